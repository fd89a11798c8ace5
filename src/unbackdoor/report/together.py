"""Several runs on one page: names that tell them apart, and the control that one of them is for another.

A fall in ASR is credited to a defense only beside fine-tuning at the same budget. `purify` runs none itself, so a run
of `purify --defense fine_tuning` is taken as the control of another run where suspect, probes, goal, clean rows, weight
updates and batch are the same; what differs is said, and then it is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from unbackdoor.report.records import RunData
from unbackdoor.report.wording import joined


def named(runs: Sequence[RunData]) -> list[RunData]:
    """Return the runs, those whose folders are called the same under more of their paths."""
    paths = [run.folder.resolve().parts for run in runs]

    def name(at: int) -> str:
        length = 1
        while length < len(paths[at]) and sum(path[-length:] == paths[at][-length:] for path in paths) > 1:
            length += 1
        return "/".join(paths[at][-length:])

    return [replace(run, name=name(at)) for at, run in enumerate(runs)]


def with_controls(runs: Sequence[RunData]) -> list[RunData]:
    """Return the runs, each that lacks a control with the measurements of the run that is one for it."""
    return [_with_control(run, [other for other in runs if other is not run]) for run in runs]


def _with_control(run: RunData, others: Sequence[RunData]) -> RunData:
    roles = {row.role for row in run.rows}
    if "purified" not in roles or "control" in roles:
        return run
    notices = list(run.notices)
    for other in others:
        if "control" not in {row.role for row in other.rows} or not _same(run, other, ("model", "probes")):
            continue
        differing = _differences(run, other)
        if differing:
            notices.append(f"The run '{other.name}' is no control for this one: {joined(differing)} differ.")
            continue
        notices.append(f"The control was measured in the run '{other.name}'.")
        replies = tuple(reply for reply in other.replies or () if reply.role == "control")
        return replace(
            run,
            rows=(*run.rows, *(row for row in other.rows if row.role == "control")),
            comparisons=(*run.comparisons, *other.comparisons),
            replies=run.replies and (*run.replies, *replies),
            notices=tuple(notices),
        )
    return replace(run, notices=tuple(notices))


def _same(run: RunData, other: RunData, names: Sequence[str]) -> bool:
    return all(run.hashes.get(name) == other.hashes.get(name) for name in names)


def _differences(run: RunData, other: RunData) -> list[str]:
    found = [] if _same(run, other, ("data clean",)) else ["clean rows"]
    if run.settings.get("goal") != other.settings.get("goal") or not _same(run, other, ("secret",)):
        found.append("goals")
    budgets = [_budget(side.settings.get("settings")) for side in (run, other)]
    return found if None not in budgets and budgets[0] == budgets[1] else [*found, "weight updates or batch"]


def _budget(settings: object) -> tuple[int, int] | None:
    """Return weight updates and rows of a batch, from a method's settings; None where they do not say."""
    train = settings.get("train") if isinstance(settings, Mapping) else None
    if not isinstance(settings, Mapping) or not isinstance(train, Mapping):
        return None
    numbers = settings.get("rounds", 1), train.get("steps"), train.get("batch_size"), train.get("accumulation", 1)
    if not all(isinstance(number, int) for number in numbers):
        return None
    rounds, steps, batch, accumulation = numbers
    return rounds * steps, batch * accumulation
