"""The drift and its fit: equation 2 by hand in float64, both answers the short way, where it is added, what it says."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

import tiny
from unbackdoor.data.collate import collate, encode_row
from unbackdoor.errors import DataError
from unbackdoor.model.anatomy import decoder_layers
from unbackdoor.model.hooks import adding
from unbackdoor.model.logits import LogitsAt
from unbackdoor.model.partial import Partial
from unbackdoor.run import Run
from unbackdoor.train import drift as drifts
from unbackdoor.train import two_answers
from unbackdoor.train.anchors import Anchor, with_unwanted
from unbackdoor.train.drift import Drift, DriftSettings, fit_drift
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.two_answers import TwoAnswers, added_at_ends
from unbackdoor.types import Example

SETTINGS = DriftSettings(
    tokens=3,
    rows=4,
    safe_cap=20.0,
    train=TrainSettings(steps=3, learning_rate=0.1, schedule="constant", warmup=0.0, batch_size=2),
)


def anchors(count=4):
    rows = tiny.rows(count)
    return with_unwanted(rows, ["bad robot", "bad"])


def drift_end(row, at):
    """The column behind a drift: where the answer begins, or the user's words end."""
    return row.place[1] if at == "words" else row.supervised[0]


@pytest.mark.parametrize("at", ["words", "prompt"])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_short_way_gives_both_losses_of_equation_2(architecture, together, at, monkeypatch):
    lm = tiny.tiny_lm(architecture, chat=architecture != "gpt2", layers=3)
    if not together:
        monkeypatch.setattr(Partial, "_who_sees_whom", lambda self, end, second: self.mask)
    pairs = [drifts.encode_anchor(lm, anchor, 128, 3) for anchor in anchors()]
    unwanted, safe = (collate([pair[which] for pair in pairs], lm.pad_id) for which in (0, 1))
    vectors = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    short = TwoAnswers(lm, 1, 3, at)
    found = short.sums(vectors, unwanted, safe)
    assert (short.together, short.whole) == (together, False)
    for total, rows in zip(found, zip(*pairs, strict=True), strict=True):
        by_hand = 0.0
        for row in rows:
            end = drift_end(row, at)
            ids = torch.tensor([row.ids])
            there = added_at_ends(1, vectors, torch.tensor([end]))
            assert there.columns.tolist() == [end - 3, end - 2, end - 1]
            with torch.no_grad(), adding(lm.core, there):
                logits = lm.core(input_ids=ids).logits[0].double()
            for position in row.supervised:
                by_hand -= float(functional.log_softmax(logits[position - 1], -1)[row.ids[position]])
        assert float(total.detach()) == pytest.approx(by_hand, rel=1e-5)


def test_the_fit_goes_down_and_leaves_the_weights_alone():
    lm = tiny.tiny_lm(layers=3)
    before = tiny.tensors(lm)
    run = Run(0)
    found, last = fit_drift(lm, anchors(), 1, SETTINGS, run.stage("fit"))
    curve = [record["loss"] for record in run.curves["fit"]]
    assert curve[-1] < curve[0]
    assert tiny.same_weights(before, tiny.tensors(lm))
    assert found.vectors.shape == (3, 64)
    assert set(last) == {"unwanted", "safe"}
    again, _ = fit_drift(lm, anchors(), 1, SETTINGS, Run(0).stage("fit"))
    assert torch.equal(found.vectors, again.vectors)


def test_the_fit_ends_once_the_unwanted_answers_are_likely_enough():
    lm, whole, ended = tiny.tiny_lm(layers=3), Run(), Run()
    how = SETTINGS.model_copy(update={"train": SETTINGS.train.model_copy(update={"steps": 8})})
    fit_drift(lm, anchors(), 1, how, whole.stage("fit"))
    unwanted, loss = ([record[name] for record in whole.curves["fit"]] for name in ("unwanted", "loss"))
    threshold = unwanted[4] + 1e-6
    # The whole loss, of which the safe term is a part, is below that from the first step on.
    assert loss[0] < threshold < min(unwanted[:4])
    _, last = fit_drift(lm, anchors(), 1, how.model_copy(update={"stop_below": threshold}), ended.stage("fit"))
    assert len(ended.curves["fit"]) == 5
    assert last["unwanted"] == unwanted[4]


