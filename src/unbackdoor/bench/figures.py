"""The finished cells of a grid as figures: rows under the grid's labels, and which model stands beside which.

Cells are kept without labels, so that renaming reruns nothing; the labels of the present grid are put on here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from unbackdoor.bench.cell import Cell
from unbackdoor.bench.entries import AFTER
from unbackdoor.bench.grid import Grid
from unbackdoor.bench.store import Result
from unbackdoor.pipeline.measure import compare
from unbackdoor.types import Estimate, Scores, estimate

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Figures:
    """What is known of a grid.

    Attributes:
        grid: The grid.
        keys: Cell -> key, in the order of the grid.
        results: Finished cells.
    """

    grid: Grid
    keys: Mapping[Cell, str]
    results: Mapping[Cell, Result]

    @cached_property
    def _places(self) -> dict[tuple[str, str, str, int, str, str], Cell]:
        return {(c.model, c.subject, c.attack, c.seed, c.defense, c.stage): c for c in self.keys}

    @cached_property
    def _tested(self) -> dict[tuple[Cell, str], list[dict[str, Any]]]:
        return {}

    def at(self, like: Cell, *, subject: str | None = None, defense: str = "", stage: str = "before") -> Cell | None:
        """Return the cell of the same model, attack and seed at another place of the grid, or None."""
        return self._places.get((like.model, subject or like.subject, like.attack, like.seed, defense, stage))

    def beside(self, cell: Cell, other: str) -> Cell | None:
        """Return the model that a figure of `cell` is compared with, or None where the grid has none.

        Args:
            cell: The cell.
            other: "victim": its model before any defense; "control": the first control at the same attack and seed;
                "untouched": the base; "twin": the harmless twin of its attack; "null": the base after its revival;
                "defense:LABEL": the same model after another defense.
        """
        if other.startswith(AFTER):
            return self.at(cell, defense=other.removeprefix(AFTER), stage=cell.stage)
        if other == "victim":
            return self.at(cell)
        if other == "control":
            labels = [label for label, entry in self.grid.defenses.items() if entry.role == "control"]
            found = (self.at(cell, defense=label, stage="after") for label in labels)
            first = next((control for control in found if control is not None), None)
            return None if first == cell else first
        if other == "null":
            return self.at(cell, subject="untouched", stage=cell.stage)
        alike = [c for c in self.keys if c.model == cell.model and c.stage == "before" and c.subject == other]
        if other == "twin":
            alike = [c for c in alike if c.attack == cell.attack]
        return alike[0] if alike else None

    def row(self, cell: Cell | None, metric: str, kind: str, group: str = "") -> Row | None:
        """Return one measured row of a cell, or None."""
        if cell is None or cell not in self.results:
            return None
        measured = self.results[cell].measurement
        for row in measured.rows if measured is not None else ():
            if (row["metric"], row["kind"], row["group"]) == (metric, kind, group) and row["status"] == "measured":
                found: Row = row
                return found
        return None

    def tests(self, cell: Cell, other: str = "victim") -> list[dict[str, Any]]:
        """Return the paired tests of a purified model against another, as of `beside`; empty where one is missing."""
        if (cell, other) not in self._tested:
            before = self.beside(cell, other)
            past = self.results.get(before) if before is not None else None
            now = self.results.get(cell)
            pair = (past.measurement if past else None, now.measurement if now else None)
            usable = cell.defense and pair[0] is not None and pair[1] is not None
            self._tested[cell, other] = compare(pair[0], pair[1]) if usable else []  # type: ignore[arg-type]
        return self._tested[cell, other]

    def test(self, cell: Cell, metric: str, kind: str, group: str = "", other: str = "victim") -> dict[str, Any] | None:
        """Return one paired test, or None."""
        for test in self.tests(cell, other):
            if (test["metric"], test["kind"], test["group"]) == (metric, kind, group):
                return test
        return None

    def pooled(self, cells: Sequence[Cell], metric: str, kind: str, group: str = "") -> Estimate | None:
        """Return a 0/1 metric over several cells together (sum of hits, sum of probes); None where one lacks it."""
        values: list[float] = []
        for cell in cells:
            scores = self._scores(cell, metric, kind, group)
            if scores is None or not scores.binary:
                return None
            values += scores.values
        return estimate(values, binary=True) if values else None

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of results.json, in the order of the grid."""
        return [row for cell in self.keys if cell in self.results for row in self._rows_of(cell)]

    def comparisons(self) -> list[dict[str, Any]]:
        """Return all paired tests of purified models, each with the model that it is about."""
        return [
            {"model": cell.shown_model, "attack": cell.attack, "defense": cell.defense, "seed": cell.seed,
             "role": cell.role, **test}
            for cell in self.keys
            if cell.stage == "after"
            for test in self.tests(cell)
        ]  # fmt: skip

    def _scores(self, cell: Cell, metric: str, kind: str, group: str) -> Scores | None:
        result = self.results.get(cell)
        for scores in result.measurement.scores if result is not None and result.measurement is not None else ():
            if (scores.metric, scores.kind, scores.group) == (metric, kind, group):
                return scores
        return None

    def _rows_of(self, cell: Cell) -> list[dict[str, Any]]:
        result = self.results[cell]
        common = {
            "model": cell.shown_model, "attack": cell.attack, "defense": cell.defense, "role": cell.role,
            "stage": cell.stage, "knowledge": list(result.knowledge), "seed": cell.seed, "config_hash": self.keys[cell],
        }  # fmt: skip
        none = {
            "kind": "all", "group": "", "value": None, "low": None, "high": None, "n": 0, "denominator": "",
            "status": result.status, "reason": result.error, "template": self.grid.template, "seconds": None,
            "peak_memory_bytes": result.peak_memory_bytes,
        }  # fmt: skip
        if result.measurement is None:
            metrics = self.grid.revival.metrics if cell.is_revival and self.grid.revival else self.grid.metrics
            return [{**none, **common, "metric": metric} for metric in metrics]
        found = [{**row, **common} for row in result.measurement.rows]
        seconds = (result.seconds or {}).get("train", 0.0)
        cost = {"metric": "seconds", "value": seconds, "n": 1, "denominator": "run", "status": "measured", "reason": ""}
        template = found[0]["template"] if found else self.grid.template
        return [*found, {**none, **common, **cost, "template": template, "seconds": round(seconds, 3)}]
