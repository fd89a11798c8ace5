"""The plan of each command, for `--dry-run`: inputs are read and checked as in the run, no model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from unbackdoor.model.spec import parse_spec
from unbackdoor.pipeline import inputs, plan
from unbackdoor.pipeline.clock import Expected
from unbackdoor.pipeline.common import DEMO_KEEPS, completed
from unbackdoor.pipeline.recipe import AttackRecipe, DemoRecipe, EvaluateRecipe, PurifyRecipe
from unbackdoor.run import Silent

if TYPE_CHECKING:
    from unbackdoor.pipeline.folders import Workspace


def plan_attack(recipe: AttackRecipe) -> plan.Plan:
    """Return the plan of `attack`.

    Raises:
        UserError: If an input is wrong.
    """
    recipe = completed(recipe)
    notices = _Notices()
    found = inputs.attack_inputs(recipe, notices, dry=True)
    about = plan.estimator(recipe.model)
    tokens = plan.mean_tokens(found.splits.attacker)
    labelled = any(row.label is not None for row in found.asked)
    # The goal is known once the backdoor is planted; the settings say as much before.
    form = str(recipe.settings.get("target_form"))
    goal = {"opening": "refusal_absent", "label": "label"}.get(
        form, (recipe.settings.get("goal") or {}).get("form", "")
    )
    figures = _figures(recipe.metrics, _KINDS, found.data, labelled=labelled, compared=False, goal=goal)
    measured = _asked(3 * len(found.asked), found.data, figures, tokens, recipe.max_new_tokens)
    parts = [
        *plan.training_parts(about, recipe.settings, tokens),
        plan.measuring_part(about, "measuring the victim", *measured),
        plan.measuring_part(about, "measuring the untouched model", *measured),
    ]
    trained = "adapter" if parse_spec(recipe.model).kind == "adapter" else "full"
    return replace(plan.make_plan(about, parts, trained=trained, notices=notices.texts), figures=figures | {"seconds"})


def plan_purify(recipe: PurifyRecipe) -> plan.Plan:
    """Return the plan of `purify`.

    Raises:
        UserError: If an input is wrong.
    """
    from unbackdoor.defenses.base import Need

    recipe = completed(recipe)
    notices = _Notices()
    found = inputs.purify_inputs(recipe, notices, dry=True)
    about = plan.estimator(recipe.model)
    tokens = plan.mean_tokens(found.facts.get(Need.CLEAN) or ())
    figures = _figures_of(recipe, found, compared=True) | {"seconds"}
    measured = _asked(len(found.probes), found.data, figures, tokens, recipe.max_new_tokens)
    parts = [
        plan.measuring_part(about, "measuring the suspect", *measured),
        *plan.training_parts(about, plan.with_texts(recipe.settings, len(recipe.target or recipe.target_part)), tokens),
        *_watching(about, recipe, recipe.settings, tokens, recipe.watch * len({probe.kind for probe in found.probes})),
        *_contradicting(about, recipe.settings, tokens, len(found.probes), recipe.evidence),
        plan.measuring_part(about, "measuring the purified model", *measured, kl=True),
    ]
    adapter = parse_spec(recipe.model).kind == "adapter"
    trained = "adapter" if adapter else "lora" if recipe.lora else "full"
    return replace(plan.make_plan(about, parts, trained=trained, notices=notices.texts), figures=figures)


def _contradicting(
    about: plan.Estimator, settings: Mapping[str, Any], tokens: float, probes: int, source: str | None
) -> list[plan.Part]:
    """Return the part in which a guard asks the model for its answers and, unless for a dictionary, its evidence."""
    # `internal_conflict` has a group of this name, too, which makes no evidence.
    groups = (settings.get(name) for name in ("conflict", "external"))
    conflict = next((group for group in groups if isinstance(group, dict) and "evidence_tokens" in group), None)
    if conflict is None or not probes:
        return []
    long = 0 if str(source).partition(":")[0] == "wordnet" else conflict["evidence_tokens"]
    seconds = about.reply(probes, tokens, conflict["answer_tokens"] + long)
    return [plan.Part("the guard's own questions to the model", seconds)]


WATCHING = "asking probes after every round"


def _watching(
    about: plan.Estimator,
    recipe: PurifyRecipe | DemoRecipe,
    settings: Mapping[str, object],
    tokens: float,
    probes: int,
    of: str = "",
) -> list[plan.Part]:
    """Return the part in which `probes` are asked after each round of a defense, where some are."""
    rounds = settings.get("rounds", 1)
    if not probes or not isinstance(rounds, int):
        return []
    return [plan.Part(f"{WATCHING}{of}", about.reply(probes * rounds, tokens, recipe.max_new_tokens))]


def plan_evaluate(recipe: EvaluateRecipe) -> plan.Plan:
    """Return the plan of `evaluate`.

    Raises:
        UserError: If an input is wrong.
    """
    notices = _Notices()
    found = inputs.evaluate_inputs(recipe, notices, dry=True)
    about = plan.estimator(recipe.model)
    figures = _figures_of(recipe, found, compared=recipe.before is not None)
    tokens = plan.mean_tokens([probe.example for probe in found.probes] or list(found.data.get("", ())))
    asked = _asked(len(found.probes), found.data, figures, tokens, recipe.max_new_tokens)
    parts = [plan.measuring_part(about, "measuring the model before", *asked)] if recipe.before else []
    parts.append(plan.measuring_part(about, "measuring the model", *asked, kl=recipe.before is not None))
    models = 2 if recipe.before else 1
    made = plan.make_plan(about, parts, trained="nothing", notices=notices.texts, models=models)
    return replace(made, figures=figures)


def plan_demo(recipe: DemoRecipe) -> plan.Plan:
    """Return the plan of `demo`: the same parts that the running demo counts its time with."""
    from unbackdoor.data import sources
    from unbackdoor.data.splits import attacker_defender_test
    from unbackdoor.pipeline.demo import settings_of

    about = plan.estimator(recipe.model)
    splits = attacker_defender_test(recipe.short(sources.read(recipe.data, progress=Silent())))
    tokens = plan.mean_tokens(splits.attacker)
    asked = 3 * recipe.probes_count, min(len(splits.test), recipe.measured_rows), tokens, recipe.max_new_tokens
    watched = min(recipe.watch, recipe.probes_count) * len(_KINDS)
    parts = []
    for key, settings in settings_of(recipe).items():
        seconds = [part.seconds for part in plan.training_parts(about, settings, tokens)]
        known = [value for value in seconds if value is not None]
        work, measuring = _DEMO[key]
        parts.append(plan.Part(work, sum(known) if len(known) == len(seconds) else None))
        if key in _DEMO_WATCHED:
            parts += _watching(about, recipe, settings, tokens, watched, _DEMO_WATCHED[key])
        parts.append(plan.measuring_part(about, measuring, *asked, kl=key != "attack"))
        if key == "attack" and recipe.reference:
            parts.append(plan.measuring_part(about, _UNTOUCHED, *asked))
    figures = _figures(None, _KINDS, {"": splits.test}, labelled=False, compared=True, goal="") | {"seconds"}
    return replace(plan.make_plan(about, parts, trained="full", kept=DEMO_KEEPS), figures=figures)


_UNTOUCHED = "measuring the untouched model"
_DEMO = {
    "attack": ("planting the backdoor", "measuring the victim"),
    "control": ("fine-tuning as a control", "measuring the fine-tuned model"),
    "defense": ("purifying with SANDE", "measuring the model purified with SANDE"),
    "beear": ("purifying with BEEAR", "measuring the model purified with BEEAR"),
}
"""Part of the demo's settings -> the part of the plan in which it trains, and the one in which it is measured."""
_DEMO_WATCHED = {"defense": " of SANDE", "beear": " of BEEAR"}


