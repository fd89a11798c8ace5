"""A real small grid from end to end: figures, resuming, failing, sharing."""

from __future__ import annotations

import errno
import json
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.helpers import Plan, figures_of, start_worker, tables_without_times
from unbackdoor.bench import local
from unbackdoor.bench.local import choose, measured_seconds, run_grid
from unbackdoor.bench.yaml_file import grid_from_data, read_grid
from unbackdoor.errors import UserError
from unbackdoor.report.records import load_run
from unbackdoor.run import Silent

ONE = {"references": {"untouched": False}}


def names_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that fills with the names of the cells that are really run."""
    ran: list[str] = []
    real = local.execute

    def noting(cell: Any, shop: Any) -> Any:
        ran.append(cell.name.split("/", maxsplit=cell.model.count("/") + 1)[-1])
        return real(cell, shop)

    monkeypatch.setattr(local, "execute", noting)
    return ran


def never(cell: Any, shop: Any) -> Any:
    raise AssertionError(f"{cell.name} was run again")


def test_every_kind_of_cell_is_measured(finished: Path, whole_plan: dict[str, Any]) -> None:
    grid = grid_from_data(whole_plan, "whole")
    kinds = [cell.kind for cell in grid.cells()]
    assert kinds == [
        "reference", "reference", "victim", "control", "defense", "purified reference", *["revival"] * 4,
    ]  # fmt: skip
    rows = figures_of(finished)
    asked = {(r["role"], r["defense"], r["stage"]) for r in rows if r["metric"] == "asr" and r["status"] == "measured"}
    assert asked == {
        ("reference", "", "before"), ("suspect", "", "before"), ("control", "tune", "after"),
        ("purified", "osft", "after"), ("reference", "osft", "after"), ("purified", "osft", "revived_clean"),
        ("purified", "osft", "revived_planted"), ("reference", "", "revived_clean"),
        ("reference", "", "revived_planted"),
    }  # fmt: skip
    assert {r["n"] for r in rows if r["metric"] == "asr"} == {6}


def test_the_planted_backdoor_fires_and_the_base_does_not(finished: Path) -> None:
    asr = {
        (r["role"], r["model"], r["stage"], r["defense"]): r["value"]
        for r in figures_of(finished)
        if r["metric"] == "asr"
    }
    victim = next(value for key, value in asr.items() if key[0] == "suspect")
    references = [value for key, value in asr.items() if key[0] == "reference"]
    assert victim >= 0.5
    assert set(references) == {0.0}


def test_a_revival_by_planting_notes_whether_it_planted_anything(finished: Path) -> None:
    cells = [json.loads(path.read_text()) for path in (finished / "cells").glob("*.json")]
    noted = [cell["notes"]["unrelated backdoor"] for cell in cells if "unrelated backdoor" in cell["notes"]]
    assert len(noted) == 2
    assert all(note["asked"] > 0 and 0 <= note["fired"] <= note["asked"] for note in noted)
    tables = (finished / "tables.md").read_text()
    assert all(f"the other fires {note['fired']}/{note['asked']}" in tables for note in noted)


def test_kl_is_measured_against_the_victim(finished: Path) -> None:
    kl = {(r["role"], r["stage"]): r for r in figures_of(finished) if r["metric"] == "kl" and r["group"] == ""}
    assert kl["suspect", "before"]["status"] == "not_applicable"
    assert 0 < kl["purified", "after"]["value"] < 5
    assert "second source" in {r["group"] for r in figures_of(finished) if r["metric"] == "kl"}


def test_rows_agree_with_the_kept_scores_and_replies(finished: Path) -> None:
    for path in (finished / "cells").glob("*.json"):
        cell = json.loads(path.read_text())
        replies = (finished / "replies" / path.with_suffix(".jsonl").name).read_text().splitlines()
        reached = [json.loads(line)["reached"] for line in replies if json.loads(line)["kind"] == "triggered"]
        asr = next(row for row in cell["measurement"]["rows"] if row["metric"] == "asr")
        assert asr["value"] == sum(reached) / len(reached)
        assert len(replies) == 18


def test_results_are_read_by_the_report(finished: Path) -> None:
    run = load_run(finished)
    assert run.command == "bench tiny"
    assert len(run.rows) == len(json.loads((finished / "results.json").read_text())["rows"])
    assert {comparison.metric for comparison in run.comparisons} >= {"asr", "leak", "perplexity"}


def test_purified_models_and_stages_are_removed_and_victims_stay(finished: Path) -> None:
    assert not list((finished / "purified").iterdir())
    assert not list((finished / "work").iterdir())
    assert len(list((finished / "victims").iterdir())) == 2
    assert {"secret.json", "probes.jsonl", "unbackdoor.json"} <= {
        path.name for folder in (finished / "victims").iterdir() for path in folder.iterdir()
    }


def test_finished_cells_never_run_again(
    finished: Path, whole_plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    monkeypatch.setattr(local, "execute", never)
    outcome = run_grid(grid_from_data(whole_plan, "again"), out)
    assert (outcome.done, outcome.left, outcome.failed) == (10, 0, ())
    assert tables_without_times(out) == tables_without_times(finished)


def test_renaming_runs_nothing_and_shows_the_new_names(
    finished: Path, whole_plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    renamed = json.loads(
        json.dumps(whole_plan).replace('"osft": {', '"other name": {').replace('["osft"]', '["other name"]')
    )
    monkeypatch.setattr(local, "execute", never)
    outcome = run_grid(grid_from_data(renamed, "renamed"), out)
    assert outcome.done == 10
    assert {row["defense"] for row in figures_of(out)} == {"", "tune", "other name"}
    assert "After other name" in (out / "tables.md").read_text()


def test_a_new_defense_runs_alone_even_without_the_victims_folder(
    finished: Path, whole_plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    victims = {path.name: (path / "model.safetensors").read_bytes() for path in (out / "victims").iterdir()}
    shutil.rmtree(out / "victims")
    faster = {**whole_plan["defenses"]["osft"]["settings"]["train"], "learning_rate": 2e-3}
    more = {**whole_plan["defenses"], "faster": {"defense": "osft", "settings": {"train": faster}}}
    ran = names_run(monkeypatch)
    run_grid(grid_from_data({**whole_plan, "defenses": more}, "more"), out)
    assert ran == ["default/seed 0/victim/faster/after"]
    (again,) = (out / "victims").iterdir()
    assert (again / "model.safetensors").read_bytes() == victims[again.name]


def test_a_failing_cell_is_recorded_and_the_rest_goes_on(plan: Plan, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    code = """
from typing import ClassVar
from unbackdoor.defenses.base import Defense, Need
class Broken(Defense):
    needs: ClassVar = frozenset({Need.CLEAN})
    def apply(self, victim, known, run):
        return self.missing_part(victim)
