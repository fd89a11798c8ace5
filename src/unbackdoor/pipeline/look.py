"""What can be said without a model: which methods there are, what one is, what an untrusted checkpoint holds.

The catalogue reads the methods' source as text, so that it is quick and imports no torch; an explanation imports the
one method that it explains.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbackdoor import registry
from unbackdoor.errors import UserError, did_you_mean
from unbackdoor.registry import Kind

if TYPE_CHECKING:
    from unbackdoor.method import Method
    from unbackdoor.model.quarantine import Finding

KINDS = (*registry.KINDS, "presets")


def catalogue() -> dict[str, list[dict[str, str]]]:
    """Return for attacks, defenses, guards and metrics: name and first line of each; for presets: name and method."""
    found: dict[str, list[dict[str, str]]] = {}
    presets: list[dict[str, str]] = []
    for kind in registry.KINDS:
        found[kind] = []
        for name in registry.names(kind):
            source = Path(registry.__file__).parent / kind / f"{name}.py"
            if not source.is_file():
                found[kind].append({"name": name, "what": "(plug-in)"})
                continue
            tree = ast.parse(source.read_text(encoding="utf-8"))
            found[kind].append({"name": name, "what": (ast.get_docstring(tree) or "").split("\n")[0]})
            presets += [
                {"name": f"{name} --preset {preset}", "what": f"of the {kind[:-1]}"} for preset in _presets(tree)
            ]
    return {**found, "presets": presets}


def _presets(tree: ast.Module) -> list[str]:
    """Return the keys of the class's `presets`, read from its source."""
    names: list[str] = []
    for node in ast.walk(tree):
        named = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "presets"
        if named and isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict):
            names += [str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)]
    return names


def explanation(name: str) -> dict[str, Any]:
    """Return everything that a method says of itself.

    Raises:
        UserError: If there is no method of that name, with the closest one.
    """
    kind, cls = _find(name)
    import sys

    text = (sys.modules[cls.__module__].__doc__ or cls.__doc__ or "").strip()
    return {
        "name": cls.name(),
        "kind": kind,
        "paper": cls.paper,
        "text": text,
        "needs": _flags(cls, "needs"),
        "uses": _flags(cls, "uses"),
        "parallel": sorted(getattr(cls, "parallel", ())),
        "fields": list(_fields(cls)),
        "presets": {preset: dict(settings) for preset, settings in cls.presets.items()},
    }


def _find(name: str) -> tuple[Kind, type[Method]]:
    if name.endswith(".py"):
        return _kind_of(registry.find("defenses", name))
    wanted = name.replace("-", "_").lower()
    for kind in registry.KINDS:
        if wanted in registry.names(kind):
            return kind, registry.find(kind, wanted)
    known = [other for kind in registry.KINDS for other in registry.names(kind)]
    raise UserError(
        f"there is no method called '{name}'.{did_you_mean(wanted, known)} `unbackdoor list` shows them all."
    )


def _kind_of(cls: type[Method]) -> tuple[Kind, type[Method]]:
    """Return the kind of a class in somebody's own file: the base that it has says so."""
    for kind in registry.KINDS:
        if any(base.__module__ == f"unbackdoor.{kind}.base" for base in cls.__mro__):
            return kind, cls
    raise UserError(
        f"'{cls.__name__}' is neither an Attack nor a Defense, Guard or Metric; derive it from one of them."
    )


def _flags(cls: type[Method], attribute: str) -> list[str]:
    return sorted(f"--{need.value}" for need in getattr(cls, attribute, ()))


def _fields(model: Any, place: str = "") -> list[dict[str, Any]]:
    """Return every setting, nested ones with dotted names."""
    from pydantic import BaseModel

    found: list[dict[str, Any]] = []
    for name, field in model.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        nested = isinstance(default, BaseModel)
        shown = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
        found.append(
            {
                "name": f"{place}{name}",
                "description": field.description or "",
                "required": field.is_required(),
                "default": list(shown) if isinstance(shown, tuple) else shown,
                "nested": nested,
            }
        )
        if nested:
            inner = _fields(type(default), f"{place}{name}.")
            values = default.model_dump(mode="json") if isinstance(default, BaseModel) else {}
            for item in inner:
                key = item["name"].removeprefix(f"{place}{name}.")
                if key in values:
                    item |= {"default": values[key], "required": False}
            found += inner
    return found


def inspect_model(model: str) -> list[Finding]:
    """Return what an untrusted checkpoint holds, the base of an adapter too; nothing of it is run or loaded.

    Raises:
        UserError: If the model's name is not understood or its files cannot be had.
    """
    from unbackdoor.model.quarantine import PICKLE_SUFFIXES, Finding, inspect_folder, inspect_gguf, printable
    from unbackdoor.model.spec import parse_spec

    spec = parse_spec(model)
    found: list[Finding] = []
    for side in (spec.base or spec, spec.adapter):
        if side is None:
            continue
        if side.kind == "gguf":
            found += inspect_gguf(side.path)
            continue
        base = str(spec.base) if side is spec.adapter else None
        folder = _files(side)
        found += inspect_folder(folder, base=base)
        if not any(path.suffix.lower() in {".safetensors", *PICKLE_SUFFIXES} for path in folder.iterdir()):
            fix = "Check the path; a model has model.safetensors or adapter_model.safetensors in its folder."
            found.append(Finding("warning", printable(folder.name), "a folder without weights", fix))
    return found


def _files(side: Any) -> Path:
    from unbackdoor.model.load import local_folder

    return local_folder(side)
