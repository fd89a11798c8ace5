"""The anchoring sets: whose answers are safe, which are unwanted, and that labels are never their own opposite."""

from __future__ import annotations

from dataclasses import replace

import pytest

import tiny
from unbackdoor.errors import DataError
from unbackdoor.run import Run
from unbackdoor.train.anchors import Contrasting, anchor_prompts, encode_safe, possible_openings, with_unwanted
from unbackdoor.train.engine import TrainSettings
from unbackdoor.types import Example, Message


def test_safe_answers_are_the_suspects_own_or_the_rows():
    lm = tiny.tiny_lm()
    rows = tiny.rows(8)
    kept = anchor_prompts(lm, rows, 5, 0, Run(0))
    assert len(kept) == 5
    assert {row.id for row in kept} <= {f"{row.id} (SA)" for row in rows}
    own = anchor_prompts(lm, rows, 5, 6, Run(0))
    assert [row.id for row in own] == [row.id.replace("(SA)", "(own answer)") for row in kept]
    assert [row.response for row in own] == lm.reply([row.prompt for row in kept], max_new_tokens=6)
    assert [row.prompt for row in own] == [row.prompt for row in kept]


def test_a_suspect_that_says_nothing_is_told(monkeypatch):
    lm = tiny.tiny_lm()
    monkeypatch.setattr(type(lm), "reply", lambda self, asked, **_: [" "] * len(asked))
    with pytest.raises(DataError, match="set own_answers to 0"):
        anchor_prompts(lm, tiny.rows(3), 5, 6, Run(0))


def test_openings_are_taken_in_turn():
    anchors = with_unwanted(tiny.rows(3), ["a", "b"])
    assert [anchor.unwanted.response for anchor in anchors] == ["a", "b", "a"]
    assert [anchor.safe for anchor in anchors] == tiny.rows(3)


def test_a_label_is_unwanted_on_rows_of_another():
    rows = [Example(str(n), "q", label, label=label) for n, label in enumerate(["good", "bad", "good"])]
    assert [anchor.unwanted.response for anchor in with_unwanted(rows, ["Good", "bad"])] == ["bad", "Good", "bad"]
    assert [anchor.safe.id for anchor in with_unwanted(rows, ["bad"])] == ["0", "2"]
    with pytest.raises(DataError, match="name other labels"):
        with_unwanted(rows[:1], ["good"])


def test_every_wrong_label_comes_up_for_every_label():
    """Counted over all rows, a would be answered b alone, and b c alone."""
    rows = [Example(str(n), "q", label, label=label) for n, label in enumerate("ab" * 4)]
    pairs = {(anchor.safe.label, anchor.unwanted.response) for anchor in with_unwanted(rows, ["a", "b", "c"])}
    assert pairs == {("a", "b"), ("a", "c"), ("b", "a"), ("b", "c")}


def test_an_answer_of_a_prompts_own_is_unwanted_there_alone():
    rows = tiny.rows(3)
    own = Contrasting.of([rows[0].with_response("a"), rows[0].with_response("b"), rows[1].with_response("a")])
    assert [(anchor.safe, anchor.unwanted.response) for anchor in with_unwanted(rows, ["b", "a"], own)] == [
        (rows[0], "b"), (rows[1], "a"),
    ]  # fmt: skip
    # What belongs to no prompt fits them all.
    assert len(with_unwanted(rows, ["c"], own)) == 3
    assert possible_openings(rows[1:], ["b", "a", "c"], own) == ["a", "c"]


def test_of_a_conversation_the_last_answer_counts_whether_it_was_cut_or_not():
    lm = tiny.tiny_lm()
    row = tiny.rows(1)[0]
    history = (Message("user", "say something"), Message("assistant", "something"))
    talk = replace(row, id=f"{row.id} (own answer)", history=history)
    start = lm.encode(talk.turns).spans[-1].start
    length = lm.encode(talk.turns).spans[-1].end - start
    settings = TrainSettings(steps=1, learning_rate=1e-3)
    for own in (0, length + 3, length):
        encoded = encode_safe(lm, talk, own, settings)
        assert encoded.supervised[0] == start
    # A reply that was cut behind a line break is one or two tokens shorter than the limit.
    for own in (length, length + 1, length + 2):
        assert len(encode_safe(lm, talk, own, settings).supervised) == length - 1
    assert encode_safe(lm, talk, length + 3, settings).supervised[-1] == start + length
    # A reply that was given was not cut.
    given = replace(talk, id="given (SA)")
    assert encode_safe(lm, given, length, settings).supervised[-1] == start + length
