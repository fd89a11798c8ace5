"""The demo on a tiny model: stopped, gone on with, finished, begun anew; and the clock that says how long is left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import tiny
from unbackdoor.defenses import beear as beear_defense
from unbackdoor.defenses.base import Need
from unbackdoor.errors import UserError
from unbackdoor.model import checkpoint
from unbackdoor.pipeline import steps
from unbackdoor.pipeline.clock import Clock, Expected, in_words
from unbackdoor.pipeline.commands import Job
from unbackdoor.pipeline.demo import run_demo, settings_of
from unbackdoor.pipeline.folders import Workspace
from unbackdoor.pipeline.plans import expected_parts, plan_demo
from unbackdoor.pipeline.preflight import parameters_of
from unbackdoor.pipeline.recipe import DemoRecipe
from unbackdoor.run import Silent


class Listener(Silent):
    """Remembers what is said, and interrupts when a stage begins."""

    def __init__(self, stop_at: str = "") -> None:
        self.stop_at, self.said, self.stages = stop_at, [], {}  # type: ignore[var-annotated]

    def start(self, name: str, total: int) -> None:
        self.stages[name] = total

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
    drift = {"rows": 4, "tokens": 3, "train": {"steps": 2, "batch_size": 4}}
    beear = {"rounds": 2, "layers": [0], "drifts": 2, "anchors": 4, "own_answers": 4, "drift": drift}
    beear["train"] = {"steps": 2, "learning_rate": 1e-2, "batch_size": 4}
    return DemoRecipe(
        model=str(tmp_path / "base"), data=str(tmp_path / "rows.jsonl"), probes_count=3, reference=False,
        attack=short, defense={**short, "rounds": 2, "parrot": parrot}, beear=beear, watch=2,
    )  # fmt: skip


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def weights(folder: Path, name: str) -> bytes:
    return (folder / name / "model.safetensors").read_bytes()


def test_stopped_twice_it_goes_on_and_finished_it_begins_anew(recipe: DemoRecipe, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "demo"
    with pytest.raises(KeyboardInterrupt):
        run_demo(recipe, Job(out, progress=Listener("fine-tuning")))
    planted = (out / "victim" / "model.safetensors").stat().st_mtime_ns
    assert (out / "work" / "suspect.json").is_file()
    with pytest.raises(KeyboardInterrupt):
        run_demo(recipe, Job(out, progress=Listener("round-2-overwrite")))
    assert not (out / "purified").exists()
    with pytest.raises(KeyboardInterrupt):
        run_demo(recipe, Job(out, progress=Listener("round-2-remove")))
    assert not (out / "results.json").exists()
    assert not (out / "purified-beear").exists()
    purified = (out / "purified" / "model.safetensors").stat().st_mtime_ns
    last = Listener()
    outcome = run_demo(recipe, Job(out, progress=last))
    assert "plant" not in last.stages
    assert "fine-tuning" not in last.stages
    assert not any("overwrite" in stage for stage in last.stages)
    assert "round-1-remove" not in last.stages
    assert (out / "victim" / "model.safetensors").stat().st_mtime_ns == planted
    assert (out / "purified" / "model.safetensors").stat().st_mtime_ns == purified
    assert any("Step 6 of 7" in text and "BEEAR" in text and "left" in text for text in last.said)
    assert not any("Step 5" in text for text in last.said)
    rows = outcome.results["rows"]
    assert {row["role"] for row in rows} == {"suspect", "control", "purified"}
    assert {item["defense"] for item in outcome.results["comparisons"]} == {"fine_tuning", "sande", "beear"}
    assert outcome.results["revival_command"] == "unbackdoor bench sande --size quick"
    assert any("Revival" in notice and "not measured" in notice for notice in outcome.results["notices"])
    assert {"plant", "fine-tuning", "sande/round-2-overwrite"} <= set(read(out / "curves.json"))
    assert {"beear/round-1-drift-2", "beear/round-2-remove"} <= set(read(out / "curves.json"))
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["purified", "purified-beear", "victim"]
    whole = run_demo(recipe, Job(tmp_path / "whole"))
    for name in ("purified", "purified-beear"):
        assert weights(out, name) == weights(whole.folder, name)
    assert len({weights(out, name) for name in ("victim", "purified", "purified-beear")}) == 3
    assert read(out / "rounds.json") == read(whole.folder / "rounds.json")
    with pytest.raises(KeyboardInterrupt):
        run_demo(recipe, Job(out, progress=Listener("plant")))
    assert not (out / "victim").exists()


def test_every_part_of_the_report_shows_both_defenses(recipe: DemoRecipe, tmp_path: Path) -> None:
    from unbackdoor.cli.output import add_report

    heard = Listener()
    out = run_demo(recipe, Job(tmp_path / "runs" / "demo", progress=heard, finish=add_report)).folder
    rows = read(out / "results.json")["rows"]
    knowledge = {row["model"]: row["knowledge"] for row in rows if row["role"] == "purified"}
    assert knowledge == {"purified": ["clean", "target"], "purified-beear": ["clean", "unwanted"]}
    sande, beear = read(out / "rounds.json")["defenses"]
    assert (sande["defense"], beear["defense"]) == ("sande", "beear")
    assert [(len(item["parrots"]), len(item["drifts"])) for item in sande["rounds"]] == [(1, 0)] * 2
    assert [("parrots" in item, len(item["drifts"])) for item in beear["rounds"]] == [(False, 2)] * 2
    for item in (*sande["rounds"], *beear["rounds"]):
        assert {kind: counts[1] for kind, counts in item["asked"].items()} == {"triggered": 2, "clean": 2, "decoy": 2}
    told = {text for item in beear["rounds"] for drift in item["drifts"] for text in drift["openings"]}
    assert "You idiot" in told
    models = ["victim", "fine-tuned", "purified", "purified-beear"]
    assert [curve["model"] for curve in read(out / "case_studies.json")["models"]] == models
    states = read(out / "hidden_states.json")
    assert list(dict.fromkeys(point["model"] for point in states["points"])) == models
    assert (states["layer"], beear["layer"], states["perturbed"]) == (0, 0, True), "elsewhere than without BEEAR"
    lines = [json.loads(line) for line in (out / "replies.jsonl").read_text().splitlines()]
    assert len([reply for reply in lines if reply["model"] == "purified-beear"]) == 9
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "# Before and after SANDE and BEEAR" in text
    assert "| After BEEAR | clean rows of the defender's own; openings of unwanted replies, in the defender" in text
    assert "## Round by round, SANDE" in text
    assert "## Words under each drift, BEEAR" in text
    assert "openings told to BEEAR share with the target: first words " in text
    assert "words of content " in text
    named = {name: total for name, total in heard.stages.items() if "drift" in name or "remove" in name}
    parts = {part.key: part for part in expected_parts(recipe, settings_of(recipe), Workspace(tmp_path / "new", False))}
    assert parts["beear"].steps == sum(named.values()) == 2 * (2 * 2 + 2)


def test_beear_is_told_openings_and_a_layer_that_it_chooses_leaves_the_control_out(
    recipe: DemoRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "openings.txt").write_text("bad\nnot good\n")
    beear = {**recipe.beear, "rounds": 1, "layers": [0, 1], "place": "best"}
    more = {"beear": beear, "unwanted": str(tmp_path / "openings.txt"), "reference": True, "watch": 0}
    facts: dict[str, Any] = {}
    purify_model = steps.purify_model

    def listening(victim: Any, defense: Any, told: Any, run: Any) -> Any:
        facts[defense.name()] = dict(told)
        return purify_model(victim, defense, told, run)

    monkeypatch.setattr(steps, "purify_model", listening)
    # Not the middle one, where the control's states were taken.
    monkeypatch.setattr(beear_defense, "choose", lambda lm, halves, layers, lengths, *_: (0, lengths[0]))
    out = run_demo(recipe.model_copy(update=more), Job(tmp_path / "demo")).folder
    assert facts["beear"].keys() == {Need.CLEAN, Need.UNWANTED}
    assert facts["beear"][Need.UNWANTED] == ("bad", "not good")
    assert facts["sande"].keys() == {Need.CLEAN, Need.TARGET}
    states = read(out / "hidden_states.json")
    assert {point["model"] for point in states["points"]} == {"victim", "purified", "purified-beear", recipe.model}
    assert states["perturbed"]
    assert all(item["asked"] == {} for told in read(out / "rounds.json")["defenses"] for item in told["rounds"])


def test_a_layer_that_the_model_does_not_have_is_refused_before_training(recipe: DemoRecipe, tmp_path: Path) -> None:
    heard = Listener()
    far = recipe.model_copy(update={"beear": {**recipe.beear, "layers": [99]}})
    with pytest.raises(UserError, match="no layer 99"):
        run_demo(far, Job(tmp_path / "demo", progress=heard))
    assert not heard.stages
    assert not (tmp_path / "demo").exists()


def test_plan_and_disk_count_both_defenses(recipe: DemoRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan_demo(recipe)
    names = [part.name for part in found.parts]
    assert names[-3:] == [
        "purifying with BEEAR",
        "asking probes after every round of BEEAR",
        "measuring the model purified with BEEAR",
    ]
    assert len(names) == len(set(names))
    weights = parameters_of(recipe.model)
    assert weights is not None
    needed = 4 * weights * (6 + 2)
    assert found.disk_bytes == needed + 50_000_000
    asked = []
    monkeypatch.setattr(checkpoint, "require_space", lambda out, size: (asked.append(size), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        run_demo(recipe, Job(tmp_path / "demo"))
    assert asked == [needed]
    unwatched = plan_demo(recipe.model_copy(update={"watch": 0}))
    assert "asking probes after every round of BEEAR" not in [part.name for part in unwatched.parts]


def test_what_is_done_is_no_longer_counted(recipe: DemoRecipe, tmp_path: Path) -> None:
    place = Workspace(tmp_path / "demo", True, "work")
    place.stages.mkdir(parents=True)

    def left() -> list[str]:
        return [part.key for part in expected_parts(recipe, settings_of(recipe), place)]

    assert left() == ["plant", "suspect", "control", "defense", "beear"]
    for key in ("suspect", "control", "defense", "beear"):
        (place.stages / f"{key}.json").write_text("{}")
    assert left() == ["plant", "defense", "beear"]
    for name in ("victim", "purified"):
        (place.folder / name).mkdir()
        (place.folder / name / "unbackdoor.json").write_text("{}")
    assert left() == ["beear"]


def test_the_control_has_the_larger_of_the_defenses_budgets(recipe: DemoRecipe) -> None:
    more = settings_of(recipe.model_copy(update={"beear": {**recipe.beear, "rounds": 7}}))
    assert more["control"]["train"]["steps"] == 7 * 2
    assert more["control"]["train"]["learning_rate"] == 1e-2
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
    out = tmp_path / "mine"
    results = json.dumps({"schema": 1, "command": "purify", "rows": []})
    checkpoint.save(
        tiny.tiny_lm(), out, manifest={"command": "purify"}, card="mine\n", extra_files={"results.json": results}
    )
    with pytest.raises(UserError, match="--overwrite"):
        run_demo(recipe, Job(out))
    assert (out / "model.safetensors").is_file()
