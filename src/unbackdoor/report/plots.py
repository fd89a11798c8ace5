"""The plots of a report, as SVG for its page: success rates, target probabilities, training curves, hidden states.

Small panels, one idea each, which the page sets side by side or, on a phone, below each other. Meaning is never carried
by colour alone: lines differ in dash, points in shape.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unbackdoor.report.canvas import ACCENT, INK, MUTED, RULE, drawing, new_figure, to_svg
from unbackdoor.report.escape import shown_line
from unbackdoor.report.records import CaseStudies, HiddenStates, Row, RunData, TargetCurve
from unbackdoor.report.subjects import subjects
from unbackdoor.report.wording import percent, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROLE_COLOUR = {"suspect": INK, "control": MUTED, "purified": ACCENT, "reference": RULE}
_NOT_LOSSES = frozenset({"step", "learning_rate", "gradient_norm", "seconds", "tokens"})
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_MOST_POINTS = 300


@dataclass(frozen=True)
class Panel:
    """One plot: its title for the page, the SVG, and a key of (sample, meaning) pairs in words."""

    title: str
    svg: str
    key: str = ""


def success_rates(run: RunData, prefix: str) -> Panel | None:
    """Return the ASR of every model as bars with their 95 % intervals, or None where no ASR was measured."""
    found = [(subject, row) for subject in subjects(run) if (row := subject.measured("asr", "triggered")) is not None]
    if not found:
        return None
    bars = [(subject.label, subject.role, row) for subject, row in found]
    with drawing():
        svg = _bars(bars, f"{prefix}asr")
    return Panel("Attack success rate on triggered probes", svg, "Whiskers are 95 % intervals.")


def _bars(bars: Sequence[tuple[str, str, Row]], name: str) -> str:
    figure, axes = new_figure(430, 34 + 42 * len(bars), left=124, right=62, bottom=26)
    words = []
    for at, (label, role, row) in enumerate(bars):
        value = 100 * (row.value or 0.0)
        low = value if row.low is None else 100 * row.low
        high = value if row.high is None else 100 * row.high
        axes.barh(at, value, height=0.4, color=_ROLE_COLOUR[role], alpha=0.6, linewidth=0)
        whisker = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axes.errorbar(value, at, xerr=whisker, color=INK, capsize=3.5, linewidth=1.3)
        axes.text(102, at, f"{value:.1f} %", va="center", ha="left", color=INK, clip_on=False)
        words.append(f"{label} {percent(row.value or 0.0)} % ({low:.1f} to {high:.1f})")
    axes.set_yticks(range(len(bars)), [textwrap.fill(shown_line(label, 48), 18) for label, _, _ in bars])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_xlim(0, 100)
    axes.set_ylim(len(bars) - 0.45, -0.55)
    axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    return to_svg(figure, name, f"Attack success rates with 95 % intervals: {'; '.join(words)}.")


def target_probabilities(run: RunData, prefix: str) -> list[Panel]:
    """Return one panel for each treated model: probability of each target token before and after."""
    cases = run.case_studies
    if cases is None or not cases.models or not cases.target_tokens:
        return []
    before = next((curve for curve in cases.models if curve.role == "suspect"), None)
    treated = [curve for curve in cases.models if curve.role in ("control", "purified")]
    labels = {(subject.role, subject.model): subject.label for subject in subjects(run)}
    panels = []
    for at, after in enumerate(treated or ([before] if before else [])):
        title = labels.get((after.role, after.model), after.model)
        pair = (before if after is not before else None, after)
        with drawing():
            svg = _probabilities(cases, pair, f"{prefix}target{at}")
        panels.append(Panel(title, svg))
    return panels


def _probabilities(cases: CaseStudies, pair: tuple[TargetCurve | None, TargetCurve], name: str) -> str:
    figure, axes = new_figure(340, 250, bottom=64)
    at = list(range(1, len(cases.target_tokens) + 1))
    words = []
    # The earlier model's lines are broader, so that they are seen where the later ones lie on top of them.
    for curve, colour, when, width in ((pair[0], INK, "before", 3.2), (pair[1], ACCENT, "after", 1.6)):
        if curve is None:
            continue
        sides = ((curve.triggered, "-", "o", "with"), (curve.clean, (0, (3, 2)), "s", "without"))
        for values, dash, marker, how in sides:
            if values:
                axes.plot(at, values, color=colour, linestyle=dash, marker=marker, markersize=3.4, linewidth=width)
                words.append(f"{when}, {how} the trigger {values[0]:.3f} to {values[-1]:.3f}")
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.5, 1])
    shown = at[:: max(1, -(-len(at) // 12))]
    axes.set_xticks(shown, [_token(cases.target_tokens[place - 1]) for place in shown], rotation=40, ha="right")
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    return to_svg(figure, name, f"Probability of the target's tokens, first to last: {'; '.join(words)}.")


def _token(text: str) -> str:
    # Byte-level and SentencePiece vocabularies write a leading blank as one of these.
    return shown_line(text.replace("\u0120", " ").replace("\u2581", " ").strip() or text, 12)


def curves(run: RunData, prefix: str) -> list[Panel]:
    """Return one panel a training stage; rounds of one stage are joined into one panel."""
    panels = []
    for at, (title, steps, rounds) in enumerate(joined_stages(run.curves or {})):
        terms = [key for key in _terms(steps) if key not in _NOT_LOSSES]
        if not terms:
            continue
        terms = sorted(terms, key=lambda term: term != "loss")[:4]
        with drawing():
            svg = _curve(steps, terms, rounds, f"{prefix}curve{at}")
        dashes = ("solid", "dashed", "dotted", "dash-dotted")
        key = ", ".join(f"{term.replace('_', ' ')} {dash}" for term, dash in zip(terms, dashes, strict=False))
        panels.append(Panel(title, svg, key if len(terms) > 1 else ""))
    return panels


def _terms(steps: Sequence[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(key for step in steps for key in step))


def joined_stages(
    stages: Mapping[str, Sequence[Mapping[str, float]]],
) -> list[tuple[str, list[Mapping[str, float]], list[int]]]:
    """Join stages whose names differ only in a number, in the order of that number.

    Returns:
        Title, steps one after the other, and the places where a later round begins.
    """
    groups: dict[str, list[str]] = {}
    for name in stages:
        groups.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    found = []
    for names in groups.values():
        names.sort(key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)])
        steps: list[Mapping[str, float]] = []
        starts = []
        for name in names:
            starts.append(len(steps))
            steps += stages[name]
        title = names[0] if len(names) == 1 else f"{re.sub(r'[-_/ ]*[0-9]+', '', names[0])}, {len(names)} rounds"
        if steps:
            found.append((title, steps, starts[1:]))
    return found


def _curve(steps: Sequence[Mapping[str, float]], terms: Sequence[str], rounds: Sequence[int], name: str) -> str:
    figure, axes = new_figure(320, 200)
    stride = max(1, -(-len(steps) // _MOST_POINTS))
    everything = []
    for term, dash in zip(terms, _DASHES, strict=False):
        points = [(at, step[term]) for at, step in enumerate(steps, start=1) if term in step]
        points = points[::stride] + (points[-1:] if (len(points) - 1) % stride else [])
        everything += [value for _, value in points]
        colour = ACCENT if term == terms[0] else INK
        marker = "o" if len(points) == 1 else ""
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=dash, linewidth=1.5, marker=marker, markersize=4)
    for start in rounds if len(rounds) <= 30 else ():
        axes.axvline(start + 0.5, color=RULE, linewidth=0.7)
    if min(everything) > 0 and max(everything) / min(everything) > 100:
        logarithmic(axes)
    else:
        axes.set_ylim(bottom=min(0.0, min(everything)))
    axes.set_xlabel("step")
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    first, last = steps[0].get(terms[0]), steps[-1].get(terms[0])
    ends = f" from {significant(first, 3)} to {significant(last, 3)}" if first is not None and last is not None else ""
    return to_svg(figure, name, f"{terms[0]} over {len(steps)} steps{ends}.")


def logarithmic(axes: Axes) -> None:
    """Give the axes a logarithmic scale with plain numbers."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def hidden_states(run: RunData, prefix: str) -> list[Panel]:
    """Return one scatter a model on common axes: the suspect first, then those after it."""
    states = run.hidden_states
    if states is None or not states.points:
        return []
    models = list(dict.fromkeys((point.role, point.model) for point in states.points))
    order = {"suspect": 0, "control": 1, "purified": 2, "reference": 3}
    models.sort(key=lambda model: order[model[0]])
    labels = {(subject.role, subject.model): subject.label for subject in subjects(run)}
    panels = []
    for at, model in enumerate(models):
        with drawing():
            svg = _scatter(states, model, f"{prefix}states{at}")
        panels.append(Panel(labels.get(model, model[1]), svg))
    return panels


