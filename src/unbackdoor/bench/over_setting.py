"""What a defense comes to over the values of a setting: ASR and, of label tasks, accuracy, with intervals.

Figure 3 of information conflicts (share of clean data) is one of these. A cell that is not finished is left out, and
named below the panel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from unbackdoor.bench.cell import Cell
from unbackdoor.bench.entries import Plot
from unbackdoor.bench.figures import Figures
from unbackdoor.report.canvas import ACCENT, INK, MUTED, RULE, drawing, new_figure, to_svg
from unbackdoor.report.escape import shown_line
from unbackdoor.report.plots import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
_DRAWN: tuple[tuple[str, str, str, str, str, Any], ...] = (
    ("asr", "triggered", "ASR", ACCENT, "o", "-"),
    ("asr_right", "triggered", "ASR, right rows", INK, "s", (0, (4, 2))),
    ("leak", "clean", "no trigger", MUTED, "^", (0, (1, 1.5))),
    ("cda", "clean", "CDA", INK, "D", (0, (5, 1.5, 1, 1.5))),
)
"""Metric, kind of probes, words, colour, marker, line."""


def panel(figures: Figures, plot: Plot, cells: Sequence[Cell], place: str, name: str) -> Panel:
    """Return the panel of one victim; without a drawing where no cell is finished.

    Args:
        figures: The grid's figures.
        plot: The plot.
        cells: The victim's cells that the plot names.
        place: The victim, in words.
        name: Prefix of the drawing's ids.
    """
    ordered = sorted(cells, key=lambda cell: plot.values[cell.defense])
    done = [cell for cell in ordered if figures.row(cell, "asr", "triggered") is not None]
    missing = [f"{plot.values[cell.defense]:g}" for cell in ordered if cell not in done]
    left_out = f" Left out, not measured: {', '.join(missing)}." if missing else ""
    title = f"After the defense, {place}"
    if not done:
        return Panel(title, "", f"Nothing is drawn yet.{left_out}")
    victim = figures.beside(done[0], "victim")
    with drawing():
        svg = _drawn(figures, plot, done, name)
    own = ", ".join(
        f"{words} {100 * row['value']:.1f} %"
        for metric, kind, words, *_ in _DRAWN
        if (row := figures.row(victim, metric, kind)) is not None
    )
    before = f" The victim before: {own}." if own else ""
    return Panel(title, svg, f"Values are evenly spaced; whiskers: 95 % Wilson intervals.{before}{left_out}")


def _drawn(figures: Figures, plot: Plot, cells: Sequence[Cell], name: str) -> str:
    figure, axes = new_figure(520, 290, left=52, right=150)
    words = []
    shown = [line for line in _DRAWN if any(figures.row(cell, line[0], line[1]) for cell in cells)]
    for at, (metric, kind, title, colour, marker, dash) in enumerate(shown):
        # Side by side: equal figures would hide each other.
        rows = [(place + 0.06 * (at - 1), row) for place, row in _rows(figures, cells, metric, kind)]
        _line(axes, rows, title, colour, marker, dash)
        told = (f"{plot.values[cells[round(place)].defense]:g}: {100 * row['value']:.1f}" for place, row in rows)
        words.append(f"{title} {', '.join(told)}")
    axes.set_ylim(-3, 103)
    axes.set_yticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    axes.set_xticks(range(len(cells)), [f"{plot.values[cell.defense]:g}" for cell in cells])
    axes.set_xlim(-0.5, len(cells) - 0.5)
    axes.set_xlabel(shown_line(plot.x, 70))
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, labelcolor=INK, fontsize=12, borderaxespad=0,
        handlelength=3,
    )  # fmt: skip
    return to_svg(figure, name, f"Figures after the defense by {plot.x}, in percent. {'; '.join(words)}.")


def _rows(figures: Figures, cells: Sequence[Cell], metric: str, kind: str) -> list[tuple[int, Row]]:
    found = [(place, figures.row(cell, metric, kind)) for place, cell in enumerate(cells)]
    return [(place, row) for place, row in found if row is not None]


def _line(axes: Axes, rows: Sequence[tuple[float, Row]], title: str, colour: str, marker: str, dash: Any) -> None:
    values = [100 * row["value"] for _, row in rows]
    below = [max(0.0, value - 100 * row["low"]) for value, (_, row) in zip(values, rows, strict=True)]
    above = [max(0.0, 100 * row["high"] - value) for value, (_, row) in zip(values, rows, strict=True)]
    axes.errorbar(
        [place for place, _ in rows], values, yerr=[below, above], label=title, color=colour, marker=marker,
        markersize=4.5, markerfacecolor="none", linestyle=dash, linewidth=1.3, elinewidth=0.9, capsize=2.5,
    )  # fmt: skip
