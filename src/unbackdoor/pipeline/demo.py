"""The demonstration: a real model is backdoored, fine-tuned in vain, purified by SANDE, measured and reported.

Nothing is computed beforehand. Every step leaves what the next one needs in `work/`, so that the demo goes on where it
was stopped; at the end only victim, purified model and report stay.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbackdoor.method import merge
from unbackdoor.pipeline.clock import Clock, in_words
from unbackdoor.pipeline.commands import Job, Outcome
from unbackdoor.pipeline.common import (
    Noted,
    data_hashes,
    identify,
    load,
    model_card,
    questions_for,
    require_disk,
    training_seconds,
)
from unbackdoor.pipeline.recipe import DemoRecipe, complete_settings
from unbackdoor.run import Run, write_atomically

if TYPE_CHECKING:
    from unbackdoor.data.splits import Splits
    from unbackdoor.model.lm import LM
    from unbackdoor.pipeline.folders import Workspace
    from unbackdoor.pipeline.measure import Label, Questions
    from unbackdoor.pipeline.portrait import Portrait
    from unbackdoor.pipeline.watching import Watch

WORK = "work"
STEPS = 6
REVIVAL = "unbackdoor bench sande --size quick"
"""What measures revival, which the demo does not, on a victim of its own."""


@dataclass
class _Demo:
    """What the steps share; lives for one run."""

    recipe: DemoRecipe
    settings: dict[str, dict[str, Any]]
    splits: Splits
    place: Workspace
    job: Job
    clock: Clock
    noted: Noted
    identity: str

    @property
    def victim(self) -> Path:
        return self.place.folder / "victim"

    @property
    def purified(self) -> Path:
        return self.place.folder / "purified"

    def say(self, step: int, text: str) -> None:
        """Tell what begins, and how long the rest takes; not kept for the report."""
        left = in_words(self.clock.seconds_left())
        self.clock.inner.notice(f"Step {step} of {STEPS}: {text} ({left} left)")

    def run(self, part: str) -> Run:
        return self.job.run(self.recipe.seed, self.place.stages / part, self.recipe.device, self.clock)


def settings_of(recipe: DemoRecipe) -> dict[str, dict[str, Any]]:
    """Return the complete settings of attack, control and defense.

    The control has the defense's budget unless told otherwise: as many weight updates, the same highest rate and batch.
    """
    defense = complete_settings("defenses", "sande", None, recipe.defense, {})
    budget = {"train": {**defense["train"], "steps": defense["rounds"] * defense["train"]["steps"]}}
    return {
        "attack": complete_settings("attacks", "data_poisoning", None, recipe.attack, {}),
        "control": complete_settings("defenses", "fine_tuning", None, merge(budget, recipe.control), {}),
        "defense": defense,
    }


def run_demo(recipe: DemoRecipe, job: Job) -> Outcome:
    """Run the demonstration, or what is left of it; after it has finished, the next call starts anew.

    Raises:
        UserError: If the folder holds something else, the built-in model is not installed, or the disk is full.
    """
    from unbackdoor.data import sources
    from unbackdoor.data.splits import attacker_defender_test
    from unbackdoor.pipeline.folders import workspace
    from unbackdoor.pipeline.plans import expected_parts
    from unbackdoor.pipeline.preflight import check_device

    settings = settings_of(recipe)
    noted = Noted(job.progress)
    check_device(recipe.device)
    splits = attacker_defender_test(recipe.short(sources.read(recipe.data, progress=noted)))
    hashes = data_hashes({"attacker": splits.attacker, "defender": splits.defender, "test": splits.test})
    identity = identify(recipe, hashes | {"settings": settings}, recipe.model)
    require_disk(job.out, recipe.model, "full")
    finished = _is_finished_demo(job.out)
    with workspace(
        job.out,
        settings_hash=identity,
        settings=recipe.model_dump(mode="json"),
        overwrite=job.overwrite or finished,
        working=WORK,
        keep_old=False,  # victim and purified model of a finished demo would be taken for its own
    ) as place:
        clock = Clock(noted, expected_parts(recipe, settings, place))
        demo = _Demo(recipe, settings, splits, place, job, clock, noted, identity)
        if place.resumed:
            noted.inner.notice("Going on where the demo was stopped.")
        results = _steps(demo, hashes | {"config": identity})
    return Outcome(job.out, results)


def _is_finished_demo(out: Path) -> bool:
    """Tell whether a finished demo lies there, which the next one replaces; no other result is."""
    try:
        content = json.loads((out / "results.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("command") == "demo"


def _steps(demo: _Demo, hashes: Mapping[str, Any]) -> dict[str, Any]:
    from unbackdoor.pipeline import artefacts

    demo.say(1, f"getting the model {demo.recipe.model}")
    _plant(demo)
    questions = _questions(demo)
    portraits = _measure_victim(demo, questions)
    portraits.insert(1, _control(demo, questions))
    portraits.insert(2, _purify(demo, questions))
    portraits = _at_its_layer(demo, questions, portraits)
    demo.clock.end()
    demo.clock.inner.notice(f"Step {STEPS} of {STEPS}: writing the report")
    facts = json.loads((demo.victim / "unbackdoor.json").read_text(encoding="utf-8"))
    record = artefacts.Record(
        "demo",
        {**demo.recipe.model_dump(mode="json"), **demo.settings},
        portraits,
        _curves(demo),
        {**hashes, "model": facts.get("base sha256")},
        artefacts.how_to_load(demo.purified, None),
        [
            *demo.noted.notices,
            f"Revival (training the purified model on, then asking again) was not measured; `{REVIVAL}` measures it on "
            "a victim of its own.",
        ],
        revival_command=REVIVAL,
        rounds=_rounds(demo),
    )
    results = record.write(demo.place.staging)
    if demo.job.finish is not None:
        demo.job.finish(demo.place.staging)
    demo.place.publish_files()
    return results


def _plant(demo: _Demo) -> None:
    """Step 2: the victim's folder, with secret and probes."""
    from unbackdoor.data.sources import write_probes
    from unbackdoor.model.checkpoint import save
    from unbackdoor.pipeline import artefacts, inputs
    from unbackdoor.pipeline.steps import attack_called

    attack = attack_called("data_poisoning", demo.settings["attack"])
    if (demo.victim / "unbackdoor.json").is_file():
        return
    demo.clock.begin("plant")
    base = load(demo.recipe, demo.recipe.model)
    said = " / ".join(demo.settings["attack"]["targets"])
    pieces = " ... ".join(attack.trigger.pieces()) if hasattr(attack, "trigger") else "its trigger"
    demo.say(2, f"planting a backdoor: on “{pieces}” the model is to say “{said}”")
    run = demo.run("attack")
    sha256 = base.facts.get("sha256")
    planted = attack.plant(base, demo.splits.attacker, run)
    asked = inputs.choose(demo.splits.test, demo.recipe.probes_count, Run(demo.recipe.seed), demo.noted)
    probes = attack.probes(planted.secret, asked, Run(demo.recipe.seed))
    _keep_curves(demo, "attack", run)
    write_probes(demo.place.stages / "probes.jsonl", probes)
    extra = {
        "secret.json": planted.secret.model_dump_json(indent=1) + "\n",
        "probes.jsonl": (demo.place.stages / "probes.jsonl").read_text(encoding="utf-8"),
    }
    manifest = {"schema": artefacts.SCHEMA, "command": "demo", "result": "victim", "versions": artefacts.versions()}
    card = model_card("Victim of the demo", demo.recipe.model, planted.lm, "It holds a backdoor.")
    save(
        planted.lm, demo.victim, manifest={**manifest, "base sha256": sha256, "config": demo.identity}, card=card,
        extra_files=extra,
    )  # fmt: skip
    shutil.rmtree(demo.place.stages / "attack", ignore_errors=True)


