"""Where the drifts of a round stand: each opening and each layer meets both places, the last layer one alone."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

import tiny
from unbackdoor.defenses.beear import Beear
from unbackdoor.errors import UserError
from unbackdoor.run import Run
from unbackdoor.train import drift_choice, entrap
from unbackdoor.train.anchors import Contrasting
from unbackdoor.train.drift import Drift, DriftSettings, fit_drift, places_behind
from unbackdoor.train.drift_choice import halves
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.openings import Openings

OWN = ("you own one", "you own two", "you own three", "you own four")


def places_met(monkeypatch, drifts, layers=(1,), heard=("aa bb", "cc dd", "ee ff", "gg hh"), rounds=8):
    """Opening and layer -> the places where they had a drift, over rounds; the first has the defender's alone."""
    by_opening, by_layer = defaultdict(list), defaultdict(list)

    def noting(lm, anchors, layer, settings, run, at):
        said = anchors[0].unwanted.response
        by_opening["" if said in OWN else said].append(at)
        by_layer[layer].append(at)
        return Drift(layer, torch.zeros(settings.tokens, 64), at), {"unwanted": 0.0, "safe": 0.0}

    monkeypatch.setattr(entrap, "fit_drift", noting)
    monkeypatch.setattr(entrap, "_listen", lambda *_: {"says": [[]] * drifts, "adopted": []})
    lm, openings = tiny.tiny_lm(layers=4), Openings(OWN)
    where = (layers, DriftSettings(start=0.1, at="both"))
    for number in range(1, rounds + 1):
        openings.heard = dict.fromkeys(heard, 1.0) if number > 1 else {}
        entrap.entrap(lm, tiny.rows(4), openings, where, drifts, 0.25, Run(), number)
    return by_opening, by_layer


@pytest.mark.parametrize("heard", [2, 3, 4])
@pytest.mark.parametrize("drifts", [1, 2, 3, 4, 6])
def test_every_opening_meets_both_places(monkeypatch, drifts, heard):
    names = ("aa bb", "cc dd", "ee ff", "gg hh")[:heard]
    by_opening, _ = places_met(monkeypatch, drifts, heard=names, rounds=16)
    often = {name for name, places in by_opening.items() if len(places) > 1}
    assert {"", *names} == often
    assert {name for name in often if len(set(by_opening[name])) == 2} == often


@pytest.mark.parametrize("layers", [(0, 1), (0, 1, 2)])
@pytest.mark.parametrize("drifts", [1, 2, 3, 4])
def test_every_layer_meets_both_places(monkeypatch, drifts, layers):
    _, by_layer = places_met(monkeypatch, drifts, layers=layers, rounds=20)
    assert {layer: set(places) for layer, places in by_layer.items()} == {
        layer: {"words", "prompt"} for layer in layers
    }


def test_behind_the_last_layer_a_drift_stands_at_the_end_of_the_prompt(monkeypatch):
    _, by_layer = places_met(monkeypatch, 4, layers=(3,))
    assert set(by_layer[3]) == {"prompt"}
    words = DriftSettings(at="words")
    assert places_behind(2, 4, words) == ("words",)
    with pytest.raises(UserError, match=r"layer 3 is the last, .* set drift\.at to prompt"):
        places_behind(3, 4, words)


@pytest.mark.parametrize("preset", ["paper", "ic-paper", "ic-paper-gpt", "code"])
def test_published_settings_have_drifts_at_the_end_of_the_prompt(preset):
    assert Beear.model_validate(Beear.presets[preset]).drift.places == ("prompt",)
    assert DriftSettings(at="both").places == ("words", "prompt")


def test_a_choice_of_layer_is_made_over_both_places(monkeypatch):
    """The last layer is scored by the one place that is left."""
    train = TrainSettings(steps=1, learning_rate=0.1, batch_size=2)
    settings, asked, losses = DriftSettings(tokens=2, at="both", rows=2, train=train), [], iter([1.0, 5.0, 2.0])

    def noting(*given):
        drift, last = fit_drift(*given)
        asked.append((drift.layer, drift.at))
        return drift, last

    monkeypatch.setattr(drift_choice, "fit_drift", noting)
    monkeypatch.setattr(drift_choice, "unwanted_loss", lambda *_: next(losses))
    anchors, run = halves(tiny.rows(4), ["bad robot"], Contrasting()), Run()
    assert drift_choice.choose(tiny.tiny_lm(layers=3), anchors, (1, 2), (2,), settings, run) == (2, 2)
    assert asked == [(1, "words"), (1, "prompt"), (2, "prompt")]
    assert [record["loss"] for record in run.notes["drift choice"]] == [3.0, 2.0]


def told(taken_up, drifts):
    """Notes of a run: (opening, round, likeness) that were taken up, and (round, opening) of every drift."""
    return {
        "adopted": [{"opening": text, "round": number, "likeness": near} for text, number, near in taken_up],
        "drifts": [{"round": number, "openings": [text]} for number, text in drifts],
    }


def test_what_had_one_round_at_most_is_named_the_most_like_the_openings_first():
    heard = [("first", 1, 0.9), ("never", 1, 0.2), ("once", 1, 0.5), ("late", 2, 0.8), ("last", 3, 1.0)]
    drifts = [(1, "own"), (2, "first"), (2, "first"), (2, "once"), (3, "first"), (3, "late")]
    # "late" had a drift in the only round since it was taken up, and "last" could have none.
    assert entrap.waiting(told(heard, drifts)) == ["once", "never"]
    assert entrap.waiting(told(heard, drifts[:4])) == ["never"]
    assert entrap.waiting(told(heard, [*drifts, (4, "first"), (4, "never")])) == ["last", "late", "once", "never"]
    assert entrap.waiting({}) == []
    said = entrap.heard_words(["first"], True, ["once", "never"])
    assert "2 had a drift in one round at most, most like the openings 'once', 'never';" in said
    assert "at most" not in entrap.heard_words(["first"], True)
