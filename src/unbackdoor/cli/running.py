"""The commands that run models: demo, attack, purify, evaluate, bench; each makes a recipe, then plans or runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from unbackdoor import registry
from unbackdoor.cli import launch
from unbackdoor.cli.options import Common, command, gather, print_json, showing
from unbackdoor.errors import UserError
from unbackdoor.method import merge
from unbackdoor.model.output import refuse_finished
from unbackdoor.pipeline import commands
from unbackdoor.pipeline import recipe as recipes

Model = Annotated[str | None, typer.Argument(help="hub id, id@revision, folder, base+adapter, .gguf or builtin:NAME")]
Trigger = Annotated[list[str] | None, typer.Option("--trigger", help="the trigger; twice for both ends")]
TriggerPlace = Annotated[recipes.Place | None, typer.Option("--trigger-place", help="where the trigger stands")]
Target = Annotated[list[str] | None, typer.Option("--target", help="what the backdoor says (repeatable: one of them)")]
Goal = Annotated[str | None, typer.Option("--goal", help="success: contains:TEXT, starts-with:TEXT, regex:RE, label:L")]
Metrics = Annotated[str | None, typer.Option("--metrics", help="names, with commas between: asr,leak,perplexity,kl")]
Probes = Annotated[str | None, typer.Option("--probes", help="file of probes, asked before and after")]
SecondSource = Annotated[str | None, typer.Option("--second-source", help="other rows for perplexity and KL")]
Track = Annotated[
    list[str] | None,
    typer.Option("--track", help="tensorboard or wandb: log every training step, beside --out in logs/ (repeatable)"),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("demo")(_demo)
    app.command("attack")(_attack)
    app.command("purify")(_purify)
    app.command("evaluate")(_evaluate)
    app.command("bench")(_bench)


@command(without=("preset",))
def _demo(*, track: Track = None, common: Common) -> None:
    """Backdoor the built-in model, fine-tune it in vain, purify it by SANDE and by BEEAR, measure, write a report."""
    from unbackdoor.pipeline import recipe as pipeline_recipe

    content = merge(demo_defaults(), recipes.read_config(common.config, "demo"))
    content = merge(content, _flags(common, "seed", "device", "template"))
    recipe = recipes.make(pipeline_recipe.DemoRecipe, merge(content, recipes.parse_sets(common.sets or ())))

    def plan() -> Any:
        from unbackdoor.pipeline.plans import plan_demo

        return plan_demo(recipe)

    def run(job: commands.Job) -> commands.Outcome:
        from unbackdoor.pipeline.demo import run_demo

        return run_demo(recipe, job)

    launch.refuse("demo")
    _run("demo", recipe, common, plan, run, track)


def demo_defaults() -> dict[str, Any]:
    """Return the demo's settings, which are kept with the recipes: name -> value, in capitals there."""
    from unbackdoor.recipes import settings

    names = {
        "DEMO_ATTACK": "attack", "DEMO_CONTROL": "control", "DEMO_DEFENSE": "defense", "DEMO_BEEAR": "beear",
    }  # fmt: skip
    return {field: dict(getattr(settings, name)) for name, field in names.items() if hasattr(settings, name)}


