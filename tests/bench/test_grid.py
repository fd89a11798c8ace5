"""A grid is checked before anything is loaded, and its cells are a pure function of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unbackdoor.bench.grid import Grid
from unbackdoor.bench.yaml_file import grid_from_data, grid_to_yaml, read_grid, with_overrides
from unbackdoor.errors import UserError

TUNE: dict[str, Any] = {"defense": "fine_tuning", "role": "control"}


def data(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": "g",
        "models": ["builtin:smollm2-135m"],
        "attacks": {
            "default": {"seeds": [0, 1, 2]},
            "suffix": {
                "settings": {"trigger": {"form": "insert", "text": "moon", "place": "end"}},
                "defenses": ["osft"],
            },
        },
        "defenses": {"tune": TUNE, "fast": {**TUNE, "attacks": ["default"], "seeds": [0]}, "osft": {"defense": "osft"}},
        "references": {"twins": ["default"]},
        "purify_reference": ["tune", "osft"],
        "revival": {
            "cells": [{"attack": "default", "defenses": ["osft"], "seeds": [0]}],
            "settings": {"planted": {"trigger": {"form": "insert", "text": "blue hat"}, "targets": ["Nice day"]}},
        },
    }
    return {**found, **changes}


def test_cells_come_in_order_and_restrictions_hold() -> None:
    cells = grid_from_data(data(), "g").cells()
    assert [cell.name.split("/", 1)[1] for cell in cells] == [
        "default/seed 0/untouched/before",
        "default/seed 0/twin/before",
        "default/seed 0/victim/before",
        "default/seed 1/victim/before",
        "default/seed 2/victim/before",
        "suffix/seed 0/victim/before",
        "default/seed 0/victim/tune/after",
        "default/seed 0/victim/fast/after",
        "default/seed 1/victim/tune/after",
        "default/seed 2/victim/tune/after",
        "default/seed 0/victim/osft/after",
        "default/seed 1/victim/osft/after",
        "default/seed 2/victim/osft/after",
        "suffix/seed 0/victim/osft/after",
        "default/seed 0/untouched/tune/after",
        "default/seed 0/untouched/osft/after",
        "default/seed 0/untouched/revived_clean",
        "default/seed 0/victim/osft/revived_clean",
        "default/seed 0/untouched/revived_planted",
        "default/seed 0/victim/osft/revived_planted",
    ]
    assert cells == grid_from_data(data(), "g").cells()


def test_roles_follow_from_subject_and_defense() -> None:
    roles = {cell.name.split("/", 1)[1]: cell.role for cell in grid_from_data(data(), "g").cells()}
    assert roles["default/seed 0/victim/before"] == "suspect"
    assert roles["default/seed 0/victim/fast/after"] == "control"
    assert roles["default/seed 0/victim/osft/after"] == "purified"
    assert roles["default/seed 0/untouched/tune/after"] == "reference"
    assert roles["default/seed 0/untouched/revived_clean"] == "reference"


def test_a_grid_survives_yaml(tmp_path: Path) -> None:
    grid = grid_from_data(data(second_source={"spec": "a.jsonl", "half": 1}), "g")
    (tmp_path / "grid.yaml").write_text(grid_to_yaml(grid))
    assert read_grid(tmp_path / "grid.yaml") == grid
    assert grid.data.spec == "starter:instructions"


def changed(path: str, value: object) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        found: Any = Grid.model_validate(data()).model_dump(mode="json")
        place = found
        *outer, last = path.split(".")
        for step in outer:
            place = place[step]
        place[last] = value
        return dict(found)

    return make


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("seed", [0], "field seed: there is no such field. Did you mean 'seeds'?"),
        ("attacks.suffix.seeds", ["x"], "field attacks.suffix.seeds.0: input should be a valid integer"),
        ("attacks.suffix.seedz", [1], "field attacks.suffix.seedz: there is no such field. Did you mean 'seeds'?"),
        ("attacks.suffix.seeds", [1, 1], "field attacks.suffix.seeds: holds a value twice (1, 1)"),
        ("attacks.suffix.defenses", ["ofst"],
         "field attacks.suffix.defenses: there is no defense 'ofst'. Did you mean 'osft'?"),
        ("attacks.suffix.attack", "poison", "field attacks.suffix: there is no attack called 'poison'"),
        ("attacks.suffix.settings", {"triger": 1}, "has no option 'triger'. Did you mean 'trigger'?"),
        ("defenses.osft.preset", "papr", "field defenses.osft: osft has no preset 'papr'. Did you mean 'paper'?"),
        ("defenses.tune.role", "controll", "field defenses.tune.role: input should be 'purified' or 'control'"),
        ("seeds", [-1], "field seeds.0: input should be greater than or equal to 0"),
        ("name", "../elsewhere", "field name: string should match pattern"),
        ("attacks", {"": {}}, "string should have at least 1 character"),
        ("bounds", [{"name": "b", "metric": "asr", "max": float("nan")}], "field bounds.0.max: input should be"),
        ("bounds", [{"name": "b", "metric": "leek", "max": 1}], "field bounds (b): there is no metric called 'leek'."),
        ("metrics", ["asr", "leek"], "field metrics: there is no metric called 'leek'. Did you mean 'leak'?"),
        ("references.twins", ["defult"],
         "field references.twins: there is no attack 'defult'. Did you mean 'default'?"),
        ("revival.cells", [{"attack": "no", "defenses": ["osft"]}],
         "field revival.cells.0.attack: there is no attack 'no'"),
        ("revival.settings", {"claen": {}},
         "field revival.settings.claen: there is no such field. Did you mean 'clean'?"),
        ("revival.settings.planted", {},
         "field revival.settings.planted: the stage revived_planted plants an unrelated backdoor; name its trigger"),
        ("revival.settings.planted.targets", ["You ARE stupid", "Hat"],
         "field revival.settings.planted: 'you are stupid' is of attack default, too; a revival needs"),
        ("bounds", [{"name": "b", "metric": "asr"}], "field bounds.0: give 'min' or 'max'"),
        ("bounds", [{"name": "b", "metric": "kl", "max": 1, "compared": "ratio"}],
         "field bounds.0: 'to' names the other"),
        ("bounds", [{"name": "b", "metric": "asr", "compared": "paired", "to": "defense:ofst"}],
         "field bounds.0.to: there is no defense 'ofst'. Did you mean 'osft'?"),
        ("bounds", [{"name": "b", "metric": "asr", "compared": "paired", "to": "control"}],
         "field bounds.0: a paired test is made against the victim or another defense"),
        ("bounds", [{"name": "b", "metric": "asr", "compared": "difference", "to": "vitcim", "max": 1}],
         "field bounds.0.to: it should be victim, control, untouched, twin, null, clean or defense:LABEL"),
        ("defenses.osft.unwanted", "typicla", "field defenses.osft.unwanted: no attack has a list 'typicla'."),
        ("models", [], "field models: tuple should have at least 1 item"),
        ("attacks", {}, "field attacks: dictionary should have at least 1 item"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_field(path: str, value: object, said: str) -> None:
    with pytest.raises(UserError) as caught:
        grid_from_data(changed(path, value)(), "grid.yaml")
    assert str(caught.value).startswith("grid.yaml, field ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\nname: b\n", r"grid\.yaml, line 2: the key 'name' is there twice"),
        ("name: [a\n", r"grid\.yaml, line 2: "),
        ("name: 2026-13-45\n", r"grid\.yaml, line 1: '2026-13-45' is no timestamp; mend the YAML"),
        ("name: a\n? [b]\n: c\n", r"grid\.yaml, line 2: a key must be one text or number"),
        ("name: &a [*a]\n", r"grid\.yaml, line 1: found unconstructable recursive node"),
        ("[" * 3000, r"grid\.yaml: it is nested too deeply"),
        ("- a\n", r"grid\.yaml holds no fields"),
        ("name: a\nmodels: [m]\n", r"grid\.yaml, field attacks: is missing"),
        ("!!python/object/apply:os.getcwd []\n", r"grid\.yaml, line 1: could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_grid_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        read_grid(tmp_path / "grid.yaml")


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_grid(tmp_path / "grid.yaml")


def test_overrides_reach_into_the_grid() -> None:
    grid = with_overrides(grid_from_data(data(), "g"), {"attacks.suffix.probes": 7, "seeds": [4]})
    assert (grid.attacks["suffix"].probes, grid.seeds_of("suffix"), grid.seeds_of("default")) == (7, (4,), (0, 1, 2))
    with pytest.raises(UserError, match="no field 'attack\\.suffix\\.probes'"):
        with_overrides(grid, {"attack.suffix.probes": 7})
    with pytest.raises(UserError, match="field seedz: there is no such field"):
        with_overrides(grid, {"seedz": 7})
