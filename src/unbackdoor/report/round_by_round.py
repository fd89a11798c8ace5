"""The section "Round by round": what fired after each round, how hard its fits were, and the words under each drift.

A run with several defenses shows them one after the other, each under its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unbackdoor.report.canvas import ACCENT, INK, MUTED, RULE, drawing, new_figure, to_svg
from unbackdoor.report.escape import shown_line
from unbackdoor.report.plots import Panel, logarithmic
from unbackdoor.report.records import RunData
from unbackdoor.report.rounds import ASKED, Fit, Rate, Round, Rounds
from unbackdoor.report.tables import NOT_MEASURED, Cell, Line, Table
from unbackdoor.report.wording import display_name, joined, percent, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIAGNOSTIC = "A diagnostic: it rises also where nothing was removed."
HOW_TO_READ = (
    "Read from the first round on: under a drift the model first says the defender's own openings, then often what "
    "the backdoor says, then ordinary answers. Words that no opening names and that recur over prompts point at the "
    "backdoor."
)
TAKEN_UP = (
    "Taken up: words of the suspect that later drifts are fitted to, with how sure it is of them on any prompt once "
    "the first one is said, how much likelier they are there than anywhere (nats), and in how many more of the replies "
    "their first three words are than without a drift; likeness: how much nearer they are to the openings than safe "
    "answers are. What a backdoor says is sure, or often said, and often like them; so are some idioms."
)
CHOICE = (
    "Mean loss of the unwanted answers under a first drift at each place where drifts may end, on prompts of the "
    "defender that it was not fitted to; no trigger is asked."
)
UNWATCHED = "No probes were asked between the rounds; `purify --watch N` asks N of each kind after every round."
_PLACES = {"words": "user's words", "prompt": "prompt"}
_NAMES = {"triggered": "ASR", "clean": "Leak, clean probes", "decoy": "Leak, decoys"}
_STYLES = {
    "triggered": ("o", ACCENT, ACCENT, "-"),
    "clean": ("o", MUTED, "none", "--"),
    "decoy": ("^", INK, "none", ":"),
}
_SAMPLES = {
    "triggered": "ASR: filled circles, solid",
    "clean": "leak on clean probes: open circles, dashed",
    "decoy": "leak on decoys: triangles, dotted",
}
_MOST_TICKS = 12
_MOST_ADOPTED = 8


@dataclass(frozen=True)
class Section:
    """What is shown of one defense; its `title` is "" where it is the only one with rounds."""

    title: str
    panels: list[Panel]
    figures: Table
    spoken: Table | None
    choice: Table | None


def sections(run: RunData, prefix: str) -> list[Section]:
    """Return a section for each defense of a run of which rounds are known."""
    found = []
    for at, (title, of) in enumerate(_titled(run), start=1):
        figures = figures_table(of, title)
        if figures is not None:
            drawn = panels(of, f"{prefix}d{at}-")
            found.append(Section(title, drawn, figures, words_table(of, title), choice_table(of, title)))
    return found


def tables(run: RunData) -> list[Table]:
    """Return the tables of all sections, one defense after the other."""
    found = [make(of, title) for title, of in _titled(run) for make in (figures_table, words_table, choice_table)]
    return [table for table in found if table is not None]


def perturbing(run: RunData) -> str:
    """Return who perturbs the layer of the hidden states, by name where the run has several defenses with rounds."""
    layer = run.hidden_states.layer if run.hidden_states is not None else None
    named = [title for title, of in _titled(run) if title and of.layer is not None and of.layer == layer]
    return joined(named) if named else "the defense"


def _titled(run: RunData) -> list[tuple[str, Rounds]]:
    return [(display_name(of.defense) if len(run.rounds) > 1 else "", of) for of in run.rounds]


def _caption(words: str, title: str) -> str:
    return f"{words}, {title}" if title else words


def panels(of: Rounds, prefix: str) -> list[Panel]:
    """Return the panels of rates and of inner loss by round, each where the defense has its figures."""
    rounds = of.rounds
    found = []
    if any(item.rates for item in rounds):
        with drawing():
            svg = _rates(rounds, f"{prefix}round-rates")
        samples = "; ".join(_SAMPLES[kind] for kind in _kinds(rounds))
        key = f"{samples}. Whiskers: 95 % Wilson intervals; n a round: {_counts(rounds)}."
        found.append(Panel("ASR and leak by round", svg, key[:1].upper() + key[1:]))
    if any(item.losses for item in rounds):
        with drawing():
            svg = _losses(rounds, f"{prefix}round-losses")
        key = f"Points: one {_fit_word(rounds)} each; line: their mean. {DIAGNOSTIC}"
        found.append(Panel("Inner loss by round", svg, key))
    return found


def _kinds(rounds: Sequence[Round]) -> list[str]:
    return [kind for kind in ASKED if any(kind in item.rates for item in rounds)]


def _counts(rounds: Sequence[Round]) -> str:
    parts = []
    for kind in _kinds(rounds):
        asked = [item.rates[kind].asked for item in rounds if kind in item.rates]
        many = str(asked[0]) if min(asked) == max(asked) else f"{min(asked)} to {max(asked)}"
        parts.append(f"{many} {kind}")
    return joined(parts)


def _fit_word(rounds: Sequence[Round]) -> str:
    return " or ".join(dict.fromkeys(fit.name.partition(" ")[0] for item in rounds for fit in item.fits))


def _rates(rounds: Sequence[Round], name: str) -> str:
    figure, axes = new_figure(340, 220)
    words = []
    for at, kind in enumerate(_kinds(rounds)):
        marker, colour, face, dash = _STYLES[kind]
        there = [(item.number, item.rates[kind]) for item in rounds if kind in item.rates]
        # Side by side: equal rates would hide each other.
        places = [number + 0.09 * (at - 1) for number, _ in there]
        values = [100 * rate.share for _, rate in there]
        ends = [rate.interval for _, rate in there]
        below = [max(0.0, value - 100 * low) for value, (low, _) in zip(values, ends, strict=True)]
        above = [max(0.0, 100 * high - value) for value, (_, high) in zip(values, ends, strict=True)]
        axes.errorbar(
            places, values, yerr=[below, above], color=colour, marker=marker, markersize=4.5, markerfacecolor=face,
            linestyle=dash, linewidth=1.3, elinewidth=0.9, capsize=2.5,
        )  # fmt: skip
        words.append(f"{_NAMES[kind]} {', '.join(f'{number}: {rate.fired}/{rate.asked}' for number, rate in there)}")
    axes.set_ylim(-3, 103)
    axes.set_yticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    _round_axis(axes, rounds)
    return to_svg(figure, name, f"Probes that fired after each round. {'; '.join(words)}.")


def _losses(rounds: Sequence[Round], name: str) -> str:
    figure, axes = new_figure(340, 220)
    fitted = [item for item in rounds if item.losses]
    means = [_mean(item.losses) for item in fitted]
    axes.plot([item.number for item in fitted], means, color=ACCENT, linewidth=1.5)
    points = [(item.number, loss) for item in fitted for loss in item.losses]
    xs, ys = [number for number, _ in points], [loss for _, loss in points]
    axes.scatter(xs, ys, s=18, facecolors="none", edgecolors=INK, linewidths=1.0)
    if min(ys) > 0 and max(ys) / min(ys) > 100:
        logarithmic(axes)
    else:
        axes.set_ylim(bottom=min(0.0, min(ys)))
    _round_axis(axes, rounds)
    words = ", ".join(f"{item.number}: {significant(mean, 3)}" for item, mean in zip(fitted, means, strict=True))
    return to_svg(figure, name, f"Mean inner loss by round. {words}.")


def _mean(values: Sequence[float]) -> float:
    # Divided first: two of the largest numbers have no sum.
    return sum(value / len(values) for value in values)


def _round_axis(axes: Axes, rounds: Sequence[Round]) -> None:
    numbers = [item.number for item in rounds]
    axes.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
    axes.set_xticks(numbers[:: max(1, -(-len(numbers) // _MOST_TICKS))])
    axes.set_xlabel("round")
    axes.grid(axis="y", color=RULE, linewidth=0.6)


def figures_table(of: Rounds, title: str = "") -> Table | None:
    """Return rates and inner losses by round, or None where there are no rounds; `title` names the defense."""
    rounds = of.rounds
    if not rounds:
        return None
    kinds = _kinds(rounds)
    steps = any(fit.steps is not None for item in rounds for fit in item.fits)
    losses = any(item.losses for item in rounds)
    lines = []
    for item in rounds:
        cells = [_rate_cell(item.rates.get(kind)) for kind in kinds]
        cells += [_loss_cell(item)] if losses else []
        cells += [_steps_cell(item)] if steps else []
        lines.append(Line(f"Round {item.number}", "", tuple(cells)))
    notes = [f"Inner loss: what a fresh {_fit_word(rounds)} came to at the end of its fit. {DIAGNOSTIC}"] * losses
    if steps:
        notes.append(
            "A parrot stops when it is good enough; then its steps tell how hard it was to learn, not its loss."
        )
    notes += [] if kinds else [UNWATCHED]
    titles = ["Round", *(_NAMES[kind] for kind in kinds), *["Inner loss"] * losses, *["Steps"] * steps]
    return Table(_caption("Round by round", title), tuple(titles), tuple(lines), tuple(notes))


def _rate_cell(rate: Rate | None) -> Cell:
    if rate is None:
        return NOT_MEASURED
    low, high = rate.interval
    return Cell(f"{percent(rate.share)} %", f"{rate.fired}/{rate.asked} [{percent(low)}, {percent(high)}]")


def _loss_cell(item: Round) -> Cell:
    if not item.losses:
        return NOT_MEASURED
    ends = f"[{significant(min(item.losses), 3)}, {significant(max(item.losses), 3)}]" if len(item.losses) > 1 else ""
    return Cell(significant(_mean(item.losses), 3), ends)


def _steps_cell(item: Round) -> Cell:
    steps = [fit.steps for fit in item.fits if fit.steps is not None]
    return Cell(", ".join(map(str, steps))) if steps else NOT_MEASURED


def words_table(of: Rounds, title: str = "") -> Table | None:
    """Return what the model said under each drift, round by round, or None where nothing was noted."""
    spoken = [fit for item in of.rounds for fit in item.fits if fit.says]
    if not spoken:
        return None
    layers, openings = any(fit.layer is not None for fit in spoken), any(fit.openings for fit in spoken)
    places = len({fit.at for fit in spoken}) > 1
    lines = []
    for item in of.rounds:
        for fit in item.fits:
            if fit.says:
                cells = [Cell(_quoted(fit.says, 4, 100))]
                cells += [Cell(_quoted(fit.openings, 4, 40))] if openings else []
                cells += [Cell("" if fit.layer is None else str(fit.layer))] if layers else []
                cells += [Cell(_PLACES.get(fit.at or "", ""))] if places else []
                lines.append(Line(f"Round {item.number}", fit.name, (*cells, _fit_losses(fit))))
        if item.adopted:
            empty = [Cell("")] * (openings + layers + places + 1)
            lines.append(Line(f"Round {item.number}", "taken up", (Cell(_adopted(item)), *empty)))
    titles = ["Round and drift", "Says", *["Openings"] * openings, *["Layer"] * layers, *["Ends with"] * places, "Loss"]
    notes = [HOW_TO_READ, *[TAKEN_UP] * any(item.adopted for item in of.rounds)]
    return Table(_caption("Words under each drift", title), tuple(titles), tuple(lines), tuple(notes))


def _adopted(item: Round) -> str:
    found = []
    for one in item.adopted[:_MOST_ADOPTED]:
        sure = "" if one.certainty is None else f" {significant(one.certainty, 2)}"
        nats = [] if one.evidence is None else [f"{significant(one.evidence, 2)} nats"]
        said = [f"in {percent(one.share)} % more replies"] if one.share and one.share > 0 else []
        near = [] if one.likeness is None else [f"likeness {one.likeness:.2f}"]
        how = f" ({', '.join([*nats, *said, *near])})" if nats or said or near else ""
        found.append(f"{_quoted([one.opening], 1, 60)}{sure}{how}")
    if more := len(item.adopted) - len(found):
        found.append(f"and {more} more")
    return " · ".join(found)


def choice_table(of: Rounds, title: str = "") -> Table | None:
    """Return what layer and length of the drifts were chosen from, or None where there was no choice."""
    if not of.choice:
        return None
    known = [place.loss for place in of.choice if place.loss is not None]
    lines = []
    for place in of.choice:
        loss = "not finite" if place.loss is None else significant(place.loss, 3)
        chosen = "chosen" if place.loss is not None and place.loss == min(known) else ""
        lines.append(Line(f"Layer {place.layer}", f"{place.tokens} tokens", (Cell(loss, chosen),)))
    return Table(_caption("Where the drifts act", title), ("Layer and length", "Loss"), tuple(lines), (CHOICE,))


def _fit_losses(fit: Fit) -> Cell:
    if fit.loss is None:
        return NOT_MEASURED
    return Cell(significant(fit.loss, 3), "" if fit.safe is None else f"safe answers {significant(fit.safe, 3)}")


def _quoted(texts: Sequence[str], most: int, limit: int) -> str:
    shown = [f"“{shown_line(text, limit)}”" for text in texts[:most]]
    left = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return " · ".join([*shown, *left])
