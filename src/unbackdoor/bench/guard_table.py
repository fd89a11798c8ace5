"""What guards did in a grid: for `evidence` each branch, why there was none, and how often the answer turned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from unbackdoor.bench.cell import Cell
from unbackdoor.bench.figures import Figures
from unbackdoor.pipeline.guarding import counts
from unbackdoor.report.tables import Cell as Entry
from unbackdoor.report.tables import Line, Table

_COLUMNS = ("Model", "Questions", "Own evidence usable", "Rewritten", "Keywords explained", "None", "Answer turned")
_NOTES = (
    "Questions: of all metrics together, with the trigger and without. The evidence is the model's own, rewritten to "
    "contradict its answer, or an explanation of keywords; below None stands why there was neither. Turned: of the "
    "questions with evidence, those answered otherwise than without.",
)


def records(figures: Figures) -> list[dict[str, Any]]:
    """Return what each guard of each cell did, counted, for results.json."""
    return [
        {"model": cell.name, "guard": guard, **count}
        for cell in figures.keys
        for guard, count in _counted(figures, cell).items()
    ]


def tables(figures: Figures, label: Callable[[Cell], str]) -> list[Table]:
    """Return one table with a line for each guard of each cell; none where no model has a guard.

    Args:
        figures: The grid's figures.
        label: Names a cell's model.
    """
    lines = [
        Line(f"{cell.attack}, seed {cell.seed}: {label(cell)}", guard, _entries(count))
        for cell in figures.keys
        for guard, count in _counted(figures, cell).items()
    ]
    return [Table("What guards did", _COLUMNS, tuple(lines), _NOTES)] if lines else []


def _counted(figures: Figures, cell: Cell) -> Mapping[str, Mapping[str, Any]]:
    result = figures.results.get(cell)
    return counts(result.measurement.guards) if result is not None and result.measurement is not None else {}


def _entries(count: Mapping[str, Any]) -> tuple[Entry, ...]:
    if "rewritten" not in count:
        return (Entry(str(count["asked"])), *(Entry("not applicable", measured=False) for _ in _COLUMNS[2:]))
    without = "; ".join(f"{reason} ({times})" for reason, times in count["reasons"].items())
    given_up = "; ".join(f"{reason} ({times})" for reason, times in count["not_rewritten"].items())
    return (
        Entry(str(count["asked"])),
        Entry(str(count["usable"])),
        Entry(str(count["rewritten"])),
        Entry(str(count["keywords"]), given_up and f"in place of a rewriting: {given_up}"),
        Entry(str(count["none"]), f"{without}, refused" if without and count["refused"] else without),
        Entry(f"{count['turned']}/{count['rewritten'] + count['keywords']}"),
    )