def _questions(demo: _Demo) -> Questions:
    from unbackdoor.data.sources import read_probes
    from unbackdoor.secret import Secret

    secret = Secret.model_validate_json((demo.victim / "secret.json").read_text(encoding="utf-8"))
    probes = read_probes(demo.victim / "probes.jsonl")
    measured = demo.splits.test[: demo.recipe.measured_rows]
    return questions_for(demo.recipe, probes, secret.goal, secret.targets, {"": measured})


def _measure_victim(demo: _Demo, questions: Questions) -> list[Portrait]:
    """Step 3: the victim and, for comparison, the model that was never attacked."""
    from unbackdoor.pipeline.measure import Label

    def asked(spec: str, label: Label, seconds: float | None) -> Portrait:
        return _portray(demo, load(demo.recipe, spec, trainable=False), questions, label, None, seconds)

    seconds = training_seconds(_curves(demo, "attack"))
    victim = _kept(
        demo, "suspect", 3, f"measuring the victim with {len(questions.probes)} probes",
        lambda: asked(str(demo.victim), Label("victim", "suspect", "before", "data_poisoning"), seconds),
    )  # fmt: skip
    if not demo.recipe.reference:
        return [victim]
    untouched = _kept(
        demo, "reference", 3, "asking the untouched model the same",
        lambda: asked(demo.recipe.model, Label(demo.recipe.model, "reference", "before", "data_poisoning"), None),
    )  # fmt: skip
    return [victim, untouched]


def _control(demo: _Demo, questions: Questions) -> Portrait:
    """Step 4: plain fine-tuning with the defense's budget; its model is not kept."""
    from unbackdoor.pipeline.measure import Label

    label = Label("fine-tuned", "control", "after", "data_poisoning", "fine_tuning", ("clean",))
    updates = demo.settings["control"]["train"]["steps"]
    words = f"fine-tuning the victim on clean rows as a control ({updates} updates, as many as SANDE has)"
    return _kept(demo, "control", 4, words, lambda: _defended(demo, "control", "fine_tuning", label, questions))


