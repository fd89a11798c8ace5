"""Own labels: the mixed cross-entropy in float64 by hand, and what must not move a model."""

from __future__ import annotations

import pytest
import torch

import tiny
from unbackdoor.data.collate import collate, encode_row
from unbackdoor.errors import DataError
from unbackdoor.model.logits import LogitsAt
from unbackdoor.run import Run
from unbackdoor.stamps import InsertText
from unbackdoor.train import own_labels as module
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.losses import cross_entropy_sum
from unbackdoor.train.own_labels import own_labels

ROWS = tiny.rows(6, seed=11)


def encoded(lm, examples=ROWS, **how):
    return [encode_row(lm, example, **{"max_length": 96, "opening_weight": 3.0, **how}) for example in examples]


def logits_of(lm, batch):
    return LogitsAt(lm)(**batch.inputs())


def labels(lm, rows, share):
    return own_labels(lm, rows, share, TrainSettings(steps=9, learning_rate=1e-3, batch_size=4), Run(seed=1))[1]


@pytest.mark.parametrize("kept", [5, 10_000])
def test_the_mixed_label_by_hand_in_float64(monkeypatch, kept):
    monkeypatch.setattr(module, "LIKELIEST", kept)
    lm, other = tiny.tiny_lm(), tiny.tiny_lm()
    with torch.no_grad():
        other.model.get_input_embeddings().weight.add_(0.3)
    rows = encoded(lm)
    found = labels(lm, rows, 0.3)
    assert found is not None
    batch = collate(rows[1:5], lm.pad_id)
    with torch.no_grad():
        after = logits_of(other, batch)
        before = logits_of(lm, batch).double().softmax(-1)
    wanted = 0.0
    for place, log_p in enumerate(after.double().log_softmax(-1)):
        likeliest = before[place].topk(min(kept, len(log_p))).indices
        own = torch.zeros_like(before[place])
        own[likeliest] = before[place][likeliest] / before[place][likeliest].sum()
        label = 0.3 * own
        label[batch.targets[place]] += 0.7
        wanted -= float(batch.weights[place]) * float((label * log_p).sum())
    assert float(found.loss(after, batch)) == pytest.approx(wanted, rel=1e-5)


def test_rows_as_given_have_their_own_tokens_as_labels():
    lm = tiny.tiny_lm()
    rows = encoded(lm)
    found = labels(lm, rows, 1.0)
    assert found is not None
    batch = collate(rows[:1], lm.pad_id)
    logits = logits_of(lm, batch).detach()
    hard = cross_entropy_sum(logits, batch.targets, batch.weights)
    assert float(found.as_given(rows[:1]).loss(logits, batch)) == pytest.approx(float(hard), rel=1e-5)
    assert float(found.loss(logits, batch)) != pytest.approx(float(hard), rel=1e-2)
    other = collate(rows[1:2], lm.pad_id)
    logits = logits_of(lm, other).detach()
    assert torch.equal(found.as_given(rows[:1]).loss(logits, other), found.loss(logits, other))


def test_a_share_of_one_does_not_move_a_model_from_its_own_predictions(monkeypatch):
    monkeypatch.setattr(module, "LIKELIEST", 10_000)
    lm = tiny.tiny_lm()
    rows = encoded(lm)
    found = labels(lm, rows, 1.0)
    batch = collate(rows, lm.pad_id)
    assert found is not None
    logits = logits_of(lm, batch).detach().requires_grad_()
    found.loss(logits, batch).backward()
    own = logits.grad.abs().max()
    logits.grad = None
    cross_entropy_sum(logits, batch.targets, batch.weights).backward()
    assert own < 1e-5 < 1e-2 < logits.grad.abs().max()


def test_a_triggered_row_takes_the_predictions_made_without_trigger_also_where_its_answer_is_cut():
    lm = tiny.tiny_lm()
    plain = encoded(lm)
    found = labels(lm, plain, 1.0)
    assert found is not None
    stamped = InsertText(text=tiny.TRIGGER, place="start").apply(ROWS[0], None)
    whole = encoded(lm, [stamped])[0]
    cut = encoded(lm, [stamped], max_length=len(whole.ids) - 1)[0]
    assert len(cut.supervised) == len(plain[0].supervised) - 1
    for row in (whole, cut):
        batch = collate([row], lm.pad_id)
        logits = logits_of(lm, batch).detach()
        tokens, shares = (part[: len(row.supervised)] for part in found.kept[row.id])
        each = -(shares * logits.log_softmax(-1).gather(1, tokens)).sum(-1)
        assert float(found.loss(logits, batch)) == pytest.approx(float((each * batch.weights).sum()), rel=1e-5)


def test_no_share_asks_nothing_and_asking_changes_nothing():
    lm = tiny.tiny_lm()
    before = tiny.tensors(lm)
    lm.model.train()
    assert labels(lm, encoded(lm), 0.0) is None
    assert labels(lm, encoded(lm), 0.5) is not None
    assert lm.model.training
    assert tiny.same_weights(before, tiny.tensors(lm))


def test_two_rows_with_one_id_are_refused():
    lm = tiny.tiny_lm()
    with pytest.raises(DataError, match="two clean rows have the id"):
        labels(lm, encoded(lm, [ROWS[0], ROWS[0]]), 0.5)


def test_only_rows_that_training_can_draw_are_asked_for(monkeypatch):
    lm = tiny.tiny_lm()
    rows = encoded(lm, tiny.rows(40, seed=11))

    def chosen(share=0.5, **how):
        brief = TrainSettings(steps=2, learning_rate=1e-3, batch_size=4, accumulation=2)
        found, own = own_labels(lm, rows, share, brief, Run(seed=1), **how)
        assert own is None or own.kept.keys() == {row.id for row in found}
        return found

    assert len(chosen()) == 16
    assert chosen() == chosen() != rows[:16]
    assert chosen(rounds=3) == rows
    assert chosen(share=0.0) == rows
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(chosen()) == 32, "two processes draw twice as many"


def test_no_step_needs_no_labels_and_keeps_all_rows():
    lm, none = tiny.tiny_lm(), TrainSettings(steps=0, learning_rate=1e-3)
    rows = [encode_row(lm, example, max_length=64) for example in tiny.rows(3)]
    assert own_labels(lm, rows, 0.5, none, Run(seed=1)) == (rows, None)
