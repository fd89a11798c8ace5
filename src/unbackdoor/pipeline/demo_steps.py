"""The steps of the demonstration: plant, measure, fine-tune as a control, purify by each defense.

Each leaves what it found in the demo's working folder, so that a demo that was stopped does none of it twice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbackdoor.pipeline.clock import Clock, in_words
from unbackdoor.pipeline.commands import Job
from unbackdoor.pipeline.common import Noted, load, model_card, questions_for, training_seconds
from unbackdoor.pipeline.recipe import DemoRecipe
from unbackdoor.run import Run, write_atomically

if TYPE_CHECKING:
    from unbackdoor.data.splits import Splits
    from unbackdoor.defenses.base import Need
    from unbackdoor.model.lm import LM
    from unbackdoor.pipeline.folders import Workspace
    from unbackdoor.pipeline.measure import Label, Questions
    from unbackdoor.pipeline.portrait import Portrait
    from unbackdoor.pipeline.watching import Watch

STEPS = 7


@dataclass(frozen=True)
class Treatment:
    """What is done to a copy of the victim.

    Attributes:
        key: Its name among the settings, the parts of the clock and the files that are kept.
        method: The defense.
        model: How the model that comes out is called, and its folder where it is kept.
        step: Which step it is.
        knowledge: What the defense is told.
        words: What is said when it begins.
    """

    key: str
    method: str
    model: str
    step: int
    knowledge: tuple[str, ...]
    words: str


CONTROL = Treatment(
    "control", "fine_tuning", "fine-tuned", 4, ("clean",), "fine-tuning the victim on clean rows as a control"
)
DEFENSES = (
    Treatment(
        "defense", "sande", "purified", 5, ("clean", "target"),
        "purifying the victim by SANDE, which knows what the backdoor says but not its trigger",
    ),
    Treatment(
        "beear", "beear", "purified-beear", 6, ("clean", "unwanted"),
        "purifying the victim by BEEAR, which knows how unwanted answers begin, but neither trigger nor target",
    ),
)  # fmt: skip
KEPT = {"plant": "victim", **{what.key: what.model for what in DEFENSES}}
"""Part of the demo -> the folder of the model that it leaves."""


@dataclass
class Demo:
    """What the steps share; lives for one run."""

    recipe: DemoRecipe
    settings: dict[str, dict[str, Any]]
    splits: Splits
    openings: tuple[str, ...]
    place: Workspace
    job: Job
    clock: Clock
    noted: Noted
    identity: str

    def folder(self, part: str) -> Path:
        """Return where the model of a part is kept."""
        return self.place.folder / KEPT[part]

    def has_model(self, part: str) -> bool:
        """Tell whether the model of a part is there."""
        return (self.folder(part) / "unbackdoor.json").is_file()

    def kept(self, name: str) -> Path:
        """Return the place of a file of the working state."""
        return self.place.stages / name

    def say(self, step: int, text: str) -> None:
        """Tell what begins, and how long the rest takes; not kept for the report."""
        left = in_words(self.clock.seconds_left())
        self.clock.inner.notice(f"Step {step} of {STEPS}: {text} ({left} left)")

    def run(self, part: str) -> Run:
        """Return the run of a part, with its own working state."""
        return self.job.run(self.recipe.seed, self.kept(part), self.recipe.device, self.clock)

    def layer(self, lm: LM) -> int | None:
        """Return the layer that BEEAR perturbs, at which states of all models are taken; None where it chooses one.

        Raises:
            UserError: If the model does not have it.
        """
        from unbackdoor.defenses.beear import Beear
        from unbackdoor.model.anatomy import decoder_layers
        from unbackdoor.pipeline.steps import defense_called

        beear = defense_called("beear", self.settings["beear"])
        assert isinstance(beear, Beear)
        layers = beear.possible_layers(len(decoder_layers(lm.core)))
        return layers[0] if len(layers) == 1 or beear.place == "each" else None


def plant(demo: Demo) -> None:
    """Step 2: the victim's folder, with secret and probes."""
    from unbackdoor.data.sources import write_probes
    from unbackdoor.model.checkpoint import save
    from unbackdoor.pipeline import artefacts, inputs
    from unbackdoor.pipeline.steps import attack_called

    attack = attack_called("data_poisoning", demo.settings["attack"])
    if demo.has_model("plant"):
        return
    demo.clock.begin("plant")
    base = load(demo.recipe, demo.recipe.model)
    demo.layer(base)  # one that the model does not have is refused before anything is trained
    said = " / ".join(demo.settings["attack"]["targets"])
    pieces = " ... ".join(attack.trigger.pieces()) if hasattr(attack, "trigger") else "its trigger"
    demo.say(2, f"planting a backdoor: on “{pieces}” the model is to say “{said}”")
    run = demo.run("attack")
    sha256 = base.facts.get("sha256")
    planted = attack.plant(base, demo.splits.attacker, run)
    asked = inputs.choose(demo.splits.test, demo.recipe.probes_count, Run(demo.recipe.seed), demo.noted)
    probes = attack.probes(planted.secret, asked, Run(demo.recipe.seed))
    _keep_curves(demo, "attack", run)
    write_probes(demo.kept("probes.jsonl"), probes)
    extra = {
        "secret.json": planted.secret.model_dump_json(indent=1) + "\n",
        "probes.jsonl": demo.kept("probes.jsonl").read_text(encoding="utf-8"),
    }
    manifest = {"schema": artefacts.SCHEMA, "command": "demo", "result": "victim", "versions": artefacts.versions()}
    card = model_card("Victim of the demo", demo.recipe.model, planted.lm, "It holds a backdoor.")
    save(
        planted.lm, demo.folder("plant"), manifest={**manifest, "base sha256": sha256, "config": demo.identity},
        card=card, extra_files=extra,
    )  # fmt: skip
    shutil.rmtree(demo.kept("attack"), ignore_errors=True)


