"""Round by round over the values of a setting: earliest round with ASR below a threshold, and ASR after every round.

The figures are those that were asked between the rounds of watched cells (`Grid.watch`). A cell that is not finished is
left out and said so; one that never fell below the threshold is a cross on a line above all rounds, never a number.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbackdoor.bench import over_setting
from unbackdoor.bench.cell import Cell
from unbackdoor.bench.entries import Plot
from unbackdoor.bench.figures import Figures
from unbackdoor.bench.store import ENDED, ROUNDS, Result
from unbackdoor.report.canvas import ACCENT, INK, MUTED, RULE, drawing, new_figure, to_svg
from unbackdoor.report.escape import shown_line
from unbackdoor.report.plots import Panel
from unbackdoor.report.tables import NOT_MEASURED, Line, Table
from unbackdoor.report.tables import Cell as Entry
from unbackdoor.report.wording import display_name, percent
from unbackdoor.run import write_atomically
from unbackdoor.types import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE = "plots.svg"
_MARKERS = "os^DvPX<>*ph"
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_COLOURS = (ACCENT, INK, MUTED)
_OVER = Entry("–", measured=False)


@dataclass(frozen=True)
class Trial:
    """One value of the setting, as far as its defense went.

    Attributes:
        value: The value.
        hits: Of every round, how many triggered probes fired and how many were asked.
    """

    value: float
    hits: tuple[tuple[int, int], ...]

    @property
    def limit(self) -> int:
        """Return how many rounds were asked after."""
        return len(self.hits)

    def earliest(self, threshold: float) -> int | None:
        """Return the first round after which ASR is below the threshold, or None."""
        return next((at for at, (fired, asked) in enumerate(self.hits, 1) if fired / asked < threshold), None)


def asked_of(result: Result | None) -> list[Mapping[str, Any]]:
    """Return what was asked after each round of a finished cell; empty where nobody did."""
    noted = (result.notes or {}).get(ROUNDS) if result is not None and result.status == "done" else None
    return list(noted) if isinstance(noted, list) else []


def ended(result: Result | None) -> str:
    """Return that the experimenter ended the cell's defense, in words, or ""."""
    return str((result.notes or {}).get(ENDED, "")) if result is not None else ""


def draw(figures: Figures, folder: Path) -> list[Panel]:
    """Return the panels of all plots, and write those that are drawn as plots.svg; an older file is removed."""
    panels = [panel for number in range(len(figures.grid.plots)) for panel in _panels(figures, number)]
    drawn = [panel for panel in panels if panel.svg]
    if drawn:
        write_atomically(folder / FILE, _file(drawn))
    else:
        (folder / FILE).unlink(missing_ok=True)
    return panels


def tables(figures: Figures) -> list[Table]:
    """Return, for each victim, what fired after every round of its defenses; none where nobody asked."""
    groups: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in figures.keys:
        if asked_of(figures.results.get(cell)) and not cell.is_revival:
            groups.setdefault((cell.model, cell.attack, cell.seed), []).append(cell)
    return [_table(figures, cells, _place(*where)) for where, cells in groups.items()]


def _table(figures: Figures, cells: Sequence[Cell], place: str) -> Table:
    found = {cell: asked_of(figures.results[cell]) for cell in cells}
    most = max(map(len, found.values()))
    lines = []
    for cell, rounds in found.items():
        entries = [_entry(item) for item in rounds] + [_OVER] * (most - len(rounds))
        lines.append(Line(display_name(cell.defense), ended(figures.results[cell]), tuple(entries)))
    note = (
        "ASR of triggered probes, and leak of clean ones, asked between the rounds; the defense was told nothing. "
        "95 % intervals (Wilson)."
    )
    columns = ("Defense", *(f"Round {number}" for number in range(1, most + 1)))
    return Table(f"Round by round, {place}", columns, tuple(lines), (note,))


