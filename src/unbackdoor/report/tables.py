"""Tables of a report, as data: HTML and Markdown print the same ones.

Rows of `results.json` are one measurement each; a table wants one line a model. A `Subject` gathers the measurements
of one model, a `Cell` is one figure in words. A figure that is not there is said to be "not measured", "not applicable"
or "failed"; it is never 0. An attack success rate after purification always stands beside the two revival columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unbackdoor.report.records import Comparison, Row, RunData, load_run
from unbackdoor.report.subjects import Subject, subjects
from unbackdoor.report.wording import (
    METRIC_NAMES,
    SHARES,
    display_name,
    duration,
    measure_words,
    p_value_words,
    percent,
    significant,
)

__all__ = [
    "Cell", "Line", "Subject", "Table", "comparison_table", "cost_table", "estimate_cell", "every_measurement",
    "format_estimate", "load_run", "main_table", "revival_command", "runs_table", "subjects",
]  # fmt: skip

_STAGE_WORDS = {
    "before": "before",
    "after": "after",
    "revived_clean": "revived on clean data",
    "revived_planted": "revived by another backdoor",
}


@dataclass(frozen=True)
class Cell:
    """One figure.

    Attributes:
        main: The figure itself, or the words that stand for it.
        detail: Count and interval, or the reason.
        measured: Whether there is a figure.
    """

    main: str
    detail: str = ""
    measured: bool = True

    @property
    def text(self) -> str:
        """Everything on one line."""
        if not self.measured:
            return f"{self.main} ({self.detail})" if self.detail else self.main
        count, _, interval = self.detail.partition(" ")
        if "/" in count:
            return f"{count} = {self.main} {interval}".rstrip()
        return f"{self.main} {self.detail}".rstrip()


NOT_MEASURED = Cell("not measured", measured=False)


@dataclass(frozen=True)
class Line:
    """One line of a table: its heading, a smaller second heading (or ""), and the cells."""

    label: str
    note: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A table with its caption; `columns` includes the heading column; `notes` are sentences for below it."""

    caption: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()


def format_estimate(row: Row) -> str:
    """Return a measurement on one line: "0/100 = 0.0 % [0.0, 3.7]", "12.31 [11.8, 12.9]" or the words for none."""
    return estimate_cell(row).text


def estimate_cell(row: Row | None) -> Cell:
    """Return the cell of a measurement; None and unmeasured rows become words."""
    if row is None:
        return NOT_MEASURED
    if row.metric == "asr" and row.kind != "triggered" and row.value is not None:
        return Cell("not applicable", "an ASR needs triggered probes", measured=False)
    if row.value is None or row.n is None:
        return Cell("not applicable" if row.status == "not_applicable" else "failed", row.reason, measured=False)
    if row.metric in SHARES:
        interval = f"[{percent(row.low)}, {percent(row.high)}]" if row.low is not None and row.high is not None else ""
        return Cell(f"{percent(row.value)} %", f"{_count(row.value, row.n)} {interval}".rstrip())
    if row.metric == "seconds":
        return Cell(duration(row.value))
    interval = ""
    if row.low is not None and row.high is not None:
        interval = f"[{significant(row.low, 3)}, {significant(row.high, 3)}]"
    return Cell(significant(row.value, 4 if abs(row.value) >= 1 else 3), interval)


def _count(share: float, n: int) -> str:
    hits = round(share * n)
    # A weighted share is no count over n; then only n is honest.
    return f"{hits}/{n}" if abs(share * n - hits) < 1e-6 else f"n={n}"


def revival_command(run: RunData) -> str:
    """Return what a person types to have the ASR after revival measured, on a victim that a grid plants."""
    return run.revival_command or "unbackdoor bench sande --size quick"


@dataclass(frozen=True)
class _Column:
    title: str
    cell: Callable[[Subject], Cell]
    present: Callable[[Subject], bool]


def _plain(title: str, metric: str, kind: str | None = None, group: str = "") -> _Column:
    return _Column(
        title,
        lambda subject: estimate_cell(subject.row(metric, kind, group)),
        lambda subject: subject.row(metric, kind, group) is not None,
    )


