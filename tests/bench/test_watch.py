"""Probes asked between the rounds of a cell's defense: what is kept, when it is ended, and which keys know of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.helpers import Plan, figures_of
from unbackdoor.bench import execute as executing
from unbackdoor.bench.estimate import guesses
from unbackdoor.bench.local import run_grid
from unbackdoor.bench.material import Material
from unbackdoor.bench.yaml_file import grid_from_data
from unbackdoor.errors import UserError
from unbackdoor.pipeline import watching
from unbackdoor.pipeline.steps import config_hash, data_hash, portable
from unbackdoor.run import Silent

FADE = """
from typing import ClassVar
import torch
from unbackdoor.defenses.base import Defense, Need

class Fade(Defense):
    needs: ClassVar = frozenset({Need.CLEAN})
    rounds: int = 4

    def apply(self, victim, known, run):
        for number in range(1, self.rounds + 1):
            with torch.no_grad():
                next(victim.model.parameters()).mul_(1.0 if number < 2 else 0.5)
            run.notes["reached"] = number
            assert run.observe(victim) is None
        return victim
"""
TRAIN = {"steps": 2, "learning_rate": 1e-3, "batch_size": 4, "max_length": 128}
BEEAR = {
    "rounds": 3, "drifts": 2, "anchors": 4, "own_answers": 4, "train": TRAIN,
    "drift": {"rows": 4, "tokens": 3, "train": {**TRAIN, "learning_rate": 0.1}},
}  # fmt: skip


@pytest.fixture(scope="session")
def make(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Return a function that gives a grid of one defense without a reference: FADE, or BEEAR."""
    folder = tmp_path_factory.mktemp("methods")
    (folder / "fade.py").write_text(FADE)
    (folder / "openings.txt").write_text("silly\nwrong robot\n")

    def data(settings: dict[str, Any], *, beear: bool = False, **changes: Any) -> dict[str, Any]:
        name = "beear" if beear else str(folder / "fade.py")
        found = plan(references={"untouched": False}, defenses={"it": {"defense": name, "settings": settings}})
        found["attacks"]["default"]["unwanted"] = {"typical": str(folder / "openings.txt")}
        return {**found, "metrics": ["asr", "leak", "perplexity"], **changes}

    return data


def cell_of(out: Path, defense: str = "it") -> dict[str, Any]:
    """Return the file of the cell of a defense."""
    cells = [json.loads(path.read_text()) for path in (out / "cells").glob("*.json")]
    (found,) = (cell for cell in cells if cell["cell"]["defense"] == defense)
    return dict(found)


def run(data: dict[str, Any], out: Path, progress: Any = None) -> dict[str, Any]:
    outcome = run_grid(grid_from_data(data, "g"), out, progress=progress)
    assert outcome.failed == ()
    return cell_of(out)


def after(out: Path) -> list[dict[str, Any]]:
    return [{**row, "config_hash": ""} for row in figures_of(out) if row["stage"] == "after"]