def _entry(item: Mapping[str, Any]) -> Entry:
    if "triggered" not in item:
        return NOT_MEASURED
    fired, asked = item["triggered"]
    low, high = wilson(fired, asked)
    leak = "; clean {}/{}".format(*item["clean"]) if "clean" in item else ""
    return Entry(f"{percent(fired / asked)} %", f"{fired}/{asked} [{percent(low)}, {percent(high)}]{leak}")


def _panels(figures: Figures, number: int) -> list[Panel]:
    plot = figures.grid.plots[number]
    groups: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in figures.keys:
        if cell.defense in plot.values and cell.subject == "victim" and not cell.is_revival:
            groups.setdefault((cell.model, cell.attack, cell.seed), []).append(cell)
    found = []
    for at, (where, cells) in enumerate(groups.items()):
        name = f"plot{number}-{at}"
        if plot.of == "outcome":
            found.append(over_setting.panel(figures, plot, cells, _place(*where), name))
        else:
            found += _pair(figures, plot, cells, _place(*where), name)
    return found


def _pair(figures: Figures, plot: Plot, cells: Sequence[Cell], place: str, name: str) -> list[Panel]:
    """Return the two panels of a plot on one victim, or one without a drawing where no cell is finished."""
    trials, missing = [], []
    for cell in sorted(cells, key=lambda cell: plot.values[cell.defense]):
        trial, state = _trial(figures, plot, cell)
        if trial is not None:
            trials.append(trial)
        else:
            missing.append(f"{plot.values[cell.defense]:g} ({state})")
    left_out = f" Left out: {', '.join(missing)}." if missing else ""
    below = f"ASR below {_threshold(plot)}"
    first, second = f"Earliest round with {below}, {place}", f"ASR by round, {place}"
    if not trials:
        return [Panel(first, "", f"Nothing is drawn yet.{left_out}")]
    counts = sorted({asked for trial in trials for _, asked in trial.hits})
    probes = f"n = {_range(counts)} triggered probes a round"
    never = [trial.limit for trial in trials if trial.earliest(plot.threshold) is None]
    crosses = f"Cross: not below {_threshold(plot)} within {_range(never)} rounds. " if never else ""
    with drawing():
        svgs = _earliest(plot, trials, f"{name}-earliest"), _by_round(plot, trials, f"{name}-rounds")
    return [
        Panel(first, svgs[0], f"{crosses}Values are evenly spaced; {probes}.{left_out}"),
        Panel(second, svgs[1], f"Dotted line: {_threshold(plot)}. Intervals: table below; {probes}.{left_out}"),
    ]


def _trial(figures: Figures, plot: Plot, cell: Cell) -> tuple[Trial | None, str]:
    """Return the trial of a cell, or None and why there is none."""
    result = figures.results.get(cell)
    if result is None:
        return None, "not run yet"
    if result.status != "done":
        return None, result.status.replace("_", " ")
    hits = tuple((item["triggered"][0], item["triggered"][1]) for item in asked_of(result) if "triggered" in item)
    if not hits:
        return None, "nothing was asked between rounds"
    return Trial(plot.values[cell.defense], hits), ""