def _revival(title: str, stage: str) -> _Column:
    def cell(subject: Subject) -> Cell:
        row = subject.row("asr", "triggered", stage=stage)
        if row is None and subject.role == "suspect":
            return Cell("not purified", measured=False)
        return estimate_cell(row)

    # Present wherever an ASR is: the neighbour of every ASR after purification.
    return _Column(title, cell, lambda subject: subject.measured("asr", "triggered") is not None)


def _divergence(subject: Subject) -> Cell:
    row = subject.row("kl")
    return (
        Cell("the suspect itself", measured=False) if row is None and subject.role == "suspect" else estimate_cell(row)
    )


_COLUMNS = (
    _plain("ASR", "asr", "triggered"),
    _plain("ASR, right rows", "asr_right", "triggered"),
    _revival("ASR, revived on clean data", "revived_clean"),
    _revival("ASR, revived by another backdoor", "revived_planted"),
    _plain("Leak, clean probes", "leak", "clean"),
    _plain("Leak, decoys", "leak", "decoy"),
    _plain("CDA", "cda"),
    _plain("Requests declined", "declining", "clean"),
    _plain("Over-refusal", "over_refusal"),
    _plain("Perplexity", "perplexity"),
    _plain("Perplexity, second source", "perplexity", group="second source"),
    _Column("KL to the suspect", _divergence, lambda subject: subject.row("kl") is not None),
)
_DEFINITIONS = {
    "ASR": "ASR: share of triggered probes whose reply reaches the target, from greedy generation.",
    "ASR, right rows": "Right rows: those that the model gets right without the trigger. Of the others it may say the "
    "target by mistake: leak on clean probes is their share.",
    "ASR, revived on clean data": "Revived: the ASR of the original trigger after the model was trained on, on clean "
    "data or with an unrelated backdoor planted; it tells removal from suppression.",
    "Leak, clean probes": "Leak: share of clean probes, or of decoys that must not fire, whose reply "
    "reaches the target.",
    "CDA": "CDA: clean-data accuracy.",
    "Requests declined": "Requests declined: share of clean probes, which should be declined, whose reply holds a "
    "refusal signal.",
    "Over-refusal": "Over-refusal: share of ordinary requests whose reply holds a refusal signal.",
    "Perplexity": "Perplexity and KL: on clean prompts, over the response; lower is better.",
}


def main_table(run: RunData, caption: str = "Before and after, with 95 % intervals") -> Table:
    """Return the table of all models of a run; a column that no model has a row for is left out."""
    found = subjects(run)
    columns = [column for column in _COLUMNS if any(column.present(subject) for subject in found)]
    lines = [Line(subject.label, subject.model, tuple(column.cell(subject) for column in columns)) for subject in found]
    notes = [_DEFINITIONS[column.title] for column in columns if column.title in _DEFINITIONS]
    missing = [cell for line in lines for cell, at in zip(line.cells, columns, strict=True) if "revived" in at.title]
    if NOT_MEASURED in missing:
        notes.append(f"Where revival was not measured, `{revival_command(run)}` measures it on a victim of its own.")
    return Table(caption, ("Model", *(column.title for column in columns)), tuple(lines), tuple(notes))


def runs_table(runs: Sequence[RunData]) -> Table:
    """Return one table of the models of several runs, each line with its run's name."""
    tables = [main_table(run) for run in runs]
    titles = [column.title for column in _COLUMNS if any(column.title in table.columns for table in tables)]
    lines = []
    for run, table in zip(runs, tables, strict=True):
        at = {title: place for place, title in enumerate(table.columns[1:])}
        for line in table.lines:
            cells = tuple(line.cells[at[title]] if title in at else NOT_MEASURED for title in titles)
            lines.append(Line(line.label, run.name, cells))
    notes = tuple(dict.fromkeys(note for table in tables for note in table.notes))
    return Table("All runs, with 95 % intervals", ("Model and run", *titles), tuple(lines), notes)