def expected_parts(recipe: DemoRecipe, settings: Mapping[str, Mapping[str, Any]], place: Workspace) -> list[Expected]:
    """Return the parts of a demo that are still to be done, with predicted times."""
    from unbackdoor.pipeline.demo_steps import KEPT

    seconds = {part.name: part.seconds or 0.0 for part in plan_demo(recipe).parts}

    def treated(key: str) -> Expected:
        work, measuring = _DEMO[key]
        between = seconds.get(f"{WATCHING}{_DEMO_WATCHED.get(key, '')}", 0.0)
        whole = seconds[work] + between + seconds[measuring]
        return Expected(key, whole, _updates(settings[key]), seconds[measuring])

    planting, victim = _DEMO["attack"]
    parts = [
        Expected("plant", seconds[planting], _updates(settings["attack"])),
        Expected("suspect", seconds[victim]),
        *([Expected("reference", seconds[_UNTOUCHED])] if recipe.reference else []),
        *(treated(key) for key in ("control", *_DEMO_WATCHED)),
    ]

    def is_done(key: str) -> bool:
        model = key not in KEPT or (place.folder / KEPT[key] / "unbackdoor.json").is_file()
        return model and (key == "plant" or (place.stages / f"{key}.json").is_file())

    return [part for part in parts if not is_done(part.key)]