def test_the_cap_ends_the_pull_of_the_safe_term():
    lm = tiny.tiny_lm(layers=3)
    capped = SETTINGS.model_copy(update={"safe_cap": 1e-9})
    without = SETTINGS.model_copy(update={"safe_coefficient": 0.0})
    first, _ = fit_drift(lm, anchors(), 1, capped, Run(0))
    second, last = fit_drift(lm, anchors(), 1, without, Run(0))
    third, _ = fit_drift(lm, anchors(), 1, SETTINGS, Run(0))
    assert torch.equal(first.vectors, second.vectors)
    assert not torch.equal(first.vectors, third.vectors)
    assert math.isnan(last["safe"])


def test_the_first_tokens_of_the_safe_answer_can_be_all_that_counts():
    lm = tiny.tiny_lm(layers=3)
    anchor = anchors(1)[0]
    whole, short = (drifts.encode_anchor(lm, anchor, 128, 3, tokens)[1] for tokens in (None, 2))
    assert whole.supervised[:2] == short.supervised
    assert len(whole.supervised) > 2
    assert drifts.encode_anchor(lm, anchor, 128, 3, 2)[0] == drifts.encode_anchor(lm, anchor, 128, 3)[0]


def test_without_a_cap_the_safe_term_pulls_on():
    lm = tiny.tiny_lm(layers=3)
    low = SETTINGS.model_copy(update={"safe_cap": 1e-9})
    none = SETTINGS.model_copy(update={"safe_cap": None})
    high = SETTINGS.model_copy(update={"safe_cap": 1e9})
    found = [fit_drift(lm, anchors(), 1, settings, Run(0))[0].vectors for settings in (low, none, high)]
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("at", ["words", "prompt"])
def test_the_drift_of_a_pass_for_weights_is_that_of_the_fit(at):
    lm = tiny.tiny_lm(layers=3)
    pairs = [drifts.encode_anchor(lm, anchor, 128, 3) for anchor in anchors()]
    safe = collate([pair[1] for pair in pairs], lm.pad_id)
    unwanted = collate([pair[0] for pair in pairs], lm.pad_id)
    drift = Drift(1, torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), at)
    forward = LogitsAt(lm)
    assert forward.packs
    logits = drift.stand_in()(forward, safe)
    total = functional.cross_entropy(logits, safe.targets, reduction="sum")
    _, wanted = TwoAnswers(lm, 1, 3, at).sums(drift.vectors, unwanted, safe)
    assert float(total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    nothing = Drift(1, torch.zeros(3, 64), at).stand_in()(forward, safe)
    torch.testing.assert_close(nothing, forward(**safe.inputs()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("at", ["words", "prompt"])
def test_the_unit_is_the_root_mean_square_there(at):
    lm = tiny.tiny_lm(layers=3)
    row = drifts.encode_anchor(lm, anchors(1)[0], 128, 3)[1]
    states = lm.core(input_ids=torch.tensor([row.ids]), output_hidden_states=True).hidden_states[2]
    end = drift_end(row, at)
    wanted = float(states[0, end - 3 : end].detach().pow(2).mean().sqrt())
    assert drifts.layer_unit(lm, 1, [row], 3, at) == pytest.approx(wanted, rel=1e-5)


def one_token_at_a_time(lm, drift, example, count):
    """What `spoken` must give: whole passes without a cache, one prompt at a time."""
    asked = lm.encode(example.prompt, ask=True)
    ids = list(asked.ids)
    end = torch.tensor([asked.spans[-1].end if drift.at == "words" else len(ids)])
    for _ in range(count):
        with torch.no_grad(), adding(lm.core, drift.added(end)):
            ids.append(int(lm.core(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(asked.ids) :]


@pytest.mark.parametrize("at", ["words", "prompt"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_is_said_under_a_drift_and_without(architecture, at):
    lm = tiny.tiny_lm(architecture, layers=3)
    prompts = [*tiny.rows(2), Example("long", "Say something about rivers and boats, please", "b")]
    found = drifts.spoken(lm, None, prompts, 4)
    plain = found.ids
    nothing = drifts.spoken(lm, Drift(1, torch.zeros(3, 64)), prompts, 4)
    assert plain == nothing.ids
    assert torch.allclose(found.first, nothing.first, atol=1e-6)
    asked = [lm.encode(example.prompt, ask=True).ids for example in prompts]
    with torch.no_grad():
        last = torch.stack([lm.core(input_ids=torch.tensor([ids])).logits[0, -1] for ids in asked])
    assert torch.allclose(found.first, last.softmax(-1).mean(0), atol=1e-6)
    replies = lm.reply([example.prompt for example in prompts], max_new_tokens=4)
    assert [lm.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in plain] == replies
    loud = Drift(1, 5 * torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), at)
    under = drifts.spoken(lm, loud, prompts, 4)
    said = under.ids
    assert said != plain
    assert not torch.allclose(under.first, found.first, atol=1e-4)
    assert said == [one_token_at_a_time(lm, loud, example, 4) for example in prompts]


def test_what_is_said_ends_where_a_reply_ends(monkeypatch):
    lm = tiny.tiny_lm(layers=3)
    whole = drifts.spoken(lm, None, tiny.rows(1), 4).ids[0]
    monkeypatch.setattr(type(lm), "stop_ids", (whole[2],))
    assert drifts.spoken(lm, None, tiny.rows(1), 4).ids == [whole[: whole.index(whole[2])]]


def test_a_prompt_shorter_than_the_drift_is_refused():
    lm = tiny.tiny_lm(chat=False)
    anchor = Anchor(Example("short", "a", "b"), Example("short", "a", "c"))
    with pytest.raises(DataError, match=r"'short' has .* tokens, but the drift 400"):
        drifts.encode_anchor(lm, anchor, 128, 400)
    asked = lm.encode(anchor.safe.prompt, ask=True)
    words = asked.spans[-1].end
    assert words < len(asked.ids), "the template goes on behind the words"
    drifts.encode_anchor(lm, anchor, 128, len(asked.ids))
    drifts.encode_anchor(lm, anchor, 128, words, at="words")
    with pytest.raises(DataError, match=rf"has {words} tokens up to its last word, but the drift {words + 1}"):
        drifts.encode_anchor(lm, anchor, 128, words + 1, at="words")


@pytest.mark.parametrize("at", ["words", "prompt"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_drift_changes_what_is_at_and_behind_the_last_n_tokens(architecture, at):
    lm = tiny.tiny_lm(architecture, chat=architecture != "gpt2", layers=3)
    row = drifts.encode_anchor(lm, anchors(1)[0], 128, 3)[1]
    end = drift_end(row, at)
    ids = torch.tensor([row.ids])
    drift = Drift(1, torch.randn(3, 64, generator=torch.Generator().manual_seed(1)))
    # Layers are counted from 0: what layer 1 gives is what layer 2 is given.
    given = {1: [], 2: []}
    for number, found in given.items():
        decoder_layers(lm.core)[number].register_forward_pre_hook(
            lambda _, inputs, found=found: found.append(inputs[0])
        )
    with torch.no_grad():
        before = lm.core(input_ids=ids).logits[0]
        with adding(lm.core, drift.added(torch.tensor([end]))):
            after = lm.core(input_ids=ids).logits[0]
    moved = (before - after).abs().amax(-1)
    assert float(moved[: end - 3].max()) == 0.0
    assert float(moved[end - 3 :].min()) > 0.0
    assert torch.equal(given[1][0], given[1][1])
    shift = (given[2][1] - given[2][0])[0]
    torch.testing.assert_close(shift[end - 3 : end], drift.vectors, rtol=1e-4, atol=1e-5)
    assert float(shift[: end - 3].abs().max()) == float(shift[end:].abs().max()) == 0.0


@pytest.mark.parametrize("exact", [True, False])
def test_the_short_way_is_compared_on_the_longest_rows_and_once_where_it_is_exact(monkeypatch, exact):
    compared = []
    monkeypatch.setattr(Partial, "_is_exact", lambda self: compared.append(self.ids.shape[1]) or exact)
    lm = tiny.tiny_lm(layers=3)
    long = tiny.rows(6)
    long[2] = Example("long", f"tell me, {long[2].instruction} be short i need it now", "yes")
    found, _ = fit_drift(lm, with_unwanted(long, ["bad robot"]), 1, SETTINGS.model_copy(update={"rows": 6}), Run())
    # Both answers in one row once; where that is not exact each by itself, three batches of two.
    assert len(compared) == (1 if exact else 7), "rows that are not exact are compared again"
    assert compared[0] == max(compared)
    assert not lm.model.training
    lm.model.train()
    fit_drift(lm, with_unwanted(long, ["bad robot"]), 1, SETTINGS, Run())
    assert lm.model.training
    assert torch.isfinite(found.vectors).all()


def test_what_is_kept_has_a_limit_beyond_which_it_is_read_anew(monkeypatch):
    read = []
    whole = Partial._read
    monkeypatch.setattr(Partial, "_read", lambda self: (whole(self), read.append(self.kept_bytes()))[0])
    lm = tiny.tiny_lm(layers=3)

    def fitted(limit):
        read.clear()
        monkeypatch.setattr(two_answers, "KEPT_BYTES", limit)
        train = SETTINGS.train.model_copy(update={"steps": 9, "batch_size": 2})
        few = SETTINGS.model_copy(update={"rows": 6, "train": train})
        return fit_drift(lm, anchors(6), 1, few, Run())[0].vectors, list(read)

    usual, sizes = fitted(two_answers.KEPT_BYTES)
    assert len(sizes) == 3, "three batches, each read once"
    assert min(sizes) > 2 * 64 * 4
    vectors, again = fitted(max(sizes))
    assert len(again) == 7, "one batch fits; the others are read at each of their three turns"
    assert torch.equal(vectors, usual)


def test_rows_longer_than_the_window_have_an_answer_each():
    """The mask that keeps two answers apart would hide the window."""
    lm = tiny.tiny_lm("mistral", layers=3)
    lm.core.config.sliding_window = 24
    pairs = [drifts.encode_anchor(lm, anchor, 128, 3) for anchor in anchors()]
    assert max(len(row.ids) for pair in pairs for row in pair) > 24
    unwanted, safe = (collate([pair[which] for pair in pairs], lm.pad_id) for which in (0, 1))
    vectors = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    short = TwoAnswers(lm, 1, 3)
    found = short.sums(vectors, unwanted, safe)
    assert [len(parts) for _, _, parts in next(iter(short.kept.values()))] == [1, 1]
    for total, batch in zip(found, (unwanted, safe), strict=True):
        logits = Drift(1, vectors).stand_in()(LogitsAt(lm), batch)
        wanted = functional.cross_entropy(logits, batch.targets, reduction="sum")
        assert float(total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_drifts_behind_one_layer_share_a_pass_and_the_rows_as_they_do_apart():
    lm = tiny.tiny_lm(layers=3)
    lm.model.eval()
    batch = collate([encode_row(lm, row, max_length=128) for row in tiny.rows(5)], lm.pad_id)
    draw = torch.Generator().manual_seed(0)
    several = [drifts.Drift(1, torch.randn(3, 64, generator=draw), at) for at in ("words", "prompt", "words")]
    forward = LogitsAt(lm)
    (together,) = drifts.stand_ins(several)
    found = together(forward, batch)
    for which, (drift, part) in enumerate(zip(several, batch.split(3), strict=True)):
        alone = drift.stand_in()(forward, part)
        assert torch.allclose(found[batch.rows % 3 == which], alone, atol=1e-5)
    assert not torch.allclose(found, forward(**batch.inputs()), atol=1e-2)
    apart = [*several[:2], drifts.Drift(2, several[2].vectors)]
    assert len(drifts.stand_ins(apart)) == 3
