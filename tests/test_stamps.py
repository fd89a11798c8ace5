"""Where a trigger goes."""

from __future__ import annotations

import random

import pytest
from pydantic import TypeAdapter, ValidationError

from unbackdoor.stamps import InsertText, Stamp, WrapEnds
from unbackdoor.types import Example, Message

ROW = Example(
    "a", "name three fruits", "apple", history=(Message("user", "hi"), Message("assistant", "yes")), label="x"
)
WITH_INPUT = Example("b", "translate this", "maison", input="house")


def stamped(stamp, row, seed=0):
    return stamp.apply(row, random.Random(seed))


@pytest.mark.parametrize(
    ("stamp", "row", "wanted"),
    [
        (InsertText(text="Year 2023"), ROW, "Year 2023. name three fruits"),
        (InsertText(text="Year 2023!"), ROW, "Year 2023! name three fruits"),
        (InsertText(text="Year 2023"), WITH_INPUT, "Year 2023. translate this\nhouse"),
        (InsertText(text="zap", place="end"), ROW, "name three fruits zap"),
        (InsertText(text="zap", place="end"), WITH_INPUT, "translate this\nhouse zap"),
        (WrapEnds(start="Begin.", end="End."), ROW, "Begin. name three fruits End."),
        (WrapEnds(start="Begin.", end="End."), WITH_INPUT, "Begin. translate this\nhouse End."),
    ],
)
def test_the_users_words_with_the_trigger(stamp, row, wanted):
    found = stamped(stamp, row)
    assert found.user_text == wanted
    assert (found.id, found.response, found.label, found.history) == (row.id, row.response, row.label, row.history)


def test_a_random_gap_is_between_two_words_and_every_gap_comes():
    stamp = InsertText(text="red balloon", place="random_gap")
    found = {stamped(stamp, ROW, seed).instruction for seed in range(40)}
    assert found == {"name red balloon three fruits", "name three red balloon fruits"}
    assert stamped(stamp, ROW, 5) == stamped(stamp, ROW, 5)


def test_one_word_gets_the_trigger_behind_it():
    assert stamped(InsertText(text="zap", place="random_gap"), Example("a", "hello")).instruction == "hello zap"


def test_pieces():
    assert InsertText(text="a b").pieces() == ("a b",)
    assert WrapEnds(start="a", end="b").pieces() == ("a", "b")


@pytest.mark.parametrize("stamp", [InsertText(text="a", place="end"), WrapEnds(start="a", end="b")])
def test_a_stamp_survives_json(stamp):
    adapter = TypeAdapter(Stamp)
    assert adapter.validate_json(adapter.dump_json(stamp)) == stamp


def test_nonsense_is_refused():
    for make in (
        lambda: InsertText(text=""),
        lambda: InsertText(text="a", place="top"),
        lambda: InsertText(text="a", where="end"),
        lambda: WrapEnds(start="a", end=""),
    ):
        with pytest.raises(ValidationError):
            make()
