"""The verbs of the command line as functions: `attack`, `purify`, `evaluate`, `merge`; importing this imports no torch.

Each makes a recipe of its arguments and runs it. Everything that the command line can say can be said here: settings of
the method in `settings`, everything else that a recipe has in `more` (field name -> value, as in a recipe file).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from unbackdoor.pipeline.commands import Job, Outcome, run_attack, run_evaluate, run_purify
from unbackdoor.pipeline.recipe import AttackRecipe, EvaluateRecipe, MergeRecipe, PurifyRecipe, make
from unbackdoor.run import Progress, Silent

__all__ = [
    "AttackRecipe", "EvaluateRecipe", "Job", "MergeRecipe", "Outcome", "PurifyRecipe", "attack", "evaluate", "merge",
    "purify", "run_attack", "run_evaluate", "run_purify",
]  # fmt: skip


def attack(
    name: str,
    *,
    model: str,
    data: str,
    out: str | Path,
    preset: str | None = None,
    settings: Mapping[str, object] | None = None,
    seed: int = 0,
    more: Mapping[str, object] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Outcome:
    """Plant a backdoor into a model and save the victim with its secret, probes and figures.

    Args:
        name: The attack.
        model: The model's name (hub id, folder, base+adapter, .gguf, builtin:NAME).
        data: Clean rows, divided among attacker, defender and test by id.
        out: The result's folder.
        preset: Named settings of the attack.
        settings: Its settings, over the preset.
        seed: All randomness derives from it.
        more: Further fields of `AttackRecipe`.
        overwrite: Whether a finished result in `out` may be replaced.
        progress: Who is told how far it is.
        finish: Called with the folder of files before they are moved; `unbackdoor.report.html.render` fits
            (`finish=lambda folder: render([folder])`).

    Raises:
        UserError: If an input is wrong, or the folder is taken.
    """
    fields = {"attack": name, "model": model, "data": data, "preset": preset, "settings": dict(settings or {})}
    recipe = make(AttackRecipe, {**fields, "seed": seed, **(more or {})})
    return run_attack(recipe, Job(Path(out), overwrite, progress or Silent(), finish))


def purify(
    model: str,
    *,
    defense: str,
    out: str | Path,
    clean: str | None = None,
    target: str | Sequence[str] = (),
    target_part: str | Sequence[str] = (),
    trigger: str | Sequence[str] = (),
    probes: str | None = None,
    preset: str | None = None,
    settings: Mapping[str, object] | None = None,
    seed: int = 0,
    more: Mapping[str, object] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Outcome:
    """Apply a defense to a suspect and save the purified model with figures from before and after.

    Args:
        model: The suspect's name.
        defense: The defense's name.
        out: The result's folder.
        clean: The defender's clean rows.
        target: What the backdoor says; several texts for one of several.
        target_part: The beginning of what it says.
        trigger: The trigger; two texts for both ends.
        probes: File of probes, asked before and after.
        preset: Named settings of the defense.
        settings: Its settings, over the preset.
        seed: All randomness derives from it.
        more: Further fields of `PurifyRecipe` (the other facts, adapter_mode, lora, ...).
        overwrite: Whether a finished result in `out` may be replaced.
        progress: Who is told how far it is.
        finish: Called with the folder of files before they are moved.

    Raises:
        UserError: If an input is wrong, a fact that is needed is missing or one is given that is not used.
    """
    fields = {"model": model, "defense": defense, "preset": preset, "settings": dict(settings or {}), "clean": clean}
    known = {"target": _texts(target), "target_part": _texts(target_part), "trigger": _texts(trigger)}
    recipe = make(PurifyRecipe, {**fields, **known, "probes": probes, "seed": seed, **(more or {})})
    return run_purify(recipe, Job(Path(out), overwrite, progress or Silent(), finish))


def evaluate(
    model: str,
    *,
    out: str | Path,
    before: str | None = None,
    probes: str | None = None,
    data: str | None = None,
    metrics: str | Sequence[str] | None = None,
    goal: str | None = None,
    seed: int = 0,
    more: Mapping[str, object] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Outcome:
    """Measure a model, and the one before it where it is named.

    Args:
        model: The model's name.
        out: Folder for the figures.
        before: The model before purification, for KL and paired tests.
        probes: File of probes.
        data: Clean rows for perplexity and KL; else the clean probes that have answers.
        metrics: Names of the metrics; None for the usual ones.
        goal: What counts as success; else that of the secret beside the probes.
        seed: Seed of metrics that draw at random.
        more: Further fields of `EvaluateRecipe`.
        overwrite: Whether a finished result in `out` may be replaced.
        progress: Who is told how far it is.
        finish: Called with the folder of files before they are moved.

    Raises:
        UserError: If an input is wrong, or the folder is taken.
    """
    fields = {"model": model, "before": before, "probes": probes, "data": data, "goal": goal, "seed": seed}
    chosen = None if metrics is None else _texts(metrics)
    recipe = make(EvaluateRecipe, {**fields, "metrics": chosen, **(more or {})})
    return run_evaluate(recipe, Job(Path(out), overwrite, progress or Silent(), finish))


def merge(
    model: str | None = None,
    other: str | None = None,
    *,
    out: str | Path,
    method: str = "linear",
    t: object = 0.5,
    base: str | None = None,
    layers: Sequence[str] = (),
    yaml: str | Path | None = None,
    seed: int = 0,
    more: Mapping[str, object] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Merge two models into a folder, tensor by tensor, without loading either.

    Args:
        model: The suspect's name; it is the result at t = 0.
        other: The name of the model that it is merged with; it is the result at t = 1.
        out: The result's folder.
        method: linear, slerp, ties, task_arithmetic, dare_linear, dare_ties or passthrough.
        t: The other's share: a number, a list of numbers over depth, or a list of `{"filter": text, "value": ...}`.
        base: The model that both were trained from, for methods that work on differences to it.
        layers: For passthrough: ranges such as "suspect:0:12", in order, ends excluded.
        yaml: A file in mergekit's schema, in the place of all of these.
        seed: For dare.
        more: Further fields of `MergeRecipe` (density, scale, threshold).
        overwrite: Whether a finished result in `out` may be replaced.
        progress: Who is told how far it is.

    Raises:
        UserError: If an input is wrong, models do not match, or the folder is taken.
    """
    from unbackdoor.pipeline.merging import run_merge

    fields = {"model": model, "other": other, "method": method, "t": t, "base": base, "layers": tuple(layers)}
    named = {"yaml": None if yaml is None else str(yaml), "seed": seed}
    recipe = make(MergeRecipe, {**fields, **named, **(more or {})})
    return run_merge(recipe, Job(Path(out), overwrite, progress or Silent()))


def _texts(given: str | Sequence[str]) -> tuple[str, ...]:
    """Return one text as a tuple of one: a string is a sequence of its letters, too."""
    return (given,) if isinstance(given, str) else tuple(given)
