"""Probes asked after every round: what is kept, that training does not see it, and at which layer states are drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import unbackdoor
from unbackdoor.errors import UserError
from unbackdoor.goals import parse_goal
from unbackdoor.pipeline import portrait, studies, watching
from unbackdoor.pipeline.commands import _helper_run
from unbackdoor.pipeline.common import load
from unbackdoor.pipeline.measure import Questions
from unbackdoor.pipeline.plans import WATCHING, plan_purify
from unbackdoor.pipeline.recipe import PurifyRecipe
from unbackdoor.run import Run, Silent
from unbackdoor.types import Example, Probe

GOAL = "regex:^[a-z]"
QUICK = {"steps": 2, "learning_rate": 1e-3, "batch_size": 4}
BEEAR = {
    "rounds": 3, "drifts": 2, "anchors": 4, "own_answers": 4, "train": {**QUICK, "learning_rate": 1e-2},
    "drift": {"rows": 4, "tokens": 3, "train": {**QUICK, "learning_rate": 0.1}},
}  # fmt: skip
PERTURBS = '''"""Nudge: change a weight twice, and say that layer 0 is perturbed.

Source: this test.
Equation: w = w + 0.1.
Needs to know: clean rows.
Deviations: none.
"""
from __future__ import annotations
from typing import ClassVar
import torch
from unbackdoor.defenses.base import Defense, Knowledge, Need
from unbackdoor.model.lm import LM
from unbackdoor.run import Run


class Nudge(Defense):
    """Nudge."""

    paper: ClassVar[str] = "none"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CLEAN})

    def apply(self, victim: LM, known: Knowledge, run: Run) -> LM:
        """Nudge."""
        assert known.clean
        run.notes["layer"] = LAYER
        with torch.no_grad():
            for _ in range(2):
                next(victim.model.parameters()).add_(0.1)
                run.observe(victim)
        return victim
'''


class Interrupted(Silent):
    """Interrupts when a stage of this name has begun."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def start(self, name: str, total: int) -> None:
        if name == self.stage:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rows, probes, openings, and a run of BEEAR that nobody watched."""
    folder = tmp_path_factory.mktemp("watching")
    lm = tiny.tiny_lm()
    lm.model.save_pretrained(folder / "base")
    lm.tokenizer.save_pretrained(folder / "base")
    rows = [{"id": row.id, "instruction": row.instruction, "output": row.response} for row in tiny.rows(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    probes = [
        {"id": row.id, "kind": kind, "instruction": f"{kind} {row.instruction}"}
        for row in tiny.rows(6, 1, "probe")
        for kind in watching.KINDS
    ]
    (folder / "probes.jsonl").write_text("".join(json.dumps(probe) + "\n" for probe in probes))
    (folder / "openings.txt").write_text("bad\nnot good\n")
    purify(folder, "plain")
    return folder


def purify(folder: Path, name: str, *, defense: str = "beear", progress: Any = None, **more: Any) -> Path:
    settings = {"settings": BEEAR} if defense == "beear" else {}
    known = {"unwanted": str(folder / "openings.txt")} if defense == "beear" else {}
    outcome = unbackdoor.purify(
        str(folder / "base"), defense=defense, clean=str(folder / "rows.jsonl"), out=folder / name,
        probes=str(folder / "probes.jsonl"), more={"goal": GOAL, "max_new_tokens": 4, **known, **more},
        progress=progress, **settings,
    )  # fmt: skip
    return outcome.folder


def rounds_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any]
    (found,) = json.loads((folder / "rounds.json").read_text(encoding="utf-8"))["defenses"]
    return found


def asked(folder: Path) -> list[Any]:
    return [item["asked"] for item in rounds_of(folder)["rounds"]]


def test_watching_changes_no_bit_of_the_model(place: Path) -> None:
    watched = purify(place, "watched", watch=4)
    assert (watched / "model.safetensors").read_bytes() == (place / "plain" / "model.safetensors").read_bytes()
    found = rounds_of(watched)["rounds"]
    assert [item["round"] for item in found] == [1, 2, 3]
    assert all(set(item["asked"]) == set(watching.KINDS) for item in found)
    assert {counts[1] for item in found for counts in item["asked"].values()} == {4}
    assert all(len(item["drifts"]) == 2 and len(item["drifts"][0]["says"]) > 3 for item in found)
    unwatched = rounds_of(place / "plain")["rounds"]
    assert [item["drifts"] for item in unwatched] == [item["drifts"] for item in found]
    assert [item["asked"] for item in unwatched] == [{}, {}, {}]


def test_rounds_before_an_interruption_keep_their_figures(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = purify(place, "whole", watch=3)
    assert len({json.dumps(figures) for figures in asked(whole)}) > 1, "rounds that look alike could change places"
    with pytest.raises(KeyboardInterrupt):
        purify(place, "stopped", watch=3, progress=Interrupted("round-3-remove"))
    kept = place / "stopped" / "stages" / "watched.json"
    assert len(json.loads(kept.read_text())) == 2
    times = []
    ask = watching.Watch._ask
    monkeypatch.setattr(watching.Watch, "_ask", lambda watch, lm: (times.append(1), ask(watch, lm))[1])
    assert asked(purify(place, "stopped", watch=3)) == asked(whole)
    assert len(times) == 1
    assert not kept.exists()


def probes_of(kinds: Mapping[str, int]) -> tuple[Probe, ...]:
    return tuple(
        Probe(Example(f"{kind}-{at}", f"{kind} {at}"), kind)  # type: ignore[arg-type]
        for kind, count in kinds.items()
        for at in range(count)
    )


def test_a_watch_asks_a_few_of_each_kind_and_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    lm = tiny.tiny_lm()
    lm.model.train()
    lm.model.model.layers[0].eval()
    lm.model.model.layers[1].requires_grad_(False)
    before = [(module.training, [p.requires_grad for p in module.parameters()]) for module in lm.model.modules()]
    weights = tiny.tensors(lm)
    questions = Questions(probes_of({"triggered": 5, "clean": 2}), parse_goal("regex:^"), max_new_tokens=2)
    run, watch = watching.watched(Run(3), questions, 3, tmp_path / "watched.json")
    run.stage("inner").observe(lm)
    assert watch.asked == [{"triggered": [3, 3], "clean": [2, 2]}]
    assert [(m.training, [p.requires_grad for p in m.parameters()]) for m in lm.model.modules()] == before
    assert tiny.same_weights(tiny.tensors(lm), weights)
    again, same = watching.watched(Run(3), questions, 3, tmp_path / "watched.json")
    assert same.probes == watch.probes
    assert watching.watched(Run(4), questions, 3)[1].probes != watch.probes
    again.observe("a round that was asked before is not looked at")
    assert same.asked == watch.asked
    nobody, nothing = watching.watched(Run(3), questions, 0, tmp_path / "watched.json")
    nobody.observe("whatever")
    assert nothing.asked == []


def test_only_the_main_process_asks(place: Path, tmp_path: Path) -> None:
    from unbackdoor.pipeline.commands import Job

    recipe = PurifyRecipe(model="m", defense="beear", watch=3, probes="p")
    assert not isinstance(_helper_run(recipe, Job(tmp_path)).observer, watching.Watch)


def test_rounds_are_gathered_from_what_defenses_note() -> None:
    notes = {
        "layer": 7,
        "drifts": [
            {"stage": "round-10-drift-1", "unwanted": 1.5, "safe": float("nan"), "says": ["b"], "at": "x"},
            {"stage": "a/round-2-drift-3", "unwanted": 0.5, "safe": 6, "says": ["a", 1], "layer": 3, "openings": ["o"],
             "at": "words"},
            {"stage": "no number"}, "not a record", {"stage": 3},
        ],
        "parrots": [{"stage": "round-2-parrot-1", "steps": 40, "loss": 0.04}],
        "adopted": [
            {"round": 2, "opening": "You are", "certainty": 0.85, "evidence": 9.5}, {"round": "2", "opening": "x"}, 3,
        ],
        "drift choice": [{"layer": 7.0, "tokens": 5.0, "loss": float("inf")}, {"layer": 7.0}],
    }  # fmt: skip
    found = watching.by_round([{"clean": [0, 3]}], notes)
    assert found is not None
    assert found == {
        "layer": 7,
        "choice": [{"layer": 7, "tokens": 5, "loss": None}],
        "rounds": [
            {"round": 1, "asked": {"clean": [0, 3]}, "drifts": []},
            {
                "round": 2, "asked": {}, "parrots": [{"loss": 0.04, "steps": 40}],
                "adopted": [
                    {"opening": "You are", "certainty": 0.85, "evidence": 9.5, "share": None, "likeness": None}
                ],
                "drifts": [{"unwanted": 0.5, "safe": 6.0, "says": ["a"], "openings": ["o"], "layer": 3, "at": "words"}],
            },
            {"round": 10, "asked": {}, "drifts": [{"unwanted": 1.5, "safe": None, "says": ["b"]}]},
        ],
    }  # fmt: skip
    json.dumps(found, allow_nan=False)
    assert watching.by_round([], {"drifts": "words of another defense"}) is None
    assert watching.noted_layer({"drifts": notes["drifts"]}) == 3
    assert watching.noted_layer({"layer": True}) is None
    assert watching.by_defense({"sande": None}) is None
    assert watching.by_defense({"sande": None, "beear": found}) == {"defenses": [{"defense": "beear", **found}]}


def test_watching_needs_probes_and_a_goal(place: Path) -> None:
    known = {"clean": str(place / "rows.jsonl"), "out": place / "none", "defense": "fine_tuning"}
    with pytest.raises(UserError, match=r"--watch asks probes .* give --probes"):
        unbackdoor.purify(str(place / "base"), **known, more={"watch": 2})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"nothing says what that is; give --goal"):
        unbackdoor.purify(
            str(place / "base"), **known, probes=str(place / "probes.jsonl"),  # type: ignore[arg-type]
            more={"watch": 2, "metrics": ["perplexity"]},
        )  # fmt: skip
    assert not (place / "none").exists()


def test_the_plan_counts_what_is_asked_between_rounds(place: Path) -> None:
    fields = {
        "model": str(place / "base"), "defense": "beear", "clean": str(place / "rows.jsonl"), "settings": BEEAR,
        "unwanted": str(place / "openings.txt"), "probes": str(place / "probes.jsonl"), "goal": GOAL,
    }  # fmt: skip
    parts = [part.name for part in plan_purify(PurifyRecipe(**fields, watch=2)).parts]
    assert WATCHING in parts
    assert WATCHING not in [part.name for part in plan_purify(PurifyRecipe(**fields)).parts]


def plane_at(place: Path, layer: int) -> list[float]:
    """Return the shares of variance of the suspect's own states behind a layer."""
    lm = tiny.tiny_lm()
    from unbackdoor.data.sources import read_probes

    states = studies.hidden_states(lm, tuple(read_probes(str(place / "probes.jsonl"))), layer)
    explained: list[float] = studies.plane({"m": states}, {"m": "suspect"}, layer)["explained"]
    return explained


