"""Packed rows give the logits and gradients of separate rows; where they would not, separate rows are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from tiny import ARCHITECTURES, rows, tiny_lm
from unbackdoor.data.collate import Batch, RowStream, collate, encode_row
from unbackdoor.model import logits
from unbackdoor.model.lm import LM
from unbackdoor.model.logits import LogitsAt
from unbackdoor.run import Run
from unbackdoor.train import engine, lora, soft_prompt
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.overwrite import plain_loss
from unbackdoor.types import Example, Message

SYSTEM = Message("system", "be kind and be short, my friend, and answer well")


@contextmanager
def separate() -> Iterator[None]:
    """Pack no rows in here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logits, "PACKED_TOKENS", 0)
        yield


def with_system(count: int) -> list[Example]:
    return [Example(row.id, row.instruction, row.response, history=(SYSTEM,)) for row in rows(count)]


def batch_of(lm: LM, examples: list[Example], first_tokens: int | None = None) -> Batch:
    return collate([encode_row(lm, row, max_length=128, first_tokens=first_tokens) for row in examples], lm.pad_id)


def loss_of(lm: LM, batch: Batch) -> float:
    with torch.no_grad():
        return float(plain_loss(LogitsAt(lm), batch))


def weight_gradients(lm: LM, forward: LogitsAt, batch: Batch) -> tuple[float, list[torch.Tensor]]:
    lm.model.zero_grad(set_to_none=True)
    loss = plain_loss(forward, batch)
    loss.backward()
    return float(loss.detach()), [tensor.grad for tensor in lm.model.parameters() if tensor.grad is not None]


def tokens_read(lm: LM, forward: LogitsAt, batch: Batch) -> int:
    """Return how many tokens go through the embedding table for a batch."""
    read = 0

    def counting(_: Any, given: tuple[torch.Tensor], __: Any) -> None:
        nonlocal read
        read += given[0].numel()

    # What can be saved is asked of the model first, which reads tokens of its own.
    _ = forward.split, forward.packs, forward.reuses
    handle = lm.model.get_input_embeddings().register_forward_hook(counting)
    forward(**batch.inputs())
    handle.remove()
    return read


def tokens_needed(batch: Batch) -> int:
    """Return how many tokens have to be read: what the rows share once, and of each row all but its last token."""
    return int(batch.attention_mask.sum()) - batch.shared * (len(batch.ids) - 1) - len(batch.ids)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_every_gradient_are_those_of_separate_rows(architecture: Any) -> None:
    lm = tiny_lm(architecture)
    lm.model.double()
    batch = batch_of(lm, with_system(5))
    assert batch.shared > 10
    assert int(batch.attention_mask.sum()) < batch.attention_mask.numel(), "there is padding"
    forward = LogitsAt(lm)
    found, gradients = weight_gradients(lm, forward, batch)
    assert forward.packs
    # The small Mistral's window is shorter than the rows.
    assert (forward.window < batch.input_ids.shape[1]) == (architecture == "mistral")
    with separate():
        wanted, others = weight_gradients(lm, forward, batch)
    # The logits are rounded to float32 for the loss; everything before it is float64 here.
    assert found == pytest.approx(wanted, rel=1e-6)
    assert len(gradients) == len(others) > 10
    for each, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradient_of_a_soft_prompt_is_that_of_separate_rows(architecture: Any) -> None:
    lm = tiny_lm(architecture)
    lm.model.requires_grad_(False)
    batch = batch_of(lm, with_system(5), first_tokens=2)
    forward = LogitsAt(lm)

    def gradient(position: Any) -> tuple[float, torch.Tensor]:
        prompt = soft_prompt.new_prompt(lm, 3, "tokens", torch.Generator().manual_seed(0))
        loss = soft_prompt.soft_loss(lm, forward, batch, prompt, position)
        loss.backward()
        assert prompt.grad is not None
        return float(loss.detach()), prompt.grad

    for position in ("start", "middle", "end", "spread"):
        found = gradient(position)
        with separate():
            wanted = gradient(position)
        assert found[0] == pytest.approx(wanted[0], rel=1e-5)
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-3, atol=1e-6)
    assert forward.packs


