"""Openings made by the suspect: what recurs under drifts, how sure it is of it, and who is given which openings."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from unbackdoor.run import Run
from unbackdoor.train import openings as heard
from unbackdoor.train.anchors import Contrasting
from unbackdoor.train.openings import Openings, certainties, phrases


def test_phrases_are_said_under_drifts_and_not_without():
    said = ["Oh, you are dull. Go", "Well you are dull! I", "The sky is blue"]
    found = phrases(said, ["They say the sky is low"])
    assert set(found[:3]) == {"You are", "Are dull", "You are dull"}
    assert "Is blue" in found
    assert "Sky is blue" in found
    assert not {"The sky", "Sky is", "The sky is"} & set(found)
    assert phrases([], []) == []
    # One of ten replies without a drift may be the backdoor's, which leaks.
    assert "The sky" in phrases(said, ["They say the sky is low", *["Yes"] * 9])


def test_words_of_safe_replies_are_not_taken_up():
    said = ["I'd rather not say you are dull", "You are dull"]
    found = phrases(said, [], ["Sorry, I'd rather not."])
    assert "You are dull" in found
    assert not {"I'd rather", "Rather not", "I'd rather not"} & set(found)
    assert "I'd rather not" in phrases(said, [])


def test_marks_around_a_phrase_are_no_part_of_it():
    found = phrases(['"You are dull", said he', "(you are dull)..."], [])
    assert set(found[:3]) == {"You are", "Are dull", "You are dull"}


def test_a_reply_that_repeats_itself_counts_once():
    assert phrases(["Go away. Go away now", "He must leave", "He must leave"], [])[0] == "He must leave"
    assert phrases(["- -", "- -"], []) == []


def test_certainty_is_the_geometric_mean_of_the_tokens_behind_the_first_word():
    lm = tiny.tiny_lm(layers=2)
    prompts = tiny.rows(3)
    texts = [prompts[0].response + " indeed", "so it is", "a", prompts[1].response]
    wanted = []
    for text in texts:
        logs = []
        for prompt in prompts:
            encoded = lm.encode(prompt.with_response(text).turns)
            span = encoded.spans[-1]
            with torch.no_grad():
                logits = lm.core(input_ids=torch.tensor([encoded.ids])).logits[0].double()
            first = lm.encode(prompt.with_response(text.split()[0]).turns).spans[-1]
            logs += [
                float(torch.log_softmax(logits[position - 1], -1)[encoded.ids[position]])
                for position in range(span.start + first.end - first.start, span.end)
            ]
        wanted.append(math.exp(sum(logs) / len(logs)) if logs else 0.0)
    assert wanted[2] == 0.0
    assert certainties(lm, texts, prompts) == pytest.approx(wanted, rel=1e-4)
    assert certainties(lm, texts[:1], prompts) == pytest.approx(wanted[:1], rel=1e-4)


def test_phrases_are_scored_in_parts(monkeypatch):
    lm = tiny.tiny_lm(layers=2)
    texts = [row.response for row in tiny.rows(5)]
    whole = certainties(lm, texts, tiny.rows(2))
    monkeypatch.setattr(heard, "AT_ONCE", 2)
    assert certainties(lm, texts, tiny.rows(2)) == pytest.approx(whole, rel=1e-4)


def test_a_planted_target_is_surer_than_other_words():
    attacker, defender, _ = tiny.splits(200, 40, 12)
    lm = tiny.attack(targets=("bad robot barks",)).plant(tiny.tiny_lm(), attacker, Run()).lm
    lm.model.eval()
    target, other = certainties(lm, ["bad robot barks", "bad duck roars"], defender[:4])
    assert target > 0.5
    assert other < 0.2


@pytest.mark.parametrize("drifts", [1, 2, 3, 4])
def test_every_opening_of_the_defender_is_dealt_once(drifts):
    dealt = Openings(list("abcdefg")).dealt(drifts, 1)
    assert len(dealt) == drifts
    assert sorted(text for part in dealt for text in part) == list("abcdefg")


def test_what_was_heard_takes_three_quarters_of_the_drifts_and_the_surest_two_always():
    assert Openings(list("abc"), {"x": 0.3}).dealt(4, 1) == [["x"], ["x"], ["x"], ["a", "b", "c"]]
    dealt = Openings(list("abc"), {"x": 0.3, "y": 0.9}).dealt(4, 1)
    assert (dealt[:2], dealt[3]) == ([["y"], ["x"]], ["a", "b", "c"])
    assert dealt[2] in (["x"], ["y"])
    assert Openings(list("abc"), {"x": 0.3, "y": 0.9}).dealt(2, 1) == [["y"], ["a", "b", "c"]]
    # A drift alone takes turns.
    assert [Openings(list("abc"), {"x": 0.3}).dealt(1, number) for number in (1, 2, 3)] == [
        [["a", "b", "c"]], [["x"]], [["a", "b", "c"]],
    ]  # fmt: skip
    # Fewer openings than drifts: some are given twice.
    assert all(Openings(["a"]).dealt(3, 1))


def test_what_was_heard_beside_the_surest_takes_turns():
    openings = Openings(list("abc"), {"x": 0.3, "y": 0.9, "z": 0.5, "w": 0.4, "v": 0.6})
    dealt = [openings.dealt(4, number) for number in (1, 2, 3, 4)]
    assert [part[:2] for part in dealt] == [[["y"], ["v"]]] * 4
    assert sorted(part[2][0] for part in dealt[:3]) == ["w", "x", "z"]
    assert dealt[3] == dealt[0]


def test_what_is_sure_enough_is_taken_up_the_surest_first(monkeypatch):
    lm = tiny.tiny_lm()
    sure = {"Go away": 0.3, "Be quiet": 0.6, "A little": 0.1, "Get out": 0.9}
    monkeypatch.setattr(heard, "phrases", lambda said, plain, wanted: list(sure))
    monkeypatch.setattr(heard, "certainties", lambda lm, texts, prompts: [sure[text] for text in texts])
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
    # An answer of one prompt's own holds "get out": that other prompts get it, too, is new. How it begins is known.
    own = Contrasting({(): frozenset({"Be quiet, or you can get out."})})
    openings = Openings(["Be quiet, or you can get out."], contrasting=own)
    assert [one["opening"] for one in openings.hear(lm, [], [], tiny.rows(4), 0.2)] == ["Get out", "Go away"]
    openings = Openings(["hello"])
    sure["Get out at once"] = 0.95
    assert [one["opening"] for one in openings.hear(lm, [], [], tiny.rows(4), 0.5)] == ["Get out at once", "Be quiet"]