def _earliest(plot: Plot, trials: Sequence[Trial], name: str) -> str:
    figure, axes = new_figure(520, 250, left=52)
    limit = max(trial.limit for trial in trials)
    step = max(1, -(-limit // 8))
    top = limit + step
    reached = [trial.earliest(plot.threshold) for trial in trials]
    done = [(at, number) for at, number in enumerate(reached) if number is not None]
    never = [at for at, number in enumerate(reached) if number is None]
    if done:
        axes.plot(*zip(*done, strict=True), color=ACCENT, marker="o", markersize=6, linestyle="none")
    if never:
        axes.plot(never, [top] * len(never), color=INK, marker="x", markersize=7, linestyle="none")
    axes.axhline(top, color=RULE, linewidth=0.8, linestyle=(0, (4, 2)))
    numbers = list(range(1, limit + 1, step))
    axes.set_yticks([*numbers, top], [*map(str, numbers), "none"])
    axes.set_ylim(0.4, top + 0.6)
    _value_axis(axes, plot, trials)
    words = [
        f"{trial.value:g}: {f'none within {trial.limit} rounds' if number is None else f'round {number}'}"
        for trial, number in zip(trials, reached, strict=True)
    ]
    title = f"Earliest round with ASR below {_threshold(plot)} by {plot.x}"
    return to_svg(figure, name, f"{title}. {'; '.join(words)}.")


def _value_axis(axes: Axes, plot: Plot, trials: Sequence[Trial]) -> None:
    axes.set_xticks(range(len(trials)), [f"{trial.value:g}" for trial in trials])
    axes.set_xlim(-0.5, len(trials) - 0.5)
    axes.set_xlabel(shown_line(plot.x, 70))
    axes.grid(axis="y", color=RULE, linewidth=0.6)


def _by_round(plot: Plot, trials: Sequence[Trial], name: str) -> str:
    figure, axes = new_figure(520, 290, left=52, right=150)
    words = []
    for at, trial in enumerate(trials):
        numbers = range(1, len(trial.hits) + 1)
        axes.plot(
            numbers, [100 * fired / asked for fired, asked in trial.hits], label=f"{trial.value:g}", linewidth=1.4,
            color=_COLOURS[at % len(_COLOURS)], linestyle=_DASHES[at % len(_DASHES)], markersize=5,
            marker=_MARKERS[at % len(_MARKERS)], markerfacecolor="none",
        )  # fmt: skip
        words.append(f"{trial.value:g}: {', '.join(f'{fired}/{asked}' for fired, asked in trial.hits)}")
    axes.axhline(100 * plot.threshold, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.set_ylim(-3, 103)
    axes.set_yticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    last = max(len(trial.hits) for trial in trials)
    axes.set_xlim(0.7, last + 0.3)
    axes.set_xticks(range(1, last + 1))
    axes.set_xlabel("round")
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    title = textwrap.fill(shown_line(plot.x, 60), 18)
    legend = axes.legend(
        title=title, loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, labelcolor=INK, fontsize=12,
        borderaxespad=0, handlelength=3, alignment="left", title_fontsize=12,
    )  # fmt: skip
    legend.get_title().set_color(MUTED)
    return to_svg(figure, name, f"Triggered probes that fired after each round, by {plot.x}. {'; '.join(words)}.")


def _file(panels: Sequence[Panel]) -> str:
    """Return all panels below each other as an SVG file, on white: it has no page to take colours from."""
    parts, bottom, widest = [], 0.0, 0.0
    for panel in panels:
        size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', panel.svg)
        assert size is not None, "to_svg writes points"
        width, height = float(size[1]), float(size[2])
        title = html.escape(shown_line(panel.title, 90), quote=True)
        parts.append(f'<text x="12" y="{bottom + 26:g}" style="font: 600 13px sans-serif">{title}</text>')
        inner = panel.svg.replace(size[0], f'width="{width:g}" height="{height:g}"', 1)
        parts.append(inner.replace("<svg ", f'<svg x="12" y="{bottom + 36:g}" ', 1))
        bottom, widest = bottom + height + 48, max(widest, width + 24, 8.0 * len(panel.title[:90]))
    shape = f'width="{widest:g}" height="{bottom:g}" viewBox="0 0 {widest:g} {bottom:g}"'
    name = html.escape(shown_line("; ".join(panel.title for panel in panels), 400), quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {shape} role="group" aria-label="{name}" '
        f'style="color: #1f2328; background: #ffffff">\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _place(model: str, attack: str, seed: int) -> str:
    return f"{attack}, seed {seed}, {model}"


def _threshold(plot: Plot) -> str:
    return f"{percent(plot.threshold).removesuffix('.0')} %"


def _range(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"
