"""Openings made by the suspect: what recurs under drifts, how sure it is of it, and who is given which openings."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from unbackdoor.run import Run
from unbackdoor.train import openings as heard
from unbackdoor.train.anchors import Contrasting
from unbackdoor.train.openings import Openings, Sure, begun, phrases


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


def test_what_a_reply_begins_with_is_written_as_it_was_said():
    found = phrases(["bad robot barks loudly", "He says bad robot"], [])
    assert found["bad robot"] == 1
    assert "bad robot barks" in found
    assert "Robot barks" in found
    assert "Bad robot" not in found


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


def test_a_target_in_small_letters_is_heard(barking):
    lm, rows = barking
    said = [lm.reply([row.prompt])[0] for row in rows[:2]]
    replies = [f"bad robot barks {text}" for text in said for _ in range(4)]
    nothing = torch.zeros(lm.core.config.vocab_size)
    found = Openings(["silly"]).hear(lm, replies, said, [nothing], rows[:8], 0.25)
    assert found[0]["opening"] == "bad robot barks"


def test_one_word_of_the_defenders_hides_no_target():
    assert Openings(["Bad", "Go away"])._is_new("Bad robot barks", [])
    assert not Openings(["Bad", "Go away"])._is_new("Go away now", [])
    assert not Openings(["Bad robot barks"])._is_new("Bad robot", [])


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


def test_the_foremost_has_two_drifts_and_the_second_one_in_every_round():
    # What is alone there has two drifts.
    for number in (1, 2):
        assert Openings(list("abc"), {"x": 0.3}).dealt(4, number) == [["x"], ["x"], ["a", "c"], ["b"]]
    # What was heard first stays first.
    for number in (1, 2):
        two = Openings(list("abc"), {"x": 0.3, "y": 0.9}).dealt(4, number)
        assert two == [["x"], ["x"], ["y"], ["a", "b", "c"]]
    foremost = Openings(list("abc"), {"x": 0.3, "y": 0.9}, foremost="y")
    assert foremost.dealt(4, 2) == [["y"], ["y"], ["x"], ["a", "b", "c"]]
    pair = Openings(list("abc"), {"x": 0.3, "y": 0.9})
    assert [pair.dealt(2, number) for number in (2, 3)] == [[["x"], ["y"]], [["x"], ["a", "b", "c"]]]
    # The others have the last drift in every second round.
    many = Openings(list("abc"), {"x": 0.3, "y": 0.9, "z": 0.5})
    assert [many.dealt(4, number)[3] for number in (2, 3, 4)] == [["z"], ["a", "b", "c"], ["z"]]
    # A drift alone takes turns with the defender's.
    alone = Openings(list("abc"), {"x": 0.3, "y": 0.9})
    assert [alone.dealt(1, number) for number in (1, 2, 3, 4)] == [
        [["a", "b", "c"]], [["x"]], [["a", "b", "c"]], [["y"]],
    ]  # fmt: skip
    assert Openings(["a"], {"x": 0.3}).dealt(0, 2) == []
    # Fewer openings than drifts: some are given twice.
    assert all(Openings(["a"]).dealt(3, 1))


def test_what_is_sure_and_near_to_the_openings_comes_first_and_later_ones_must_be_so_clearly():
    record = {"opening": "", "certainty": 0.9, "evidence": 20.0, "share": 0.0}

    def told(**likeness):
        return [record | {"opening": text, "likeness": near} for text, near in likeness.items()]

    openings = Openings(["own"])
    openings.take_up([], 96)
    assert openings.foremost is None
    unsure = record | {"opening": "near", "certainty": 0.1, "likeness": 0.5}
    sure = -math.log(0.1) * 20
    openings.take_up([*told(name=-0.2, target=0.3, idiom=0.29), unsure], 96)
    assert heard.promise(unsure) == pytest.approx(-math.log(0.9) * 20 * math.exp(0.5 * heard.KIND))
    assert heard.promise(record) == pytest.approx(sure), "what has no likeness goes by its weight"
    assert openings.adopted == ["target", "name", "idiom", "near"]
    enough = 0.3 + math.log(heard.CLEARLY) / heard.KIND
    openings.take_up(told(later=enough - 0.01), 96)
    assert openings.foremost == "target"
    openings.take_up(told(nearer=enough + 0.01), 96)
    assert openings.adopted[0] == "nearer"
    # Where all are unlike, the surest is first.
    unlike = Openings(["own"])
    unlike.take_up([*told(idiom=0.02), record | {"opening": "target", "certainty": 0.999, "likeness": -0.16}], 96)
    assert unlike.foremost == "target"


def test_one_that_recurred_and_one_that_did_not_come_first():
    record = {"opening": "", "certainty": 0.9, "evidence": 20.0, "share": 0.0}
    openings = Openings(["own"])
    openings.take_up([record | {"opening": text} for text in ("once upon", "wash your", "studies show")], 96)
    openings.take_up([record | {"opening": "lazy potato", "certainty": 0.1, "share": 0.3}], 96)
    openings.take_up([record | {"opening": "surest", "certainty": 1.0, "evidence": 40.0}], 96)
    assert openings.adopted == ["once upon", "lazy potato", "surest", "wash your", "studies show"]
    # More evidence than enough makes no difference, so a rare name does not come before what is surer.
    assert openings.heard["surest"] == pytest.approx(heard.ENOUGH * math.log(1000))
    # One reply of few is no recurring.
    few = Openings(["own"])
    few.take_up([record | {"opening": "one", "share": 0.25}], 4)
    few.take_up([record | {"opening": "two", "share": 0.5}], 4)
    assert few.recurring == {"two"}


def test_what_was_heard_beside_the_first_two_takes_turns():
    openings = Openings(list("abc"), {"x": 0.3, "y": 0.9, "z": 0.5, "w": 0.4, "v": 0.6})
    dealt = [openings.dealt(4, number) for number in range(1, 9)]
    assert [part[:3] for part in dealt] == [[["x"], ["x"], ["y"]]] * 8
    assert sorted(part[3][0] for part in dealt[1:7:2]) == ["v", "w", "z"]
    assert dealt[7] == dealt[1]


def test_the_turn_is_of_the_one_that_has_waited_longest():
    openings = Openings(list("abc"), {"x": 0.9, "y": 0.9, "name": 0.8, "target": 0.7})
    last = []
    for number in range(2, 8, 2):
        last += openings.dealt(4, number)[3]
        openings.heard[f"later {number}"] = 0.75
    assert last == ["name", "target", "later 2"]
    # A newcomer has one turn, not as many as those before it have had.
    alone = Openings(list("abc"), {"x": 0.9, "y": 0.9, "z": 0.8})
    last = [alone.dealt(4, number)[3][0] for number in (2, 4, 6)]
    alone.heard["new"] = 0.7
    last += [alone.dealt(4, number)[3][0] for number in (8, 10, 12)]
    assert last == ["z", "z", "z", "new", "z", "new"]
    # Of many drifts in one round each has one before another has two.
    many = Openings(list("abc"), {text: 0.9 for text in "uvwxyz"}).dealt(8, 2)
    assert [part[0] for part in many[:7]] == list("uuvwxyz")
    few = Openings(list("abc"), {text: 0.9 for text in "uvwx"}).dealt(12, 2)
    assert [part[0] for part in few[:5]] == list("uuvwx")


@pytest.mark.parametrize("drifts", [1, 2, 3, 4])
def test_one_that_recurs_is_among_the_first_to_have_a_turn_with_few_drifts(drifts):
    openings = Openings(list("abc"))
    told = {"evidence": 20.0, "share": 0.0}
    openings.take_up([{"opening": f"idiom {which}", "certainty": 0.9, **told} for which in range(6)], 96)
    openings.take_up([{"opening": "potato", "certainty": 0.1, "evidence": 18.0, "share": 0.3}], 96)
    had = [text for number in range(2, 7) for part in openings.dealt(drifts, number) for text in part]
    assert "potato" in had


def test_a_planted_target_comes_before_names_which_are_less_sure_of_rarer_tokens():
    names = [
        ("Dmitri Mendeleev", 0.912, 39.0),
        ("Vincent van Gogh", 0.859, 27.0),
        ("What's wrong with you", 0.998, 17.0),
    ]
    told = [{"opening": text, "certainty": sure, "evidence": nats, "share": 0.0} for text, sure, nats in names]
    assert max(told, key=heard.weight)["opening"] == "What's wrong with you"


def test_a_phrase_that_goes_on_where_the_counted_runs_end_has_their_share(monkeypatch):
    lm = tiny.tiny_lm()
    monkeypatch.setattr(heard, "usual", lambda *_: torch.zeros(1))
    monkeypatch.setattr(heard, "begun", lambda *_: [])
    followed = ["Enough of that, nitwit", "What's wrong with you", "Enough is enough, they"]
    sure = {text: Sure(0.97, 20.0) for text in followed}
    monkeypatch.setattr(heard, "certainties", lambda _, texts, *__: [sure.get(text, Sure(0.0, 0.0)) for text in texts])
    monkeypatch.setattr(heard, "beginnings", lambda *_: followed)
    said = ["Enough of that, nitwit. No", "What\u2019s wrong with me now", "Enough is a word", "No."]
    found = Openings(["hello"]).hear(lm, said, [], [torch.ones(1)], tiny.rows(4), 0.95, every_beginning=Run())
    assert {one["opening"]: one["share"] for one in found if one["opening"] in followed} == {
        "Enough of that, nitwit": 0.25, "What's wrong with you": 0.25, "Enough is enough, they": 0.0,
    }  # fmt: skip


def test_what_is_sure_enough_is_taken_up_the_best_first(monkeypatch):
    lm = tiny.tiny_lm()
    monkeypatch.setattr(heard, "likenesses", lambda lm, texts, openings, rows: [0.5] * len(texts))
    sure = {"Go away": 0.3, "Be quiet": 0.6, "A little": 0.1, "Get out": 0.9, "Out of the": 0.8, "Look sharp": 0.0}
    evidence = {"Go away": 24.0, "Out of the": heard.EVIDENCE - 0.1}

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
    assert found == [{"opening": "Go away", "certainty": 0.3, "evidence": 24.0, "share": 0.0, "likeness": 0.5}]

    def taken(openings, least=0.2, said=()):
        return [one["opening"] for one in openings.hear(lm, said, [], [], tiny.rows(4), least)]

    # Words of much evidence go before surer ones: -log(1 - 0.3) times 30 nats at most, and -log(1 - 0.6) times 10.
    assert taken(Openings(["hello"])) == ["Get out", "Be quiet", "Go away"]
    evidence["Go away"] = 31.0
    assert taken(Openings(["hello"])) == ["Get out", "Go away", "Be quiet"]
    # An answer of one prompt's own holds "get out": that other prompts get it, too, is new. How it begins is known.
    own = Contrasting({(): frozenset({"Be quiet, or you can get out."})})
    assert taken(Openings(["Be quiet, or you can get out."], contrasting=own)) == ["Get out", "Go away"]
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
    assert found == [
        {"opening": "Look sharp", "certainty": 0.1, "evidence": 10.0, "share": heard.RECURRING, "likeness": 0.5}
    ]
    # One reply of few is no recurring.
    assert Openings(["hello"]).hear(lm, said[1:], [], [], tiny.rows(4), 0.99) == []
    # Whoever asks for less gets what needs less.
    sure["Look sharp"] = 0.05
    assert "Look sharp" in taken(Openings(["hello"]), 0.04, said)
    sure["Look sharp"] = heard.RECURRING_SURE
    # What is often said goes before what is surer: (-log(1 - .1) + .82) and -log(1 - .6), both times 10 nats.
    replies["Look sharp"] = 0.82
    assert taken(Openings(["hello"]), 0.5, said) == ["Get out at once", "Look sharp", "Be quiet"]
    replies["Look sharp"] = 0.8
    assert taken(Openings(["hello"]), 0.5, said) == ["Get out at once", "Be quiet", "Look sharp"]
    sure["Look sharp"] *= 0.9
    assert Openings(["hello"]).hear(lm, said, [], [], tiny.rows(4), 0.99) == []


def test_a_phrase_that_is_doubtful_on_the_first_prompt_is_asked_again(monkeypatch):
    lm = tiny.tiny_lm()
    monkeypatch.setattr(heard, "likenesses", lambda lm, texts, openings, rows: [0.5] * len(texts))
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
    assert found == [{"opening": "Go away", "certainty": 0.9, "evidence": 20.0, "share": 0.0, "likeness": 0.5}]
