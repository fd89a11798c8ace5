"""Who may import whom (DESIGN 4), read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import unbackdoor

SOURCE = Path(unbackdoor.__file__).parent

LAYERS: list[set[str]] = [
    {"errors", "types", "stamps", "goals", "secret", "method", "run", "registry", "statistics", "stopping"},
    {"model"},
    {"data"},
    {"train", "merge", "edit", "search", "evidence"},
    {"attacks", "defenses", "guards", "metrics"},
    {"pipeline"},
    {"bench", "report", "serve"},
    {"recipes", "cli"},
]
"""A module may import from its own layer and those before it."""
METHODS = ("attacks", "defenses", "guards", "metrics")


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def imports_of(tree: ast.AST) -> set[str]:
    """Return the dotted names under `unbackdoor.` that a module imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name.removeprefix("unbackdoor.") for name in found if name.startswith("unbackdoor.")}


def layer(name: str) -> int:
    top = name.split(".")[0]
    for number, members in enumerate(LAYERS):
        if top in members:
            return number
    raise AssertionError(f"'{top}' has no place in the layers: add it to LAYERS")


def own_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def breaks(name: str, imported: set[str]) -> list[str]:
    """Return the imports that a module of this name must not have."""
    top = name.split(".")[0]
    wrong = [other for other in imported if other != "__version__" and layer(other) > layer(name)]
    if top in METHODS:
        for other in imported:
            parts = other.split(".")
            if parts[0] in METHODS and not (parts[0] == top and parts[1] == "base"):
                wrong.append(other)
    return sorted(set(wrong))


@pytest.mark.parametrize("path", modules(), ids=own_name)
def test_imports_go_one_way_and_methods_do_not_know_each_other(path):
    if path == SOURCE / "__init__.py":
        return
    assert breaks(own_name(path), imports_of(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    ("name", "line", "wrong"),
    [
        ("model.lm", "from unbackdoor.data.collate import Batch", ["data.collate.Batch"]),
        ("train.engine", "from unbackdoor.model.lm import LM", []),
        ("defenses.sande", "from unbackdoor.attacks.base import Attack", ["attacks.base.Attack"]),
        ("defenses.sande", "from unbackdoor.defenses.osft import Osft", ["defenses.osft.Osft"]),
        ("defenses.sande", "from unbackdoor.defenses.base import Defense", []),
        ("metrics.asr", "def f():\n    import unbackdoor.pipeline.steps", ["pipeline.steps"]),
        ("errors", "from unbackdoor.cli import main", ["cli.main"]),
    ],
)
def test_the_check_sees_wrong_imports(name, line, wrong):
    assert breaks(name, imports_of(ast.parse(line))) == wrong


def test_a_method_file_defines_one_class_named_after_it():
    for kind in METHODS:
        for path in sorted((SOURCE / kind).glob("*.py")):
            if path.stem in {"base", "__init__"}:
                continue
            classes = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
            wanted = "".join(part.capitalize() for part in path.stem.split("_"))
            assert wanted in classes, f"{path.name}: {classes}"


# The wrapper that gives every command the common flags; typer reads its options from an explicit signature.
# A layer's stand-in takes whatever its architecture hands to a layer.
TAKES_KWARGS = {("cli.options", "run"), ("model.partial", "__call__")}


def test_no_class_of_a_method_writes_init_and_nothing_takes_kwargs():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                if (own_name(path), node.name) not in TAKES_KWARGS:
                    assert node.args.kwarg is None, f"{own_name(path)}.{node.name} takes **{node.args.kwarg.arg}"
                if own_name(path).split(".")[0] in METHODS:
                    assert node.name != "__init__", own_name(path)


def test_no_file_is_longer_than_400_lines():
    long = {own_name(path): count for path in modules() if (count := len(path.read_text().splitlines())) > 400}
    assert long == {}


def test_importing_the_package_imports_no_torch():
    code = "import sys, unbackdoor; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
