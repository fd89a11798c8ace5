"""Whole experiments as functions: a module with `grid(size) -> Grid` is a recipe, and its name is the recipe's.

`names` only reads files, so that listing recipes imports nothing heavy.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from unbackdoor.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from unbackdoor.bench.grid import Grid

Size = Literal["quick", "paper"]


def names() -> list[str]:
    """Return the names of the recipes, sorted."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if _is_recipe(path))


def load_grid(place: str, size: str | None = None) -> Grid:
    """Return the grid of a recipe, or of a YAML file.

    Args:
        place: A recipe's name, or a file that ends in .yaml or .yml.
        size: "quick" or "paper" (None), of a recipe; a YAML file has one size.

    Raises:
        UserError: If there is no such recipe, file or size, or the grid is wrong.
    """
    from unbackdoor.bench.grid import check_methods
    from unbackdoor.bench.yaml_file import read_grid

    if size not in ("quick", "paper", None):
        raise UserError(f"there is no size '{size}'.{did_you_mean(size, ['quick', 'paper'])} Sizes: quick, paper.")
    if Path(place).suffix.lower() in (".yaml", ".yml"):
        if size is not None:
            raise UserError(f"--size is of a recipe, and '{place}' is a grid of one size; leave it out.")
        return read_grid(Path(place))
    wanted = place.replace("-", "_")
    if wanted not in names():
        hint = did_you_mean(wanted, names())
        raise UserError(f"there is no recipe '{place}'.{hint} Recipes: {', '.join(names())}; or give a .yaml file.")
    module = importlib.import_module(f"unbackdoor.recipes.{wanted}")
    grid: Grid = module.grid(size or "paper")
    check_methods(grid)
    return grid


def _is_recipe(path: Path) -> bool:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(isinstance(node, ast.FunctionDef) and node.name == "grid" for node in body)