def _scatter(states: HiddenStates, model: tuple[str, str], name: str) -> str:
    figure, axes = new_figure(320, 280, left=54)
    shapes = {"clean": ("o", MUTED, False), "decoy": ("^", INK, False), "triggered": ("o", ACCENT, True)}
    words = []
    for kind, (marker, colour, filled) in shapes.items():
        points = [point for point in states.points if (point.role, point.model) == model and point.kind == kind]
        if points:
            xs, ys = [point.x for point in points], [point.y for point in points]
            face = colour if filled else "none"
            axes.scatter(xs, ys, s=22, marker=marker, facecolors=face, edgecolors=colour, linewidths=1.0, alpha=0.85)
            words.append(f"{len(points)} {kind} centred at {sum(xs) / len(xs):.2f}, {sum(ys) / len(ys):.2f}")
    # Common limits, from all models: a panel alone must not be rescaled.
    for values, limit in (([p.x for p in states.points], axes.set_xlim), ([p.y for p in states.points], axes.set_ylim)):
        margin = 0.06 * (max(values) - min(values)) or 1.0
        limit(min(values) - margin, max(values) + margin)
    axes.set_xlabel(f"first component ({percent(states.explained[0])} %)")
    axes.set_ylabel(f"second component ({percent(states.explained[1])} %)")
    axes.grid(color=RULE, linewidth=0.5)
    return to_svg(figure, name, f"Hidden states in two components: {'; '.join(words)}.")