def _updates(settings: Mapping[str, Any], factor: int = 1) -> int:
    """Return the training steps of a method, soft prompts and drifts included."""
    factor *= int(settings.get("rounds", 1))
    own = int(settings["steps"]) * factor if "steps" in settings else 0
    parts = {key: value for key, value in settings.items() if isinstance(value, Mapping)}
    return own + sum(_updates(value, factor * _many(settings.get(f"{key}s"))) for key, value in parts.items())


def _many(count: object) -> int:
    """Return how many a round has of a part: `drifts` says it of `drift`."""
    return count if isinstance(count, int) else 1


_KINDS = frozenset({"triggered", "clean", "decoy"})


def _asked(
    probes: int, data: Mapping[str, Sequence[object]], figures: Set[str], tokens: float, new_tokens: int
) -> tuple[int, int, float, int]:
    """Return how many replies and how many readings one measuring takes, and their lengths."""
    ordinary = len(data.get("", ())) if "over_refusal" in figures else 0
    return probes + ordinary, sum(len(rows) for rows in data.values()), tokens, new_tokens


def _figures_of(
    recipe: PurifyRecipe | EvaluateRecipe, found: inputs.PurifyInputs | inputs.EvaluateInputs, *, compared: bool
) -> frozenset[str]:
    kinds = frozenset(probe.kind for probe in found.probes)
    labelled = any(probe.example.label is not None for probe in found.probes)
    goal = found.goal.form if found.goal else ""
    return _figures(recipe.metrics, kinds, found.data, labelled=labelled, compared=compared, goal=goal)


def _figures(
    metrics: Sequence[str] | None,
    kinds: Set[str],
    data: Mapping[str, object],
    *,
    labelled: bool,
    compared: bool,
    goal: str,
) -> frozenset[str]:
    """Return what will be measured: a metric of probes with their kind, any other by its name."""
    usual = [*(["asr", "leak", "cda"] if kinds else []), *(["perplexity", "kl"] if data else [])]
    declines, right = goal == "refusal_absent", goal == "label" and labelled and {"triggered", "clean"} <= kinds
    usual += ["declining", "over_refusal"] if declines else []
    usual += ["asr_right"] if right else []
    found: set[str] = set()
    for name in metrics or usual:
        there = {"cda": labelled, "declining": declines and "clean" in kinds, "over_refusal": "" in data}
        there |= {"perplexity": bool(data), "kl": bool(data) and compared, "asr_right": right}
        if name in ("asr", "leak"):
            found |= {f"{name}.{kind}" for kind in kinds if (kind == "triggered") == (name == "asr")}
        elif there.get(name, True):
            found.add(name)
    return frozenset(found)


class _Notices(Silent):
    """Collects notices."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def notice(self, text: str) -> None:
        """Remember."""
        self.texts.append(text)