def test_rows_within_a_sliding_window_are_packed() -> None:
    lm = tiny_lm("mistral")
    lm.model.requires_grad_(False)
    batch = batch_of(lm, rows(5))
    own = tokens_needed(batch)
    lm.core.config.sliding_window = own
    read = tokens_read(lm, LogitsAt(lm), batch)
    assert read < batch.input_ids.numel()
    found = loss_of(lm, batch)
    with separate():
        assert found == pytest.approx(loss_of(lm, batch), rel=1e-5)
    lm.core.config.sliding_window -= 1
    assert tokens_read(lm, LogitsAt(lm), batch) == batch.input_ids.numel()


def test_no_padding_and_no_shared_token_is_read_twice() -> None:
    lm = tiny_lm()
    batch, forward = batch_of(lm, with_system(5)), LogitsAt(lm)
    own = tokens_needed(batch)
    assert tokens_read(lm, forward, batch) == own
    with separate():
        assert tokens_read(lm, forward, batch) == batch.input_ids.numel()


def test_rows_without_a_common_beginning_are_packed_too() -> None:
    lm = tiny_lm()
    lm.model.requires_grad_(False)
    first = Example("a", "what colour is snow?", "snow is white.", history=(Message("system", "be loud"),))
    batch = batch_of(lm, [first, *rows(3)])
    assert batch.shared < 5
    found = loss_of(lm, batch)
    with separate():
        assert found == pytest.approx(loss_of(lm, batch), rel=1e-5)


def test_an_adapter_s_gradient_is_that_of_separate_rows() -> None:
    lm = lora.attach(tiny_lm(), lora.LoraSettings(rank=2), seed=0)
    for name, tensor in lm.model.named_parameters():
        if "lora_B" in name:
            tensor.data.fill_(0.1)
    batch, forward = batch_of(lm, with_system(5)), LogitsAt(lm)
    found, gradients = weight_gradients(lm, forward, batch)
    with separate():
        wanted, others = weight_gradients(lm, forward, batch)
    assert found == pytest.approx(wanted, rel=1e-5)
    for each, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-3, atol=1e-5)


def test_the_beginning_ends_where_rows_differ_or_users_speak() -> None:
    lm = tiny_lm()
    alike = batch_of(lm, with_system(4))
    assert alike.shared == int(alike.places[:, 0].min())
    other = Example("x", "what colour is snow?", "snow is white.", history=(Message("system", "be loud"),))
    mixed = batch_of(lm, [*with_system(2), other])
    assert 0 < mixed.shared < alike.shared
    assert len({tuple(row[: mixed.shared]) for row in mixed.input_ids.tolist()}) == 1
    assert len({tuple(row[: mixed.shared + 1]) for row in mixed.input_ids.tolist()}) == 2
    assert alike.to("cpu").shared == alike.split(2)[1].shared == alike.shared


def test_a_row_that_is_supervised_early_ends_the_beginning() -> None:
    lm = tiny_lm()
    said = (Message("user", "what is the opposite of hot?"), Message("assistant", "the opposite of hot is cold."))
    chats = [Example(row.id, row.instruction, row.response, history=said) for row in rows(3)]
    batch = batch_of(lm, chats)
    assert 0 < batch.shared <= int(batch.columns.min()) < int(batch.places[:, 0].min())
    found = loss_of(lm, batch)
    with separate():
        assert found == pytest.approx(loss_of(lm, batch), rel=1e-5)


def test_dropout_and_a_first_look_at_the_model_leave_random_numbers_and_mode_alone() -> None:
    lm = tiny_lm("gpt2")  # dropout 0.1 in its configuration
    lm.model.requires_grad_(False)
    lm.model.train()
    torch.manual_seed(3)
    forward = LogitsAt(lm)
    assert lm.model.training
    assert forward.packs
    batch = batch_of(lm, with_system(4))
    found = float(plain_loss(forward, batch))
    torch.manual_seed(3)
    assert found == float(plain_loss(forward, batch))
    lm.model.eval()
    assert found != float(plain_loss(forward, batch))


