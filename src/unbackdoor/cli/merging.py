"""The command merge: two models, or a YAML file in mergekit's schema, become one folder; no model is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from unbackdoor.cli import launch, output
from unbackdoor.cli.options import Common, command, gather, print_json, showing
from unbackdoor.data.strict_yaml import YamlMistake, load_yaml
from unbackdoor.errors import UserError
from unbackdoor.model.output import refuse_finished
from unbackdoor.model.quarantine import printable, printable_lines
from unbackdoor.pipeline import recipe as recipes
from unbackdoor.pipeline.commands import Job


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("merge")(_merge)


@command(without=("preset", "device", "template", "fail_on"), looks=False)
def _merge(
    model: Annotated[
        str | None,
        typer.Argument(help="the suspect: hub id, folder or base+adapter; or a .yaml of mergekit", metavar="A"),
    ] = None,
    other: Annotated[str | None, typer.Argument(help="the model that it is merged with", metavar="B")] = None,
    *,
    method: Annotated[
        str | None, typer.Option("--method", help="linear, slerp, ties, task_arithmetic, dare_linear, ..., passthrough")
    ] = None,
    t: Annotated[str | None, typer.Option("--t", help="share of B: 0.5, or numbers over depth: 0,0.5,1")] = None,
    base: Annotated[str | None, typer.Option("--base", help="the model that A and B were trained from")] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layers", help="passthrough: suspect:0:12, then other:12:24 (repeatable; ends excluded)"),
    ] = None,
    common: Common,
) -> None:
    """Merge a suspect with another model, tensor by tensor; memory stays small whatever the models' size."""
    flags: dict[str, Any] = {"model": model, "other": other, "method": method, "base": base, "layers": layers}
    if t is not None:
        flags["t"] = _numbers(t)
    if model is not None and other is None and model.endswith((".yaml", ".yml")):
        flags |= {"model": None, "yaml": model}
    sets = recipes.parse_sets(common.sets or ())
    recipe = gather(recipes.MergeRecipe, "merge", {**flags, **sets}, common)
    launch.refuse("merge")
    if common.dump_config:
        typer.echo(recipes.as_yaml(recipe), nl=False)
        return
    out = common.out or Path("runs") / "merge"
    if common.dry_run:
        _show_plan(recipe, out, common)
        return
    from unbackdoor.pipeline.merging import run_merge

    with showing(common) as shown:
        outcome = run_merge(recipe, Job(out, common.overwrite, shown))
    if common.json_output:
        print_json({**outcome.results, "out": str(outcome.folder)})
        return
    facts = outcome.results["notes"]
    typer.echo(
        printable_lines(f"{facts['tensors']} tensors merged by {facts['method']}, {facts['copied']} of them copied.")
    )
    typer.echo(str(outcome.folder))


def _show_plan(recipe: recipes.MergeRecipe, out: Path, common: Common) -> None:
    """Show what a merge would do."""
    from unbackdoor.pipeline.merging import plan_merge

    found = plan_merge(recipe)
    if not common.overwrite:
        refuse_finished(out)
    print_json(found.to_json()) if common.json_output else output.plan(found)


def _numbers(text: str) -> Any:
    """Return what --t says: a number, numbers with commas between, or YAML."""
    try:
        found = load_yaml(text if text.lstrip().startswith(("[", "{")) or "," not in text else f"[{text}]")
    except YamlMistake as problem:
        raise UserError(f"--t '{printable(text)}' is not understood; write --t 0.5 or --t 0,0.5,1.") from problem
    endless = isinstance(found, float) and not math.isfinite(found)
    if not isinstance(found, int | float | list | dict) or isinstance(found, bool) or endless:
        raise UserError(f"--t '{printable(text)}' is not understood; write --t 0.5 or --t 0,0.5,1.")
    return found
