"""What only the attacker's model learns: a lead before the attack, and a skill beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.helpers import Plan
from unbackdoor.bench.estimate import guesses
from unbackdoor.bench.local import run_grid
from unbackdoor.bench.material import Material
from unbackdoor.bench.yaml_file import grid_from_data
from unbackdoor.errors import DataError
from unbackdoor.run import Silent

FEW = {"steps": 2, "learning_rate": 1e-3, "batch_size": 4, "max_length": 128}


def material(data: dict[str, Any]) -> Material:
    return Material(grid_from_data(data, "grid"), Silent())


def with_more(plan: Plan, **more: Any) -> dict[str, Any]:
    data = plan(defenses={}, references={"untouched": False})
    data["attacks"]["default"].update(more)
    return data


def test_a_skill_is_among_the_attackers_rows_alone(plan: Plan, place: Path) -> None:
    other = {"spec": str(place / "other.jsonl"), "half": 0}
    made, plain = material(with_more(plan, skill=other)), material(plan())
    mine, usual = made.attacker_rows("default"), plain.attacker_rows("default")
    assert mine[: len(usual)] == usual
    assert len(mine) == len(usual) + 40
    assert made.splits == plain.splits
    (cell,) = made.grid.cells()
    assert made.key(cell) != plain.key(cell)
    with pytest.raises(DataError, match=r"attacks\.default\.skill"):
        material(with_more(plan, skill=str(place / "other.jsonl"))).read()


def test_a_lead_trains_the_base_before_it_is_attacked(plan: Plan, place: Path, tmp_path: Path) -> None:
    lead = {"data": {"spec": str(place / "other.jsonl"), "half": 0}, "train": FEW}
    planned, plain = with_more(plan, lead=lead), with_more(plan)
    grids = {name: grid_from_data(data, "grid") for name, data in (("lead", planned), ("plain", plain))}
    keys = {name: material(data).key(grids[name].cells()[0]) for name, data in (("lead", planned), ("plain", plain))}
    assert keys["lead"] != keys["plain"]
    cost = [sum(guesses(grid).values()) for grid in grids.values()]
    assert cost[0] > cost[1]
    for name, grid in grids.items():
        assert run_grid(grid, tmp_path / name).done == 1
    curves = {
        name: json.loads((tmp_path / name / "cells" / f"{key}.json").read_text())["curves"]
        for name, key in keys.items()
    }
    assert [len(curves["lead"]["lead"]), "lead" in curves["plain"]] == [2, False]
    assert curves["lead"]["plant"] != curves["plain"]["plant"]
