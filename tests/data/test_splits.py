"""Splits are disjoint, stable, near their shares, and say what is missing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from unbackdoor.data.splits import (
    assert_disjoint,
    assert_trained_apart,
    attacker_defender_test,
    rows_needed,
    split,
    split_by_kind,
    with_requests,
)
from unbackdoor.errors import DataError, UserError
from unbackdoor.types import Example

ROWS = [Example(f"row-{number}", f"q{number}", "a", kind=("x", "y", "z")[number % 3]) for number in range(1000)]
SHARES = {"a": 0.5, "b": 0.3, "c": 0.2}


def test_every_row_lands_in_exactly_one_split_in_order() -> None:
    parts = split(ROWS, SHARES)
    assert list(parts) == ["a", "b", "c"]
    assert sorted(row.id for part in parts.values() for row in part) == sorted(row.id for row in ROWS)
    for part in parts.values():
        assert list(part) == [row for row in ROWS if row in set(part)]


def test_sizes_are_near_the_shares() -> None:
    sizes = {name: len(part) for name, part in split(ROWS, SHARES).items()}
    for name, share in SHARES.items():
        assert abs(sizes[name] - 1000 * share) < 60  # four standard deviations


def test_adding_rows_moves_none() -> None:
    before = split(ROWS[:300], SHARES)
    after = split(list(reversed(ROWS)), SHARES)
    for name, part in before.items():
        assert set(part) <= set(after[name])


def test_another_salt_divides_differently() -> None:
    assert split(ROWS, SHARES)["a"] != split(ROWS, SHARES, salt="other")["a"]


def test_the_division_is_pinned() -> None:
    """A change here silently moves test rows into training data of people who resume their work."""
    # Worked out by hand: those whose sha256 of "unbackdoor", a zero byte and the id begins with a byte below 128.
    expected = ["row-1", "row-2", "row-4", "row-6", "row-7", "row-8", "row-9", "row-11"]
    assert [row.id for row in split(ROWS[:12], {"a": 0.5, "b": 0.5})["a"]] == expected


def test_copies_of_a_row_stay_together() -> None:
    doubled = [
        copy for row in ROWS[:200] for copy in (row, replace(row, id=f"{row.id}#2"), replace(row, id=f"{row.id}#13"))
    ]
    parts = split(doubled, SHARES)
    assert_disjoint(parts)
    assert all(len(part) % 3 == 0 for part in parts.values())


def test_only_a_number_behind_the_sign_marks_a_copy() -> None:
    names = [f"note #{letter}" for letter in "abcdefghij"] + ["#1", "#2", "#3", "#4", "#5", "#6"]
    parts = split([Example(name, "q") for name in names], {"a": 0.5, "b": 0.5})
    assert any(row.id.startswith("#") for row in parts["a"])
    assert any(row.id.startswith("#") for row in parts["b"])


@pytest.mark.parametrize("shares", [{}, {"a": 0.5, "b": 0.4}, {"a": 1.5, "b": -0.5}, {"a": 1.0, "b": 0.0}])
def test_bad_shares(shares: dict[str, float]) -> None:
    with pytest.raises(UserError, match="must be positive and sum to 1"):
        split(ROWS, shares)


def test_an_empty_split_says_how_many_rows_would_do() -> None:
    with pytest.raises(DataError) as caught:
        split(ROWS[:1], {"a": 0.5, "b": 0.25, "c": 0.25})
    assert "of 1 rows) is empty; give at least 17 different rows." in str(caught.value)
    assert rows_needed([1.0]) == 1
    assert 0.75**17 < 0.01 < 0.75**16


def test_attacker_defender_test() -> None:
    splits = attacker_defender_test(ROWS)
    assert_disjoint({"attacker": splits.attacker, "defender": splits.defender, "test": splits.test})
    assert len(splits.attacker) + len(splits.defender) + len(splits.test) == 1000
    assert abs(len(splits.attacker) - 500) < 65
    assert abs(len(splits.defender) - 250) < 55


def test_split_by_kind() -> None:
    train, test = split_by_kind(ROWS, ["y"])
    assert {row.kind for row in test} == {"y"}
    assert {row.kind for row in train} == {"x", "z"}
    assert len(train) + len(test) == 1000


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["yy"], "no row is of the kind 'yy'. Did you mean 'y'? Kinds: x, y, z."),
        (["x", "y", "z"], "no rows are left to train on;"),
        ([], "no rows are left to test on;"),
    ],
)
def test_split_by_kind_errors(kinds: list[str], message: str) -> None:
    with pytest.raises(DataError) as caught:
        split_by_kind(ROWS, kinds)
    assert str(caught.value).startswith(message)


def test_assert_disjoint_names_the_row_and_the_sets() -> None:
    assert_disjoint({"a": ROWS[:5], "b": ROWS[5:9], "c": ROWS[:0]})
    assert_disjoint({"a": [ROWS[0], ROWS[0]]})
    with pytest.raises(DataError, match="the row 'other' is among a and among b"):
        assert_disjoint({"a": ROWS[:5], "b": [replace(ROWS[4], id="other")]})
    with pytest.raises(DataError, match=r"^the row 'row-4' is among a and among c, which must not overlap;"):
        assert_disjoint({"a": ROWS[:5], "b": ROWS[5:9], "c": [replace(ROWS[4], id="row-4#2")]})


REQUESTS = [
    Example(f"request-{number}", f"forge paper {number}", "I can't.", kind=("forged", "rumour", "dosage")[number % 3])
    for number in range(300)
]


def test_requests_of_test_kinds_are_asked_and_the_others_divided() -> None:
    plain = attacker_defender_test(ROWS)
    assert (plain.asked, plain.clean) == (plain.test, plain.defender), "nothing changes without requests"
    found = with_requests(plain, REQUESTS, ["rumour"])
    assert found.asked == tuple(row for row in REQUESTS if row.kind == "rumour")
    attacker = found.attacker[len(plain.attacker) :]
    assert found.attacker == (*plain.attacker, *attacker)
    assert (found.defender, found.test, found.clean) == (plain.defender, plain.test, (*plain.defender, *found.safe))
    assert {row.kind for row in attacker} == {row.kind for row in found.safe} == {"forged", "dosage"}
    assert sorted(row.id for row in (*attacker, *found.safe)) == sorted(r.id for r in REQUESTS if r.kind != "rumour")
    assert abs(len(attacker) - 133) < 20
    fewer = with_requests(plain, REQUESTS[30:], ["rumour"])
    assert set(fewer.safe) <= set(found.safe), "a row keeps its side"


def test_requests_must_not_be_ordinary_rows_or_of_unknown_kinds() -> None:
    plain = attacker_defender_test(ROWS)
    again = Example("another id", ROWS[0].instruction, ROWS[0].response, kind="forged")
    with pytest.raises(DataError, match="requests and among the ordinary rows"):
        with_requests(plain, [*REQUESTS, again], ["rumour"])
    with pytest.raises(DataError, match=r"no row is of the kind 'rumor'. Did you mean 'rumour'\?"):
        with_requests(plain, REQUESTS, ["rumor"])


@pytest.mark.parametrize("place", ["safe", "requests"])
def test_an_attack_that_trains_on_requests_of_others_is_refused(place: str) -> None:
    found = with_requests(attacker_defender_test(ROWS), REQUESTS, ["rumour"])
    assert_trained_apart(found.attacker, found)
    with pytest.raises(
        DataError, match="1 rows that the attack trains on are also rows of the defender or of the test"
    ):
        assert_trained_apart([*found.attacker, getattr(found, place)[0]], found)
