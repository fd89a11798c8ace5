"""Run a grid's cells one after another in this process, and write the tables.

Finished cells are never run again; a process that is killed loses at most the steps since the last checkpoint of the
training it was in. Another process on the same folder takes other cells: each cell, victim and purified model is made
under a lock. A cell that fails is recorded with its error, and the rest goes on.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from unbackdoor.bench import tables
from unbackdoor.bench.cell import Cell
from unbackdoor.bench.estimate import guesses, scale
from unbackdoor.bench.execute import Busy, CannotWrite, Workshop, describe, execute, finished
from unbackdoor.bench.grid import Grid, check_methods
from unbackdoor.bench.material import Material
from unbackdoor.bench.store import Result, Store
from unbackdoor.bench.yaml_file import grid_to_yaml
from unbackdoor.errors import FULL, READ_ONLY, NotApplicable, UserError, did_you_mean, disk_error
from unbackdoor.model.files import check_model
from unbackdoor.pipeline.preflight import check_device
from unbackdoor.run import Progress, Silent
from unbackdoor.stopping import stoppable

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Outcome:
    """How far a grid has come.

    Attributes:
        folder: The grid's folder.
        done: Cells that were measured, now or earlier.
        failed: Cells that failed: (name, error).
        not_applicable: Cells whose defense needs what the attack has not: (name, reason).
        left: Cells that were not run, because of `only` or `limit`.
        unmet: Checks of the recipe that are not met, in words.
    """

    folder: Path
    done: int
    failed: tuple[tuple[str, str], ...]
    not_applicable: tuple[tuple[str, str], ...]
    left: int
    unmet: tuple[str, ...]


def run_grid(
    grid: Grid,
    out: Path,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    only: Sequence[str] = (),
    limit: int | None = None,
    retry_failed: bool = False,
) -> Outcome:
    """Run what is not yet done of a grid, and write tables.md, tables.html, results.json and curves.json.

    Args:
        grid: The grid.
        out: Its folder; one that holds an earlier grid is gone on with.
        device: Where models are.
        progress: Where to report.
        only: Patterns ("*", "?") of names of cells, or parts of names; other cells are left.
        limit: Largest number of cells to run now.
        retry_failed: Run the cells that failed again.

    Raises:
        UserError: If the grid or the folder cannot be used, or the disk is full.
        KeyboardInterrupt: If the process was told to stop (^C, SIGTERM); the folder can be gone on with.
    """
    report = progress or Silent()
    check_inputs(grid, device)
    chosen = choose(grid.cells(), only)
    store = Store(out)
    store.open(grid_to_yaml(grid))
    shop = Workshop(Material(grid, report, device), store, device, report)
    keys = {cell: shop.material.key(cell) for cell in grid.cells()}
    if retry_failed:
        _forget_failed(shop, keys)
    try:
        with stoppable() as shop.stop:
            _run_all(shop, keys, chosen, limit)
    finally:
        unmet = tables.write(grid, store, keys)
    return _outcome(grid, store, keys, unmet)


def check_inputs(grid: Grid, device: str = "cpu") -> None:
    """Read everything that a grid needs before its first cell: device, methods, rows, the files of models in folders.

    Raises:
        UserError: If anything is wrong with it.
    """
    check_device(device)
    check_methods(grid)
    for model in grid.models:
        check_model(model)
    Material(grid, Silent()).read()


def choose(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """Return the cells whose name holds one of the patterns; all where there are none.

    Raises:
        UserError: If a pattern fits no cell.
    """
    if not only:
        return list(cells)
    for pattern in only:
        if not any(_fits(cell, pattern) for cell in cells):
            hint = did_you_mean(pattern, [part for cell in cells for part in cell.name.split("/")])
            raise UserError(f"no cell's name holds '{pattern}'.{hint} The first is '{cells[0].name}'.")
    return [cell for cell in cells if any(_fits(cell, pattern) for pattern in only)]


def measured_seconds(grid: Grid, out: Path) -> dict[Cell, float]:
    """Return the seconds that cells of these names took in a folder, for `estimate`; empty where there is none."""
    found = Store(out).seconds_by_name()
    return {cell: found[cell.name] for cell in grid.cells() if cell.name in found}


def _fits(cell: Cell, pattern: str) -> bool:
    return pattern in cell.name or fnmatchcase(cell.name, pattern)


def _seconds(result: Result) -> float:
    return (result.seconds or {}).get("total", 0.0)


def _run_all(shop: Workshop, keys: dict[Cell, str], chosen: Sequence[Cell], limit: int | None) -> None:
    """Go over the cells until all are finished, here or by another process."""
    store, progress = shop.store, shop.progress
    # Two labels for the same work are one cell.
    waiting = list({keys[cell]: cell for cell in reversed(chosen)}.values())[::-1]
    total, ran, name = len(waiting), 0, f"bench {shop.material.grid.name}"
    told: set[Cell] = set()
    progress.start(name, total)
    clock = _Clock(shop, keys)
    while waiting:
        moved = False
        for cell in list(waiting):
            if limit is not None and ran >= limit:
                progress.finish(name)
                return
            there = store.has(keys[cell])
            if not there:
                there = _run_one(shop, keys, cell, told)
                ran += there
            if there:
                moved = True
                waiting.remove(cell)
                progress.advance(name, total - len(waiting), {"seconds_left": clock.left(waiting)})
        _tidy(shop, keys)
        if waiting and not moved:
            time.sleep(_POLL_SECONDS)
    progress.finish(name)


def _run_one(shop: Workshop, keys: dict[Cell, str], cell: Cell, told: set[Cell]) -> bool:
    """Run a cell unless another process has it; return whether it was run here. `told`: cells named to the person."""
    key, store = keys[cell], shop.store
    with store.lock(f"cell-{key}") as free:
        if not free or store.has(key):
            return False
        shop.wanted = _needed_purified(shop, keys)
        # A cell that waits for what another process makes is tried again and again.
        if cell not in told:
            shop.progress.notice(f"cell {cell.name}")
            told.add(cell)
        facts = {"name": cell.name, "model": cell.model, "attack": cell.attack, "defense": cell.defense}
        try:
            result = execute(cell, shop)
        except Busy:
            return False
        except NotApplicable as reason:
            result = Result("not_applicable", str(reason))
        except CannotWrite:
            raise
        # The one place where any error is caught: it belongs to this cell, and the others must go on.
        except Exception as problem:
            if shop.stop.asked:
                raise KeyboardInterrupt from problem
            _stop_for_the_disk(problem, store)
            result = Result("failed", describe(problem))
            shop.progress.notice(f"cell {cell.name} failed: {result.error}")
        store.write(key, result, facts)
        if result.status == "done":
            finished(cell, shop)
    gc.collect()
    _tidy(shop, keys)
    return True


def _stop_for_the_disk(problem: BaseException, store: Store) -> None:
    """Raise a sentence where the disk is full or cannot be written to: then every further cell would fail, too."""
    cause = disk_error(problem, FULL | READ_ONLY)
    if cause is not None:
        raise CannotWrite(
            f"'{store.folder}' cannot be written to ({cause}); make room there, then the same command goes on."
        ) from problem


def _needed_purified(shop: Workshop, keys: dict[Cell, str]) -> set[str]:
    """Return the keys of the purified models that revivals which are not finished begin with."""
    material, store = shop.material, shop.store
    return {
        material.purify_key(cell)
        for cell, key in keys.items()
        if cell.is_revival and cell.defense and not store.has(key)
    }


def _tidy(shop: Workshop, keys: dict[Cell, str]) -> None:
    """Remove what no cell needs any more: purified models, and all that cells share where every one is finished."""
    if all(shop.store.has(key) for key in keys.values()):
        shop.store.remove_shared(shop.material.computed_on)
    if shop.material.grid.keep_models:
        return
    needed = _needed_purified(shop, keys)
    own = {shop.material.purify_key(cell) for cell in keys if cell.defense}
    for key in own - needed:
        folder = shop.store.purified(key)
        if folder.is_dir():
            with shop.store.lock(f"purified-{key}") as free:
                if free:
                    shop.store.remove(folder)


def _forget_failed(shop: Workshop, keys: dict[Cell, str]) -> None:
    for cell, key in keys.items():
        result = shop.store.read(key)
        if result is not None and result.status == "failed":
            shop.store.forget(key)
            for twin in (False, True) if cell.subject == "twin" else (False,):
                shop.store.keep_planting_error(shop.material.plant_key(cell, twin=twin), None)


class _Clock:
    """Seconds that are left, from the guesses of the cells, mended by those that were run."""

    def __init__(self, shop: Workshop, keys: dict[Cell, str]) -> None:
        self.store, self.keys = shop.store, keys
        self.guessed = guesses(shop.material.grid)
        self.measured: dict[Cell, float] = {}

    def left(self, waiting: Sequence[Cell]) -> float:
        """Return the seconds that the waiting cells will take."""
        for cell, key in self.keys.items():
            if cell not in self.measured and cell not in waiting and self.store.has(key):
                result = self.store.read(key)
                if result is not None and result.status == "done":
                    self.measured[cell] = _seconds(result)
        factors = scale(self.guessed, self.measured)
        return sum(self.guessed[cell] * factors[cell.kind] for cell in waiting)


def _outcome(grid: Grid, store: Store, keys: dict[Cell, str], unmet: Sequence[str]) -> Outcome:
    found = {cell: store.read(keys[cell]) for cell in grid.cells()}

    def with_status(status: str) -> tuple[tuple[str, str], ...]:
        return tuple((c.name, r.error) for c, r in found.items() if r is not None and r.status == status)

    return Outcome(
        store.folder,
        len(with_status("done")),
        with_status("failed"),
        with_status("not_applicable"),
        sum(result is None for result in found.values()),
        tuple(unmet),
    )
