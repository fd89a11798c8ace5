"""Tables as Markdown and as one plain HTML page; every text is escaped, because labels and errors may hold anything."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from unbackdoor.bench.ablation import FILE
from unbackdoor.report.escape import shown
from unbackdoor.report.plots import Panel
from unbackdoor.report.tables import Cell, Table

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 90rem; padding: 1rem; }
h1 { font-size: 1.6rem; } dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; }
dt { opacity: .7; } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin-top: 2.5rem; } table { border-collapse: collapse; min-width: 40rem; }
caption { text-align: left; font-weight: 600; font-size: 1.15rem; padding-bottom: .5rem; }
th, td { border-bottom: 1px solid var(--line); padding: .4rem .8rem .4rem 0; text-align: left; vertical-align: top; }
thead th { font-weight: 600; font-size: .85rem; } tbody th { font-weight: 500; }
td { font-variant-numeric: tabular-nums; } td.none { opacity: .6; } tr:hover { background: var(--soft); }
small { display: block; font-weight: 400; opacity: .75; } td small { white-space: nowrap; }
p { max-width: 50rem; font-size: .9rem; opacity: .85; }
figure { margin: 2.5rem 0 0; } figcaption { font-weight: 600; font-size: 1.15rem; padding-bottom: .5rem; }
figure svg { display: block; height: auto; max-width: 100%; }
"""


def markdown_page(
    title: str, facts: Sequence[tuple[str, str]], tables: Sequence[Table], plots: Sequence[Panel] = ()
) -> str:
    """Return the tables as Markdown, after what is said of the plots; these are in a file beside it."""
    parts = [f"# {_escaped(title)}", "", *(f"* {name}: {_escaped(value)}" for name, value in facts), ""]
    parts += ["## Plots", ""] if plots else []
    if any(plot.svg for plot in plots):
        parts += [f"![{_escaped('; '.join(plot.title for plot in plots if plot.svg))}]({FILE})", ""]
    for plot in plots:
        parts += [f"**{_escaped(plot.title)}.** {_escaped(plot.key)}", ""]
    for table in tables:
        parts += [f"## {_escaped(table.caption)}", ""]
        parts += [
            "| " + " | ".join(_escaped(column) for column in table.columns) + " |",
            "|" + " --- |" * len(table.columns),
        ]
        for line in table.lines:
            label = f"{line.label} ({line.note})" if line.note else line.label
            parts.append("| " + " | ".join(_escaped(text) for text in (label, *(c.text for c in line.cells))) + " |")
        parts += ["", *(part for note in table.notes for part in (_escaped(note), ""))]
    return "\n".join(parts).rstrip() + "\n"


def html_page(
    title: str, facts: Sequence[tuple[str, str]], tables: Sequence[Table], plots: Sequence[Panel] = ()
) -> str:
    """Return the plots and the tables as one HTML page that fetches nothing."""
    listed = "".join(f"<dt>{_safe(name)}</dt><dd>{_safe(value)}</dd>" for name, value in facts)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{_safe(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{_safe(title)}</h1>\n<dl>{listed}</dl>\n"
        + "".join(_html_plot(plot) for plot in plots)
        + "\n".join(_html_table(table) for table in tables)
    ) + "\n</main>\n</body>\n</html>\n"


def _html_plot(plot: Panel) -> str:
    # What stands in a drawing was escaped when it was drawn.
    return f"<figure>\n<figcaption>{_safe(plot.title)}</figcaption>\n{plot.svg}\n<p>{_safe(plot.key)}</p>\n</figure>\n"


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_safe(column)}</th>' for column in table.columns)
    body = ""
    for line in table.lines:
        note = f"<small>{_safe(line.note)}</small>" if line.note else ""
        cells = "".join(_html_cell(cell) for cell in line.cells)
        body += f'<tr><th scope="row">{_safe(line.label)}{note}</th>{cells}</tr>\n'
    notes = "".join(f"<p>{_safe(note)}</p>\n" for note in table.notes)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_safe(table.caption)}">\n<table>\n'
        f"<caption>{_safe(table.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n"
        f"</table>\n</div>\n{notes}"
    )


def _html_cell(cell: Cell) -> str:
    detail = f"<small>{_safe(cell.detail)}</small>" if cell.detail else ""
    mark = "" if cell.measured else ' class="none"'
    return f"<td{mark}>{_safe(cell.main)}{detail}</td>"


def _safe(text: str) -> str:
    return html.escape(shown(text), quote=True)


def _escaped(text: str) -> str:
    line = shown(text).replace("\n", " ")
    line = re.sub(r"([\\`*_|~#]|\](?=[\[(:]))", r"\\\1", line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
