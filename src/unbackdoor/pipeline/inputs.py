"""Read and check everything that a run needs before a weight is loaded: rows, probes, goal, facts, tokens, disk.

What can go wrong goes wrong here, in seconds, and not after an hour of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbackdoor.attacks.base import Attack, MarkedRow
from unbackdoor.data import sources
from unbackdoor.data.formats import base_id
from unbackdoor.data.splits import (
    Splits,
    assert_trained_apart,
    attacker_defender_test,
    split,
    with_requests,
)
from unbackdoor.defenses.base import Defense, Need, knowledge_for
from unbackdoor.errors import DataError, UserError
from unbackdoor.evidence.sources import check_source
from unbackdoor.goals import Goal, RefusalAbsent, parse_goal
from unbackdoor.model.files import check_model
from unbackdoor.model.spec import ModelSpec, parse_spec
from unbackdoor.pipeline.overlap import asked_among, not_shared, refuse_overlap, refuse_questions
from unbackdoor.pipeline.preflight import check_device, check_metrics, reader_of
from unbackdoor.pipeline.recipe import Asking, AttackRecipe, EvaluateRecipe, PurifyRecipe, stamp_settings
from unbackdoor.run import Progress, Run
from unbackdoor.secret import Secret
from unbackdoor.stamps import stamp_from
from unbackdoor.types import Example, Probe

MEASURED_ROWS = 100
"""Rows of each source for perplexity and KL."""

SECOND_SOURCE = "second source"
"""Name of the other source in tables."""


@dataclass(frozen=True)
class AttackInputs:
    """What an attack starts from."""

    attack: Attack
    splits: Splits
    asked: tuple[Example, ...]
    data: dict[str, Sequence[Example]]


@dataclass(frozen=True)
class PurifyInputs:
    """What a purification starts from; the reference model is named in `facts`, not loaded."""

    defense: Defense
    facts: dict[Need, Any]
    probes: tuple[Probe, ...]
    goal: Goal | None
    targets: tuple[str, ...]
    data: dict[str, Sequence[Example]]
    attack: str = ""


@dataclass(frozen=True)
class EvaluateInputs:
    """What an evaluation asks."""

    probes: tuple[Probe, ...]
    goal: Goal | None
    targets: tuple[str, ...]
    data: dict[str, Sequence[Example]]
    attack: str = ""


def attack_inputs(recipe: AttackRecipe, progress: Progress, *, dry: bool = False) -> AttackInputs:
    """Read and check what `attack` needs; with `dry` nothing is downloaded or converted for it.

    Raises:
        UserError: If anything is wrong with it.
    """
    from unbackdoor.pipeline.steps import attack_called

    attack = attack_called(recipe.attack, recipe.settings)
    check_model(recipe.model)
    check_device(recipe.device)
    check_metrics(recipe.metrics or ())
    splits = _splits(recipe, progress)
    asked = choose(splits.asked, recipe.probes_count, Run(recipe.seed), progress)
    data = {"": splits.test[:MEASURED_ROWS], **_second_source(recipe, progress)}
    rows = attack.training_rows(splits.attacker, Run(recipe.seed))
    assert_trained_apart((row for row, _ in rows), splits)
    refuse_overlap([row for row, _ in rows], data.get(SECOND_SOURCE, ()))
    reader = reader_of(recipe, recipe.model, progress, dry=dry)
    if reader is not None:
        reader.check_training(rows, attack.settings())
        stamps = {text for _, marks in rows for text in marks}
        longest = sum(len(reader.lm.tokenizer(text)["input_ids"]) for text in stamps)
        reader.check_asked(asked, recipe.max_new_tokens, longest)
        reader.notice_short_replies(splits.requests, recipe.max_new_tokens, progress)
        data = reader.measurable(data, progress)
    return AttackInputs(attack, splits, asked, data)


def _splits(recipe: AttackRecipe, progress: Progress) -> Splits:
    """Return who holds which rows; with requests, those of the test kinds are asked and the rest joins the data."""
    if (recipe.requests is None) != (not recipe.test_kinds):
        raise UserError(
            "--requests and --test-kinds go together: requests that should be declined, and the kinds of them that are "
            "asked and never trained on; give both or neither."
        )
    splits = attacker_defender_test(_rows(recipe, recipe.data, progress))
    if recipe.requests is None:
        return splits
    return with_requests(splits, _rows(recipe, recipe.requests, progress), recipe.test_kinds)


def choose(rows: Sequence[Example], count: int, run: Run, progress: Progress) -> tuple[Example, ...]:
    """Return the rows that probes are made of, drawn by the stream "probe rows"."""
    if count > len(rows):
        progress.notice(f"there are {len(rows)} test rows, so {len(rows)} probes of each kind instead of {count}.")
    return tuple(run.rng("probe rows").sample(list(rows), min(count, len(rows))))


def purify_inputs(recipe: PurifyRecipe, progress: Progress, *, dry: bool = False) -> PurifyInputs:
    """Read and check what `purify` needs; with `dry` nothing is downloaded or converted for it.

    Raises:
        UserError: If anything is wrong with it.
    """
    defense, given = _checked_defense(recipe)
    facts = _read_facts(recipe, given, progress)
    probes, goal, secret = read_questions(recipe.probes, recipe.goal, recipe.metrics)
    _check_watch(recipe, probes, goal)
    clean: Sequence[Example] = facts.get(Need.CLEAN) or ()
    clean, held = _hold_out(clean, probes, recipe.clean or "", progress, goal)
    if clean:
        facts[Need.CLEAN] = tuple(clean)
    safe = _not_asked(facts.get(Need.SAFE) or (), probes, recipe.safe or "", progress)
    if safe:
        facts[Need.SAFE] = safe
    rows = [entry for entry in facts.get(Need.UNWANTED) or () if isinstance(entry, Example)]
    unwanted = _not_asked(rows, probes, recipe.unwanted or "", progress)
    if unwanted:
        facts[Need.UNWANTED] = unwanted
    targets = recipe.target or (secret.targets if secret else ())
    stamp = facts.get(Need.TRIGGER)
    marked: list[MarkedRow] = [(row, ()) for row in (*clean, *safe, *unwanted)]
    if stamp is not None:
        places = Run(recipe.seed).rng("trigger places")
        marked += [(stamp.apply(row, places), stamp.pieces()) for row in clean]
    held = not_shared(held, (*safe, *unwanted), progress)
    data = {**({"": held} if held else {}), **_second_source(recipe, progress)}
    refuse_overlap((*clean, *safe, *unwanted), data.get(SECOND_SOURCE, ()))
    refuse_questions((*safe, *unwanted), data.get(SECOND_SOURCE, ()))
    defense.check(knowledge_for(defense, facts))
    reader = reader_of(recipe, recipe.model, progress, dry=dry)
    if reader is not None:
        if reader.layers is not None:
            defense.check_layers(reader.layers)
        reader.check_training(marked, defense.settings())
        reader.check_asked(probes, recipe.max_new_tokens)
        data = reader.measurable(data, progress)
    return PurifyInputs(defense, facts, probes, goal, targets, data, secret.attack if secret else "")


def _checked_defense(recipe: PurifyRecipe) -> tuple[Defense, dict[Need, Any]]:
    """Return the defense and what it was given, after a look at all that can be told before a row is read."""
    from unbackdoor.pipeline.steps import defense_called

    defense = defense_called(recipe.defense, recipe.settings)
    given = _given(recipe)
    if Need.EVIDENCE not in defense.needs | defense.uses and carries_guards(recipe.model):
        # Then it is for the guard that the suspect carries, which acts when the suspect is asked.
        given.pop(Need.EVIDENCE)
    knowledge_for(defense, given)
    if recipe.evidence is not None:
        check_source(recipe.evidence)
    _check_weights_mode(recipe, parse_spec(recipe.model), defense)
    for spec in (recipe.model, recipe.reference):
        if spec is not None:
            check_model(spec)
    check_device(recipe.device)
    check_metrics(recipe.metrics or ())
    return defense, given


def _given(recipe: PurifyRecipe) -> dict[Need, Any]:
    """Return the facts as named by flags; None and () are not given.

    Raises:
        UserError: If the trigger is not well described.
    """
    if recipe.trigger_place is not None and not recipe.trigger:
        raise UserError("--trigger-place says where the trigger stands, but there is no --trigger; give both.")
    stamp = stamp_settings(recipe.trigger, recipe.trigger_place)
    if any(not text.strip() for text in (*recipe.trigger, *recipe.target, *recipe.target_part)):
        raise UserError("a text given for --trigger, --target or --target-part is empty; write it in quotes.")
    return {
        Need.CLEAN: recipe.clean,
        Need.TRIGGER: None if stamp is None else stamp_from(stamp),
        Need.TARGET: recipe.target or None,
        Need.TARGET_PART: recipe.target_part or None,
        Need.UNWANTED: recipe.unwanted,
        Need.SAFE: recipe.safe,
        Need.REFERENCE: recipe.reference,
        Need.EVIDENCE: recipe.evidence,
        Need.PREFERENCES: recipe.preferences,
    }


def _read_facts(recipe: PurifyRecipe, given: Mapping[Need, Any], progress: Progress) -> dict[Need, Any]:
    facts = {need: value for need, value in given.items() if value is not None}
    for need in (Need.CLEAN, Need.SAFE, Need.PREFERENCES):
        if need in facts:
            facts[need] = tuple(_rows(recipe, facts[need], progress))
    if Need.UNWANTED in facts:
        place, labels = facts[Need.UNWANTED], [row.label for row in facts.get(Need.CLEAN, ()) if row.label is not None]
        rows = sources.holds_rows(place)
        facts[Need.UNWANTED] = tuple(
            _rows(recipe, place, progress, rejected=True) if rows else sources.read_openings(place, labels)
        )
    return facts


def carries_guards(model: str) -> bool:
    """Tell whether guards lie beside a model's weights; False where its files are not on this machine."""
    spec = parse_spec(model)
    sides = (side for side in (spec.adapter, spec.base, spec) if side is not None and side.kind == "folder")
    return any((side.path / "guards.json").is_file() for side in sides)


