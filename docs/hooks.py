"""Pages of the documentation that are made at build time, so that nothing is written twice.

A page for every attack, defense, guard and metric, from its docstring, fields, presets and needs; the table of what
each defense must know; signatures and docstrings of the Python functions; measured results out of `docs/results/`; and
the files at the top of the repository (README, CONTRIBUTING, ...) as pages. Nothing is written to disk.

`python docs/hooks.py` brings the table of the README up to date.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unbackdoor import pipeline, registry
from unbackdoor.defenses.base import Need
from unbackdoor.pipeline.look import explanation
from unbackdoor.report.wording import NAMES, display_name

DOCS = Path(__file__).parent
TOP = DOCS.parent
RESULTS = DOCS / "results"

FILES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CITATION.cff": "citation.md",
    "LICENSE": "license.md",
}
"""File at the top -> page."""

FACTS = {
    "clean": "clean rows",
    "trigger": "the trigger and its place",
    "target": "what the backdoor says",
    "target-part": "how that begins",
    "unwanted": "unwanted openings, in your own words",
    "safe": "requests with safe replies",
    "reference": "a trusted model",
    "evidence": "a source of evidence",
    "preferences": "preference pairs",
}
"""Need -> the fact in words."""

_MARKS = ("<!-- knowledge: made by docs/hooks.py -->", "<!-- /knowledge -->")


def on_config(config: Any) -> Any:
    """Put the generated pages into the navigation."""
    for section in config.nav:
        if section.get("Methods") == []:
            section["Methods"] = [
                {kind.capitalize(): [{_title(name): f"methods/{name}.md"} for name in registry.names(kind)]}
                for kind in registry.KINDS
            ]
        if section.get("Measured") == []:
            section["Measured"] = [f"measured/{name}.md" for name in result_names() or ["none"]]
        if section.get("Decisions") == []:
            section["Decisions"] = [f"decisions/{path.name}" for path in sorted((DOCS / "decisions").glob("*.md"))]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for place, content in pages().items():
        files.append(File.generated(config, place, content=content))
    for name in result_names():
        if (RESULTS / name / "plots.svg").is_file():
            drawn = (RESULTS / name / "plots.svg").read_text(encoding="utf-8")
            files.append(File.generated(config, f"measured/{name}-plots.svg", content=drawn))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the places that pages leave for generated text."""
    return fill(markdown)


def fill(markdown: str) -> str:
    """Return a page with `{{ knowledge }}` and `{{ functions }}` replaced."""
    if "{{ knowledge }}" in markdown:
        markdown = markdown.replace("{{ knowledge }}", knowledge_table("methods/"))
    if "{{ functions }}" in markdown:
        markdown = markdown.replace("{{ functions }}", functions())
    return markdown


def pages() -> dict[str, str]:
    """Return every generated page: place below docs -> Markdown."""
    found = {page: _from_top(TOP / name) for name, page in FILES.items()}
    for kind in registry.KINDS:
        for name in registry.names(kind):
            found[f"methods/{name}.md"] = method_page(explanation(name))
    for name in result_names():
        # Its tables have eleven columns; the list of contents would take their room.
        title, _, tables = (RESULTS / name / "tables.md").read_text(encoding="utf-8").partition("\n")
        tables = tables.replace("](plots.svg)", f"]({name}-plots.svg)")
        found[f"measured/{name}.md"] = f"---\nhide: [toc]\n---\n\n{title}\n\n{_remarks(name)}{tables}"
    if not result_names():
        found["measured/none.md"] = (
            "# No results yet\n\nTables appear here when `docs/results/` holds the folder of a grid; "
            "[Grids](../grid.md) says how to run one.\n"
        )
    return found


