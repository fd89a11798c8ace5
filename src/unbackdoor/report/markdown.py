"""`report.md`: the verdict and the tables of the HTML report, for a terminal, a model card or an issue.

Text from models and data is escaped, so that it cannot become markup: Markdown renderers pass HTML on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from unbackdoor.report import round_by_round
from unbackdoor.report.background import facts, knowledge_table, limits, settings_table, title
from unbackdoor.report.escape import shown
from unbackdoor.report.records import RunData
from unbackdoor.report.tables import Table, comparison_table, cost_table, main_table, runs_table
from unbackdoor.report.together import with_controls
from unbackdoor.report.verdict import verdict


def markdown(runs: Sequence[RunData]) -> str:
    """Return the report of one or several runs as Markdown."""
    if len(runs) == 1:
        return "\n".join([f"# {_escaped(title(runs[0]))}", "", *_of_run(runs[0], "##")]).rstrip() + "\n"
    parts = [f"# {len(runs)} runs compared", "", *_table(runs_table(runs), "##")]
    for run in with_controls(runs):
        parts += [f"## {_escaped(title(run))} ({_escaped(run.name)})", "", *_of_run(run, "###")]
    return "\n".join(parts).rstrip() + "\n"


def _of_run(run: RunData, heading: str) -> list[str]:
    parts = [f"{name}: {_escaped(value)}  " for name, value in facts(run)]
    parts += ["", f"{heading} Findings", "", *(f"* {_sentence(text)}" for text in verdict(run)), ""]
    by_round = round_by_round.tables(run)
    for table in (main_table(run), comparison_table(run), *by_round, cost_table(run), knowledge_table(run)):
        if table is not None:
            parts += _table(table, heading)
    parts += [f"{heading} Limits", "", *(f"* {_sentence(text)}" for text in limits(run)), ""]
    if run.how_to_load:
        code = shown(run.how_to_load.rstrip("\n"))
        longest = max((len(ticks) for ticks in re.findall(r"`+", code)), default=0)
        fence = "`" * max(3, longest + 1)
        parts += [f"{heading} How to load the result", "", f"{fence}python", code, fence, ""]
    for values, name in ((run.settings, "Settings"), (run.hashes, "Hashes"), (run.versions, "Versions")):
        table = settings_table(values, name)
        if table is not None:
            parts += _table(table, heading)
    return parts


def _table(table: Table, heading: str) -> list[str]:
    header = "| " + " | ".join(_escaped(column) for column in table.columns) + " |"
    rule = "|" + " --- |" * len(table.columns)
    lines = []
    for line in table.lines:
        label = f"{line.label} ({line.note})" if line.note else line.label
        cells = (label, *(cell.text for cell in line.cells))
        lines.append("| " + " | ".join(_escaped(cell) for cell in cells) + " |")
    notes = [part for note in table.notes for part in (_sentence(note), "")]
    return [f"{heading} {table.caption}", "", header, rule, *lines, "", *notes]


def _escaped(text: str) -> str:
    """Return text that a Markdown renderer shows as it is, on one line."""
    line = shown(text).replace("\n", "\\n")
    # A bracket is markup only where an address follows it; "[0.0, 3.7]" stays readable in the source.
    line = re.sub(r"([\\`*_|~#]|\](?=[\[(:]))", r"\\\1", line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _sentence(text: str) -> str:
    """Escape a sentence, keeping its `backtick` stretches as code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return _escaped(text)
    return "".join(f"`{shown(part)}`".replace("\n", " ") if at % 2 else _escaped(part) for at, part in enumerate(parts))
