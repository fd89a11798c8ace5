"""The models of a run, each with its measurements: rows of `results.json` gathered and named for the reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from unbackdoor.report.records import Row, RunData
from unbackdoor.report.wording import display_name

_ROLE_ORDER = {"suspect": 0, "control": 1, "purified": 2, "reference": 3}
_REVIVALS = ("revived_clean", "revived_planted")


@dataclass(frozen=True)
class Subject:
    """One model of a run with its measurements; those after revival are kept with the model that was revived."""

    label: str
    model: str
    attack: str
    defense: str
    role: str
    stage: str
    seed: int | None
    rows: tuple[Row, ...]

    def row(self, metric: str, kind: str | None = None, group: str = "", stage: str | None = None) -> Row | None:
        """Return the measurement asked for (`kind` None: whichever was measured), or None."""
        wanted = self.stage if stage is None else stage
        for row in self.rows:
            same = row.metric == metric and row.group == group and row.stage == wanted
            if same and (kind is None or row.kind == kind):
                return row
        # A metric that could not be had at all has one row of kind "all" that says why.
        for row in self.rows:
            if row.metric == metric and row.stage == wanted and row.kind == "all" and row.value is None:
                return row
        return None

    def measured(self, metric: str, kind: str | None = None, group: str = "", stage: str | None = None) -> Row | None:
        """Return the measurement asked for if it has a value, else None."""
        row = self.row(metric, kind, group, stage)
        return row if row is not None and row.value is not None else None


def subjects(run: RunData) -> list[Subject]:
    """Gather the rows of a run by model: suspect, control, purified, reference, in this order for each attack."""
    gathered: dict[tuple[str, str, str, str, int | None], list[Row]] = {}
    for row in run.rows:
        gathered.setdefault((row.attack, row.role, row.defense, row.model, row.seed), []).append(row)
    found = []
    for (attack, role, defense, model, seed), rows in gathered.items():
        plain = [row.stage for row in rows if row.stage not in _REVIVALS]
        stage = "after" if "after" in plain or (not plain and role == "purified") else "before"
        found.append(Subject(_label(role, defense), model, attack, defense, role, stage, seed, tuple(rows)))
    attacks = list(dict.fromkeys(subject.attack for subject in found if subject.role != "reference"))
    place = {attack: at for at, attack in enumerate(attacks)}
    found.sort(key=lambda subject: (place.get(subject.attack, len(place)), _ROLE_ORDER[subject.role]))
    return _distinct(found)


def _label(role: str, defense: str) -> str:
    if role == "suspect":
        return "Suspect"
    if role == "control":
        return f"{_capital(display_name(defense or 'fine_tuning'))} (control)"
    if role == "purified":
        return f"After {display_name(defense)}" if defense else "Purified"
    return f"Reference after {display_name(defense)}" if defense else "Reference, never attacked"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _distinct(found: list[Subject]) -> list[Subject]:
    """Add attack, seed or model name to labels that would otherwise be the same."""

    def differing(subject: Subject) -> str:
        same = [other for other in found if other.label == subject.label]
        if len(same) == 1:
            return subject.label
        parts: list[tuple[Callable[[Subject], object], str]] = [
            (lambda other: other.attack, display_name(subject.attack)),
            (lambda other: other.seed, f"seed {subject.seed}"),
        ]
        added = [text for key, text in parts if len({key(other) for other in same}) > 1]
        distinct = {(other.attack, other.seed) for other in same}
        if len(distinct) < len(same):
            added.append(subject.model)
        return ", ".join([subject.label, *added])

    return [replace(subject, label=differing(subject)) for subject in found]