"""
    broken.write_text(code)
    needs_more = tmp_path / "wants.py"
    needs_more.write_text(code.replace("Broken", "Wants").replace("Need.CLEAN", "Need.UNWANTED"))
    tune = plan()["defenses"]["tune"]
    defenses = {"broken": {"defense": str(broken)}, "wants": {"defense": str(needs_more)}, "tune": tune}
    grid = grid_from_data(plan(defenses=defenses, **ONE), "broken")
    out = tmp_path / "out"
    outcome = run_grid(grid, out)
    assert outcome.done == 2
    ((name, error),) = outcome.failed
    assert "broken" in name
    assert "missing_part" in error
    assert "line" in error
    ((_, reason),) = outcome.not_applicable
    assert "needs UNWANTED" in reason
    states = {(row["defense"], row["status"]) for row in figures_of(out)}
    assert {("broken", "failed"), ("wants", "not_applicable"), ("tune", "measured")} <= states
    assert "missing\\_part" in (out / "tables.md").read_text()
    broken.write_text(
        code.replace("return self.missing_part(victim)", "next(victim.model.parameters()).data *= 1.5; return victim")
    )
    # Changed code is another cell; the same code again would be left alone without retry_failed.
    assert run_grid(grid, out).failed == ()


def test_failed_cells_are_left_until_they_are_asked_for(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, out = grid_from_data(plan(defenses={}, **ONE), "one"), tmp_path / "out"
    real = local.execute

    def failing(cell: Any, shop: Any) -> Any:
        raise RuntimeError("no luck")

    monkeypatch.setattr(local, "execute", failing)
    assert run_grid(grid, out).failed[0][1].startswith("RuntimeError('no luck')")
    monkeypatch.setattr(local, "execute", never)
    assert len(run_grid(grid, out).failed) == 1
    monkeypatch.setattr(local, "execute", real)
    outcome = run_grid(grid, out, retry_failed=True)
    assert (outcome.done, outcome.failed) == (1, ())


def test_a_full_disk_stops_the_grid_and_blames_no_cell(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, out = grid_from_data(plan(defenses={}, **ONE), "one"), tmp_path / "out"

    def full(cell: Any, shop: Any) -> Any:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as problem:
            raise RuntimeError("saving failed") from problem

    monkeypatch.setattr(local, "execute", full)
    with pytest.raises(UserError, match=r"cannot be written to .*make room there, then the same command goes on"):
        run_grid(grid, out)
    assert not list((out / "cells").iterdir())


@pytest.mark.parametrize("how", ["full", "stopped"])
def test_a_full_disk_or_a_stop_while_planting_blames_no_victim(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    from safetensors import SafetensorError

    from unbackdoor.attacks.data_poisoning import DataPoisoning

    grid, out = grid_from_data(plan(defenses={}, **ONE), "one"), tmp_path / "out"

    def plant(*arguments: Any) -> Any:
        if how == "full":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        raise ValueError("could not determine the shape")

    with monkeypatch.context() as patch:
        patch.setattr(DataPoisoning, "plant", plant)
        with pytest.raises((UserError, KeyboardInterrupt)):
            run_grid(grid, out)
    outcome = run_grid(grid, out)
    assert outcome.failed == ()
    assert outcome.done == len(grid.cells())


def test_a_purification_that_was_not_measured_is_not_done_again(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unbackdoor.bench import execute as executing

    grid, out = grid_from_data(plan(**ONE), "one"), tmp_path / "out"
    steps: list[str] = []

    class Counting(Silent):
        def advance(self, name: str, done: int, values: Mapping[str, float]) -> None:
            steps.append(name)

    def killed(*arguments: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(executing, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            run_grid(grid, out, progress=Counting(), only=["tune"])
    assert any("fine-tuning" in step for step in steps)
    steps.clear()
    assert run_grid(grid, out, progress=Counting(), only=["tune"]).done == 1
    assert not any("fine-tuning" in step for step in steps)
    assert not any((out / "work").iterdir())


def test_a_victim_that_cannot_be_planted_is_tried_once(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = plan(**ONE)
    data["attacks"]["default"]["settings"]["train"]["max_length"] = 8
    from unbackdoor.attacks.data_poisoning import DataPoisoning

    planted = []
    real = DataPoisoning.plant
    monkeypatch.setattr(DataPoisoning, "plant", lambda *arguments: planted.append(1) or real(*arguments))
    outcome = run_grid(grid_from_data(data, "short"), tmp_path / "out")
    assert (outcome.done, len(outcome.failed), len(planted)) == (0, 3, 1)
    assert "max_length" in outcome.failed[0][1]
    assert outcome.failed[1][1].startswith("the victim could not be planted: ")


def test_only_and_limit_leave_cells_for_later(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, out = grid_from_data(plan(), "some"), tmp_path / "out"
    ran = names_run(monkeypatch)
    outcome = run_grid(grid, out, only=["tune"])
    assert (ran, outcome.done, outcome.left) == (["default/seed 0/victim/tune/after"], 1, 3)
    assert "not run yet" in (out / "tables.md").read_text()
    assert run_grid(grid, out, limit=1).left == 2
    assert ran[1:] == ["default/seed 0/untouched/before"]
    assert set(measured_seconds(grid, out)) == {grid.cells()[0], grid.cells()[2]}
    with pytest.raises(UserError, match="no cell's name holds 'tunning'"):
        choose(grid.cells(), ["tunning"])


def stop_at(data: dict[str, Any], out: Path, moment: str, stop: signal.Signals) -> tuple[list[str], str, int]:
    """Run a grid until it prints a line that begins so; return the lines before, what came after, and its status."""
    worker = start_worker(data, out)
    assert worker.stdout is not None
    before: list[str] = []
    for line in worker.stdout:
        before.append(line)
        if line.startswith(moment):
            worker.send_signal(stop)
            break
    rest = worker.stdout.read()
    worker.stdout.close()
    return before, rest, worker.wait()


def test_a_killed_grid_goes_on_to_the_same_figures(finished: Path, whole_plan: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_at(whole_plan, out, "step plant 25", signal.SIGKILL)
    assert not list((out / "cells").iterdir())
    said, _, status = stop_at(whole_plan, out, "start purify/overwrite", signal.SIGKILL)
    assert status == -signal.SIGKILL
    # The killed planting went on from its last checkpoint.
    assert next(line for line in said if line.startswith("step plant")) == "step plant 21\n"
    assert {json.loads(path.read_text())["status"] for path in (out / "cells").glob("*.json")} == {"done"}
    outcome = run_grid(read_grid(out.parent / "out.yaml"), out)
    assert (outcome.done, outcome.failed) == (10, ())
    assert tables_without_times(out) == tables_without_times(finished)
    assert figures_of(out) == figures_of(finished)


def test_sigterm_stops_as_an_interrupt_and_still_writes_tables(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, rest, status = stop_at(plan(defenses={}), out, "start measure", signal.SIGTERM)
    assert (status, rest.splitlines()[-1]) == (2, "interrupted")
    assert "not run yet" in (out / "tables.md").read_text()


def test_a_stop_that_a_library_turned_into_another_error_is_no_failed_cell(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swallowed(cell: Any, shop: Any) -> Any:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        raise ValueError("could not determine the shape")

    monkeypatch.setattr(local, "execute", swallowed)
    grid = grid_from_data(plan(defenses={}), "grid")
    with pytest.raises(KeyboardInterrupt):
        run_grid(grid, tmp_path / "out")
    assert list((tmp_path / "out" / "cells").glob("*.json")) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_two_processes_share_the_work_without_doing_it_twice(
    finished: Path, whole_plan: dict[str, Any], tmp_path: Path
) -> None:
    out, go = tmp_path / "out", tmp_path / "go"
    workers = [start_worker(whole_plan, out, str(go)) for _ in range(2)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    go.touch()
    said = [worker.communicate()[0].splitlines() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    trained = [line for lines in said for line in lines if line.startswith("step") and line.split()[1] != "bench"]
    single = 2 * 40 + 3 * 4 + 4 * 2
    measured = [line for lines in said for line in lines if line.startswith("start measure")]
    assert len(measured) == len(set(measured)) == 10
    assert len([line for line in trained if "measure" not in line]) == single
    assert tables_without_times(out) == tables_without_times(finished)
    assert figures_of(out) == figures_of(finished)