@pytest.fixture(scope="module")
def ended(make: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a grid whose defense takes nothing away in its first round, and everything later, and is ended."""
    out = tmp_path_factory.mktemp("ended") / "out"
    fade = {"rounds": 4}
    run(make(fade, watch={"probes": 5, "until": 0.25}), out)
    return out


def test_the_experimenter_ends_a_defense_and_the_model_of_that_round_is_measured(
    ended: Path, make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    notes = cell_of(ended)["notes"]
    rounds = notes["rounds"]
    assert [item["round"] for item in rounds] == list(range(1, len(rounds) + 1))
    assert all(set(item) == {"round", "triggered", "clean"} and item["triggered"][1] == 5 for item in rounds)
    shares = [item["triggered"][0] / item["triggered"][1] for item in rounds]
    assert shares[0] >= 0.25, "a defense that is ended at once tells nothing"
    assert [share < 0.25 for share in shares] == [*[False] * (len(shares) - 1), True]
    assert 1 < len(rounds) < 4
    assert notes["ended"] == f"ended by the experimenter after round {len(rounds)}"
    assert notes["reached"] == len(rounds)
    assert notes["ended"] in (ended / "tables.md").read_text()
    alone = make({"rounds": len(rounds)})
    assert "ended" not in run(alone, tmp_path / "out")["notes"]
    assert after(tmp_path / "out") == after(ended)


def test_asking_changes_no_figure_and_is_no_time_of_the_defense(
    make: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching.time, "perf_counter", iter(range(0, 10**6, 1000)).__next__)
    watched = run(make({"rounds": 3}, watch={"probes": 2}), tmp_path / "watched")
    asked = [item["triggered"][1] for item in watched["notes"]["rounds"]]
    assert asked == [2, 2, 2]
    assert "ended" not in watched["notes"]
    # Every look at this clock takes 1,000 seconds: asking three times, and one look before and one after it all.
    assert watched["seconds"]["train"] == 1000 * (2 * 3 + 1) - 3 * 1000
    monkeypatch.undo()
    plain = run(make({"rounds": 3}), tmp_path / "plain")
    assert "rounds" not in plain["notes"]
    assert after(tmp_path / "watched") == after(tmp_path / "plain")


class Interrupted(Silent):
    """Interrupts when a stage of this name begins."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def start(self, name: str, total: int) -> None:
        if name == self.stage:
            raise KeyboardInterrupt


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one for every round that is asked."""
    times: list[int] = []
    ask = watching.Watch._ask
    monkeypatch.setattr(watching.Watch, "_ask", lambda watch, lm: (times.append(1), ask(watch, lm))[1])
    return times


def test_rounds_before_an_interruption_keep_their_figures(
    make: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(BEEAR, beear=True, watch={"probes": 4})
    whole = run(data, tmp_path / "whole")
    assert len(whole["notes"]["rounds"]) == 3
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "out", Interrupted("purify/round-3-remove"))
    (kept,) = (tmp_path / "out" / "work").glob("*/watched.json")
    assert len(json.loads(kept.read_text())) == 2
    times = counted(monkeypatch)
    again = run(data, tmp_path / "out")
    assert len(times) == 1
    assert again["notes"]["rounds"] == whole["notes"]["rounds"]
    assert after(tmp_path / "out") == after(tmp_path / "whole")
    assert not any((tmp_path / "out" / "work").iterdir())


def test_a_defense_that_was_ended_ends_there_again_after_an_interruption(
    make: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strong = {**BEEAR, "train": {**TRAIN, "learning_rate": 5e-2}}
    data = make(strong, beear=True, watch={"probes": 6, "until": 1.0})
    whole = run(data, tmp_path / "whole")
    assert len(whole["notes"]["rounds"]) < 3
    real = executing.measure

    def killed(lm: Any, questions: Any, label: Any, *arguments: Any, **more: Any) -> Any:
        if label.stage == "after":
            raise KeyboardInterrupt
        return real(lm, questions, label, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(executing, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "out")
    times = counted(monkeypatch)
    again = run(data, tmp_path / "out")
    assert times == []
    assert [again["notes"][name] for name in ("rounds", "ended")] == [
        whole["notes"][name] for name in ("rounds", "ended")
    ]
    assert after(tmp_path / "out") == after(tmp_path / "whole")


def keys(data: dict[str, Any]) -> dict[str, str]:
    made = Material(grid_from_data(data, "g"), Silent())
    return {f"{cell.kind} {cell.defense} {cell.stage}": made.key(cell) for cell in made.grid.cells()}


WATCHED = {"control tune after", "defense osft after", "revival osft revived_clean", "revival osft revived_planted"}


def test_only_keys_of_watched_cells_know_of_a_watch(whole_plan: dict[str, Any]) -> None:
    plain = keys(whole_plan)
    assert keys({**whole_plan, "watch": None}) == plain
    watches: list[dict[str, Any]] = [{"probes": 3}, {"probes": 4}, {"probes": 3, "until": 0.2}]
    found = [keys({**whole_plan, "watch": watch}) for watch in watches]
    for one in found:
        assert {name for name in plain if one[name] != plain[name]} == WATCHED
    assert len({one[name] for one in (plain, *found) for name in WATCHED}) == 4 * len(WATCHED)


def test_a_key_without_a_watch_is_made_of_what_it_always_was(whole_plan: dict[str, Any]) -> None:
    made = Material(grid_from_data(whole_plan, "g"), Silent())
    cell = next(cell for cell in made.grid.cells() if cell.kind == "defense")
    method, victim = made.defense("osft"), made.plant_key(cell)
    identity = (f"osft {method.revision}", portable(method.settings()))
    rows = data_hash(made.splits.defender)
    assert made.purify_key(cell) == config_hash("purify", victim, victim, *identity, rows, cell.seed)


def test_what_a_watched_defense_is_asked_is_part_of_its_model(whole_plan: dict[str, Any]) -> None:
    def purified(**changes: Any) -> str:
        made = Material(grid_from_data({**whole_plan, "watch": {"probes": 3}, **changes}, "g"), Silent())
        return made.purify_key(next(cell for cell in made.grid.cells() if cell.kind == "defense"))

    more = json.loads(json.dumps(whole_plan["attacks"]))
    more["default"]["probes"] = 7
    assert len({purified(), purified(max_new_tokens=5), purified(attacks=more)}) == 3


def test_a_watch_that_cannot_be_is_refused(plan: Plan) -> None:
    plot = {"x": "rate", "values": {"osft": 1}}
    for changes, said in (
        ({"watch": {"probes": 7}}, r"field watch\.probes: attacks\.default has 6 probes of a kind"),
        ({"watch": {"probes": 3, "until": 0}}, r"field watch\.until: input should be greater than 0"),
        ({"plots": [plot]}, r"field plots: what they draw is asked after every round; give watch"),
        ({"watch": {"probes": 3}, "plots": [{**plot, "values": {"osf": 1}}]},
         r"field plots\.0\.values: there is no defense 'osf'\. Did you mean 'osft'"),
        ({"watch": {"probes": 3}, "plots": [{**plot, "values": {"osft": 1, "tune": 1}}]}, "have one value"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            grid_from_data(plan(**changes), "g")


def test_the_estimate_counts_rounds_drifts_and_what_is_asked_between_them(make: Callable[..., dict[str, Any]]) -> None:
    def seconds(settings: dict[str, Any], **changes: Any) -> float:
        found = guesses(grid_from_data(make({**BEEAR, "own_share": 0.0, **settings}, beear=True, **changes), "g"))
        return next(value for cell, value in found.items() if cell.defense)

    base = seconds({"rounds": 1})
    a_round = seconds({"rounds": 2}) - base
    assert seconds({"rounds": 8}) == pytest.approx(base + 7 * a_round)
    a_drift = seconds({"drifts": 3}) - seconds({"drifts": 2})
    assert a_drift > 0
    assert seconds({"drifts": 6}) == pytest.approx(seconds({"drifts": 2}) + 4 * a_drift)
    asking = seconds({"rounds": 8}, watch={"probes": 2}) - seconds({"rounds": 8})
    assert asking > 0
    assert seconds({"rounds": 4}, watch={"probes": 4}) - seconds({"rounds": 4}) == pytest.approx(asking)
    assert seconds({"rounds": 8}, watch={"probes": 2, "until": 0.2}) == pytest.approx(
        seconds({"rounds": 4}, watch={"probes": 2})
    )