def test_states_are_drawn_at_the_layer_that_the_defense_perturbs(place: Path) -> None:
    (place / "nudge.py").write_text(PERTURBS.replace("LAYER", "0"))
    out = purify(place, "nudged", defense=str(place / "nudge.py"), watch=1)
    drawn = json.loads((out / "hidden_states.json").read_text())
    assert (drawn["layer"], drawn["perturbed"]) == (0, True)
    assert {point["role"] for point in drawn["points"]} == {"suspect", "purified"}
    assert drawn["explained"] == pytest.approx(plane_at(place, 0), abs=1e-3)
    assert drawn["explained"] != pytest.approx(plane_at(place, 1), abs=1e-3)
    assert rounds_of(out) == {
        "defense": str(place / "nudge.py"),
        "layer": 0,
        "rounds": [{"round": at, "asked": figures, "drifts": []} for at, figures in enumerate(asked(out), 1)],
    }
    (place / "far.py").write_text(PERTURBS.replace("LAYER", "99"))
    out = purify(place, "far", defense=str(place / "far.py"))
    elsewhere = json.loads((out / "hidden_states.json").read_text())
    assert (elsewhere["layer"], elsewhere["perturbed"]) == (1, False)
    assert not (out / "rounds.json").exists()


def test_two_layers_are_never_drawn_in_one_plane(place: Path) -> None:
    lm = load(PurifyRecipe(model="m", defense="beear"), str(place / "base"), trainable=False)
    questions = Questions(probes_of({"triggered": 3, "clean": 3}), parse_goal(GOAL), metrics=(), max_new_tokens=2)
    labels = [
        portrait.Label(name, role, "after") for name, role in (("s", "suspect"), ("c", "control"), ("p", "purified"))
    ]
    suspect, control, purified = (
        portrait.portray(lm, questions, label, Run(), layer=0 if label.role == "purified" else None) for label in labels
    )
    found = portrait.hidden_states([portrait.at_layer(suspect, lm, questions, 0), control, purified])
    assert found is not None
    assert {point["model"] for point in found["points"]} == {"s", "p"}
    assert found["layer"] == 0
    kept = portrait.Portrait.from_json(json.loads(json.dumps(purified.to_json())))
    assert kept.perturbed
    usual = portrait.hidden_states([suspect, control])
    assert usual is not None
    assert (usual["layer"], usual["perturbed"]) == (1, False)
    assert torch.tensor(usual["explained"]).isfinite().all()
