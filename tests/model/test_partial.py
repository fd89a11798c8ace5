"""The short way through a model against the whole model: logits and gradients, for every architecture."""

from __future__ import annotations

import pytest
import torch

import tiny
from unbackdoor.model.anatomy import decoder_layers
from unbackdoor.model.generate import left_pad
from unbackdoor.model.hooks import Added, adding
from unbackdoor.model.partial import Partial

LENGTHS = (9, 14, 5, 14)
ANSWER = 6
TOKENS = 4


def rows_of(lm):
    """Prompts of unlike length, padded on the left, with answers of unlike length behind them."""
    generator = torch.Generator().manual_seed(2)
    vocabulary = lm.core.config.vocab_size
    prompts = [torch.randint(4, vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]
    ids, mask = left_pad(prompts, lm.pad_id)
    answers = torch.randint(4, vocabulary, (len(LENGTHS), ANSWER), generator=generator)
    ids, mask = torch.cat([ids, answers], 1), torch.cat([mask, torch.ones_like(answers)], 1)
    mask[1, -2:] = 0
    return ids, mask


def added_to(lm, layer, start, requires_grad=False):
    rows = torch.arange(len(LENGTHS)).repeat_interleave(TOKENS)
    columns = start + torch.arange(TOKENS).repeat(len(LENGTHS))
    hidden = lm.core.config.hidden_size
    vectors = torch.randn(len(rows), hidden, generator=torch.Generator().manual_seed(3)).requires_grad_(requires_grad)
    return Added(layer, rows, columns, vectors)


@pytest.mark.parametrize(("architecture", "window"), [*((name, None) for name in tiny.ARCHITECTURES), ("mistral", 8)])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_short_way_gives_what_the_whole_model_gives(architecture, window, layer):
    lm = tiny.tiny_lm(architecture, layers=3)
    if window is not None:
        lm.core.config.sliding_window = window
    ids, mask = rows_of(lm)
    start = max(LENGTHS) - TOKENS
    short = Partial(lm.core, layer, ids, mask, start)
    assert short.exact
    added = added_to(lm, layer, start, requires_grad=True)
    rows, columns = mask[:, start:].nonzero(as_tuple=True)
    columns = columns + start
    found = short(added, rows, columns)
    with adding(lm.core, added):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        wanted = lm.core(input_ids=ids, attention_mask=mask, position_ids=positions).logits[rows, columns]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
    (short_way,) = torch.autograd.grad((found * weights).sum(), added.vectors)
    (whole,) = torch.autograd.grad((wanted * weights).sum(), added.vectors)
    torch.testing.assert_close(short_way, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
    # Again, after the first call: nothing that was kept has grown or moved.
    torch.testing.assert_close(short(added, rows, columns), found, rtol=0, atol=0)
    assert not any("forward" in vars(module) for module in decoder_layers(lm.core))


def test_a_window_shorter_than_the_rows_matters():
    lm = tiny.tiny_lm("mistral", layers=3)
    lm.core.config.sliding_window = 8
    ids, mask = rows_of(lm)
    start = max(LENGTHS) - TOKENS
    short = Partial(lm.core, 1, ids, mask, start)
    wide = tiny.tiny_lm("mistral", layers=3)
    added = added_to(lm, 1, start)
    rows, columns = torch.tensor([1]), torch.tensor([max(LENGTHS) + 2])
    other = Partial(wide.core, 1, ids, mask, start)(added, rows, columns)
    assert not torch.allclose(short(added, rows, columns), other, atol=1e-4), "the window must matter here"


def test_nothing_before_the_first_column():
    lm = tiny.tiny_lm(layers=2)
    ids, mask = rows_of(lm)
    ids, mask = ids[1:2], mask[1:2]
    short = Partial(lm.core, 0, ids, mask, 0)
    assert short.exact
    added = Added(0, torch.tensor([0]), torch.tensor([3]), torch.ones(1, 64))
    rows, columns = torch.zeros(2, dtype=torch.long), torch.tensor([2, 5])
    with adding(lm.core, added):
        wanted = lm.core(input_ids=ids, attention_mask=mask).logits[0, [2, 5]]
    torch.testing.assert_close(short(added, rows, columns), wanted, rtol=1e-5, atol=1e-5)


def test_a_model_that_cannot_be_run_so_is_run_whole(monkeypatch):
    lm = tiny.tiny_lm(layers=3)
    ids, mask = rows_of(lm)
    start = max(LENGTHS) - TOKENS
    monkeypatch.setattr(Partial, "_rest", lambda self: {"no_such_argument": 1})
    short = Partial(lm.core, 1, ids, mask, start)
    assert not short.exact
    added = added_to(lm, 1, start)
    rows, columns = torch.tensor([0, 2]), torch.tensor([16, 17])
    with adding(lm.core, added):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        wanted = lm.core(input_ids=ids, attention_mask=mask, position_ids=positions).logits[rows, columns]
    torch.testing.assert_close(short(added, rows, columns), wanted, rtol=1e-5, atol=1e-5)


def whole(lm, ids, mask, added, rows, columns):
    with adding(lm.core, added):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return lm.core(input_ids=ids, attention_mask=mask, position_ids=positions).logits[rows, columns]


def test_a_comparison_that_fails_is_no_proof(monkeypatch):
    """A layer above l refuses a cache: reading goes well, the pass over what is left does not."""
    lm = tiny.tiny_lm(layers=3)
    ids, mask = rows_of(lm)
    start = max(LENGTHS) - TOKENS
    monkeypatch.setattr(Partial, "_logits", lambda self, given, *rest: (_ for _ in ()).throw(ValueError("no cache")))
    short = Partial(lm.core, 1, ids, mask, start)
    monkeypatch.undo()
    assert not short.exact
    added = added_to(lm, 1, start)
    rows, columns = torch.tensor([0, 2]), torch.tensor([16, 17])
    wanted = whole(lm, ids, mask, added, rows, columns)
    torch.testing.assert_close(short(added, rows, columns), wanted, rtol=1e-5, atol=1e-5)


def test_states_that_a_pass_changes_in_place_are_not_kept():
    """LFM2 has convolutions, whose states in the cache a pass overwrites: a second one would begin elsewhere."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention", "conv", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    core = Lfm2ForCausalLM(config).eval()
    ids = torch.randint(4, 300, (2, 16), generator=torch.Generator().manual_seed(1))
    short = Partial(core, 1, ids, torch.ones_like(ids), 10)
    assert not short.exact
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    added = Added(1, torch.arange(2), torch.tensor([10, 10]), vectors)
    rows, columns = torch.tensor([0, 1]), torch.tensor([15, 15])
    with torch.no_grad():
        first, second = short(added, rows, columns), short(added, rows, columns)
        with adding(core, added):
            wanted = core(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[rows, columns]
    torch.testing.assert_close(first, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_added_vectors_move_logits_from_their_column_on_and_no_others(architecture):
    lm = tiny.tiny_lm(architecture, layers=3)
    ids, mask = rows_of(lm)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        plain = lm.core(**given).logits
        start = max(LENGTHS) - TOKENS
        with adding(lm.core, added_to(lm, 1, start)):
            moved = lm.core(**given).logits
        after = lm.core(**given).logits
    assert torch.equal(plain[:, :start][mask[:, :start].bool()], moved[:, :start][mask[:, :start].bool()])
    assert not torch.allclose(plain[:, start:], moved[:, start:], atol=1e-3)
    assert torch.equal(plain, after), "no hook is left"
    nothing = Added(1, torch.tensor([0]), torch.tensor([start]), torch.zeros(1, plain.shape[-1])[:, :64])
    with torch.no_grad(), adding(lm.core, nothing):
        assert torch.equal(plain, lm.core(**given).logits), "a null perturbation changes no logit"


def test_no_memory_left_says_nothing_about_the_model(monkeypatch):
    def full(self):
        raise torch.OutOfMemoryError("no memory left")

    lm = tiny.tiny_lm(layers=3)
    ids, mask = rows_of(lm)
    monkeypatch.setattr(Partial, "_read", full)
    with pytest.raises(torch.OutOfMemoryError):
        Partial(lm.core, 1, ids, mask, max(LENGTHS) - TOKENS)


def test_layers_are_counted_from_0():
    lm = tiny.tiny_lm(layers=3)
    ids = torch.tensor([[5, 6, 7]])
    states = lm.core(input_ids=ids, output_hidden_states=True).hidden_states
    kept = []
    handle = decoder_layers(lm.core)[1].register_forward_hook(lambda module, inputs, output: kept.append(output))
    lm.core(input_ids=ids)
    handle.remove()
    # transformers counts the embeddings as state 0.
    assert torch.equal(kept[0], states[2])
    with adding(lm.core, Added(1, torch.tensor([0]), torch.tensor([2]), torch.full((1, 64), 9.0))):
        shifted = lm.core(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(shifted[1], states[1])


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_what_was_read_of_prompts_serves_other_answers_to_them(architecture, monkeypatch):
    lm = tiny.tiny_lm(architecture, layers=3)
    ids, mask = rows_of(lm)
    start = max(LENGTHS) - TOKENS
    first = Partial(lm.core, 1, ids, mask, start)
    width = max(LENGTHS)
    answers = torch.randint(4, lm.core.config.vocab_size, (len(LENGTHS), 2), generator=torch.Generator().manual_seed(5))
    other, seen = torch.cat([ids[:, :width], answers], 1), torch.cat([mask[:, :width], torch.ones_like(answers)], 1)
    added = added_to(lm, 1, start)
    rows, columns = seen[:, start:].nonzero(as_tuple=True)
    wanted = Partial(lm.core, 1, other, seen, start)(added, rows, columns + start)
    lengths = []
    real = type(lm.core.base_model).forward
    monkeypatch.setattr(
        type(lm.core.base_model), "forward",
        lambda self, *given, **named: lengths.append(named["input_ids"].shape[1]) or real(self, *given, **named),
    )  # fmt: skip
    second = Partial(lm.core, 1, other, seen, start, trusted=True, beside=first)
    assert lengths == [TOKENS + 2], "the prompts are not read again"
    assert torch.equal(second(added, rows, columns + start), wanted)
    unlike = other.clone()
    unlike[0, start - 1] += 1
    third = Partial(lm.core, 1, unlike, seen, start, trusted=True, beside=first)
    assert not torch.allclose(third(added, rows, columns + start), wanted, atol=1e-4), "other prompts are read"
