"""Grids as YAML: a mistake is told with file, line or field, and the closest known name."""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from unbackdoor.bench.grid import Grid, check_methods
from unbackdoor.data.files import decoded
from unbackdoor.data.strict_yaml import YamlMistake, load_yaml
from unbackdoor.errors import UserError, did_you_mean
from unbackdoor.model.quarantine import printable


def read_grid(path: Path) -> Grid:
    """Read and check a grid file.

    Raises:
        UserError: If the file is missing, is not YAML, or a field is wrong; the message names file and field.
    """
    try:
        data = load_yaml(decoded(path))
    except YamlMistake as problem:
        place = f", line {problem.line}" if problem.line is not None else ""
        raise UserError(f"{path}{place}: {printable(problem.what)}; mend the YAML.") from problem
    return grid_from_data(data, str(path))


def grid_from_data(data: object, place: str) -> Grid:
    """Check plain data as a grid.

    Args:
        data: What the YAML file held.
        place: File or name, for errors.

    Raises:
        UserError: With place and field.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{place} holds no fields; write at least name, models and attacks.")
    try:
        grid = Grid.model_validate(dict(data))
    except ValidationError as problem:
        raise UserError(_explained(problem, place)) from problem
    try:
        check_methods(grid)
    except UserError as problem:
        raise UserError(str(problem).replace(f"grid {grid.name}, ", f"{place}, ", 1)) from problem
    return grid


def grid_to_yaml(grid: Grid) -> str:
    """Return the grid as YAML that reads back to an equal grid."""
    return yaml.safe_dump(grid.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def with_overrides(grid: Grid, overrides: Mapping[str, object]) -> Grid:
    """Return the grid with fields replaced, by dotted path ("attacks.default.probes": 20).

    Raises:
        UserError: If a path leads nowhere or a value does not fit.
    """
    data = grid.model_dump(mode="json")
    for path, value in overrides.items():
        *outer, last = path.split(".")
        place: Any = data
        for step in outer:
            place = place.get(step) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise UserError(f"the grid has no field '{path}'; fields: {', '.join(Grid.model_fields)}.")
        place[last] = value
    return grid_from_data(data, f"grid {grid.name}")


def _explained(problem: ValidationError, place: str) -> str:
    """Return the first finding as one sentence with its field."""
    error = problem.errors(include_url=False)[0]
    steps = [str(step) for step in error["loc"]]
    message = error["msg"].removeprefix("Value error, ").rstrip(".")
    if not steps:
        return f"{place}, field {message}."
    field = ".".join(steps)
    if error["type"] == "extra_forbidden":
        known = list(_model_at(steps[:-1]).model_fields)
        hint = did_you_mean(steps[-1], known)
        return f"{place}, field {field}: there is no such field.{hint} Known: {', '.join(known)}."
    if error["type"] == "missing":
        return f"{place}, field {field}: is missing; write it."
    given = printable(repr(error["input"]), 60)
    return f"{place}, field {field}: {message[:1].lower() + message[1:]}; it is {given}."


def _model_at(steps: list[str]) -> type[BaseModel]:
    """Return the class that checks the part of the grid at this path; the grid itself where it cannot be told."""
    found: Any = Grid
    for step in steps:
        if isinstance(found, type) and issubclass(found, BaseModel) and step in found.model_fields:
            found = _inner(found.model_fields[step].annotation)
    return found if isinstance(found, type) and issubclass(found, BaseModel) else Grid


def _inner(annotation: Any) -> Any:
    """Return the model class inside `X | None`, `tuple[X, ...]`, `dict[str, X]` or `Annotated[X, ...]`."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple, dict) or hasattr(annotation, "__metadata__"):
        inner = [_inner(part) for part in get_args(annotation)]
        return next((part for part in inner if isinstance(part, type) and issubclass(part, BaseModel)), None)
    return None
