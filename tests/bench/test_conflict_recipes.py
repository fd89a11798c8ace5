"""The recipes of information conflicts: every table has its controls, and shares are of rows that are seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from unbackdoor import recipes
from unbackdoor.bench.entries import DefenseEntry
from unbackdoor.bench.estimate import estimate
from unbackdoor.bench.grid import Grid
from unbackdoor.bench.material import Material
from unbackdoor.pipeline.steps import defense_called
from unbackdoor.run import Run, Silent

GRIDS = ("conflict", "conflict_adaptive", "conflict_emotion", "conflict_roles", "conflict_talk", "conflict_decline")
CONFLICTS = ("internal_conflict", "information_conflict")


@pytest.mark.parametrize(("name", "size"), [("conflict_emotion", "quick"), ("conflict_emotion", "paper")])
def test_a_larger_share_of_clean_rows_is_more_rows_seen(name: str, size: str) -> None:
    grid = recipes.load_grid(name, size)
    spec = str(getattr(grid.attacks["shares"].defender_data, "spec", ""))
    first, last = map(int, spec.rpartition("[")[2].rstrip("]").split(":"))
    shares = {label: entry for label, entry in grid.defenses.items() if label.startswith("share_")}
    assert len(shares) == 5
    for label, entry in shares.items():
        conflict = defense_called(entry.defense, entry.settings).settings()["internal"]["conflict"]
        seen = conflict["train"]["steps"] * conflict["train"]["batch_size"]
        assert conflict["share"] * (last - first) <= seen, label


def internal_of(entry: DefenseEntry) -> dict[str, Any]:
    found: dict[str, Any] = defense_called(entry.defense, entry.settings).settings()["internal"]
    return found


def met(grid: Grid, label: str) -> dict[str, DefenseEntry]:
    """The defenses that the victims of an attack meet at its first seed."""
    cells = [cell for cell in grid.cells() if cell.attack == label and cell.subject == "victim" and cell.defense]
    return {cell.defense: grid.defenses[cell.defense] for cell in cells if cell.seed == cells[0].seed}


def test_the_quick_look_at_roles_has_its_controls() -> None:
    grid = recipes.load_grid("conflict_roles", "quick")
    assert {"m5_and_m6", "base_merged_half", "fine_tuning"} == set(met(grid, "m5")) == set(grid.defenses)


@pytest.mark.parametrize(
    ("name", "size"),
    [*((name, "paper") for name in GRIDS), ("conflict", "quick"), ("conflict_decline", "quick")],
)
def test_every_victim_that_meets_a_conflict_meets_the_controls(name: str, size: str) -> None:
    grid = recipes.load_grid(name, size)
    for label, attack in grid.attacks.items():
        if label == "shares":
            # The same victim as the table's, which has them.
            assert attack.settings == grid.attacks["composite"].settings
            continue
        there = met(grid, label)
        conflicts = {key: internal_of(entry) for key, entry in there.items() if entry.defense in CONFLICTS}
        trained = {key: made for key, made in conflicts.items() if made["conflict"]["share"]}
        bare = [made["t"] for made in conflicts.values() if not made["conflict"]["share"]]
        merged = {key: made["t"] for key, made in trained.items() if isinstance(made["t"], float) and made["t"] < 1}
        if not merged:
            continue
        assert any(entry.defense == "fine_tuning" for entry in there.values()), label
        assert any(made["t"] == 1 for made in trained.values()), (label, "the conflict model alone")
        assert not {key: t for key, t in merged.items() if t not in bare}, (label, "the untouched base at the same t")


def test_the_grids_of_conflicts_are_guessed_as_the_page_says() -> None:
    """Each by itself. Six hours of two processes were asked for, which they do not fit in; that they do not grow."""
    hours = sum(seconds for name in GRIDS for _, seconds in estimate(recipes.load_grid(name))) / 3600
    page = (Path(__file__).parents[2] / "docs/grid.md").read_text()
    assert f"those of information conflicts at {hours:.1f}" in page
    assert hours < 2 * 8


@pytest.mark.parametrize("name", [*GRIDS, "dev_conflict"])
def test_every_victim_can_be_planted_on_its_rows(name: str, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNBACKDOOR_TEST_DATA", str(shared_data))
    made = Material(recipes.load_grid(name), Silent())
    made.read()
    for label in made.grid.attacks:
        clean = made.attacker_rows(label)
        rows = made.attack(label).training_rows(clean, Run())
        marked = [row for row, pieces in rows if pieces]
        assert marked, label


def test_all_clean_rows_are_seen_once_where_a_model_is_to_know_them_all() -> None:
    grid = recipes.load_grid("conflict_roles")
    conflict = grid.defenses["m3"].settings["internal"]["conflict"]
    assert conflict["share"] == 1.0
    assert conflict["train"]["steps"] * conflict["train"]["batch_size"] == 3600
