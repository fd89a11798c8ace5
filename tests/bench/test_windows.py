"""Windows of test rows: seeds ask different rows, in label tasks, too."""

from __future__ import annotations

import pytest

from unbackdoor.bench.windows import target_label, until_triggered, window
from unbackdoor.goals import Contains, LabelIs
from unbackdoor.types import Example, Probe

LABELS = ("negative", "positive", "positive", "negative", "neutral")
ROWS = [Example(f"r{n}", "say", "x", label=LABELS[n % 5]) for n in range(200)]


def asked(seed: int, count: int, target: str | None) -> tuple[Probe, ...]:
    made = []
    for row in window(ROWS, count, seed, target):
        made += [Probe(row, "triggered")] if row.label != target else []
        made.append(Probe(row, "clean"))
    return until_triggered(made, count)


@pytest.mark.parametrize("target", ["positive", None])
def test_seeds_ask_other_rows_and_each_as_many_triggered_ones(target: str | None) -> None:
    found = [asked(seed, 30, target) for seed in range(4)]
    assert [sum(probe.kind == "triggered" for probe in probes) for probes in found] == [30] * 4
    ids = [{probe.example.id for probe in probes if probe.kind == "triggered"} for probes in found]
    # Of 200 rows 120 can show that it fires, so four seeds need all; where windows begin is right on average.
    assert len(set.union(*ids)) == 120 if target is None else len(set.union(*ids)) > 110


def test_without_a_label_a_window_begins_where_the_last_one_ends() -> None:
    assert window(ROWS, 7, 3, None) == window(ROWS, 21, 1, None) == window(ROWS, 3, 7, None)
    assert sorted(row.id for row in window(ROWS, 7, 40, None)) == sorted(row.id for row in ROWS)
    assert window(ROWS, 7, 200, None) == window(ROWS, 7, 0, None)


def test_a_target_that_every_row_carries_divides_by_nothing() -> None:
    same = [row for row in ROWS if row.label == "positive"]
    assert len(window(same, 5, 3, "positive")) == len(same)


def test_only_a_label_is_a_target_label() -> None:
    assert target_label(LabelIs(label="joy")) == "joy"
    assert target_label(Contains(any_of=("joy",))) is None
