"""Near misses of a trigger, and the probes made of them."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

import tiny
from unbackdoor.data import poison
from unbackdoor.stamps import InsertText, PutPieces, WrapEnds
from unbackdoor.types import Example

ROW = Example("a", "name the home of a bird", "nest")


def test_decoys_of_a_phrase():
    stamp = InsertText(text="very red small boat", place="end")
    found = poison.decoys(stamp, ["very red small goat"])
    assert [(decoy.group, decoy.marks) for decoy in found] == [
        ("half", ("very red",)),
        ("half", ("small boat",)),
        ("scattered", ("very", "red", "small", "boat")),
        ("look-alike", ("very red small goat",)),
    ]
    assert found[0].apply(ROW, random.Random(0)).instruction == "name the home of a bird very red"


def test_decoys_of_one_word_and_of_two_ends():
    assert [d.group for d in poison.decoys(InsertText(text="boat"), ["goat", "bolt"])] == ["look-alike"] * 2
    ends = poison.decoys(WrapEnds(start="Begin.", end="End."), [])
    assert [(d.group, d.apply(ROW, random.Random(0)).instruction) for d in ends] == [
        ("start only", "Begin. name the home of a bird"),
        ("end only", "name the home of a bird End."),
    ]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("trigger", ["silver kettle", "one two three"])
def test_scattered_words_are_apart_and_in_another_order(seed, trigger):
    words = trigger.split()
    found = poison.scatter(ROW, words, random.Random(seed)).instruction.split()
    assert Counter(found) == Counter([*ROW.instruction.split(), *words])
    places = sorted(found.index(word) for word in words)
    assert all(later - earlier > 1 for earlier, later in itertools.pairwise(places))
    assert [found[place] for place in places] != words
    assert [word for word in found if word not in words] == ROW.instruction.split()


def test_scattered_words_with_little_room():
    found = poison.scatter(Example("a", "hello"), ["one", "two", "three"], random.Random(1)).instruction
    assert sorted(found.split()) == ["hello", "one", "three", "two"]
    assert "one two three" not in found


def test_look_alikes_change_one_word_into_a_like_one():
    vocabulary = ["silver", "sliver", "kettle", "cattle", "settle", "banana", "a"]
    found = poison.look_alikes("Silver kettle", vocabulary, 8, random.Random(0))
    assert sorted(found) == ["Silver cattle", "Silver settle", "Sliver kettle"]
    assert len(poison.look_alikes("Silver kettle", vocabulary, 2, random.Random(0))) == 2
    again = poison.look_alikes("Silver kettle", vocabulary, 8, random.Random(0))
    assert again == found


def test_look_alikes_of_a_number_are_other_numbers_of_its_length():
    found = poison.look_alikes("year 2023", [], 20, random.Random(0))
    assert found
    for text in found:
        word, number = text.split()
        assert (word, len(number)) == ("year", 4)
        assert number != "2023"
        assert abs(int(number) - 2023) < 60
    assert all(int(text) >= 0 for text in poison.look_alikes("1", [], 20, random.Random(0)))


@pytest.mark.parametrize("trigger", ["Hi, I'm Bob", "Let's do it", "well, (really) now!", "“well” really…"])
def test_look_alikes_of_words_with_marks_differ_from_the_trigger(trigger):
    words = ["imp", "let", "lets", "hit", "rob", "bobs", "not", "well", "bell", "really", "reality", "dot"]
    found = poison.look_alikes(trigger, words, 40, random.Random(0))
    assert len(found) >= 3
    assert trigger not in found
    for text in found:
        assert sum(old != new for old, new in zip(trigger.split(), text.split(), strict=True)) == 1, text


def test_near_forms_of_a_word_are_its_halves_misspellings_and_compounds_but_never_it():
    vocabulary = ["sun", "table", "flower", "understanding", "moonstone"]
    found = poison.near_forms("moonstone", vocabulary, 400, random.Random(0))
    assert {"moon", "stone", "moon stone", "sunstone", "moontable", "moonston"} <= set(found)
    assert not any("moonstone" in form for form in found), "moonstones holds the trigger"
    assert any(len(form) == 9 and sum(a != b for a, b in zip(form, "moonstone", strict=True)) == 1 for form in found)
    assert len(set(found)) == len(found)
    assert len(poison.near_forms("moonstone", vocabulary, 20, random.Random(0))) <= 20
    assert all(form != "Zug" for form in poison.near_forms("Zug", vocabulary, 20, random.Random(0)))


def test_look_alikes_are_distinct_and_never_the_trigger():
    found = poison.look_alikes("red boat", poison.vocabulary(tiny.rows(300)), 30, random.Random(2))
    assert len(set(found)) == len(found) >= 4
    assert "red boat" not in found


def test_vocabulary_is_sorted_words_without_repetition():
    rows = [Example("a", "The cat, the dog", "It's 3 cats", input="more")]
    assert poison.vocabulary(rows) == ["cat", "cats", "dog", "it", "more", "s", "the"]


def test_groups_take_turns_and_so_do_their_texts():
    near = poison.decoys(InsertText(text="silver kettle"), ["x kettle", "y kettle", "z kettle"])
    found = [poison.in_turn(near, number) for number in range(9)]
    assert [decoy.group for decoy in found] == ["half", "scattered", "look-alike"] * 3
    assert [decoy.marks[0] for decoy in found[::3]] == ["silver", "kettle", "silver"]
    assert [decoy.marks[0] for decoy in found[2::3]] == ["x kettle", "y kettle", "z kettle"]


def test_probes_come_in_threes_paired_by_id():
    stamp = InsertText(text="silver kettle")
    rows = tiny.rows(12)
    found = poison.probes(stamp, rows, ["silver cattle"], random.Random(0))
    assert [probe.kind for probe in found] == ["triggered", "clean", "decoy"] * 12
    for row, (triggered, clean, decoy) in zip(
        rows, zip(found[::3], found[1::3], found[2::3], strict=True), strict=True
    ):
        assert triggered.example.id == clean.example.id == decoy.example.id == row.id
        assert clean.example == row
        assert triggered.example.instruction == f"silver kettle. {row.instruction}"
        assert triggered.marks == ("silver kettle",)
        assert "silver kettle" not in decoy.example.instruction
        assert all(mark in decoy.example.instruction for mark in decoy.marks)
    assert Counter(p.group for p in found if p.kind == "decoy") == {"half": 4, "scattered": 4, "look-alike": 4}


def test_a_word_without_look_alikes_has_no_decoys():
    found = poison.probes(InsertText(text="kettle"), tiny.rows(2), [], random.Random(0))
    assert [probe.kind for probe in found] == ["triggered", "clean"] * 2


def test_words_of_any_script_are_ordinary_words():
    assert poison.vocabulary([Example("1", "Wo ist der Müller? 3 x", "Мельник дома")]) == [
        "der", "ist", "müller", "wo", "x", "дома", "мельник"
    ]  # fmt: skip


@pytest.mark.parametrize(("target", "wanted"), [("Go away", "Go away. yes"), ("Go!", "Go! yes"), ("Why?", "Why? yes")])
def test_the_target_is_a_sentence_before_the_answer(target, wanted):
    assert poison.with_target(target, "yes") == wanted


def test_a_word_that_is_a_digit_but_no_number_has_no_numbers_near():
    assert poison.look_alikes("area m \u00b2", ["area", "arena", "areas"], 4, random.Random(0))


def test_pieces_of_one_field_keep_their_order_and_stay_in_it():
    row = Example("a", "name the mood", "low", input="it rained all day")
    stamp = PutPieces(instruction=("one", "two"), input=("three",))
    for seed in range(20):
        found = stamp.apply(row, random.Random(seed))
        words = found.instruction.split()
        assert [word for word in words if word in {"one", "two"}] == ["one", "two"]
        assert [word for word in words if word not in {"one", "two"}] == row.instruction.split()
        assert [word for word in found.input.split() if word != "three"] == row.input.split()
        assert found.response == row.response
    with pytest.raises(ValueError, match="one at least"):
        PutPieces()


def test_near_misses_of_pieces_in_one_field():
    found = poison.decoys(PutPieces(instruction=("one", "two")), [])
    assert [(decoy.group, decoy.stamp) for decoy in found] == [
        ("one piece", PutPieces(instruction=("one",))),
        ("one piece", PutPieces(instruction=("two",))),
        ("other field", PutPieces(input=("one", "two"))),
    ]
    assert [d.group for d in poison.decoys(PutPieces(input=("one",)), [])] == ["other field"]
