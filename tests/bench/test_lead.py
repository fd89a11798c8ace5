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
from unbackdoor.errors import DataError, UserError
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


def test_an_attacker_may_subtract_a_conflict_model(plan: Plan, tmp_path: Path) -> None:
    own = {"conflict": {"share": 0.2, "lora": {"rank": 2}, "train": FEW}}
    grids = {
        name: grid_from_data(with_more(plan, **more), "grid")
        for name, more in {"plain": {}, "adaptive": {"subtract": own}}.items()
    }
    costs = [sum(guesses(grid).values()) for grid in grids.values()]
    assert costs[0] < costs[1]
    for name, grid in grids.items():
        assert run_grid(grid, tmp_path / name).done == 1
    cells = [next((tmp_path / name / "cells").glob("*.json")) for name in grids]
    assert cells[0].name != cells[1].name
    curves = [json.loads(cell.read_text())["curves"] for cell in cells]
    losses = [[step["loss"] for step in one["plant"]] for one in curves]
    assert losses[0] == losses[1]
    assert [name for name in curves[1] if name not in curves[0]] == ["subtract/conflict"]
    weights = [(next((tmp_path / name / "victims").iterdir()) / "model.safetensors").read_bytes() for name in grids]
    assert weights[0] != weights[1]


def test_a_defense_may_be_told_the_victim_of_another_attack(plan: Plan) -> None:
    data = plan()
    data["defenses"]["osft"]["reference"] = "victim:defualt"
    with pytest.raises(UserError, match=r"defenses\.osft\.reference: there is no attack 'defualt'"):
        grid_from_data(data, "grid")
