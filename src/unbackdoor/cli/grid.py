"""`unbackdoor bench`: a recipe or a grid file becomes a grid, which is printed, planned or run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from unbackdoor.cli import output
from unbackdoor.cli.options import Common, print_json, showing
from unbackdoor.errors import UserError
from unbackdoor.model.quarantine import printable_lines
from unbackdoor.pipeline import recipe as recipes

if TYPE_CHECKING:
    from unbackdoor.bench.grid import Grid
    from unbackdoor.bench.local import Outcome


def run_bench(name: str | None, size: str | None, only: Sequence[str], retry_failed: bool, common: Common) -> None:
    """Run the grid of a recipe or file, and exit with 2 if a cell failed, with 1 if a threshold was missed.

    Raises:
        UserError: If there is no such recipe, or the grid is wrong.
    """
    threshold = common.threshold
    place = name or (str(common.config) if common.config else None)
    if place is None:
        from unbackdoor.recipes import names

        raise UserError(f"`bench` needs a recipe or a grid: one of {', '.join(names())}, or a .yaml file.")
    if name is not None and common.config is not None:
        raise UserError("a grid is named twice, as an argument and in --config; leave one out.")
    grid = _grid(place, size, common)
    if threshold is not None:
        threshold.check({*grid.metrics, "seconds"})
    out = common.out or Path("runs") / f"bench-{grid.name}"
    if common.dump_config:
        from unbackdoor.bench.yaml_file import grid_to_yaml

        typer.echo(grid_to_yaml(grid), nl=False)
        return
    if common.dry_run:
        _plan(grid, out, only, common)
        return
    from unbackdoor.bench.local import run_grid

    if Path(place).is_file() and Path(place).resolve().is_relative_to(out.resolve()):
        raise UserError(
            f"'{place}' lies in the grid's folder, '{out}', which has a grid.yaml of its own; choose another --out."
        )
    with showing(common) as shown:
        outcome = run_grid(
            grid, out, device=common.device or "cpu", progress=shown, only=only, retry_failed=retry_failed
        )
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    _print(outcome, results, common)
    output.finish(results["rows"], threshold)
    if outcome.failed:
        raise typer.Exit(2)


def _grid(place: str, size: str | None, common: Common) -> Grid:
    from unbackdoor.bench.yaml_file import with_overrides
    from unbackdoor.recipes import load_grid

    grid = load_grid(place, size)
    overrides: dict[str, Any] = {}
    if common.seed is not None:
        named = [label for label, attack in grid.attacks.items() if attack.seeds is not None]
        if named:
            raise UserError(
                f"--seed is for a grid with one list of seeds, and attack {named[0]} has its own; give "
                f"--set attacks.{named[0]}.seeds=[{common.seed}]."
            )
        overrides["seeds"] = [common.seed]
    if common.template is not None:
        overrides["template"] = common.template
    overrides |= dict(_dotted(recipes.parse_sets(common.sets or ())))
    return with_overrides(grid, overrides) if overrides else grid


def _dotted(nested: dict[str, Any], place: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in nested.items():
        inner = isinstance(value, dict) and value
        found += _dotted(value, f"{place}{key}.") if inner else [(f"{place}{key}", value)]
    return found


def _plan(grid: Grid, out: Path, only: Sequence[str], common: Common) -> None:
    from unbackdoor.bench.estimate import estimate, memory
    from unbackdoor.bench.local import check_inputs, choose, measured_seconds

    check_inputs(grid, common.device or "cpu")
    done, chosen = measured_seconds(grid, out), choose(grid.cells(), only)
    cells = [(cell, seconds) for cell, seconds in estimate(grid, done) if cell in chosen]
    left = sum(seconds for cell, seconds in cells if cell not in done)
    needed = memory(grid)
    if common.json_output:
        listed = [{"name": cell.name, "seconds": seconds, "measured_before": cell in done} for cell, seconds in cells]
        print_json({"dry_run": True, "cells": listed, "seconds": left, "memory_bytes": needed})
        return
    for cell, seconds in cells:
        typer.echo(f"{output.duration(seconds):>16}  {cell.name}{' (measured before)' if cell in done else ''}")
    counted = sum(cell not in done for cell, _ in cells)
    typer.echo(f"{output.duration(left):>16}  {counted} cells on two cores, estimated; cells in '{out}' are kept")
    if counted < len(cells):
        typer.echo(
            "Cells measured before under the same name are not counted; they run again if their settings changed."
        )
    typer.echo(f"{needed / 2**30:>12.1f} GiB  of memory, estimated")
    typer.echo("Nothing was run or written (--dry-run).")


def _print(outcome: Outcome, results: dict[str, Any], common: Common) -> None:
    if common.json_output:
        print_json({**results, "out": str(outcome.folder), "failed": outcome.failed, "unmet": outcome.unmet})
        return
    typer.echo(f"{outcome.done} cells measured, {len(outcome.failed)} failed, {outcome.left} left.")
    for name, error in outcome.failed:
        typer.echo(printable_lines(f"failed: {name}: {error}"))
    for words in outcome.unmet:
        typer.echo(printable_lines(f"not met: {words}"))
    typer.echo(str(outcome.folder / "tables.html"))
