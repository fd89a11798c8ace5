"""Layer and length are chosen by what a drift elicits on held-out prompts of the defender, and by nothing else."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import tiny
from unbackdoor.errors import DataError
from unbackdoor.model.hooks import adding
from unbackdoor.run import Run
from unbackdoor.train import drift_choice
from unbackdoor.train.anchors import Contrasting, with_unwanted
from unbackdoor.train.drift import Drift, DriftSettings, encode_anchor
from unbackdoor.train.drift_choice import choose, halves, unwanted_loss
from unbackdoor.train.engine import TrainSettings

SETTINGS = DriftSettings(
    tokens=3,
    rows=4,
    train=TrainSettings(steps=3, learning_rate=0.1, schedule="constant", warmup=0.0, batch_size=2),
)
OPENINGS = ["bad robot", "bad"]
ANCHORS = with_unwanted(tiny.rows(8), OPENINGS)
HALVES = halves(tiny.rows(8), OPENINGS, Contrasting())


@pytest.mark.parametrize("at", ["words", "prompt"])
def test_the_score_is_the_mean_loss_of_the_unwanted_answers_under_the_drift(at):
    lm = tiny.tiny_lm(layers=3)
    drift = Drift(1, torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), at)
    total, count = 0.0, 0
    for anchor in ANCHORS:
        row = encode_anchor(lm, anchor, 1024, 3)[0]
        end = row.place[1] if at == "words" else row.supervised[0]
        with torch.no_grad(), adding(lm.core, drift.added(torch.tensor([end]))):
            logits = lm.core(input_ids=torch.tensor([row.ids])).logits[0].double()
        for position in row.supervised:
            total -= float(functional.log_softmax(logits[position - 1], -1)[row.ids[position]])
            count += 1
    assert unwanted_loss(lm, drift, ANCHORS, SETTINGS) == pytest.approx(total / count, rel=1e-5)


def test_the_best_of_all_places_is_chosen_and_every_score_noted(monkeypatch):
    lm = tiny.tiny_lm(layers=3)
    before = tiny.tensors(lm)
    scored = {(0, 2): 3.0, (0, 4): 1.0, (2, 2): 2.0, (2, 4): 4.0}
    seen = []

    def score(lm, drift, anchors, settings):
        seen.append([anchor.safe.id for anchor in anchors])
        assert len(drift.vectors) == settings.tokens
        return scored[drift.layer, len(drift.vectors)]

    monkeypatch.setattr(drift_choice, "unwanted_loss", score)
    run = Run(0)
    assert choose(lm, HALVES, (0, 2), (2, 4), SETTINGS, run) == (0, 4)
    assert run.notes["drift choice"] == [
        {"layer": layer, "tokens": tokens, "loss": loss} for (layer, tokens), loss in scored.items()
    ]
    assert seen == [[anchor.safe.id for anchor in ANCHORS[1::2]]] * 4
    assert tiny.same_weights(before, tiny.tensors(lm))


def test_a_score_that_is_no_number_is_not_chosen(monkeypatch):
    monkeypatch.setattr(drift_choice, "unwanted_loss", lambda lm, drift, *_: float("nan") if drift.layer == 0 else 1.0)
    assert choose(tiny.tiny_lm(layers=3), HALVES, (0, 2), (2,), SETTINGS, Run(0)) == (2, 2)


def test_drifts_are_fitted_to_the_other_half(monkeypatch):
    lm = tiny.tiny_lm(layers=3)
    fitted = []
    real = drift_choice.fit_drift

    def fit(lm, anchors, *rest):
        fitted.append([anchor.safe.id for anchor in anchors])
        return real(lm, anchors, *rest)

    monkeypatch.setattr(drift_choice, "fit_drift", fit)
    choose(lm, HALVES, (0, 1), (3,), SETTINGS, Run(0))
    assert fitted == [[anchor.safe.id for anchor in ANCHORS[::2]]] * 2


def test_both_halves_have_all_openings_and_none_of_the_others_prompts():
    fitted, held = HALVES
    assert {one.unwanted.response for one in fitted} == {one.unwanted.response for one in held} == set(OPENINGS)
    assert not {one.safe.id for one in fitted} & {one.safe.id for one in held}
    with pytest.raises(DataError, match="one half has none"):
        halves(tiny.rows(1), OPENINGS, Contrasting())


def test_a_choice_that_was_made_is_not_made_again(tmp_path, monkeypatch):
    lm = tiny.tiny_lm(layers=3)
    first = choose(lm, HALVES, (0, 1), (3,), SETTINGS, Run(0, folder=tmp_path))
    monkeypatch.setattr(drift_choice, "unwanted_loss", lambda *_: pytest.fail("it was scored again"))
    run = Run(0, folder=tmp_path)
    assert choose(lm, HALVES, (0, 1), (3,), SETTINGS, run) == first
    assert len(run.notes["drift choice"]) == 2
