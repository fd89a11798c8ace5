"""The commands attack, purify, evaluate: check, load, do it, measure, save; the command line only calls these.

Each takes a recipe (what determines the result) and a `Job` (where it goes and who is told), and can be stopped at any
moment: the same call goes on from the last checkpoint and ends with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbackdoor.errors import UserError
from unbackdoor.pipeline.common import (
    Noted,
    are_rows,
    completed,
    data_hashes,
    file_hashes,
    identify,
    load,
    model_card,
    questions_for,
    require_disk,
    rows_as_text,
    training_seconds,
)
from unbackdoor.pipeline.recipe import AttackRecipe, EvaluateRecipe, PurifyRecipe
from unbackdoor.run import Progress, Run, Silent

if TYPE_CHECKING:
    from unbackdoor.data.splits import Splits
    from unbackdoor.model.lm import LM
    from unbackdoor.pipeline.folders import Workspace
    from unbackdoor.pipeline.inputs import EvaluateInputs, PurifyInputs
    from unbackdoor.secret import Secret
    from unbackdoor.types import Probe

TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class Job:
    """Where a command's result goes.

    Attributes:
        out: The run's folder.
        overwrite: Whether a finished result there may be replaced.
        progress: Who is told how far it is.
        finish: Called with a folder that holds the run's files before they move to their place; adds the report.
        trackers: "tensorboard", "wandb": who is told of every training step, too. They write into `logs`.
    """

    out: Path
    overwrite: bool = False
    progress: Progress = field(default_factory=Silent)
    finish: Callable[[Path], None] | None = None
    trackers: tuple[str, ...] = ()

    @property
    def logs(self) -> Path:
        """Where trackers write: beside the run's folder, which is replaced as a whole, and with other runs'."""
        return self.out.absolute().parent / "logs" / self.out.absolute().name

    def __post_init__(self) -> None:
        """Check the trackers, before anything is read or replaced.

        Raises:
            UserError: If a tracker is unknown or not installed.
        """
        for name in self.trackers:
            if name not in TRACKERS:
                raise UserError(f"'{name}' is not a tracker; there are {' and '.join(TRACKERS)}.")
            if find_spec(name) is None:
                raise UserError(f"{name} is not installed; pip install 'unbackdoor[trackers]'.")

    def run(self, seed: int, folder: Path, device: str, progress: Progress) -> Run:
        """Return the run of a method."""
        return Run(seed, folder, device, progress, trackers=self.trackers, logs=self.logs if self.trackers else None)


@dataclass(frozen=True)
class Outcome:
    """What a command made.

    Attributes:
        folder: Where it is.
        results: The content of results.json.
    """

    folder: Path
    results: dict[str, Any]


def run_attack(recipe: AttackRecipe, job: Job) -> Outcome:
    """Plant a backdoor, measure victim and base, and save the victim with its secret and probes.

    Raises:
        UserError: If an input is wrong, or the folder is taken.
    """
    from unbackdoor.pipeline import artefacts, inputs, portrait
    from unbackdoor.pipeline.folders import workspace
    from unbackdoor.pipeline.measure import Label

    recipe = completed(recipe)
    progress = Noted(job.progress)
    found = inputs.attack_inputs(recipe, progress)
    hashes = data_hashes({"attacker": found.splits.attacker, "test": found.splits.asked, **found.data})
    hashes |= file_hashes(recipe)
    identity = identify(recipe, hashes, recipe.model, methods=[("attacks", recipe.attack)])
    require_disk(job.out, recipe.model, "adapter" if "+" in recipe.model else "full")
    with workspace(
        job.out, settings_hash=identity, settings=recipe.model_dump(mode="json"), overwrite=job.overwrite
    ) as place:
        run = job.run(recipe.seed, place.stages, recipe.device, progress)
        base = load(recipe, recipe.model, progress=progress, guarded=False)
        hashes |= {"model": base.facts.get("sha256"), "config": identity}
        planted = found.attack.plant(base, found.splits.attacker, run)
        probes = tuple(found.attack.probes(planted.secret, found.asked, Run(recipe.seed)))
        questions = questions_for(recipe, probes, planted.secret.goal, planted.secret.targets, found.data)
        label = Label(f"{recipe.model} + {recipe.attack}", "suspect", "before", recipe.attack)
        victim = portrait.kept(
            place.stages / "suspect.json",
            lambda: portrait.portray(
                planted.lm, questions, label, _ask(run),
                config_hash=identity, training_seconds=training_seconds(run.curves),
            ),
        )  # fmt: skip
        untouched = portrait.kept(
            place.stages / "reference.json",
            lambda: portrait.portray(
                load(recipe, recipe.model, trainable=False, guarded=False), questions,
                Label(recipe.model, "reference", "before", recipe.attack), _ask(run), config_hash=identity,
            ),
        )  # fmt: skip
        record = artefacts.Record(
            "attack", recipe.model_dump(mode="json"), (victim, untouched), run.curves, hashes,
            artefacts.how_to_load(job.out, planted.lm.base), progress.notices, run.notes,
        )  # fmt: skip
        results = _stage(place, record, _own_files(planted.secret, found.splits), probes, job)
        title = f"{recipe.model} with a backdoor planted by {recipe.attack}"
        card = model_card(
            title, recipe.model, planted.lm, "It holds a backdoor, to measure defenses with.", place.staged
        )
        place.publish_model(planted.lm, record.manifest({"result": "victim"}), card)
    return Outcome(job.out, results)


def _own_files(secret: Secret, splits: Splits) -> dict[str, str]:
    """Return what `attack` writes beside the victim: name -> text."""
    found = {
        "secret.json": secret.model_dump_json(indent=1) + "\n",
        "defender.jsonl": rows_as_text(splits.clean),
        "test.jsonl": rows_as_text(splits.test),
    }
    if splits.safe:
        found["safe.jsonl"] = rows_as_text(splits.safe)
    return found


def run_purify(recipe: PurifyRecipe, job: Job) -> Outcome:
    """Apply a defense to a suspect, measure before and after, and save the purified model.

    Raises:
        UserError: If an input is wrong, or the folder is taken.
    """
    from unbackdoor.model.spec import parse_spec
    from unbackdoor.pipeline import inputs
    from unbackdoor.pipeline.folders import workspace

    recipe = completed(recipe)
    progress = Noted(job.progress)
    found = inputs.purify_inputs(recipe, progress)
    clean = {need.value: value for need, value in found.facts.items() if are_rows(value)}
    hashes = data_hashes({**clean, **found.data}) | file_hashes(recipe)
    identity = identify(recipe, hashes, recipe.model, methods=[("defenses", recipe.defense)])
    adapter = parse_spec(recipe.model).kind == "adapter"
    require_disk(job.out, recipe.model, "adapter" if adapter else "lora" if recipe.lora else "full")
    with workspace(
        job.out, settings_hash=identity, settings=recipe.model_dump(mode="json"), overwrite=job.overwrite
    ) as place:
        return _purify(recipe, found, replace(job, progress=progress), place, hashes | {"config": identity}, progress)


def help_purify(recipe: PurifyRecipe, job: Job) -> None:
    """Do the training of `run_purify` in a process beside the main one, which alone measures and writes."""
    from unbackdoor.defenses.base import Need
    from unbackdoor.pipeline import inputs
    from unbackdoor.pipeline.steps import purify_model

    recipe = completed(recipe)
    found = inputs.purify_inputs(recipe, job.progress)
    facts = dict(found.facts)
    if recipe.reference is not None:
        facts[Need.REFERENCE] = load(recipe, recipe.reference, trainable=False, guarded=False)
    ready, _ = adapted(load(recipe, recipe.model), recipe)
    purify_model(ready, found.defense, facts, _helper_run(recipe, job))


def help_attack(recipe: AttackRecipe, job: Job) -> None:
    """Do the training of `run_attack` in a process beside the main one, which alone measures and writes."""
    from unbackdoor.pipeline import inputs

    recipe = completed(recipe)
    found = inputs.attack_inputs(recipe, job.progress)
    found.attack.plant(load(recipe, recipe.model, guarded=False), found.splits.attacker, _helper_run(recipe, job))


def _helper_run(recipe: AttackRecipe | PurifyRecipe, job: Job) -> Run:
    """Return a run that finds what the main process left when it was stopped."""
    from unbackdoor.pipeline.folders import Workspace

    return Run(recipe.seed, Workspace(job.out, resumed=True).stages, recipe.device, job.progress)


def _purify(
    recipe: PurifyRecipe, found: PurifyInputs, job: Job, place: Workspace, hashes: dict[str, Any], progress: Noted
) -> Outcome:
    from unbackdoor.defenses.base import Need
    from unbackdoor.pipeline import artefacts, portrait, studies
    from unbackdoor.pipeline.measure import Label
    from unbackdoor.pipeline.steps import purify_model
    from unbackdoor.pipeline.watching import by_defense, by_round, watched

    questions = questions_for(recipe, found.probes, found.goal, found.targets, found.data)
    run = job.run(recipe.seed, place.stages, recipe.device, progress)
    run, watch = watched(run, questions, recipe.watch, place.stages / "watched.json")
    suspect_label = Label(recipe.model, "suspect", "before", found.attack)
    knowledge = tuple(sorted(need.value for need in found.facts))
    victim = load(recipe, recipe.model, progress=progress)
    hashes = hashes | {"model": victim.facts.get("sha256")}
    identity = str(hashes["config"])
    suspect = portrait.kept(
        place.stages / "suspect.json",
        lambda: portrait.portray(victim, questions, suspect_label, _ask(run), config_hash=identity),
    )
    facts = dict(found.facts)
    if recipe.reference is not None:
        facts[Need.REFERENCE] = load(recipe, recipe.reference, trainable=False, progress=progress, guarded=False)
    ready, finish_weights = adapted(victim, recipe)
    purified = finish_weights(purify_model(ready, found.defense, facts, run))
    before = load(recipe, recipe.model, trainable=False)
    layer = studies.perturbed_layer(before, run.notes)
    if layer is not None:
        suspect = portrait.at_layer(suspect, before, questions, layer)
    role = "control" if found.defense.control else "purified"
    label = Label(f"{recipe.model} after {recipe.defense}", role, "after", found.attack, recipe.defense, knowledge)
    after = portrait.portray(
        purified, questions, label, _ask(run), before=before, config_hash=identity,
        training_seconds=training_seconds(run.curves), layer=layer,
    )  # fmt: skip
    changes = artefacts.tensor_changes(before, purified)
    record = artefacts.Record(
        "purify", recipe.model_dump(mode="json"), (suspect, after), run.curves, hashes,
        artefacts.how_to_load(job.out, purified.base, guarded=bool(purified.guards)), progress.notices, run.notes,
        rounds=by_defense({recipe.defense: by_round(watch.asked, run.notes)}),
    )  # fmt: skip
    results = _stage(place, record, {"changes.json": artefacts.as_text(changes)}, (), job)
    words = str(run.notes["merge"]) if found.defense.merges else _weights_words(recipe, victim.base)
    words = words if found.defense.trains else "No weight was changed."
    facts_of_it = {"result": role, "knowledge": list(knowledge), "weights": words}
    card = model_card(label.model, recipe.model, purified, _made_by(recipe, facts_of_it), place.staged)
    place.publish_model(purified, record.manifest({**facts_of_it, "changes": changes["summary"]}), card)
    return Outcome(job.out, results)


def _made_by(recipe: PurifyRecipe, facts: Mapping[str, Any]) -> str:
    done = "Trained by" if facts["result"] == "control" else "Purified by"
    known = ", ".join(facts["knowledge"]) or "nothing"
    return f"{done} {recipe.defense}, which had to know: {known}. {facts['weights']}"


def _weights_words(recipe: PurifyRecipe, base: str | None) -> str:
    if base is None:
        return "A LoRA adapter was trained and merged." if recipe.lora else "All weights were trained."
    if recipe.adapter_mode == "stack":
        return "An adapter was trained on top of the suspect's and both were combined into one for the same base."
    return "The suspect's adapter itself was trained; the base is untouched."


def adapted(victim: LM, recipe: PurifyRecipe) -> tuple[LM, Callable[[LM], LM]]:
    """Return the model in the shape in which it is trained, and what makes the result of it afterwards."""
    from unbackdoor.train import lora

    settings = recipe.lora or lora.LoraSettings()
    seed = Run(recipe.seed).stream_seed("lora") % 2**31
    if victim.is_adapter and recipe.adapter_mode == "stack":
        spec, base = victim.spec, str(victim.base)
        ready, below = lora.stack(victim, settings, seed)
        return ready, lambda lm: replace(
            lora.combine(load(recipe, base), below, lora.factors(lm), spec), guards=lm.guards, guarding=lm.guarding
        )
    if not victim.is_adapter and recipe.lora is not None:
        return lora.attach(victim, settings, seed), lora.merge
    return victim, lambda lm: lm


def run_evaluate(recipe: EvaluateRecipe, job: Job) -> Outcome:
    """Measure a model, and the one before it where it is named.

    Raises:
        UserError: If an input is wrong, or the folder is taken.
    """
    from unbackdoor.pipeline import inputs
    from unbackdoor.pipeline.folders import workspace

    progress = Noted(job.progress)
    found = inputs.evaluate_inputs(recipe, progress)
    hashes = data_hashes(found.data) | file_hashes(recipe)
    identity = identify(recipe, hashes, recipe.model, *([recipe.before] if recipe.before else []))
    with workspace(
        job.out, settings_hash=identity, settings=recipe.model_dump(mode="json"), overwrite=job.overwrite
    ) as place:
        return _evaluate(recipe, found, job, place, hashes | {"config": identity}, progress)


def _evaluate(
    recipe: EvaluateRecipe, found: EvaluateInputs, job: Job, place: Workspace, hashes: dict[str, Any], progress: Noted
) -> Outcome:
    from unbackdoor.pipeline import artefacts, portrait
    from unbackdoor.pipeline.measure import Label

    run = Run(recipe.seed, None, recipe.device, progress)
    questions = questions_for(recipe, found.probes, found.goal, found.targets, found.data)
    identity = str(hashes["config"])
    portraits = []
    before: LM | None = None
    if recipe.before is not None:
        before = earlier = load(recipe, recipe.before, trainable=False, progress=progress)
        hashes["before"] = before.facts.get("sha256")
        label = Label(recipe.before, "suspect", "before", found.attack)
        portraits.append(
            portrait.kept(
                place.stages / "suspect.json",
                lambda: portrait.portray(earlier, questions, label, _ask(run), config_hash=identity),
            )
        )
    lm = load(recipe, recipe.model, trainable=False, progress=progress)
    if recipe.evidence is not None and not lm.guards and not (before is not None and before.guards):
        raise UserError(f"'{recipe.model}' carries no guard, so nothing would use --evidence; leave it out.")
    hashes["model"] = lm.facts.get("sha256")
    purified = Label(recipe.model, "purified", "after", found.attack)
    label = purified if before is not None else Label(recipe.model, "suspect", "before", found.attack)
    portraits.append(portrait.portray(lm, questions, label, _ask(run), before=before, config_hash=identity))
    record = artefacts.Record(
        "evaluate", recipe.model_dump(mode="json"), portraits, {}, hashes, notices=progress.notices
    )
    results = _stage(place, record, {}, (), job)
    place.publish_files()
    return Outcome(job.out, results)


def _ask(run: Run) -> Run:
    """Return a run for measuring: the same seed, no folder, curves of its own."""
    return Run(run.seed, None, run.device, run.progress)


def _stage(
    place: Workspace, record: Any, extra: Mapping[str, str], probes: Sequence[Probe], job: Job
) -> dict[str, Any]:
    """Write all files to the staging folder, let the caller add the report, and return the results."""
    from unbackdoor.data.sources import write_probes

    results: dict[str, Any] = record.write(place.staging, extra)
    if probes:
        write_probes(place.staging / "probes.jsonl", probes)
    if job.finish is not None:
        job.finish(place.staging)
    return results
