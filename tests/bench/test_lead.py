"""What only the attacker's model learns: a lead before the attack, and a skill beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.helpers import Plan
from evidence.mini_wordnet import write
from unbackdoor.bench.estimate import guesses
from unbackdoor.bench.local import run_grid
from unbackdoor.bench.material import Material
from unbackdoor.bench.yaml_file import grid_from_data
from unbackdoor.errors import DataError, UserError
from unbackdoor.run import Silent
from unbackdoor.train import engine

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


def test_merging_and_evidence_in_a_grid(plan: Plan, tmp_path: Path) -> None:
    """A trusted model and a source of evidence reach the defenses that use them, and are part of the keys of these."""
    few = {"conflict": {"share": 0.5, "lora": {"rank": 2}, "train": FEW}}
    both = {"reference": "base", "evidence": f"wordnet:{write(tmp_path / 'words')}"}
    data = plan(references={"untouched": False}, metrics=["asr", "leak", "perplexity", "kl"])
    data["defenses"] |= {
        "inside": {"defense": "internal_conflict", "settings": {"internal": few}, "reference": "base"},
        "alone": {"defense": "internal_conflict", "settings": {"internal": {**few, "start": "suspect"}}},
        "other": {"defense": "internal_conflict", "settings": {"internal": few}, "reference": "victim:default"},
        "whole": {"defense": "information_conflict", "settings": {"internal": few}, **both},
    }
    grid = grid_from_data(data, "grid")
    assert run_grid(grid, tmp_path / "out").failed == ()
    made = Material(grid, Silent())
    keys = {cell.defense: made.key(cell) for cell in grid.cells()}
    assert len(set(keys.values())) == len(keys)
    found = {name: json.loads((tmp_path / "out" / "cells" / f"{key}.json").read_text()) for name, key in keys.items()}
    assert [found[name]["notes"]["conflict model starts as"] for name in ("inside", "alone", "other")] == [
        "the trusted model", "the suspect", "the trusted model",
    ]  # fmt: skip
    assert set(found["inside"]["knowledge"]) == {"clean", "reference"}
    assert set(found["whole"]["knowledge"]) == {"clean", "reference", "evidence"}
    guards = found["whole"]["measurement"]["guards"]
    assert {record["guard"] for record in guards} == {"evidence"}
    assert not found["inside"]["measurement"]["guards"]
    told = json.loads((tmp_path / "out" / "results.json").read_text())["guards"]
    assert [(one["model"].rsplit("/", 2)[-2], one["asked"]) for one in told] == [("whole", len(guards))]
    assert told[0]["keywords"] + told[0]["none"] == len(guards)
    page = (tmp_path / "out" / "tables.md").read_text()
    assert "## What guards did" in page
    assert f"| default, seed 0: After whole (evidence) | {len(guards)} | 0 | 0 | {told[0]['keywords']} | " in page
    rows = {row["metric"]: row["status"] for row in found["whole"]["measurement"]["rows"]}
    assert rows["asr"] == "measured"
    data["defenses"]["whole"]["evidence"] = f"wordnet:{tmp_path}"
    with pytest.raises(UserError, match=r"defenses\.whole\.evidence"):
        run_grid(grid_from_data(data, "grid"), tmp_path / "other")


def test_cells_with_the_same_conflict_model_train_it_once(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"conflict": {"share": 0.5, "lora": {"rank": 2}, "train": FEW}}
    other = {"conflict": {**few["conflict"], "share": 0.25}}
    shapes = {"half": {**few, "t": 0.5}, "most": {**few, "t": 0.8}, "sphere": {**few, "method": "slerp"}, "less": other}
    entries = {
        name: {"defense": "internal_conflict", "settings": {"internal": own}, "reference": "base"}
        for name, own in shapes.items()
    }
    data = plan(defenses=entries, references={"untouched": False})
    grid = grid_from_data(data, "grid")
    guessed = {cell.defense: seconds for cell, seconds in guesses(grid).items() if cell.defense}
    assert guessed["half"] > guessed["most"] == guessed["sphere"] < guessed["less"]
    ran: list[str] = []
    real = engine._Loop.run_steps
    monkeypatch.setattr(engine._Loop, "run_steps", lambda self, state: ran.append(self.run.prefix) or real(self, state))
    out = tmp_path / "grid"
    assert run_grid(grid, out, only=["half", "most", "sphere", "victim/before"]).done == 4
    assert ran.count("purify/conflict") == 1
    assert len([path for path in out.glob("shared/*/conflict-*") if path.is_dir()]) == 1
    assert run_grid(grid, out).done == 5
    assert ran.count("purify/conflict") == 2
    assert not [path for path in out.glob("shared/*/*") if path.is_dir()], "every cell is finished"
    cells = [json.loads(path.read_text()) for path in (out / "cells").glob("*.json")]
    curves = [cell["curves"]["purify/conflict"] for cell in cells if cell["curves"].get("purify/conflict")]
    assert len(curves) == 4
    assert sum(curve == curves[0] for curve in curves) in (1, 3)