def questions_of(demo: Demo) -> Questions:
    """Return what every model is asked; what the openings share with the target is noted."""
    from unbackdoor.data.shared_words import shared_words
    from unbackdoor.data.sources import read_probes
    from unbackdoor.secret import Secret

    victim = demo.folder("plant")
    secret = Secret.model_validate_json((victim / "secret.json").read_text(encoding="utf-8"))
    firsts, content = (", ".join(words) or "none" for words in shared_words(demo.openings, secret.targets))
    demo.noted.notices.append(
        f"Words that the {len(demo.openings)} openings told to BEEAR share with the target: first words {firsts}; "
        f"words of content {content}."
    )
    measured = demo.splits.test[: demo.recipe.measured_rows]
    return questions_for(demo.recipe, read_probes(victim / "probes.jsonl"), secret.goal, secret.targets, {"": measured})


def measure_victim(demo: Demo, questions: Questions) -> list[Portrait]:
    """Step 3: the victim and, for comparison, the model that was never attacked."""
    from unbackdoor.pipeline.measure import Label

    def asked(spec: str, label: Label, seconds: float | None) -> Portrait:
        lm = load(demo.recipe, spec, trainable=False)
        return _portray(demo, lm, questions, label, None, seconds, demo.layer(lm))

    seconds = training_seconds(_curves_of(demo, "attack"))
    victim = _kept(
        demo, "suspect", 3, f"measuring the victim with {len(questions.probes)} probes",
        lambda: asked(str(demo.folder("plant")), Label("victim", "suspect", "before", "data_poisoning"), seconds),
    )  # fmt: skip
    if not demo.recipe.reference:
        return [victim]
    untouched = _kept(
        demo, "reference", 3, "asking the untouched model the same",
        lambda: asked(demo.recipe.model, Label(demo.recipe.model, "reference", "before", "data_poisoning"), None),
    )  # fmt: skip
    return [victim, untouched]


def control(demo: Demo, questions: Questions) -> Portrait:
    """Step 4: plain fine-tuning; its model is not kept."""
    found = demo.settings
    budget = f"{found['control']['train']['steps']} updates; SANDE has {updates_of(found['defense'])}"
    words = f"{CONTROL.words} ({budget}, BEEAR {updates_of(found['beear'])})"
    return _kept(demo, "control", CONTROL.step, words, lambda: _treated(demo, CONTROL, questions))


def purify(demo: Demo, what: Treatment, questions: Questions) -> Portrait:
    """Steps 5 and 6: a defense, and the purified model's folder."""
    if demo.has_model(what.key):
        return _kept(demo, what.key, what.step, what.words, lambda: _treated(demo, what, questions))
    # Without its model a portrait that was kept is not enough: the model must be made again.
    demo.clock.begin(what.key)
    demo.say(what.step, what.words)
    return _treated(demo, what, questions)


def updates_of(settings: dict[str, Any]) -> int:
    """Return how often a defense updates weights."""
    return int(settings.get("rounds", 1) * settings["train"]["steps"])


def _treated(demo: Demo, what: Treatment, questions: Questions) -> Portrait:
    from unbackdoor.pipeline.measure import Label
    from unbackdoor.pipeline.portrait import kept
    from unbackdoor.pipeline.steps import defense_called, purify_model
    from unbackdoor.pipeline.studies import perturbed_layer
    from unbackdoor.pipeline.watching import watched

    role = "purified" if what in DEFENSES else "control"
    label = Label(what.model, role, "after", "data_poisoning", what.method, what.knowledge)
    count = demo.recipe.watch if what in DEFENSES else 0
    run, watch = watched(demo.run(what.key), questions, count, demo.kept(f"watched-{what.key}.json"))
    defense = defense_called(what.method, demo.settings[what.key])
    victim = str(demo.folder("plant"))
    model = purify_model(load(demo.recipe, victim), defense, _told(demo, what, questions), run)
    _keep_curves(demo, what.key, run)
    _keep_rounds(demo, what.key, run, watch)
    before = load(demo.recipe, victim, trainable=False)
    perturbed = perturbed_layer(before, run.notes)
    layer = demo.layer(before) if perturbed is None else perturbed
    portrait = kept(
        demo.kept(f"{what.key}.json"),
        lambda: _portray(demo, model, questions, label, before, training_seconds(run.curves), layer),
    )
    if what in DEFENSES and not demo.has_model(what.key):
        _save_purified(demo, what, before, model)
    shutil.rmtree(demo.kept(what.key), ignore_errors=True)
    return portrait


