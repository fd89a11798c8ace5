"""What the commands print on stdout when they are done: a short summary for people, or the results as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from unbackdoor.cli.failing import FailOn
from unbackdoor.cli.options import Common, print_json
from unbackdoor.model.quarantine import printable_lines

if TYPE_CHECKING:
    from unbackdoor.pipeline.commands import Outcome
    from unbackdoor.pipeline.plan import Plan


def add_report(folder: Path) -> None:
    """Render report.html and report.md into a run's folder."""
    from unbackdoor.report.html import render

    render([folder])


def outcome(result: Outcome, common: Common, threshold: FailOn | None) -> None:
    """Print a finished run, and exit with 1 if a threshold was missed."""
    if common.json_output:
        print_json({**result.results, "out": str(result.folder), "report": str(result.folder / "report.html")})
    else:
        for sentence in _verdict(result.folder):
            typer.echo(printable_lines(sentence))
        typer.echo("")
        typer.echo(f"{result.folder / 'report.html'}")
    finish(result.results["rows"], threshold)


def finish(rows: Sequence[Mapping[str, Any]], threshold: FailOn | None) -> None:
    """Exit with 1, saying why, if a threshold was missed."""
    missed = [] if threshold is None else threshold.missed(rows)
    for sentence in missed:
        typer.echo(sentence, err=True)
    if missed:
        raise typer.Exit(1)


def _verdict(folder: Path) -> list[str]:
    from unbackdoor.report.tables import load_run
    from unbackdoor.report.verdict import verdict

    return verdict(load_run(folder))


def plan(found: Plan) -> None:
    """Print a plan."""
    for part in found.parts:
        typer.echo(f"{duration(part.seconds):>16}  {part.name}")
    typer.echo(f"{duration(found.seconds):>16}  in all, estimated")
    if found.memory_bytes is not None and found.disk_bytes is not None:
        typer.echo(f"memory about {found.memory_bytes / 1e9:.1f} GB, disk about {found.disk_bytes / 1e9:.1f} GB")
    for notice in found.notices:
        typer.echo(printable_lines(f"note: {notice}"))
    typer.echo("Nothing was run or written (--dry-run).")


def duration(seconds: float | None) -> str:
    """Return a time for a plan."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