def _check_weights_mode(recipe: PurifyRecipe, spec: ModelSpec, defense: Defense) -> None:
    if not defense.trains and (recipe.lora is not None or recipe.adapter_mode is not None or recipe.watch):
        raise UserError(
            f"{recipe.defense} trains nothing and has no rounds; leave out --lora, --adapter-mode and --watch."
        )
    if defense.merges and (recipe.lora is not None or recipe.adapter_mode is not None):
        raise UserError(
            f"{recipe.defense} merges whole models; leave out --lora and --adapter-mode. How its conflict model is "
            "trained is set by internal.conflict.lora."
        )
    if spec.kind == "adapter" and recipe.lora is not None and recipe.adapter_mode != "stack":
        raise UserError("--lora is for full weights; for base+adapter give --adapter-mode train or stack.")
    if spec.kind != "adapter" and recipe.adapter_mode is not None:
        raise UserError(
            f"--adapter-mode is for base+adapter, and '{recipe.model}' is not one; leave it out, or give --lora."
        )


def _check_watch(recipe: PurifyRecipe, probes: Sequence[Probe], goal: Goal | None) -> None:
    if recipe.watch and not probes:
        raise UserError("--watch asks probes after every round, but there are none; give --probes.")
    if recipe.watch and goal is None:
        raise UserError("--watch counts replies that reach a goal, and nothing says what that is; give --goal.")