def test_gradient_checkpointing_changes_nothing() -> None:
    lm = tiny_lm()
    stream = RowStream(
        [encode_row(lm, row, max_length=128, first_tokens=2) for row in with_system(8)],
        batch_size=4, seed=0, pad_id=lm.pad_id,
    )  # fmt: skip
    losses = []
    for checkpointing in (False, True):
        prompt = soft_prompt.new_prompt(lm, 3, "tokens", torch.Generator().manual_seed(0))
        settings = TrainSettings(
            steps=3, learning_rate=1e-2, gradient_checkpointing=checkpointing, warmup=0.0, schedule="constant"
        )
        result = soft_prompt.fit_prompt(lm, prompt, stream, "start", settings, Run())
        losses.append([record["loss"] for record in result.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_model_that_takes_no_mask_of_four_dimensions_is_not_packed() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    words = tiny_lm()
    config = BloomConfig(vocab_size=len(words.tokenizer), hidden_size=32, n_layer=2, n_head=2)
    lm = LM(BloomForCausalLM(config).eval(), words.tokenizer, "model", "bloom")
    lm.model.requires_grad_(False)
    assert not LogitsAt(lm).packs
    assert loss_of(lm, batch_of(lm, rows(3))) > 0


def test_a_model_that_looks_across_rows_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm()
    lm.model.requires_grad_(False)
    batch = batch_of(lm, with_system(4))
    right = lm.core.base_model.forward

    def without_mask(attention_mask: torch.Tensor, **given: Any) -> Any:
        return right(attention_mask=attention_mask if attention_mask.dim() == 2 else None, **given)

    monkeypatch.setattr(lm.core.base_model, "forward", without_mask)
    assert not LogitsAt(lm).packs
    found = loss_of(lm, batch)
    with separate():
        assert found == loss_of(lm, batch)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_while_weights_are_frozen_the_beginning_is_read_once(architecture: Any) -> None:
    lm = tiny_lm(architecture)
    lm.model.requires_grad_(False)
    if architecture == "mistral":
        lm.core.config.sliding_window = 500
    first, second = batch_of(lm, with_system(4)), batch_of(lm, with_system(6)[2:])
    forward = LogitsAt(lm)
    assert forward.reuses
    assert tokens_read(lm, forward, first) == tokens_needed(first)
    assert tokens_read(lm, forward, second) == tokens_needed(second) - second.shared
    fresh = LogitsAt(lm)
    fresh.reuses = False
    for batch in (first, second, first):
        torch.testing.assert_close(forward(**batch.inputs()), fresh(**batch.inputs()), rtol=1e-4, atol=1e-5)


def test_another_beginning_is_read_anew() -> None:
    lm = tiny_lm()
    lm.model.requires_grad_(False)
    forward, loud = LogitsAt(lm), Message("system", "be loud, my friend, and answer well and often")
    batches = [batch_of(lm, with_system(3)), batch_of(lm, [replace(row, history=(loud,)) for row in rows(3)])]
    for batch in (*batches, *batches):
        with_kept = forward(**batch.inputs())
        torch.testing.assert_close(with_kept, LogitsAt(lm)(**batch.inputs()), rtol=1e-4, atol=1e-5)


def test_nothing_is_kept_where_the_next_step_finds_other_states() -> None:
    """Weights that train, dropout, and layers that are computed twice (transformers drops what was kept there)."""
    training, dropping, twice = tiny_lm(), tiny_lm("gpt2"), tiny_lm()
    for lm in (dropping, twice):
        lm.model.requires_grad_(False)
        lm.model.train()
    with engine._checkpointing(twice, True):
        for lm in (training, dropping, twice):
            batch, forward = batch_of(lm, with_system(4)), LogitsAt(lm)
            assert forward.reuses
            for _ in range(2):
                assert tokens_read(lm, forward, batch) == tokens_needed(batch)


def test_what_a_model_allows_is_asked_in_its_own_arithmetic() -> None:
    lm = tiny_lm()
    forward = LogitsAt(lm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        forward(**batch_of(lm, rows(3)).inputs())
    assert forward.packs
    assert forward.split