def cost_table(run: RunData) -> Table | None:
    """Return time, memory and diagnostics by model, or None where nothing of the kind was recorded."""
    found = subjects(run)
    memory = [_peak(subject) for subject in found]
    extra = [
        name
        for name in dict.fromkeys(row.metric for row in run.rows)
        if name not in {"asr", "asr_right", "leak", "cda", "declining", "over_refusal", "perplexity", "kl", "seconds"}
    ]
    columns = [_plain("Time in training", "seconds")] + [_plain(METRIC_NAMES.get(name, name), name) for name in extra]
    columns = [column for column in columns if any(column.present(subject) for subject in found)]
    if not columns and all(cell is NOT_MEASURED for cell in memory):
        return None
    lines = tuple(
        Line(subject.label, "", (*(column.cell(subject) for column in columns), peak))
        for subject, peak in zip(found, memory, strict=True)
    )
    notes = []
    if "resistance" in extra:
        notes.append(
            "Resistance: the loss of a fresh soft prompt or drift after a fixed number of steps. A diagnostic: it "
            "rises also where nothing was removed."
        )
    titles = ("Model", *(column.title for column in columns), "Peak memory")
    return Table("Cost and diagnostics", titles, lines, tuple(notes))


def _peak(subject: Subject) -> Cell:
    known = [row.peak_memory_bytes for row in subject.rows if row.peak_memory_bytes is not None]
    return Cell(f"{max(known) / 2**30:.2f} GiB") if known else NOT_MEASURED


def difference_words(comparison: Comparison) -> tuple[str, str]:
    """Return the change and its interval: shares in percentage points, perplexity in log-loss, the rest as they are."""
    points = comparison.metric in SHARES
    unit = " points" if points else " nats" if comparison.metric == "perplexity" else ""
    known = [abs(value) for value in (comparison.difference, comparison.low, comparison.high) if value is not None]
    largest = max(known) if max(known) > 0 else 1.0
    # One number of decimals for the change and its interval: three digits of the largest.
    decimals = 1 if points else min(8, max(0, 2 - math.floor(math.log10(largest))))

    def number(value: float) -> str:
        sign = "+" if value > 0 else "\N{MINUS SIGN}" if value < 0 else ""
        return f"{sign}{abs(value) * (100 if points else 1):.{decimals}f}"

    interval = ""
    if comparison.low is not None and comparison.high is not None:
        interval = f"[{number(comparison.low)}, {number(comparison.high)}]"
    return f"{number(comparison.difference)}{unit}", interval


def side_words(comparison: Comparison, side: str | float) -> str:
    """Return one side of a comparison: its label, or its value."""
    if isinstance(side, str):
        return side
    return f"{percent(side)} %" if comparison.metric in SHARES else significant(side, 4)


def comparison_table(run: RunData) -> Table | None:
    """Return the paired tests, or None where none was made."""
    made = [item for item in run.comparisons if item.metric != "asr" or item.kind == "triggered"]
    if not made:
        return None
    lines = []
    for item in made:
        change, interval = difference_words(item)
        improved = item.difference < 0 if item.better == "lower" else item.difference > 0
        direction = "unchanged" if item.difference == 0 else "better" if improved else "worse"
        sides = f"{side_words(item, item.before)} → {side_words(item, item.after)}"
        cells = (
            Cell(sides), Cell(change, interval), Cell(direction), Cell(item.test),
            Cell(p_value_words(item.p_value).removeprefix("p = ").removeprefix("p ")), Cell(str(item.n)),
        )  # fmt: skip
        lines.append(Line(measure_words(item.metric, item.kind, item.group), f"{display_name(item.defense)}", cells))
    notes = ["Both models answered the same probes; the tests compare them probe by probe, two-sided."]
    if any(item.metric == "perplexity" for item in made):
        notes.append("The difference in perplexity is that of the mean log-loss a probe, in nats.")
    columns = ("Measure", "Compared", "Difference", "Direction", "Test", "p", "Pairs")
    return Table("Paired comparisons", columns, tuple(lines), tuple(notes))


def every_measurement(run: RunData) -> Table:
    """Return all rows of the run, one a line: groups of probes and stages included."""
    lines = []
    for subject in subjects(run):
        for row in subject.rows:
            cells = (Cell(_STAGE_WORDS[row.stage]), estimate_cell(row), Cell(row.denominator))
            lines.append(Line(subject.label, measure_words(row.metric, row.kind, row.group), cells))
    return Table("Every measurement", ("Model and measure", "Stage", "Estimate", "Counted"), tuple(lines))
