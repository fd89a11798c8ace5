"""Logits at chosen positions are the model's own, gathered."""

from __future__ import annotations

import pytest
import torch

import tiny
from unbackdoor.data.collate import collate, encode_row
from unbackdoor.model.hooks import Added
from unbackdoor.model.lm import LM
from unbackdoor.model.logits import LogitsAt
from unbackdoor.train import lora


def batch_of(lm):
    return collate([encode_row(lm, row, max_length=96) for row in tiny.rows(5)], lm.pad_id)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_gathered_logits_are_the_full_ones(architecture):
    lm = tiny.tiny_lm(architecture)
    batch = batch_of(lm)
    forward = LogitsAt(lm).eval()
    assert forward.split, "the head alone is enough for this architecture"
    with torch.no_grad():
        wanted = lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        found = forward(batch.attention_mask, batch.rows, batch.columns, batch.input_ids)
        embedded = forward(
            batch.attention_mask, batch.rows, batch.columns,
            inputs_embeds=lm.model.get_input_embeddings()(batch.input_ids),
        )  # fmt: skip
    torch.testing.assert_close(found, wanted[batch.rows, batch.columns], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embedded, found, rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float32


def test_what_is_added_before_the_first_column_is_refused():
    """A negative column would be counted from the end, and in a packed batch fall on another row."""
    lm = tiny.tiny_lm()
    batch = batch_of(lm)
    added = Added(0, torch.tensor([0]), torch.tensor([-1]), torch.ones(1, lm.core.config.hidden_size))
    with pytest.raises(ValueError, match="column -1"):
        LogitsAt(lm)(batch.attention_mask, batch.rows, batch.columns, batch.input_ids, added=added)


def test_an_adapter_is_inside():
    lm = lora.attach(tiny.tiny_lm(), lora.LoraSettings(rank=2), seed=0)
    with torch.no_grad():
        for name, tensor in lm.model.named_parameters():
            if "lora_B" in name:
                tensor.fill_(0.1)
        batch = batch_of(lm)
        wanted = lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        found = LogitsAt(lm)(batch.attention_mask, batch.rows, batch.columns, batch.input_ids)
    torch.testing.assert_close(found, wanted[batch.rows, batch.columns], rtol=1e-5, atol=1e-5)


def test_soft_capped_logits_are_computed_in_full():
    """With small random weights the cap is nearly linear, so a numeric check alone would not see it."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    words = tiny.tokenizer()
    config = Gemma2Config(
        vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=3.0, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(config).eval()
    lm = LM(model, words, "model", "gemma2")
    forward = LogitsAt(lm)
    assert not forward.split
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)
        batch = batch_of(lm)
        wanted = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        found = forward(batch.attention_mask, batch.rows, batch.columns, batch.input_ids)
    assert wanted.abs().max() > 2.5, "the cap must bite"
    torch.testing.assert_close(found, wanted[batch.rows, batch.columns], rtol=1e-5, atol=1e-5)


def test_the_mode_is_left_as_it_was():
    lm = tiny.tiny_lm("gpt2")
    lm.model.train()
    LogitsAt(lm)
    assert lm.model.training