def _told(demo: Demo, what: Treatment, questions: Questions) -> dict[Need, Any]:
    """Return what a defense is told, and nothing else."""
    from unbackdoor.defenses.base import Need

    offered: dict[Need, Any] = {
        Need.CLEAN: demo.splits.defender, Need.TARGET: questions.targets, Need.UNWANTED: demo.openings
    }  # fmt: skip
    return {need: value for need, value in offered.items() if need.value in what.knowledge}


def _save_purified(demo: Demo, what: Treatment, before: LM, model: LM) -> None:
    from unbackdoor.model.checkpoint import save
    from unbackdoor.pipeline import artefacts

    changes = artefacts.tensor_changes(before, model)
    manifest = {"schema": artefacts.SCHEMA, "command": "demo", "result": "purified", "versions": artefacts.versions()}
    name = what.method.upper()
    card = model_card(f"Purified by {name}", demo.recipe.model, model, f"The demo's victim after {name}.")
    extra = {"changes.json": artefacts.as_text(changes)}
    save(model, demo.folder(what.key), manifest={**manifest, "config": demo.identity}, card=card, extra_files=extra)


def _portray(
    demo: Demo, lm: LM, questions: Questions, label: Label, before: LM | None, seconds: float | None, layer: int | None
) -> Portrait:
    from unbackdoor.pipeline.portrait import portray

    run = Run(demo.recipe.seed, None, demo.recipe.device, demo.clock)
    return portray(
        lm, questions, label, run,
        before=before, config_hash=demo.identity, training_seconds=seconds, layer=layer,
    )  # fmt: skip


def at_its_layer(demo: Demo, questions: Questions, portraits: list[Portrait]) -> list[Portrait]:
    """Take states again that were taken before BEEAR chose the layer that it perturbs; most often it has no choice.

    The control's model is not kept, so it is not drawn then.
    """
    from unbackdoor.pipeline.portrait import at_layer

    layer = next((portrait.layer for portrait in portraits if portrait.perturbed), None)
    specs = {name: str(demo.place.folder / name) for name in KEPT.values()} | {demo.recipe.model: demo.recipe.model}
    return [
        at_layer(portrait, load(demo.recipe, specs[portrait.model], trainable=False), questions, layer)
        if layer is not None and not portrait.perturbed and portrait.model in specs
        else portrait
        for portrait in portraits
    ]


def _kept(demo: Demo, key: str, step: int, words: str, make: Callable[[], Portrait]) -> Portrait:
    """Return a portrait that an earlier run kept, or say what is done and make it."""
    from unbackdoor.pipeline.portrait import kept

    path = demo.kept(f"{key}.json")
    if not path.is_file():
        demo.clock.begin(key)
        demo.say(step, words)
    return kept(path, make)


def _keep_curves(demo: Demo, part: str, run: Run) -> None:
    demo.place.stages.mkdir(parents=True, exist_ok=True)
    write_atomically(demo.kept(f"curves-{part}.json"), json.dumps(run.curves))


def _keep_rounds(demo: Demo, part: str, run: Run, watch: Watch) -> None:
    from unbackdoor.pipeline.watching import by_round

    write_atomically(demo.kept(f"rounds-{part}.json"), json.dumps(by_round(watch.asked, run.notes)))


def rounds(demo: Demo) -> dict[str, Any] | None:
    """Return what is known of the defenses' rounds, also where an earlier execution ran them."""
    from unbackdoor.pipeline.watching import by_defense

    return by_defense({what.method: _read(demo, f"rounds-{what.key}.json") for what in DEFENSES})


def curves(demo: Demo) -> dict[str, list[dict[str, float]]]:
    """Return the curves of all steps; stages of a defense bear its name, as two may call them the same."""
    found = _curves_of(demo, "attack") | _curves_of(demo, "control")
    for what in DEFENSES:
        found |= {f"{what.method}/{stage}": steps for stage, steps in _curves_of(demo, what.key).items()}
    return found


def _curves_of(demo: Demo, part: str) -> dict[str, list[dict[str, float]]]:
    return _read(demo, f"curves-{part}.json") or {}


def _read(demo: Demo, name: str) -> Any:
    path = demo.kept(name)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
