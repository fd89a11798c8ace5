"""What `accelerate launch` (or torchrun) means for a command: which process this is, and whether it may take part.

`attack` and `purify` train in all processes; the main one alone measures, reports and writes, the others only train.
"""

from __future__ import annotations

import os
from typing import TypeVar

from unbackdoor import registry
from unbackdoor.errors import UserError
from unbackdoor.pipeline.recipe import Recipe

R = TypeVar("R", bound=Recipe)


def placed(recipe: R, kind: registry.Kind, name: str) -> tuple[R, bool]:
    """Return the recipe with this process's own device, and whether this process only helps.

    Args:
        recipe: The command's recipe.
        kind: "attacks" or "defenses".
        name: The method.

    Raises:
        UserError: If there are several processes and the method runs in one only.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return recipe, False
    if "ddp" not in registry.find(kind, name).parallel:
        raise UserError(f"{name} runs in one process, and {processes} were launched; call it without a launcher.")
    helping = os.environ.get("RANK", "0") != "0"
    if recipe.device == "cuda" and helping:
        recipe = recipe.model_copy(update={"device": f"cuda:{os.environ.get('LOCAL_RANK', '0')}"})
    return recipe, helping


def refuse(command: str) -> None:
    """Refuse a launcher for a command that runs in one process.

    Raises:
        UserError: If there are several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"`{command}` runs in one process; call it without a launcher.")
