"""Read and check everything that a run needs before a weight is loaded: rows, probes, goal, facts, tokens, disk.

What can go wrong goes wrong here, in seconds, and not after an hour of training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbackdoor.attacks.base import Attack
from unbackdoor.data import sources
from unbackdoor.data.formats import base_id
from unbackdoor.data.splits import Splits, attacker_defender_test, split
from unbackdoor.defenses.base import Defense, Need, knowledge_for
from unbackdoor.errors import DataError, UserError
from unbackdoor.goals import Goal, parse_goal
from unbackdoor.model.lm import LM
from unbackdoor.model.spec import ModelSpec, parse_spec
from unbackdoor.pipeline.recipe import Asking, AttackRecipe, EvaluateRecipe, PurifyRecipe, stamp_settings
from unbackdoor.run import Progress, Run
from unbackdoor.secret import Secret
from unbackdoor.stamps import InsertText, WrapEnds
from unbackdoor.types import Example, Probe

MEASURED_ROWS = 100
"""Rows of each source for perplexity and KL."""

Marked = tuple[Example, tuple[str, ...]]
"""A row, and the trigger texts that must survive its tokenisation."""


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
    parse_spec(recipe.model)
    check_device(recipe.device)
    check_metrics(recipe.metrics or ())
    splits = attacker_defender_test(_rows(recipe, recipe.data, progress))
    asked = choose(splits.test, recipe.probes_count, Run(recipe.seed), progress)
    data = {"": splits.test[:MEASURED_ROWS], **_second_source(recipe, progress)}
    rows = attack.training_rows(splits.attacker, Run(recipe.seed))
    if not dry or parse_spec(recipe.model).kind == "folder":
        check_training(recipe, rows, attack.settings(), progress)
        data = _measurable(recipe, data, progress)
    return AttackInputs(attack, splits, asked, data)


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
    from unbackdoor.pipeline.steps import defense_called

    defense = defense_called(recipe.defense, recipe.settings)
    given = _given(recipe)
    knowledge_for(defense, given)
    _check_weights_mode(recipe, parse_spec(recipe.model))
    if recipe.reference is not None:
        parse_spec(recipe.reference)
    check_device(recipe.device)
    check_metrics(recipe.metrics or ())
    facts = _read_facts(recipe, given, progress)
    probes, goal, secret = read_questions(recipe.probes, recipe.goal, recipe.metrics)
    clean: Sequence[Example] = facts.get(Need.CLEAN) or ()
    clean, held = _hold_out(clean, probes, recipe.clean or "", progress)
    if clean:
        facts[Need.CLEAN] = tuple(clean)
    targets = recipe.target or (secret.targets if secret else ())
    stamp = facts.get(Need.TRIGGER)
    marked: list[Marked] = [(row, ()) for row in clean]
    if stamp is not None:
        places = Run(recipe.seed).rng("trigger places")
        marked += [(stamp.apply(row, places), stamp.pieces()) for row in clean]
    data = {**({"": held} if held else {}), **_second_source(recipe, progress)}
    if not dry or parse_spec(recipe.model).kind == "folder":
        check_training(recipe, marked, defense.settings(), progress)
        data = _measurable(recipe, data, progress)
    return PurifyInputs(defense, facts, probes, goal, targets, data, secret.attack if secret else "")


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
        Need.TRIGGER: None if stamp is None else (WrapEnds if stamp["form"] == "wrap" else InsertText)(**stamp),
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
        facts[Need.UNWANTED] = tuple(sources.read_lines(facts[Need.UNWANTED]))
    return facts


def _check_weights_mode(recipe: PurifyRecipe, spec: ModelSpec) -> None:
    if spec.kind == "adapter" and recipe.lora is not None and recipe.adapter_mode != "stack":
        raise UserError("--lora is for full weights; for base+adapter give --adapter-mode train or stack.")
    if spec.kind != "adapter" and recipe.adapter_mode is not None:
        raise UserError(
            f"--adapter-mode is for base+adapter, and '{recipe.model}' is not one; leave it out, or give --lora."
        )


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
    if chosen is None and (metrics is None or {"asr", "leak"} & set(metrics)):
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


def _hold_out(
    clean: Sequence[Example], probes: Sequence[Probe], spec: str, progress: Progress
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return the rows to purify with and the rows to measure utility on; no row is in both."""
    asked = {base_id(probe.example.id) for probe in probes}
    kept = [row for row in clean if base_id(row.id) not in asked]
    if len(kept) < len(clean):
        progress.notice(f"{len(clean) - len(kept)} rows of '{spec}' are asked as probes and were left out of training.")
    if clean and not kept:
        raise DataError(f"every row of '{spec}' is also a probe; give other rows for --clean.")
    answered = answered_rows(probes)
    if answered or not kept:
        return kept, answered
    if len(kept) < 2:
        progress.notice("one clean row is too few to hold any out; perplexity and KL are not measured.")
        return kept, ()
    parts = split(kept, {"clean": 0.8, "held out": 0.2}, salt="held out") if len(kept) >= 25 else None
    held = parts["held out"][:MEASURED_ROWS] if parts else tuple(kept[:: max(2, len(kept) // 5)])
    names = {row.id for row in (parts["held out"] if parts else held)}
    progress.notice(f"{len(names)} of the {len(kept)} clean rows are held out to measure perplexity and KL on.")
    return [row for row in kept if row.id not in names], held


def answered_rows(probes: Sequence[Probe]) -> tuple[Example, ...]:
    """Return the clean probes that have an answer to compare with."""
    return tuple(p.example for p in probes if p.kind == "clean" and p.example.response.strip())[:MEASURED_ROWS]


def evaluate_inputs(recipe: EvaluateRecipe, progress: Progress, *, dry: bool = False) -> EvaluateInputs:
    """Read and check what `evaluate` needs; with `dry` nothing is downloaded or converted for it.

    Raises:
        UserError: If anything is wrong with it, or there is nothing to ask.
    """
    for spec in (recipe.model, recipe.before):
        if spec is not None:
            parse_spec(spec)
    check_device(recipe.device)
    check_metrics(recipe.metrics or ())
    if recipe.probes is None and recipe.data is None:
        raise UserError("there is nothing to ask the model: give --probes, or --data for perplexity and KL.")
    probes, goal, secret = read_questions(recipe.probes, recipe.goal, recipe.metrics)
    rows = answered_rows(probes)
    if recipe.data is not None:
        rows = tuple(_rows(recipe, recipe.data, progress)[:MEASURED_ROWS])
    data = {**({"": rows} if rows else {}), **_second_source(recipe, progress)}
    if not dry or parse_spec(recipe.model).kind == "folder":
        data = _measurable(recipe, data, progress)
    return EvaluateInputs(probes, goal, secret.targets if secret else (), data, secret.attack if secret else "")


def _rows(recipe: Asking, spec: str, progress: Progress) -> list[Example]:
    return sources.read(spec, prompt_template=recipe.prompt_template, labels=recipe.labels or None, progress=progress)


def _second_source(recipe: Asking, progress: Progress) -> dict[str, Sequence[Example]]:
    if recipe.second_source is None:
        return {}
    return {"second source": _rows(recipe, recipe.second_source, progress)[:MEASURED_ROWS]}


def check_metrics(names: Sequence[str]) -> None:
    """Raise a `UserError` for a metric that is not there."""
    from unbackdoor.pipeline.measure import metric_called

    for name in names:
        metric_called(name)


def check_device(device: str) -> None:
    """Raise a `UserError` for a device that this machine has not."""
    import torch

    kind = device.partition(":")[0]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in there:
        raise UserError(f"there is no device '{device}'; write cpu, cuda, cuda:0 or mps.")
    if not there[kind]:
        raise UserError(f"the device '{device}' is not available here; use --device cpu.")


def check_training(
    recipe: Asking | AttackRecipe, rows: Sequence[Marked], settings: Mapping[str, Any], progress: Progress
) -> None:
    """Encode every row with the model's tokenizer alone: a trigger that is lost or a row that is too long shows now.

    Raises:
        UserError: If the tokenizer cannot be had, a row does not fit, or a trigger is absent from its tokens.
    """
    from unbackdoor.data.poison import encode_marked

    lm = tokenizer_of(str(getattr(recipe, "model", "")), recipe.template, progress)
    if lm is not None:
        encode_marked(lm, rows, int((settings.get("train") or {}).get("max_length", 1024)))


def _measurable(
    recipe: Asking | AttackRecipe, data: dict[str, Sequence[Example]], progress: Progress
) -> dict[str, Sequence[Example]]:
    """Return the rows that utility is measured on, without those whose prompt alone is too long for it."""
    from unbackdoor.metrics.base import MAX_LENGTH

    lm = tokenizer_of(str(getattr(recipe, "model", "")), recipe.template, progress) if data else None
    if lm is None:
        return data
    found: dict[str, Sequence[Example]] = {}
    for name, rows in data.items():
        kept = tuple(row for row in rows if lm.encode(row.turns).spans[-1].start < MAX_LENGTH)
        if len(kept) < len(rows):
            where = f" of the {name}" if name else ""
            progress.notice(
                f"{len(rows) - len(kept)} rows{where} are not measured: their prompts have {MAX_LENGTH} tokens or more."
            )
        found |= {name: kept} if kept else {}
    return found


def tokenizer_of(model: str, template: str, progress: Progress) -> LM | None:
    """Return an LM that can encode but holds no weights, or None where the tokenizer comes only with them (.gguf).

    Raises:
        UserError: If the model or its tokenizer cannot be had.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from unbackdoor.model.builtin import builtin_folder
    from unbackdoor.model.load import local_folder
    from unbackdoor.model.quarantine import inspect_folder, refuse_dangerous

    spec = parse_spec(model)
    sides = [side for side in (spec.adapter, spec.base or spec) if side is not None]
    if any(side.kind == "gguf" for side in sides):
        return None
    for side in sides:
        folder = builtin_folder(side.place, progress=progress) if side.kind == "builtin" else local_folder(side)
        refuse_dangerous(inspect_folder(folder, base=str(spec.base) if spec.base else None), str(side))
        if side is spec.adapter and not (folder / "tokenizer.json").is_file():
            continue
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError):
            return None  # loading the model will say what is wrong with it
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            return None
        chosen = ("model" if tokenizer.chat_template else "plain") if template == "auto" else template
        if chosen == "model" and not tokenizer.chat_template:
            raise UserError(f"'{model}' has no chat template; use --template plain.")
        return LM(None, tokenizer, "model" if chosen == "model" else "plain", model)
    return None


def parameters_of(model: str) -> int | None:
    """Return how many weights a model has, from the headers of its files; None where they are not on this machine."""
    from unbackdoor.model.header import HeaderError, read_header

    spec = parse_spec(model)
    if spec.base is not None:
        return parameters_of(str(spec.base))
    if spec.kind == "builtin":
        return 134_515_008
    if spec.kind == "gguf":
        return spec.path.stat().st_size  # about one byte a weight; only an estimate rests on it
    if spec.kind != "folder":
        return None
    try:
        headers = [read_header(path) for path in sorted(spec.path.glob("model*.safetensors"))]
    except (HeaderError, OSError):
        return None  # loading refuses it with the reason
    return sum(math.prod(entry.shape) for header in headers for entry in header.values()) or None


def fingerprint(model: str) -> list[object]:
    """Return what tells one state of a model's files from another, without reading them: name, size, time of change."""
    spec = parse_spec(model)
    found: list[object] = [model]
    for side in (spec, spec.base, spec.adapter):
        if side is not None and side.kind in {"folder", "gguf"}:
            files = [side.path] if side.kind == "gguf" else sorted(side.path.glob("*.safetensors"))
            found += [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return found