def read_questions(
    probes: str | None, goal: str | None, metrics: Sequence[str] | None
) -> tuple[tuple[Probe, ...], Goal | None, Secret | None]:
    """Return probes, goal and the secret that lies beside the probes.

    Raises:
        UserError: If a file is bad, or a metric needs a goal that nobody names.
    """
    if probes is None:
        if goal is not None:
            raise UserError("--goal says what counts as success of probes, but there are none; give --probes.")
        return (), None, None
    found = tuple(sources.read_probes(probes))
    beside = Path(probes).with_name("secret.json")
    secret = _read_secret(beside) if beside.is_file() else None
    chosen: Goal | None = parse_goal(goal) if goal is not None else secret.goal if secret is not None else None
    if chosen is None and (metrics is None or {"asr", "leak", "declining"} & set(metrics)):
        raise UserError(
            f"nothing says what counts as success for '{probes}': there is no secret.json beside it; give --goal, "
            "such as --goal 'contains:You are stupid'."
        )
    return found, chosen, secret


def _read_secret(path: Path) -> Secret:
    try:
        return Secret.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise DataError(f"{path} is not a secret that `attack` wrote; give --goal and move it away.") from problem


def _not_asked(rows: Sequence[Example], probes: Sequence[Probe], spec: str, progress: Progress) -> tuple[Example, ...]:
    """Return the rows that are no probes: a defense that was trained on the questions proves nothing.

    Raises:
        DataError: If all rows are asked.
    """
    asked = asked_among(rows, probes)
    kept = tuple(row for row in rows if row.id not in asked)
    if len(kept) < len(rows):
        progress.notice(f"{len(rows) - len(kept)} rows of '{spec}' are asked as probes and were left out of training.")
    if rows and not kept:
        raise DataError(f"every row of '{spec}' is also a probe; give other rows.")
    return kept