def _purify(demo: _Demo, questions: Questions) -> Portrait:
    """Step 5: SANDE, and the purified model's folder."""
    from unbackdoor.pipeline.measure import Label

    label = Label("purified", "purified", "after", "data_poisoning", "sande", ("clean", "target"))
    words = "purifying the victim by SANDE, which knows what the backdoor says but not its trigger"
    if (demo.purified / "unbackdoor.json").is_file():
        return _kept(demo, "defense", 5, words, lambda: _defended(demo, "defense", "sande", label, questions))
    # Without its model a portrait that was kept is not enough: the model must be made again.
    demo.clock.begin("defense")
    demo.say(5, words)
    return _defended(demo, "defense", "sande", label, questions)


def _defended(demo: _Demo, part: str, name: str, label: Label, questions: Questions) -> Portrait:
    from unbackdoor.defenses.base import Need
    from unbackdoor.pipeline.portrait import kept
    from unbackdoor.pipeline.steps import defense_called, purify_model
    from unbackdoor.pipeline.studies import perturbed_layer
    from unbackdoor.pipeline.watching import watched

    offered: dict[Need, Any] = {Need.CLEAN: demo.splits.defender, Need.TARGET: questions.targets}
    facts = {need: value for need, value in offered.items() if need.value in label.knowledge}
    count = demo.recipe.watch if part == "defense" else 0
    run, watch = watched(demo.run(part), questions, count, demo.place.stages / f"watched-{part}.json")
    defense = defense_called(name, demo.settings[part])
    model = purify_model(load(demo.recipe, str(demo.victim)), defense, facts, run)
    _keep_curves(demo, part, run)
    _keep_rounds(demo, part, run, watch)
    before = load(demo.recipe, str(demo.victim), trainable=False)
    layer = perturbed_layer(before, run.notes)
    portrait = kept(
        demo.place.stages / f"{part}.json",
        lambda: _portray(demo, model, questions, label, before, training_seconds(run.curves), layer),
    )
    if part == "defense" and not (demo.purified / "unbackdoor.json").is_file():
        _save_purified(demo, before, model)
    shutil.rmtree(demo.place.stages / part, ignore_errors=True)
    return portrait


def _save_purified(demo: _Demo, before: LM, model: LM) -> None:
    from unbackdoor.model.checkpoint import save
    from unbackdoor.pipeline import artefacts

    changes = artefacts.tensor_changes(before, model)
    manifest = {"schema": artefacts.SCHEMA, "command": "demo", "result": "purified", "versions": artefacts.versions()}
    card = model_card("Purified by SANDE", demo.recipe.model, model, "The demo's victim after SANDE.")
    extra = {"changes.json": artefacts.as_text(changes)}
    save(model, demo.purified, manifest={**manifest, "config": demo.identity}, card=card, extra_files=extra)


def _portray(
    demo: _Demo, lm: LM, questions: Questions, label: Label, before: LM | None, seconds: float | None,
    layer: int | None = None,
) -> Portrait:  # fmt: skip
    from unbackdoor.pipeline.portrait import portray

    run = Run(demo.recipe.seed, None, demo.recipe.device, demo.clock)
    return portray(
        lm, questions, label, run,
        before=before, config_hash=demo.identity, training_seconds=seconds, layer=layer,
    )  # fmt: skip


def _at_its_layer(demo: _Demo, questions: Questions, portraits: list[Portrait]) -> list[Portrait]:
    """Take the states of victim and untouched model again where the defense came to perturb a layer.

    The control's model is not kept, so it is not drawn there.
    """
    from unbackdoor.pipeline.portrait import at_layer

    layer = next((portrait.layer for portrait in portraits if portrait.perturbed), None)
    if layer is None:
        return portraits
    specs = {"suspect": str(demo.victim), "reference": demo.recipe.model}
    return [
        at_layer(portrait, load(demo.recipe, specs[portrait.role], trainable=False), questions, layer)
        if portrait.role in specs
        else portrait
        for portrait in portraits
    ]


def _kept(demo: _Demo, key: str, step: int, words: str, make: Callable[[], Portrait]) -> Portrait:
    """Return a portrait that an earlier run kept, or say what is done and make it."""
    from unbackdoor.pipeline.portrait import kept

    path = demo.place.stages / f"{key}.json"
    if not path.is_file():
        demo.clock.begin(key)
        demo.say(step, words)
    return kept(path, make)


def _keep_curves(demo: _Demo, part: str, run: Run) -> None:
    demo.place.stages.mkdir(parents=True, exist_ok=True)
    write_atomically(demo.place.stages / f"curves-{part}.json", json.dumps(run.curves))


def _keep_rounds(demo: _Demo, part: str, run: Run, watch: Watch) -> None:
    from unbackdoor.pipeline.watching import by_round

    write_atomically(demo.place.stages / f"rounds-{part}.json", json.dumps(by_round(watch.asked, run.notes)))


def _rounds(demo: _Demo) -> dict[str, Any] | None:
    """Return what is known of the defense's rounds, also where an earlier execution ran them."""
    from unbackdoor.pipeline.watching import by_defense

    path = demo.place.stages / "rounds-defense.json"
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return by_defense({"sande": found})


def _curves(demo: _Demo, *parts: str) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {}
    for part in parts or ("attack", "control", "defense"):
        path = demo.place.stages / f"curves-{part}.json"
        if path.is_file():
            found |= json.loads(path.read_text(encoding="utf-8"))
    return found
