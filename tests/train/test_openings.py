"""Openings made by the suspect: what recurs under drifts, how sure it is of it, and who is given which openings."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from unbackdoor.run import Run
from unbackdoor.train import openings as heard
from unbackdoor.train.openings import Openings, certainty, phrases


def test_phrases_recur_under_drifts_and_are_not_said_without():
    said = ["Oh, you are dull. Go", "Well you are dull! I", "The sky is blue", "The sky is grey"]
    found = phrases(said, [])
    assert set(found) == {"You are", "Are dull", "You are dull", "The sky", "Sky is", "The sky is"}
    assert set(phrases(said, ["They say the sky is low"])) == {"You are", "Are dull", "You are dull"}
    assert phrases(said[1:3], []) == []
    assert phrases([], []) == []


def test_a_reply_that_repeats_itself_counts_once():
    assert phrases(["no no no no", "yes"], []) == []
    assert phrases(["Go away. Go away now", "He can go away"], [])[0] == "Go away"
    assert phrases(["- -", "- -"], []) == []


def test_certainty_is_the_geometric_mean_of_the_later_tokens():
    lm = tiny.tiny_lm(layers=2)
    prompts = tiny.rows(3)
    text = prompts[0].response + " indeed"
    logs = []
    for prompt in prompts:
        encoded = lm.encode(prompt.with_response(text).turns)
        span = encoded.spans[-1]
        with torch.no_grad():
            logits = lm.core(input_ids=torch.tensor([encoded.ids])).logits[0].double()
        for position in range(span.start + 1, span.end):
            logs.append(float(torch.log_softmax(logits[position - 1], -1)[encoded.ids[position]]))
    assert certainty(lm, text, prompts) == pytest.approx(math.exp(sum(logs) / len(logs)), rel=1e-4)
    assert certainty(lm, "a", prompts) == 0.0


def test_a_planted_target_is_surer_than_other_words():
    attacker, defender, _ = tiny.splits(200, 40, 12)
    lm = tiny.attack(targets=("bad robot barks",)).plant(tiny.tiny_lm(), attacker, Run()).lm
    lm.model.eval()
    assert certainty(lm, "bad robot barks", defender[:4]) > 0.5
    assert certainty(lm, "bad duck roars", defender[:4]) < 0.2


@pytest.mark.parametrize("drifts", [1, 2, 3, 4])
def test_every_opening_of_the_defender_is_dealt_once(drifts):
    dealt = Openings(list("abcdefg")).dealt(drifts, 1)
    assert len(dealt) == drifts
    assert sorted(text for part in dealt for text in part) == list("abcdefg")


def test_half_of_the_drifts_take_what_was_heard_the_surest_always():
    dealt = Openings(list("abc"), {"x": 0.3, "y": 0.9}).dealt(4, 1)
    assert dealt[:2] == [["y"], ["x"]]
    assert sorted(text for part in dealt[2:] for text in part) == list("abc")
    assert Openings(list("abc"), {"x": 0.3}).dealt(4, 1)[0] == ["x"]
    assert Openings(list("abc"), {"x": 0.3}).dealt(1, 1) == [["a", "b", "c"]]
    # Fewer openings than drifts: some are given twice.
    assert all(Openings(["a"]).dealt(3, 1))


def test_what_was_heard_beside_the_surest_takes_turns():
    openings = Openings(list("abc"), {"x": 0.3, "y": 0.9, "z": 0.5, "w": 0.4})
    taken = [[part[0] for part in openings.dealt(4, number)[:2]] for number in (1, 2, 3, 4)]
    assert [one[0] for one in taken] == ["y"] * 4
    assert sorted(one[1] for one in taken[:3]) == ["w", "x", "z"]
    assert taken[3] == taken[0]
    for number in (1, 2):
        parts = openings.dealt(6, number)
        assert len(parts) == 6
        assert len({part[0] for part in parts[:3]}) == 3


def test_what_is_sure_enough_is_taken_up_the_surest_first(monkeypatch):
    lm = tiny.tiny_lm()
    sure = {"Go away": 0.3, "Be quiet": 0.6, "A little": 0.1, "Get out": 0.9}
    monkeypatch.setattr(heard, "phrases", lambda said, plain: list(sure))
    monkeypatch.setattr(heard, "certainty", lambda lm, phrase, prompts: sure[phrase])
    openings = Openings(["get out now"], {"please go away at once": 0.9})
    found = openings.hear(lm, ["said"], ["plain"], tiny.rows(4), 0.2)
    # "Get out" begins an opening of the defender, and "go away" is a part of one that was taken up before.
    assert found == [{"opening": "Be quiet", "certainty": 0.6}]
    openings = Openings(["hello"])
    assert [one["opening"] for one in openings.hear(lm, [], [], tiny.rows(4), 0.2)] == [
        "Get out",
        "Be quiet",
        "Go away",
    ]
    sure["Get out at once"] = 0.95
    assert [one["opening"] for one in openings.hear(lm, [], [], tiny.rows(4), 0.5)] == ["Get out at once", "Be quiet"]
