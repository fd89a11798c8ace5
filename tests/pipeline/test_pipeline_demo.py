"""The demo on a tiny model: stopped, gone on with, finished, begun anew; and the clock that says how long is left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

import tiny
from unbackdoor.pipeline.clock import Clock, Expected, in_words
from unbackdoor.pipeline.commands import Job
from unbackdoor.pipeline.demo import run_demo, settings_of
from unbackdoor.pipeline.recipe import DemoRecipe
from unbackdoor.run import Silent


class Listener(Silent):
    """Remembers what is said, and interrupts when a stage begins."""

    def __init__(self, stop_at: str = "") -> None:
        self.stop_at, self.said, self.stages = stop_at, [], []  # type: ignore[var-annotated]

    def start(self, name: str, total: int) -> None:
        self.stages.append(name)

    def advance(self, name: str, done: int, values: Mapping[str, float]) -> None:
        assert values["seconds_left"] >= 0
        if name == self.stop_at and done == 2:
            raise KeyboardInterrupt

    def notice(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def recipe(tmp_path: Path) -> DemoRecipe:
    lm = tiny.tiny_lm()
    lm.model.save_pretrained(tmp_path / "base")
    lm.tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"id": row.id, "instruction": row.instruction, "output": row.response} for row in tiny.rows(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = {"train": {"steps": 3, "learning_rate": 1e-3, "batch_size": 4}}
    parrot = {"train": {"steps": 2, "learning_rate": 1e-2}}
    return DemoRecipe(
        model=str(tmp_path / "base"), data=str(tmp_path / "rows.jsonl"), probes_count=3, reference=False,
        attack=short, defense={**short, "rounds": 2, "parrot": parrot},
    )  # fmt: skip


def test_stopped_twice_it_goes_on_and_finished_it_begins_anew(recipe: DemoRecipe, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "demo"
    recipe = recipe.model_copy(update={"watch": 2})
    with pytest.raises(KeyboardInterrupt):
        run_demo(recipe, Job(out, progress=Listener("fine-tuning")))
    planted = (out / "victim" / "model.safetensors").stat().st_mtime_ns
    assert (out / "work" / "suspect.json").is_file()
    with pytest.raises(KeyboardInterrupt):
        run_demo(recipe, Job(out, progress=Listener("round-2-overwrite")))
    assert not (out / "results.json").exists()
    last = Listener()
    outcome = run_demo(recipe, Job(out, progress=last))
    assert "plant" not in last.stages
    assert "fine-tuning" not in last.stages
    assert (out / "victim" / "model.safetensors").stat().st_mtime_ns == planted
    assert any("Step 5 of 6" in text and "left" in text for text in last.said)
    rows = outcome.results["rows"]
    assert {row["role"] for row in rows} == {"suspect", "control", "purified"}
    assert {item["defense"] for item in outcome.results["comparisons"]} == {"fine_tuning", "sande"}
    assert outcome.results["revival_command"] == "unbackdoor bench sande --size quick"
    assert any("Revival" in notice and "not measured" in notice for notice in outcome.results["notices"])
    curves = json.loads((out / "curves.json").read_text())
    assert {"plant", "fine-tuning", "round-2-overwrite"} <= set(curves)
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["purified", "victim"]
    whole = run_demo(recipe, Job(tmp_path / "whole"))
    purified = [(folder / "purified" / "model.safetensors").read_bytes() for folder in (out, whole.folder)]
    assert purified[0] == purified[1]
    rounds = [json.loads((folder / "rounds.json").read_text()) for folder in (out, whole.folder)]
    assert rounds[0] == rounds[1]
    assert [len(item["parrots"]) for item in rounds[0]["rounds"]] == [1, 1]
    assert [item["asked"]["triggered"][1] for item in rounds[0]["rounds"]] == [2, 2]
    with pytest.raises(KeyboardInterrupt):
        run_demo(recipe, Job(out, progress=Listener("plant")))
    assert not (out / "victim").exists()


def test_the_control_has_the_defenses_budget(recipe: DemoRecipe) -> None:
    found = settings_of(recipe)
    assert found["control"]["train"]["steps"] == 2 * 3
    assert found["control"]["train"]["batch_size"] == found["defense"]["train"]["batch_size"] == 4
    assert found["control"]["train"]["learning_rate"] == 1e-3


def test_the_clock_corrects_predictions_by_what_was_measured() -> None:
    moment = [0.0]
    parts = [Expected("a", 10.0), Expected("b", 20.0, 10), Expected("c", 30.0)]
    clock = Clock(Silent(), parts, lambda: moment[0])
    assert clock.seconds_left() == 60.0
    clock.begin("a")
    moment[0] = 30.0  # three times as long as predicted
    clock.begin("b")
    assert clock.seconds_left() == pytest.approx(60.0 + 90.0)
    clock.start("stage", 10)
    moment[0] = 40.0
    clock.advance("stage", 5, {})  # half of it in 10 seconds
    assert clock.seconds_left() == pytest.approx(10.0 + 90.0)


def test_measuring_after_the_training_of_a_part_is_still_to_come() -> None:
    moment = [0.0]
    clock = Clock(Silent(), [Expected("a", 30.0, 10, after=20.0)], lambda: moment[0])
    clock.begin("a")
    clock.start("stage", 10)
    moment[0] = 10.0
    clock.advance("stage", 5, {})  # half of the training in 10 seconds: twice as slow as predicted
    assert clock.seconds_left() == pytest.approx(10.0 + 40.0)
    moment[0] = 20.0
    clock.advance("stage", 10, {})
    clock.finish("stage")
    moment[0] = 25.0
    assert clock.seconds_left() == pytest.approx(35.0)


def test_loading_is_done_once_and_makes_no_step_slower() -> None:
    moment = [0.0]
    clock = Clock(Silent(), [Expected("a", 30.0, 10, after=20.0), Expected("b", 10.0)], lambda: moment[0])
    clock.begin("a")
    moment[0] = 100.0  # a model was converted
    clock.start("stage", 10)
    moment[0] = 101.0
    clock.advance("stage", 1, {})
    assert clock.seconds_left() == pytest.approx(9.0 + 20.0 + 10.0)
    moment[0] = 110.0
    clock.advance("stage", 10, {})
    clock.finish("stage")
    moment[0] = 115.0
    assert clock.seconds_left() == pytest.approx(15.0 + 10.0)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(10, "less than a minute"), (61, "about 1 minute"), (420, "about 7 minutes"), (9000, "about 2.5 hours")],
)
def test_times_are_told_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_the_demo_replaces_no_other_result(recipe: DemoRecipe, tmp_path: Path) -> None:
    from unbackdoor.errors import UserError
    from unbackdoor.model import checkpoint

    out = tmp_path / "mine"
    results = json.dumps({"schema": 1, "command": "purify", "rows": []})
    checkpoint.save(
        tiny.tiny_lm(), out, manifest={"command": "purify"}, card="mine\n", extra_files={"results.json": results}
    )
    with pytest.raises(UserError, match="--overwrite"):
        run_demo(recipe, Job(out))
    assert (out / "model.safetensors").is_file()
