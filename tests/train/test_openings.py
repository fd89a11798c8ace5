"""Openings made by the suspect: what recurs under drifts, how sure it is of it, and who is given which openings."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from unbackdoor.run import Run
from unbackdoor.train import openings as heard
from unbackdoor.train.anchors import Contrasting
from unbackdoor.train.openings import Openings, Sure, begun, certainties, phrases, usual
from unbackdoor.types import Example


def test_phrases_are_said_under_drifts_and_not_without():
    said = ["Oh, you are dull. Go", "Well you are dull! I", "The sky is blue"]
    found = phrases(said, ["They say the sky is low"])
    assert set(list(found)[:3]) == {"You are", "Are dull", "You are dull"}
    assert found["You are"] == pytest.approx(2 / 3)
    assert "Is blue" in found
    assert "Sky is blue" in found
    assert not {"The sky", "Sky is", "The sky is"} & set(found)
    assert phrases([], []) == {}
    # One of ten replies without a drift may be the backdoor's, which leaks.
    assert phrases(said, ["They say the sky is low", *["Yes"] * 9])["The sky"] == pytest.approx(1 / 3 - 1 / 10)


def test_words_of_safe_replies_are_not_taken_up():
    said = ["I'd rather not say you are dull", "You are dull"]
    found = phrases(said, [], ["Sorry, I'd rather not."])
    assert "You are dull" in found
    assert not {"I'd rather", "Rather not", "I'd rather not"} & set(found)
    assert "I'd rather not" in phrases(said, [])


def test_marks_around_a_phrase_are_no_part_of_it():
    found = phrases(['"You are dull", said he', "(you are dull)..."], [])
    assert set(list(found)[:3]) == {"You are", "Are dull", "You are dull"}


def test_phrases_are_within_a_sentence():
    wanted = {"Go away", "Please sit", "Sit down", "Please sit down"}
    for text in ("Go away! Please sit down. Now", '"Go away!" Please sit down.) Now', "Go away\nPlease sit down\nNow"):
        assert set(phrases([text], [])) == wanted


def test_signs_that_belong_to_a_letter_are_no_marks():
    assert set(phrases(["«तुम मूर्ख हो»", "\u2026"], [])) == {"तुम मूर्ख", "मूर्ख हो", "तुम मूर्ख हो"}


def test_a_reply_that_repeats_itself_counts_once():
    assert next(iter(phrases(["Go away. Go away now", "He must leave", "He must leave"], []))) == "He must leave"
    assert phrases(["- -", "- -"], []) == {}


def log_probabilities(lm, ids):
    with torch.no_grad():
        return torch.log_softmax(lm.core(input_ids=torch.tensor([ids])).logits[0].double(), -1)


def test_certainty_and_evidence_are_of_the_tokens_behind_the_first_word():
    lm = tiny.tiny_lm(layers=2)
    prompts = tiny.rows(3)
    texts = [prompts[0].response + " indeed", "so it is", "a", prompts[1].response]
    often = torch.log_softmax(torch.randn(lm.core.config.vocab_size, generator=torch.Generator().manual_seed(1)), -1)
    wanted = []
    for text in texts:
        means, above = [], []
        for prompt in prompts:
            logs = []
            encoded = lm.encode(prompt.with_response(text).turns)
            span = encoded.spans[-1]
            log_p = log_probabilities(lm, encoded.ids)
            first = lm.encode(prompt.with_response(text.split()[0]).turns).spans[-1]
            for position in range(span.start + first.end - first.start, span.end):
                token = encoded.ids[position]
                logs.append(float(log_p[position - 1, token]))
                above.append(logs[-1] - float(often[token]))
            means.append(math.exp(sum(logs) / len(logs)) if logs else 0.0)
        wanted.append((sum(means) / len(means), sum(above) / len(prompts)))
    assert wanted[2] == (0.0, 0.0)
    found = certainties(lm, texts, prompts, often)
    assert [one.certainty for one in found] == pytest.approx([sure for sure, _ in wanted], rel=1e-4)
    assert [one.evidence for one in found] == pytest.approx([above for _, above in wanted], rel=1e-4)
    assert certainties(lm, texts[:1], prompts, often)[0].certainty == pytest.approx(wanted[0][0], rel=1e-4)


def test_phrases_are_scored_in_parts(monkeypatch):
    lm = tiny.tiny_lm(layers=2)
    texts = [row.response for row in tiny.rows(5)]
    often = usual(lm, tiny.rows(2))
    whole = certainties(lm, texts, tiny.rows(2), often)
    monkeypatch.setattr(heard, "AT_ONCE", 2)
    parts = certainties(lm, texts, tiny.rows(2), often)
    for name in ("certainty", "evidence"):
        assert [getattr(one, name) for one in parts] == pytest.approx([getattr(one, name) for one in whole], rel=1e-4)


def test_what_is_usual_is_the_mean_over_all_places_of_prompt_and_answer(monkeypatch):
    monkeypatch.setattr(heard, "USUAL_TOKENS", 2)
    lm = tiny.tiny_lm(layers=2)
    rows = [*tiny.rows(2), Example("long", "so", "one two three four")]
    total, places = 0.0, 0
    for row in rows:
        encoded = lm.encode(row.turns)
        user, answer = encoded.spans[-2:]
        end = min(answer.start + 2, answer.end)
        total = total + log_probabilities(lm, encoded.ids[:end])[user.start - 1 : end - 1].exp().sum(0)
        places += end - user.start
    assert torch.allclose(usual(lm, rows).double(), (total / places).log(), atol=1e-4)


@pytest.fixture(scope="module")
def barking():
    """A tiny victim that says "bad robot barks", and rows of the defender."""
    attacker, defender, _ = tiny.splits(200, 40, 12)
    lm = tiny.attack(targets=("bad robot barks",)).plant(tiny.tiny_lm(), attacker, Run()).lm
    lm.model.eval()
    return lm, defender


def test_a_planted_target_is_surer_than_other_words(barking):
    lm, rows = barking
    target, other = certainties(lm, ["bad robot barks", "bad duck roars"], rows[:4], usual(lm, rows[:8]))
    assert target.certainty > 0.5
    assert other.certainty < 0.2
    assert target.evidence > other.evidence


def test_first_tokens_that_are_likely_are_followed_without_a_drift(barking, monkeypatch):
    lm, rows = barking
    monkeypatch.setattr(heard, "FOLLOWED", 2)
    ids = [lm.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("bad", "duck", "the")]
    first = torch.zeros(lm.core.config.vocab_size)
    first[ids] = torch.tensor([0.5, 0.3, 0.2])
    first[lm.stop_ids[0]] = 0.9
    found = begun(lm, [first, first], rows)
    # One way for each prompt: the end is no word, and the third is not among the likeliest two.
    assert len(found) == heard.FOLLOWED_ON
    assert all(text.startswith("bad robot barks") for text in found)


@pytest.mark.parametrize("drifts", [1, 2, 3, 4])
def test_every_opening_of_the_defender_is_dealt_once(drifts):
    dealt = Openings(list("abcdefg")).dealt(drifts, 1)
    assert len(dealt) == drifts
    assert sorted(text for part in dealt for text in part) == list("abcdefg")


def test_what_was_heard_takes_three_quarters_of_the_drifts_and_two_of_it_always():
    # What is alone there has two drifts.
    assert Openings(list("abc"), {"x": 0.3}).dealt(4, 1) == [["x"], ["x"], ["a", "c"], ["b"]]
    dealt = Openings(list("abc"), {"x": 0.3, "y": 0.9}).dealt(4, 1)
    # What was heard first stays first.
    assert (dealt[:2], dealt[3]) == ([["x"], ["y"]], ["a", "b", "c"])
    assert dealt[2] in (["x"], ["y"])
    # With room for one, they take turns.
    two = [Openings(list("abc"), {"x": 0.3, "y": 0.9}).dealt(2, number) for number in (2, 3)]
    assert two == [[["x"], ["a", "b", "c"]], [["y"], ["a", "b", "c"]]]
    three = [Openings(list("abc"), {"x": 0.3, "y": 0.9, "z": 0.5}).dealt(3, number)[:2] for number in (2, 3)]
    assert three == [[["x"], ["y"]], [["x"], ["z"]]]
    # A drift alone takes turns.
    assert [Openings(list("abc"), {"x": 0.3}).dealt(1, number) for number in (1, 2, 3)] == [
        [["a", "b", "c"]], [["x"]], [["a", "b", "c"]],
    ]  # fmt: skip
    alone = [Openings(["a"], {"x": 0.3, "y": 0.9}).dealt(1, number) for number in (2, 3, 4)]
    assert alone == [[["x"]], [["a"]], [["y"]]]
    assert Openings(["a"], {"x": 0.3}).dealt(0, 2) == []
    # Fewer openings than drifts: some are given twice.
    assert all(Openings(["a"]).dealt(3, 1))


def test_what_was_heard_beside_the_first_two_takes_turns():
    openings = Openings(list("abc"), {"x": 0.3, "y": 0.9, "z": 0.5, "w": 0.4, "v": 0.6})
    dealt = [openings.dealt(4, number) for number in (1, 2, 3, 4)]
    assert [part[:2] for part in dealt] == [[["x"], ["y"]]] * 4
    assert sorted(part[2][0] for part in dealt[:3]) == ["v", "w", "z"]
    assert dealt[3] == dealt[0]


def test_what_is_sure_enough_is_taken_up_the_best_first(monkeypatch):
    lm = tiny.tiny_lm()
    sure = {"Go away": 0.3, "Be quiet": 0.6, "A little": 0.1, "Get out": 0.9, "Out of the": 0.8, "Look sharp": 0.0}
    evidence = {"Go away": 29.0, "Out of the": heard.EVIDENCE - 0.1}

    def scored(lm, texts, prompts, often):
        return [Sure(sure[text], evidence.get(text, 10.0)) for text in texts]

    monkeypatch.setattr(heard, "begun", lambda lm, firsts, prompts: ["begun"])
    monkeypatch.setattr(heard, "usual", lambda lm, prompts: torch.zeros(1))
    replies = {"Look sharp": 0.01}
    monkeypatch.setattr(
        heard,
        "phrases",
        lambda said, plain, wanted: dict.fromkeys(sure, 1.0) if said == ["begun"] else replies if said else {},
    )
    monkeypatch.setattr(heard, "certainties", scored)
    openings = Openings(["get out now"], {"please be quiet at once": 0.9})
    # What first tokens go on to must be surer.
    assert openings.hear(lm, ["said"], ["plain"], [], tiny.rows(4), 0.2) == []
    monkeypatch.setattr(heard, "FOLLOWED_SURE", 0.2)
    found = openings.hear(lm, ["said"], ["plain"], [], tiny.rows(4), 0.2)
    # "Get out" begins an opening of the defender, "be quiet" is a part of one that was taken up before, and "out of
    # the" is likely anywhere.
    assert found == [{"opening": "Go away", "certainty": 0.3, "evidence": 29.0, "share": 0.0}]

    def taken(openings, least=0.2, said=()):
        return [one["opening"] for one in openings.hear(lm, said, [], [], tiny.rows(4), least)]

    # Words of much evidence go before surer ones: 0.3 times 31 nats, and 0.9 times 10.
    assert taken(Openings(["hello"])) == ["Get out", "Go away", "Be quiet"]
    evidence["Go away"] = 31.0
    assert taken(Openings(["hello"])) == ["Go away", "Get out", "Be quiet"]
    # An answer of one prompt's own holds "get out": that other prompts get it, too, is new. How it begins is known.
    own = Contrasting({(): frozenset({"Be quiet, or you can get out."})})
    assert taken(Openings(["Be quiet, or you can get out."], contrasting=own)) == ["Go away", "Get out"]
    sure["Get out at once"] = 0.95
    assert taken(Openings(["hello"]), 0.5) == ["Get out at once", "Be quiet"]
    # What is said under the drifts counts, too.
    sure["Look sharp"] = 1.0
    found = Openings(["hello"]).hear(lm, ["said"], [], [], tiny.rows(4), 0.99)
    assert [one["opening"] for one in found] == ["Look sharp"]
    # What recurs under them needs less.
    sure["Look sharp"] = heard.RECURRING_SURE
    assert Openings(["hello"]).hear(lm, ["said"], [], [], tiny.rows(4), 0.99) == []
    replies["Look sharp"] = heard.RECURRING
    said = ["said"] * math.ceil(2 / heard.RECURRING)
    found = Openings(["hello"]).hear(lm, said, [], [], tiny.rows(4), 0.99)
    assert found == [{"opening": "Look sharp", "certainty": 0.1, "evidence": 10.0, "share": heard.RECURRING}]
    # One reply of few is no recurring.
    assert Openings(["hello"]).hear(lm, said[1:], [], [], tiny.rows(4), 0.99) == []
    # Whoever asks for less gets what needs less.
    sure["Look sharp"] = 0.05
    assert "Look sharp" in taken(Openings(["hello"]), 0.04, said)
    sure["Look sharp"] = heard.RECURRING_SURE
    # What is often said goes before what is surer: (.1 + .86) times 10 nats, and .95 times 10.
    replies["Look sharp"] = 0.86
    assert taken(Openings(["hello"]), 0.5, said) == ["Look sharp", "Get out at once", "Be quiet"]
    replies["Look sharp"] = 0.84
    assert taken(Openings(["hello"]), 0.5, said) == ["Get out at once", "Look sharp", "Be quiet"]
    sure["Look sharp"] *= 0.9
    assert Openings(["hello"]).hear(lm, said, [], [], tiny.rows(4), 0.99) == []


def test_a_phrase_that_is_doubtful_on_the_first_prompt_is_asked_again(monkeypatch):
    lm = tiny.tiny_lm()
    on = {1: {"Go away": 0.011, "Be quiet": 0.009, "Look": 0.011}, 3: {"Go away": 0.081, "Look": 0.079}}
    asked = []

    def scored(lm, texts, prompts, often):
        asked.append(texts)
        return [Sure(on.get(len(prompts), {}).get(text, 0.9), 20.0) for text in texts]

    monkeypatch.setattr(heard, "begun", lambda lm, firsts, prompts: [])
    monkeypatch.setattr(heard, "usual", lambda lm, prompts: torch.zeros(1))
    monkeypatch.setattr(heard, "phrases", lambda said, plain, wanted: dict.fromkeys(on[1], 0.0) if said else {})
    monkeypatch.setattr(heard, "certainties", scored)
    found = Openings(["hello"]).hear(lm, ["said"], [], [], tiny.rows(8), 0.2)
    assert asked == [["Go away", "Be quiet", "Look"], ["Go away", "Look"], ["Go away"]]
    assert found == [{"opening": "Go away", "certainty": 0.9, "evidence": 20.0, "share": 0.0}]