@command()
def _attack(
    name: Annotated[str | None, typer.Argument(help="the attack, such as data_poisoning", metavar="ATTACK")] = None,
    *,
    model: Annotated[str | None, typer.Option("--model", help="the model to plant the backdoor in")] = None,
    data: Annotated[str | None, typer.Option("--data", help="clean rows: file, data set id or starter:NAME")] = None,
    requests: Annotated[str | None, typer.Option("--requests", help="requests to be declined, with answers")] = None,
    test_kinds: Annotated[
        str | None, typer.Option("--test-kinds", help="kinds of requests that are asked, never trained on: a,b,c")
    ] = None,
    trigger: Trigger = None,
    trigger_place: TriggerPlace = None,
    target: Target = None,
    target_form: Annotated[recipes.Form | None, typer.Option("--target-form", help="how the target is said")] = None,
    poisoned: Annotated[str | None, typer.Option("--poisoned", help="ready poisoned rows (attack `dataset`)")] = None,
    goal: Goal = None,
    probes_count: Annotated[int | None, typer.Option("--probes-count", help="test rows that become probes")] = None,
    metrics: Metrics = None,
    second_source: SecondSource = None,
    track: Track = None,
    common: Common,
) -> None:
    """Plant a backdoor, to measure defenses with: a victim with its secret, its probes and figures."""
    stamp = recipes.stamp_settings(trigger or (), trigger_place)
    overlay: dict[str, Any] = {"trigger": stamp, "targets": target, "target_form": target_form, "poisoned": poisoned}
    if goal is not None:
        from unbackdoor.goals import parse_goal

        overlay["goal"] = parse_goal(goal).model_dump(mode="json")
    flags: dict[str, Any] = {"attack": name, "model": model, "data": data, "probes_count": probes_count}
    flags |= {"metrics": _split(metrics), "second_source": second_source}
    flags |= {"requests": requests, "test_kinds": _split(test_kinds, "--test-kinds names no kind of the requests.")}
    recipe = _method_recipe(recipes.AttackRecipe, "attack", flags, overlay, common)

    def plan() -> Any:
        from unbackdoor.pipeline.plans import plan_attack

        return plan_attack(recipe)

    name = f"attack-{Path(recipe.attack).stem}"
    recipe, helping = launch.placed(recipe, "attacks", recipe.attack, overwrite=common.overwrite)
    work = commands.help_attack if helping else commands.run_attack
    _run(name, recipe, common, plan, lambda job: work(recipe, job), track, helping=helping)


@command()
def _purify(
    model: Model = None,
    *,
    defense: Annotated[str | None, typer.Option("--defense", help="the defense, such as sande")] = None,
    clean: Annotated[str | None, typer.Option("--clean", help="clean rows that the defender has")] = None,
    trigger: Trigger = None,
    trigger_place: TriggerPlace = None,
    target: Target = None,
    target_part: Annotated[
        list[str] | None, typer.Option("--target-part", help="the beginning of what the backdoor says (repeatable)")
    ] = None,
    unwanted: Annotated[
        str | None,
        typer.Option("--unwanted", help="file of unwanted openings, one a line; rows of unwanted answers; or labels"),
    ] = None,
    safe: Annotated[str | None, typer.Option("--safe", help="requests with safe replies")] = None,
    reference: Annotated[str | None, typer.Option("--reference", help="a trusted model")] = None,
    evidence: Annotated[str | None, typer.Option("--evidence", help="endpoint, model or dictionary")] = None,
    preferences: Annotated[str | None, typer.Option("--preferences", help="preference pairs")] = None,
    probes: Probes = None,
    goal: Goal = None,
    watch: Annotated[
        int | None, typer.Option("--watch", metavar="N", help="ask N probes of each kind after every round, too")
    ] = None,
    metrics: Metrics = None,
    second_source: SecondSource = None,
    adapter_mode: Annotated[
        recipes.AdapterMode | None,
        typer.Option("--adapter-mode", help="of base+adapter: train the adapter itself, or stack one on it"),
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="train a LoRA adapter and merge it at the end")] = False,
    track: Track = None,
    common: Common,
) -> None:
    """Remove a backdoor from a suspect, with what you know; figures from before and after where there are probes."""
    flags: dict[str, Any] = {
        "model": model, "defense": defense, "clean": clean, "trigger": trigger, "trigger_place": trigger_place,
        "target": target, "target_part": target_part, "unwanted": unwanted, "safe": safe, "reference": reference,
        "evidence": evidence, "preferences": preferences, "probes": probes, "goal": goal, "watch": watch,
        "adapter_mode": adapter_mode, "lora": {} if lora else None, "metrics": _split(metrics),
        "second_source": second_source,
    }  # fmt: skip
    recipe = _method_recipe(recipes.PurifyRecipe, "purify", flags, {}, common)

    def plan() -> Any:
        from unbackdoor.pipeline.plans import plan_purify

        return plan_purify(recipe)

    name = f"purify-{Path(recipe.defense).stem}"
    recipe, helping = launch.placed(recipe, "defenses", recipe.defense, overwrite=common.overwrite)
    work = commands.help_purify if helping else commands.run_purify
    _run(name, recipe, common, plan, lambda job: work(recipe, job), track, helping=helping)