def _remarks(name: str) -> str:
    """Return what the README of the results says about a grid, such as what was required and not reached, or ""."""
    readme = RESULTS / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    section = re.search(rf"^## {re.escape(name)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return f"{section[1].strip()}\n\n---\n\n" if section else ""


def method_page(method: Mapping[str, Any]) -> str:
    """Return the page of a method."""
    name, kind = method["name"], method["kind"]
    headline, _, rest = str(method["text"]).partition("\n")
    parts = [f"# {_title(name)}", f"*{kind.removesuffix('s').capitalize()} `{name}`. Source: {method['paper']}.*"]
    parts += [headline, _paragraphs(rest)]
    if kind == "defenses":
        parts.append(_needs(method))
    parts += [_use(name, kind), _options(method["fields"], kind), _presets(method["presets"]), _measured(name)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _paragraphs(text: str) -> str:
    """Return a docstring's body with its headwords ("Paper:", "Equation 4:") bold, each a paragraph of its own."""
    lines = []
    for line in text.strip().split("\n"):
        head = re.match(r"(Paper|Source|Equations?(?: [\d and]+)?|Formula|Method|Needs to know|Deviations)\b(:?)", line)
        lines.append(f"\n**{head[0]}**{line[head.end() :]}" if head else line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _needs(method: Mapping[str, Any]) -> str:
    lines = ["## What it must know", ""]
    for key, words in (("needs", "needs"), ("uses", "uses where given")):
        for flag in method[key]:
            need = flag.removeprefix("--")
            lines.append(f"- `{flag}`: {FACTS.get(need, need)} ({words})")
    return "\n".join(lines)


def _use(name: str, kind: str) -> str:
    if kind == "defenses":
        needs = [f"{flag} ..." for flag in explanation(name)["needs"]]
        command = f"unbackdoor purify MODEL --defense {name} {' '.join(needs)} --out DIR"
    elif kind == "attacks":
        own = {field["name"] for field in explanation(name)["fields"]}
        ready = " --poisoned ROWS --trigger TEXT --goal GOAL" if "poisoned" in own else ""
        command = f"unbackdoor attack {name} --model MODEL --data DATA{ready} --out DIR"
    elif kind == "guards":
        command = f"unbackdoor serve MODEL --guard {name}"
    else:
        command = f"unbackdoor evaluate MODEL --before MODEL --probes PROBES --metrics {name}"
    return f"## Use\n\n```\n{command}\n```"


def _options(fields: Sequence[Mapping[str, Any]], kind: str) -> str:
    if not fields:
        return ""
    how = "Fields of the class; commands use the defaults." if kind == "metrics" else "Set with `--set NAME=VALUE`."
    lines = ["## Options", "", how, "", "| option | default | meaning |", "|---|---|---|"]
    for field in fields:
        default = "required" if field["required"] else _code(field["default"])
        shown = "" if field["nested"] else default
        lines.append(f"| `{field['name']}` | {shown} | {_cell(field['description'])} |")
    return "\n".join(lines)


def _presets(presets: Mapping[str, Mapping[str, Any]]) -> str:
    if not presets:
        return ""
    lines = ["## Presets", ""]
    for name, settings in presets.items():
        lines.append(f"- `--preset {name}`: {', '.join(f'`{key}` {_code(value)}' for key, value in settings.items())}")
    return "\n".join(lines)


def _measured(name: str) -> str:
    """Return the lines of the committed tables about this method, with those of victim, control and untouched base."""
    parts = []
    for result in result_names():
        for heading, table in _tables((RESULTS / result / "tables.md").read_text(encoding="utf-8")):
            mine = [row for row in table[2:] if _about(row) == name]
            if mine:
                beside = table[0].startswith("| Model |")
                lines = "\n".join(
                    [*table[:2], *(row for row in table[2:] if row in mine or (beside and _is_beside(row)))]
                )
                parts.append(f"### {heading}\n\n{lines}\n\n[all of {result}](../measured/{result}.md)")
    return "## Measured\n\n" + "\n\n".join(parts) if parts else ""


def _tables(markdown: str) -> list[tuple[str, list[str]]]:
    """Return every table of a page with the heading above it."""
    found: list[tuple[str, list[str]]] = []
    heading, table = "", []
    for line in [*markdown.split("\n"), ""]:
        if line.startswith("|"):
            table.append(line)
            continue
        if table:
            found.append((heading, table))
            table = []
        if line.startswith("#"):
            heading = line.lstrip("# ")
    return found


def _about(row: str) -> str:
    """Return the method that a table's row names first, or behind "after", or ""; "SANDE-P" is not "SANDE"."""
    label = re.sub(r"[^a-z0-9]+", "_", row.strip("| ").split("|")[0].lower()).strip("_")
    label = re.sub(r"^(.*_)?after_", "", label)
    known = [name for kind in registry.KINDS for name in registry.names(kind)]
    return max((name for name in known if label == name or label.startswith(f"{name}_")), key=len, default="")


def _is_beside(row: str) -> bool:
    """Tell whether a row is of what every figure is read against."""
    label = row.strip("| ").split("|")[0]
    return label.startswith(("Victim", "Untouched base (reference)")) or "(control)" in label


def knowledge_table(folder: str) -> str:
    """Return the table of what each defense must know.

    Args:
        folder: Where the methods' pages are, for links; "" for none.
    """
    methods = [explanation(name) for name in registry.names("defenses")]
    used = {flag.removeprefix("--") for method in methods for flag in (*method["needs"], *method["uses"])}
    columns = [need.value for need in Need if need.value in used]
    head = " | ".join(f"{FACTS[need]}<br>`--{need}`" for need in columns)
    lines = [f"| defense | {head} |", "|---|" + ":-:|" * len(columns)]
    for method in methods:
        marks = [_mark(method, f"--{need}") for need in columns]
        name = f"[{_title(method['name'])}]({folder}{method['name']}.md)" if folder else f"`{method['name']}`"
        lines.append(f"| {name} | {' | '.join(marks)} |")
    return "\n".join([*lines, "", "● must be given, ○ is used where given."])


def _mark(method: Mapping[str, Any], flag: str) -> str:
    return "●" if flag in method["needs"] else "○" if flag in method["uses"] else ""


def functions() -> str:
    """Return signatures and docstrings of the verbs."""
    parts = []
    for name in ("attack", "purify", "evaluate", "merge"):
        function = getattr(pipeline, name)
        tree = ast.parse(inspect.getsource(function)).body[0]
        assert isinstance(tree, ast.FunctionDef)
        tree.body, doc = [ast.Expr(ast.Constant(...))], inspect.getdoc(function) or ""
        parts.append(f"### {name}\n\n```python\n{_signature(tree)}\n```\n\n{_docstring(doc)}")
    return "\n\n".join(parts)


def _signature(tree: ast.FunctionDef) -> str:
    whole = ast.unparse(tree).removesuffix(":\n    ...")
    return whole.replace("(", "(\n    ", 1).replace(", ", ",\n    ") if len(whole) > 100 else whole


def _docstring(doc: str) -> str:
    """Return a Google docstring as Markdown: sections in bold, entries as lists."""
    lines = []
    for line in doc.split("\n"):
        section = re.fullmatch(r"(Args|Returns|Raises):", line)
        entry = re.match(r" {4}(\w+): ", line)
        if section:
            lines.append(f"**{section[1]}**\n")
        elif entry:
            lines.append(f"- `{entry[1]}`: {line[entry.end() :]}")
        else:
            lines.append(line)
    return "\n".join(lines)


def result_names() -> list[str]:
    """Return the names of the committed results that have tables."""
    return sorted(path.parent.name for path in RESULTS.glob("*/tables.md"))


def _from_top(path: Path) -> str:
    """Return a file of the top folder as a page, its links leading to pages."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".md":
        return f"# {'Licence' if path.name == 'LICENSE' else 'Citation'}\n\n```\n{text.strip()}\n```\n"

    def page(link: re.Match[str]) -> str:
        target = FILES.get(link[2], link[2].removeprefix("docs/"))
        if target == "results/":
            target = f"measured/{(result_names() or ['none'])[0]}.md"
        return f"{link[1]}{target}{link[3]}"

    text = re.sub(r"(\]\()([\w./-]+)((?:#[\w-]+)?\))", page, text)
    return re.sub(r'((?:src|href)=")([\w./-]+)(")', page, text)


def _title(name: str) -> str:
    shown = display_name(name) if name in NAMES or len(name) > 4 else name.upper()
    return shown[0].upper() + shown[1:]


def _code(value: object) -> str:
    return f"`{_cell(json.dumps(value, ensure_ascii=False, default=str))}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> None:
    """Bring the README's table up to date."""
    path = TOP / "README.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(_MARKS[0])
    after = rest.partition(_MARKS[1])[2]
    path.write_text(f"{before}{_MARKS[0]}\n{knowledge_table('')}\n{_MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
