"""Disjoint splits by a hash of the example's id: stable when rows are added, and copies of a row stay together.

Attacker's, defender's and test data must never overlap (a defense that was trained on test rows proves nothing), and a
row must not change sides because another was added.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from unbackdoor.data.formats import base_id
from unbackdoor.errors import DataError, UserError, did_you_mean
from unbackdoor.types import Example, content_hash


@dataclass(frozen=True)
class Splits:
    """Who holds which rows.

    Attributes:
        attacker: Rows that the backdoor is planted with.
        defender: Clean rows that the defense may use.
        test: Rows that utility is measured on, and that probes are made of where there are no `requests`.
        safe: The defender's requests that should be declined, each with the answer that declines; not in `defender`.
        requests: Requests that probes are made of, of kinds that nobody trains on.
    """

    attacker: tuple[Example, ...]
    defender: tuple[Example, ...]
    test: tuple[Example, ...]
    safe: tuple[Example, ...] = ()
    requests: tuple[Example, ...] = ()

    @property
    def asked(self) -> tuple[Example, ...]:
        """Rows that probes are made of."""
        return self.requests or self.test

    @property
    def clean(self) -> tuple[Example, ...]:
        """All clean rows of the defender."""
        return (*self.defender, *self.safe)


def split(
    examples: Sequence[Example], shares: Mapping[str, float], *, salt: str = "unbackdoor"
) -> dict[str, tuple[Example, ...]]:
    """Divide examples into named, disjoint parts.

    Args:
        examples: The rows; each part keeps their order.
        shares: Name -> share of the rows, positive, summing to 1. Parts have about these sizes, not exactly, because
            each row is placed by itself.
        salt: Another salt gives another, independent division.

    Raises:
        UserError: If the shares are not positive or do not sum to 1.
        DataError: If a part comes out empty; the message says how many rows would do.
    """
    total = math.fsum(shares.values())
    if not shares or min(shares.values()) <= 0 or abs(total - 1) > 1e-6:
        written = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        raise UserError(f"the shares of the splits ({written or 'none'}) must be positive and sum to 1.")
    names = list(shares)
    edges = [math.fsum(list(shares.values())[: number + 1]) for number in range(len(names))]
    parts: dict[str, list[Example]] = {name: [] for name in names}
    for example in examples:
        place = _position(example.id, salt)
        # The last edge may be 0.999...: what lies above it belongs to the last part.
        number = next((number for number, edge in enumerate(edges) if place < edge), len(names) - 1)
        parts[names[number]].append(example)
    for name, rows in parts.items():
        if not rows:
            raise DataError(
                f"the split '{name}' ({shares[name]:.0%} of {len(examples)} rows) is empty; "
                f"give at least {rows_needed(shares.values())} different rows."
            )
    return {name: tuple(rows) for name, rows in parts.items()}


def rows_needed(shares: Iterable[float]) -> int:
    """Return how many different rows leave no part empty with a probability of at least 99 %."""
    smallest = min(shares)
    return 1 if smallest >= 1 else math.ceil(math.log(0.01) / math.log1p(-smallest))


def attacker_defender_test(examples: Sequence[Example]) -> Splits:
    """Divide examples among attacker (half), defender (a quarter) and test (a quarter).

    Raises:
        DataError: If there are too few rows.
    """
    parts = split(examples, {"attacker": 0.5, "defender": 0.25, "test": 0.25})
    return Splits(parts["attacker"], parts["defender"], parts["test"])


def split_by_kind(
    examples: Sequence[Example], held_out_kinds: Sequence[str]
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Divide examples into other kinds and held-out kinds, for a test on requests of kinds that were never trained on.

    Returns:
        The rows to train on and the rows to test on, each in order.

    Raises:
        DataError: If a held-out kind is not among the rows, or either part is empty.
    """
    known = sorted({example.kind for example in examples if example.kind})
    for kind in held_out_kinds:
        if kind not in known:
            raise DataError(f"no row is of the kind '{kind}'.{did_you_mean(kind, known)} Kinds: {', '.join(known)}.")
    test = tuple(example for example in examples if example.kind in held_out_kinds)
    train = tuple(example for example in examples if example.kind not in held_out_kinds)
    if not train or not test:
        raise DataError(
            f"no rows are left to {'train' if test else 'test'} on; hold out some of the kinds, not all or none."
        )
    return train, test


def with_requests(splits: Splits, requests: Sequence[Example], test_kinds: Sequence[str]) -> Splits:
    """Add requests that should be declined: of the test kinds for probes, the rest for attacker and defender (2:1).

    Raises:
        DataError: If a kind is unknown, a part comes out empty, or a request is among the ordinary rows, too.
    """
    rest, asked = split_by_kind(requests, test_kinds)
    parts = split(rest, {"attacker": 2 / 3, "defender": 1 / 3}, salt="requests")
    assert_disjoint(
        {
            "the attacker's requests": parts["attacker"],
            "the defender's requests": parts["defender"],
            "the test requests": asked,
            "the ordinary rows": (*splits.attacker, *splits.defender, *splits.test),
        }
    )
    attacker = (*splits.attacker, *parts["attacker"])
    return replace(splits, attacker=attacker, safe=parts["defender"], requests=asked)


def assert_disjoint(groups: Mapping[str, Iterable[Example]]) -> None:
    """Check that no two groups hold the same row, by id or by what it says; copies of a row ("#2") count as the row.

    Args:
        groups: What a group is called -> its rows.

    Raises:
        DataError: If two groups share a row; the message names both and it.
    """
    owner: dict[str, str] = {}
    for name, group in groups.items():
        for example in group:
            marks = (base_id(example.id), f"content {row_content(example)}")
            first = next((owner[mark] for mark in marks if owner.setdefault(mark, name) != name), name)
            if first != name:
                raise DataError(
                    f"the row '{base_id(example.id)}' is among {first} and among {name}, which must not overlap; "
                    "take it out of one, or give different rows different ids."
                )


def row_content(row: Example) -> str:
    """Return a hash of a row's turns, answer included, that is the same whatever its id and the format of its file."""
    return content_hash([(turn.role, " ".join((turn.content or "").split())) for turn in row.turns])


def assert_trained_apart(trained: Iterable[Example], splits: Splits) -> None:
    """Check that rows which a backdoor is planted with are not rows of the defender or of the test.

    Raises:
        DataError: If an attack brings a row with the id of one of theirs.
    """
    others = {base_id(row.id) for row in (*splits.clean, *splits.test, *splits.requests)}
    shared = list(dict.fromkeys(base_id(row.id) for row in trained if base_id(row.id) in others))
    if shared:
        raise DataError(
            f"{len(shared)} rows that the attack trains on are also rows of the defender or of the test (the first is "
            f"'{shared[0]}'); take them out of the poisoned file, or give different rows different ids."
        )


def _position(example_id: str, salt: str) -> float:
    """Return a number in [0, 1) that depends on salt and id alone."""
    digest = hashlib.sha256(f"{salt}\0{base_id(example_id)}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)
