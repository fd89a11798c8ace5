"""`report.html`: one file that needs nothing else, readable in any browser, light or dark, on paper or a phone.

Everything shown may come from an attacker: the template escapes all of it, invisible characters are made visible before
that, and a content security policy forbids scripts and addresses should something slip through.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from unbackdoor.model.checkpoint import update_hashes
from unbackdoor.report import plots, round_by_round
from unbackdoor.report.background import ABSENT, facts, knowledge_table, limits, settings_table, title
from unbackdoor.report.escape import shown
from unbackdoor.report.excerpts import Excerpt, excerpts
from unbackdoor.report.markdown import markdown
from unbackdoor.report.records import RunData
from unbackdoor.report.tables import (
    Table,
    comparison_table,
    cost_table,
    every_measurement,
    load_run,
    main_table,
    runs_table,
)
from unbackdoor.report.together import named, with_controls
from unbackdoor.report.verdict import Finding, findings
from unbackdoor.run import write_atomically


@dataclass(frozen=True)
class _View:
    """One run as the template reads it."""

    prefix: str
    title: str
    facts: list[tuple[str, str]]
    findings: list[Finding]
    rates: plots.Panel | None
    main: Table
    comparison: Table | None
    excerpts: list[Excerpt]
    target: list[plots.Panel]
    prompts: int
    curves: list[plots.Panel]
    rounds: list[round_by_round.Section]
    states: list[plots.Panel]
    layer: int
    perturbed: bool
    perturbing: str
    knowledge: Table | None
    cost: Table | None
    everything: Table
    collapsed: list[Table]
    how_to_load: str
    limits: list[str]


def render(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write `report.html` and `report.md` of one run or of several compared.

    Args:
        folders: Run folders.
        out: Folder for the report, made if it is missing; that of the run for one run, `runs/report` for several.

    Returns:
        The path of the HTML file.

    Raises:
        ValueError: If `folders` is empty.
        DataError: If a folder is no finished run or one of its files is broken.
    """
    if not folders:
        raise ValueError("a report needs at least one run folder")
    runs = named([load_run(Path(folder)) for folder in folders])
    page = html_page(runs)
    text = markdown(runs)
    place = out or (Path(folders[0]) if len(folders) == 1 else Path("runs") / "report")
    place.mkdir(parents=True, exist_ok=True)
    write_atomically(place / "report.md", text)
    write_atomically(place / "report.html", page)
    update_hashes(place, ("report.md", "report.html"))
    return place / "report.html"


def html_page(runs: Sequence[RunData]) -> str:
    """Return the page of one or several runs."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters["code_spans"] = _code_spans
    environment.filters["drawing"] = Markup
    views = [_view(run, f"r{at}-" if len(runs) > 1 else "") for at, run in enumerate(with_controls(runs), start=1)]
    together = runs_table(runs) if len(runs) > 1 else None
    heading = views[0].title if together is None else f"{len(runs)} runs compared"
    template = environment.get_template("page.html.j2")
    return template.render(title=heading, views=views, together=together, absent=ABSENT)


def _visible(value: object) -> object:
    """Applied by the template to everything that it prints: no control character reaches the page."""
    return shown(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _code_spans(text: str) -> Markup:
    """Return a sentence with its `backtick` stretches as code elements."""
    # A figure and its per cent sign stay on one line.
    parts = [html.escape(shown(part)).replace(" %", "\N{NO-BREAK SPACE}%") for part in text.split("`")]
    if len(parts) % 2 == 0:
        return Markup("`".join(parts))  # noqa: S704 -- every part was escaped
    spans = [f"<code>{part}</code>" if at % 2 else part for at, part in enumerate(parts)]
    return Markup("".join(spans))  # noqa: S704 -- every part was escaped


def _view(run: RunData, prefix: str) -> _View:
    tables = (
        settings_table(run.settings, "Settings"),
        settings_table(run.versions, "Versions"),
        settings_table(run.hardware, "Hardware"),
        settings_table(run.hashes, "Hashes"),
    )
    return _View(
        prefix=prefix,
        title=title(run),
        facts=facts(run),
        findings=findings(run),
        rates=plots.success_rates(run, prefix),
        main=main_table(run),
        comparison=comparison_table(run),
        excerpts=excerpts(run),
        target=plots.target_probabilities(run, prefix),
        prompts=run.case_studies.prompts if run.case_studies else 0,
        curves=plots.curves(run, prefix),
        rounds=round_by_round.sections(run, prefix),
        states=plots.hidden_states(run, prefix),
        layer=run.hidden_states.layer if run.hidden_states else 0,
        perturbed=run.hidden_states is not None and run.hidden_states.perturbed,
        perturbing=round_by_round.perturbing(run),
        knowledge=knowledge_table(run),
        cost=cost_table(run),
        everything=every_measurement(run),
        collapsed=[table for table in tables if table is not None],
        how_to_load=run.how_to_load,
        limits=limits(run),
    )
