"""Plots of what a defense comes to over a setting, from made-up cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from unbackdoor.bench import ablation
from unbackdoor.bench.figures import Figures
from unbackdoor.bench.store import Result
from unbackdoor.bench.yaml_file import grid_from_data
from unbackdoor.errors import UserError
from unbackdoor.pipeline.measure import Measurement
from unbackdoor.types import Scores

PLOT = {"x": "share of clean rows, %", "values": {"s50": 50, "s5": 5, "s100": 100}, "of": "outcome"}


def data(**changes: Any) -> dict[str, Any]:
    defenses = {label: {"defense": "fine_tuning"} for label in ("s50", "s5", "s100")}
    attacks = {"default": {"attack": "composite"}}
    return {"name": "g", "models": ["m"], "attacks": attacks, "defenses": defenses, "plots": [PLOT], **changes}


def result(**hits: int) -> Result:
    """Return figures of 20 probes a metric."""
    ids = tuple(f"row{number}" for number in range(20))
    kinds = {"asr": "triggered", "asr_right": "triggered", "leak": "clean", "cda": "clean"}
    rows = []
    for metric, count in hits.items():
        figure = Scores(metric, kinds[metric], ids, tuple(float(n < count) for n in range(20)), "probes").estimate()
        rows.append(
            {"metric": metric, "kind": kinds[metric], "group": "", "value": figure.value, "low": figure.low,
             "high": figure.high, "n": 20, "status": "measured", "reason": ""}
        )  # fmt: skip
    return Result("done", "", Measurement(rows, [], []), (), {}, 1, {}, {})


def figures(**found: Result) -> Figures:
    grid = grid_from_data(data(), "g")
    keys = {cell: f"key{number}" for number, cell in enumerate(grid.cells())}
    return Figures(grid, keys, {cell: found[name] for cell in keys if (name := cell.defense or cell.subject) in found})


def test_figures_stand_at_their_values_in_order_with_the_victims_beside_them(tmp_path: Path) -> None:
    made = figures(
        victim=result(asr=20, cda=18), s5=result(asr=12, asr_right=11, leak=2, cda=16),
        s50=result(asr=4, asr_right=3, leak=1, cda=17),
    )  # fmt: skip
    (panel,) = ablation.draw(made, tmp_path)
    assert panel.title == "After the defense, default, seed 0, m"
    words = (
        "Figures after the defense by share of clean rows, %, in percent. ASR 5: 60.0, 50: 20.0; "
        "ASR, right rows 5: 55.0, 50: 15.0; no trigger 5: 10.0, 50: 5.0; CDA 5: 80.0, 50: 85.0."
    )
    assert words in panel.svg
    assert "The victim before: ASR 100.0 %, CDA 90.0 %." in panel.key
    assert "Left out, not measured: 100." in panel.key
    assert "After the defense" in (tmp_path / ablation.FILE).read_text()


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    (panel,) = ablation.draw(figures(s5=result(asr=3)), tmp_path)
    assert "CDA" not in panel.svg
    assert "The victim before" not in panel.key
    (nothing,) = ablation.draw(figures(s5=Result("failed", "boom")), tmp_path)
    assert nothing.svg == ""
    assert "Nothing is drawn yet. Left out, not measured: 5, 50, 100." in nothing.key
    assert not (tmp_path / ablation.FILE).exists()


def test_rounds_are_drawn_of_what_is_watched_alone() -> None:
    with pytest.raises(UserError, match="give watch, too, or of: outcome"):
        grid_from_data(data(plots=[{**PLOT, "of": "rounds"}]), "g")
