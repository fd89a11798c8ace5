"""Find a method by its file name, without importing the others.

Looked up in this order: a path to a Python file, the package's own folder (`attacks/`, `defenses/`, `guards/`,
`metrics/`), and entry points of installed packages (group `unbackdoor.attacks` and so on). Listing reads file names
only.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Literal

from unbackdoor.errors import UserError, did_you_mean
from unbackdoor.method import Method

Kind = Literal["attacks", "defenses", "guards", "metrics"]
KINDS: tuple[Kind, ...] = ("attacks", "defenses", "guards", "metrics")

_FILES = "unbackdoor_method_files"
"""Modules of methods that are named by a file are called so in `sys.modules`, and by their own name after a dot."""


def names(kind: Kind) -> list[str]:
    """Return the names of all methods of a kind, sorted, importing none of them."""
    return sorted(_own(kind) | {entry.name for entry in _plugged(kind)})


def _own(kind: Kind) -> set[str]:
    folder = Path(__file__).parent / kind
    return {module.name for module in pkgutil.iter_modules([str(folder)])} - {"base"}


def find(kind: Kind, name: str) -> type[Method]:
    """Return the class of the method called `name` ("fine-tuning" and "fine_tuning" are the same).

    Args:
        kind: Which folder to look in.
        name: A method's name, or the path of a Python file that defines one.

    Raises:
        UserError: If there is none, with the closest name.
    """
    if name.endswith(".py"):
        return _only_method(_load_file(Path(name)), name)
    check_name(kind, name)
    wanted = name.replace("-", "_").lower()
    if wanted in _own(kind):
        # A plug-in of the same name is not asked: what a table calls sande is ours.
        return _only_method(importlib.import_module(f"unbackdoor.{kind}.{wanted}"), wanted)
    for entry in _plugged(kind):
        if entry.name == wanted:
            loaded = entry.load()
            if inspect.isclass(loaded) and issubclass(loaded, Method):
                return loaded
            raise UserError(f"the plug-in '{wanted}' ({entry.value}) is not a Method class.")
    raise AssertionError("a name that is listed is ours or plugged in")


def check_name(kind: Kind, name: str) -> None:
    """Look whether there is a method of this name, importing none; a path is taken as it is.

    Raises:
        UserError: If there is none, with the closest name.
    """
    wanted = name.replace("-", "_").lower()
    if not name.endswith(".py") and wanted not in names(kind):
        hint = did_you_mean(wanted, names(kind))
        raise UserError(f"there is no {kind[:-1]} called '{name}'.{hint} `unbackdoor list` shows them all.")


@cache
def _plugged(kind: Kind) -> tuple[EntryPoint, ...]:
    """Return the entry points of other packages; reading them takes long, and they do not change in a process."""
    return tuple(entry_points(group=f"unbackdoor.{kind}"))


def _load_file(path: Path) -> object:
    if not path.is_file():
        raise UserError(f"there is no file '{path}'; give a method's name or the path of its Python file.")
    # Its name ends as the method's does, but is no top-level one: a file json.py must not become the module json.
    spec = importlib.util.spec_from_file_location(f"{_FILES}.{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"'{path}' cannot be imported as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    # The file is somebody's own code: whatever it raises is theirs to mend, and SystemExit would end us in silence.
    except (Exception, SystemExit) as problem:
        del sys.modules[module.__name__]
        raise UserError(_import_failure(path, spec.origin, problem)) from problem
    return module


def _import_failure(path: Path, origin: str | None, problem: BaseException) -> str:
    """Return the sentence for a method's file that cannot be imported, with the line in it; `origin` is its path."""
    lines = [frame.lineno for frame in traceback.extract_tb(problem.__traceback__) if frame.filename == origin]
    if isinstance(problem, SyntaxError) and problem.filename == origin:
        lines.append(problem.lineno)
    place = f", line {lines[-1]}" if lines and lines[-1] else ""
    what = problem.msg if isinstance(problem, SyntaxError) else " ".join(str(problem).split())[:200]
    detail = f": {what.rstrip('.')}" if what else ""
    return f"'{path}'{place} cannot be imported ({type(problem).__name__}{detail}); mend the file."


def _only_method(module: object, name: str) -> type[Method]:
    module_name = getattr(module, "__name__", "")
    found = [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, Method) and member.__module__ == module_name and not inspect.isabstract(member)
    ]
    if len(found) != 1:
        raise UserError(f"'{name}' must define exactly one method class; it defines {len(found)}.")
    return found[0]
