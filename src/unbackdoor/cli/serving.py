"""The command that serves: a model, or what stands before another server."""

from __future__ import annotations

from typing import Annotated

import typer

from unbackdoor.cli.options import Common, command, print_json, showing
from unbackdoor.method import merge
from unbackdoor.pipeline import recipe as recipes


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve")(_serve)


@command(without=("preset", "out", "overwrite", "fail_on"))
def _serve(
    model: Annotated[str | None, typer.Argument(help="hub id, folder, base+adapter, .gguf or builtin:NAME")] = None,
    *,
    upstream: Annotated[
        str | None, typer.Option("--upstream", metavar="URL", help="stand before this server instead")
    ] = None,
    guard: Annotated[list[str] | None, typer.Option("--guard", help="a guard, such as evidence (repeatable)")] = None,
    evidence: Annotated[
        str | None, typer.Option("--evidence", help="source for the guard evidence: endpoint, model or dictionary")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="address to listen on")] = None,
    port: Annotated[int | None, typer.Option("--port", help="port to listen on; 0 for a free one")] = None,
    common: Common,
) -> None:
    """Serve a model, or guard an upstream, as an OpenAI-compatible endpoint; ^C or SIGTERM ends it."""
    from unbackdoor.serve import run

    content = recipes.read_config(common.config, "serve")
    flags = {"model": model, "upstream": upstream, "evidence": evidence, "host": host, "port": port}
    flags |= {name: getattr(common, name) for name in ("seed", "device", "template")}
    content = merge(content, {name: value for name, value in flags.items() if value is not None})
    content = run.settings_of(merge(content, recipes.parse_sets(common.sets or ())), guard or [])
    recipe = recipes.make(run.ServeRecipe, content)
    if common.dump_config:
        typer.echo(recipes.as_yaml(recipe), nl=False)
        return
    if common.dry_run:
        run.check(recipe)
        words = f"serve '{recipe.model or recipe.upstream}' on {recipe.host} port {recipe.port} until it is stopped"
        print_json({"dry_run": True, "plan": words}) if common.json_output else typer.echo(f"Would {words}.")
        return

    def ready(url: str) -> None:
        shown = {"url": url, "model": recipe.model, "upstream": recipe.upstream}
        print_json(shown) if common.json_output else typer.echo(f"Serving on {url}/v1; ^C ends it.")

    with showing(common) as progress:
        run.serve(recipe, progress, ready)
