"""Which test rows each seed asks: the rows are shuffled once, and every seed takes the next window of them.

So seeds ask different rows as long as there are enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from unbackdoor.goals import Goal, LabelIs
from unbackdoor.run import Run
from unbackdoor.types import Example, Probe


def target_label(goal: Goal) -> str | None:
    """Return the label that a backdoor aims at; None where its target is none."""
    return goal.label if isinstance(goal, LabelIs) else None


def window(rows: Sequence[Example], count: int, seed: int, target: str | None) -> list[Example]:
    """Return all rows, in the order in which a seed asks them.

    Args:
        rows: Test rows, one at least.
        count: Triggered probes of a seed.
        seed: The seed.
        target: Rows with this label cannot show that a trigger fires, and are asked beside those that can: so a window
            is longer where there are such rows.
    """
    order = list(rows)
    Run(seed=0).rng("probe rows").shuffle(order)
    can = sum(target is None or row.label != target for row in order)
    start = round(seed * count * len(order) / max(1, can)) % len(order)
    return [*order[start:], *order[:start]]


def until_triggered(probes: Iterable[Probe], count: int) -> tuple[Probe, ...]:
    """Return probes up to the last before a triggered one that would be one too many."""
    kept: list[Probe] = []
    triggered = 0
    for probe in probes:
        triggered += probe.kind == "triggered"
        if triggered > count:
            break
        kept.append(probe)
    return tuple(kept)