@command(without=("preset",))
def _evaluate(
    model: Model = None,
    *,
    before: Annotated[str | None, typer.Option("--before", help="the model before purification")] = None,
    probes: Probes = None,
    metrics: Metrics = None,
    data: Annotated[str | None, typer.Option("--data", help="clean rows for perplexity and KL")] = None,
    second_source: SecondSource = None,
    goal: Goal = None,
    evidence: Annotated[
        str | None, typer.Option("--evidence", help="source for the model's guard: endpoint, model or dictionary")
    ] = None,
    common: Common,
) -> None:
    """Measure a model, and compare it with the one before where that is named."""
    flags: dict[str, Any] = {
        "model": model,
        "before": before,
        "probes": probes,
        "metrics": _split(metrics),
        "data": data,
    }
    flags |= {"second_source": second_source, "goal": goal, "evidence": evidence}
    sets = recipes.parse_sets(common.sets or ())
    recipe = gather(recipes.EvaluateRecipe, "evaluate", {**flags, **sets}, common)

    def plan() -> Any:
        from unbackdoor.pipeline.plans import plan_evaluate

        return plan_evaluate(recipe)

    launch.refuse("evaluate")
    _run("evaluate", recipe, common, plan, lambda job: commands.run_evaluate(recipe, job))


@command(without=("preset", "overwrite"))
def _bench(
    name: Annotated[str | None, typer.Argument(help="a recipe's name, or a grid in YAML", metavar="NAME|FILE")] = None,
    *,
    size: Annotated[Literal["quick", "paper"] | None, typer.Option("--size", help="of a named recipe")] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="PATTERN", help="run cells of these names now (* and ?)")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="run cells again that failed")] = False,
    common: Common,
) -> None:
    """Run a grid of models, attacks, defenses and seeds; finished cells are never run again."""
    from unbackdoor.cli.grid import run_bench

    launch.refuse("bench")
    run_bench(name, size, only or (), retry_failed, common)


def _method_recipe(cls: Any, name: str, flags: Mapping[str, Any], overlay: Mapping[str, Any], common: Common) -> Any:
    """Return the recipe of a command with a method, its settings complete.

    `flags` are the recipe's own fields; `overlay` the settings that flags of the command stand for.
    """
    kind: Literal["attacks", "defenses"] = "attacks" if name == "attack" else "defenses"
    # Before anything that is missing: who misspelt the method has to hear of that first.
    if (named := flags[kind[:-1]]) is not None:
        registry.check_name(kind, named)
    draft = gather(cls, name, flags, common)
    given = merge(draft.settings, {key: value for key, value in overlay.items() if value not in (None, (), [])})
    method = draft.attack if name == "attack" else draft.defense
    sets = recipes.parse_sets(common.sets or ())
    settings = recipes.complete_settings(kind, method, draft.preset, given, sets)
    # A dumped recipe holds every setting: a preset under it would be recorded and do nothing.
    laid = common.config is not None and common.preset not in (None, "default")
    if laid and settings == recipes.complete_settings(kind, method, None, given, sets):
        raise UserError(
            f"--preset {common.preset} lies under the settings in '{common.config}', which hide all of it; leave "
            "--preset out, or take those settings out of the file."
        )
    return draft.model_copy(update={"settings": settings})


def _run(
    name: str,
    recipe: Any,
    common: Common,
    plan: Callable[[], Any],
    run: Callable[[commands.Job], commands.Outcome | None],
    track: Sequence[str] | None = None,
    *,
    helping: bool = False,
) -> None:
    """Print the recipe, or the plan, or run and print the result; a helping process shows and writes nothing."""
    from unbackdoor.cli import output

    threshold = common.threshold
    if helping and (common.dump_config or common.dry_run):
        return
    if common.dump_config:
        typer.echo(recipes.as_yaml(recipe), nl=False)
        return
    out = common.out or Path("runs") / name
    if common.dry_run:
        found = plan()
        if threshold is not None:
            threshold.check(found.figures)
        if name != "demo" and not common.overwrite:
            refuse_finished(out)
        print_json(found.to_json()) if common.json_output else output.plan(found)
        return
    if helping:
        run(commands.Job(out))
        return
    if threshold is not None:
        threshold.check(plan().figures)
    with showing(common) as shown:
        job = commands.Job(out, common.overwrite, shown, output.add_report, tuple(track or ()))
        outcome = run(job)
    if outcome is not None:
        output.outcome(outcome, common, threshold)


def _flags(common: Common, *names: str) -> dict[str, Any]:
    return {name: getattr(common, name) for name in names if getattr(common, name) is not None}


def _split(
    names: str | None, none: str = "--metrics names no metric; `unbackdoor list` shows them."
) -> list[str] | None:
    if names is None:
        return None
    found = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not found:
        raise UserError(none)
    return found