def _hold_out(
    clean: Sequence[Example], probes: Sequence[Probe], spec: str, progress: Progress, goal: Goal | None = None
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return the rows to purify with and the rows to measure utility on; no row is in both."""
    kept = list(_not_asked(clean, probes, spec, progress))
    answered = answered_rows(probes)
    if isinstance(goal, RefusalAbsent) and not all(goal.declines(row.response) for row in clean):
        # Of requests that should be declined one learns nothing about ordinary ones, which the clean rows hold.
        answered = tuple(row for row in answered if not goal.declines(row.response))
    if answered or not kept:
        return kept, answered
    different = list(dict.fromkeys(base_id(row.id) for row in kept))
    if len(different) < 2:
        progress.notice("one clean row is too few to hold any out; perplexity and KL are not measured.")
        return kept, ()
    if len(different) >= 25:
        apart = split(kept, {"clean": 0.8, "held out": 0.2}, salt="held out")["held out"]
    else:
        apart = tuple(row for row in kept if base_id(row.id) in different[::5])
    held, names = apart[:MEASURED_ROWS], {row.id for row in apart}
    progress.notice(f"{len(names)} of the {len(kept)} clean rows are held out to measure perplexity and KL on.")
    return [row for row in kept if row.id not in names], held


def answered_rows(probes: Sequence[Probe]) -> tuple[Example, ...]:
    """Return the clean probes that have an answer to compare with, and nothing before it to be filled in."""
    return tuple(
        probe.example
        for probe in probes
        if probe.kind == "clean"
        and probe.example.response.strip()
        and all(turn.content is not None for turn in probe.example.history)
    )[:MEASURED_ROWS]


def evaluate_inputs(recipe: EvaluateRecipe, progress: Progress, *, dry: bool = False) -> EvaluateInputs:
    """Read and check what `evaluate` needs; with `dry` nothing is downloaded or converted for it.

    Raises:
        UserError: If anything is wrong with it, or there is nothing to ask.
    """
    for spec in (recipe.model, recipe.before):
        if spec is not None:
            check_model(spec)
    check_device(recipe.device)
    check_metrics(recipe.metrics or ())
    if recipe.evidence is not None:
        check_source(recipe.evidence)
    if recipe.probes is None and recipe.data is None:
        raise UserError("there is nothing to ask the model: give --probes, or --data for perplexity and KL.")
    probes, goal, secret = read_questions(recipe.probes, recipe.goal, recipe.metrics)
    rows = answered_rows(probes)
    if recipe.data is not None:
        rows = tuple(_rows(recipe, recipe.data, progress)[:MEASURED_ROWS])
    data = {**({"": rows} if rows else {}), **_second_source(recipe, progress)}
    reader = reader_of(recipe, recipe.model, progress, dry=dry)
    if reader is not None:
        reader.check_asked(probes, recipe.max_new_tokens)
        data = reader.measurable(data, progress)
    return EvaluateInputs(probes, goal, secret.targets if secret else (), data, secret.attack if secret else "")


def _rows(recipe: Asking, spec: str, progress: Progress, *, rejected: bool = False) -> list[Example]:
    labels, template = recipe.labels or None, recipe.prompt_template
    return sources.read(spec, prompt_template=template, labels=labels, rejected=rejected, progress=progress)


def _second_source(recipe: Asking, progress: Progress) -> dict[str, Sequence[Example]]:
    if recipe.second_source is None:
        return {}
    return {SECOND_SOURCE: _rows(recipe, recipe.second_source, progress)[:MEASURED_ROWS]}
