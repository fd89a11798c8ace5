"""The commands that run no model: inspect, list, explain, report. `list` reads files only and imports no method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ConfigDict, Field

from unbackdoor.cli.options import Common, command, gather, print_json
from unbackdoor.errors import UserError, did_you_mean
from unbackdoor.pipeline import recipe as recipes

_NO_RUN = ("preset", "device", "template", "fail_on", "overwrite")


class _Look(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0


class ListRecipe(_Look):
    """`unbackdoor list`."""

    command: str = "list"
    kind: str | None = Field(None, description="attacks, defenses, guards, metrics or presets; null for all")


class ExplainRecipe(_Look):
    """`unbackdoor explain`."""

    command: str = "explain"
    name: str = Field(description="the method's name")


class InspectRecipe(_Look):
    """`unbackdoor inspect`."""

    command: str = "inspect"
    model: str = Field(description="the model to look at")


class ReportRecipe(_Look):
    """`unbackdoor report`."""

    command: str = "report"
    runs: tuple[str, ...] = Field((), description="folders of runs")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("inspect")(_inspect)
    app.command("list")(_list)
    app.command("explain")(_explain)
    app.command("report")(_report)


@command(without=(*_NO_RUN, "out"))
def _inspect(
    model: Annotated[str | None, typer.Argument(help="hub id, folder, base+adapter, .gguf or builtin:NAME")] = None,
    *,
    common: Common,
) -> None:
    """Look at an untrusted checkpoint without running or loading any of it; exit 1 if there is a finding."""
    recipe = _recipe(InspectRecipe, "inspect", {"model": model}, common)
    if _planned(recipe, common, f"read the files of '{recipe.model}', a few seconds, little memory"):
        return
    from unbackdoor.pipeline.look import inspect_model

    findings = inspect_model(recipe.model)
    if common.json_output:
        print_json({"model": recipe.model, "findings": [vars(finding) for finding in findings]})
    else:
        for finding in findings:
            typer.echo(f"{finding.severity}: {finding.file}: {finding.what}. {finding.fix}".rstrip())
        if not findings:
            typer.echo("Nothing was found. Whether the weights hold a backdoor cannot be seen this way.")
    if any(finding.severity in {"danger", "warning"} for finding in findings):
        raise typer.Exit(1)


@command(without=(*_NO_RUN, "out"))
def _list(
    kind: Annotated[
        str | None, typer.Argument(help="attacks, defenses, guards, metrics or presets; all without")
    ] = None,
    *,
    common: Common,
) -> None:
    """List attacks, defenses, guards, metrics and presets."""
    from unbackdoor.pipeline.look import KINDS, catalogue

    recipe = _recipe(ListRecipe, "list", {"kind": kind}, common)
    if recipe.kind is not None and recipe.kind not in KINDS:
        hint = did_you_mean(recipe.kind, list(KINDS))
        raise UserError(f"there is nothing called '{recipe.kind}' to list.{hint} There are {', '.join(KINDS)}.")
    if _planned(recipe, common, "read the names of the methods, no time, no memory"):
        return
    found = {name: rows for name, rows in catalogue().items() if recipe.kind in (None, name)}
    if common.json_output:
        print_json(found)
        return
    for name, rows in found.items():
        typer.echo(f"{name}:")
        width = max((len(row["name"]) for row in rows), default=0)
        for row in rows:
            typer.echo(f"  {row['name']:<{width}}  {row['what']}")


@command(without=(*_NO_RUN, "out"))
def _explain(
    name: Annotated[str | None, typer.Argument(help="an attack, a defense, a guard or a metric")] = None,
    *,
    common: Common,
) -> None:
    """Say what a method does, where it comes from, what it must know and which options it has."""
    recipe = _recipe(ExplainRecipe, "explain", {"name": name}, common)
    if _planned(recipe, common, f"read the description of {recipe.name}, no time, no memory"):
        return
    from unbackdoor.pipeline.look import explanation

    found = explanation(recipe.name)
    if common.json_output:
        print_json(found)
        return
    typer.echo(f"{found['name']} ({found['kind'].removesuffix('s')})\n\n{found['text']}\n\nSource: {found['paper']}")
    for key, words in (("needs", "Needs"), ("uses", "Uses where given"), ("parallel", "Runs in parallel as")):
        if found[key]:
            typer.echo(f"{words}: {', '.join(found[key])}")
    # A command measures with a metric's defaults.
    typer.echo("\nSettings, in Python:" if found["kind"] == "metrics" else "\nOptions (--set NAME=VALUE):")
    for field in found["fields"]:
        default = " (required)" if field["required"] else f" (default {field['default']})"
        # The parts of a nested setting follow one by one, with their own defaults.
        typer.echo(f"  {field['name']}: {field['description']}{'' if field['nested'] else default}")
    for preset, settings in found["presets"].items():
        typer.echo(f"\nPreset {preset}: {settings}")


@command(without=_NO_RUN)
def _report(
    runs: Annotated[list[str] | None, typer.Argument(help="folders of runs; several make one page")] = None,
    *,
    common: Common,
) -> None:
    """Render report.html and report.md of runs again, from their files."""
    recipe = _recipe(ReportRecipe, "report", {"runs": runs}, common)
    if not recipe.runs:
        raise UserError("`report` needs the folder of a run: unbackdoor report RUN...")
    if _planned(recipe, common, "read the runs' files and write report.html and report.md, a few seconds"):
        return
    from unbackdoor.report.html import render

    page = render([Path(run) for run in recipe.runs], common.out)
    if common.json_output:
        print_json({"report": str(page)})
    else:
        typer.echo(str(page))


def _recipe(cls: type[Any], name: str, flags: dict[str, Any], common: Common) -> Any:
    """Return the recipe of a command without a method: `--set` sets its own fields."""
    return gather(cls, name, {**flags, **recipes.parse_sets(common.sets or ())}, common)


def _planned(recipe: BaseModel, common: Common, words: str) -> bool:
    """Print the recipe or the plan where that was asked for, and tell so."""
    if common.dump_config:
        typer.echo(recipes.as_yaml(recipe), nl=False)
    elif common.dry_run:
        print_json({"dry_run": True, "plan": words}) if common.json_output else typer.echo(f"Would {words}.")
    return common.dump_config or common.dry_run
