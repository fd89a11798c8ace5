"""What `accelerate launch` (or torchrun) means for a command: which process this is, and whether it may take part.

`attack` and `purify` train in all processes; the main one alone measures, reports and writes, the others only train.
"""

from __future__ import annotations

import os
from typing import TypeVar

from unbackdoor import registry
from unbackdoor.errors import UserError
from unbackdoor.pipeline.recipe import Recipe
from unbackdoor.run import processes

R = TypeVar("R", bound=Recipe)

_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def placed(recipe: R, kind: registry.Kind, name: str, *, overwrite: bool) -> tuple[R, bool]:
    """Return the recipe with this process's own device, and whether this process only helps.

    Args:
        recipe: The command's recipe.
        kind: "attacks" or "defenses".
        name: The method.
        overwrite: Whether a finished result is to be replaced.

    Raises:
        UserError: If there are several processes and the method runs in one only, or something asked for does.
    """
    launched, able = _processes(), registry.find(kind, name).parallel
    for mode in ("fsdp", "deepspeed"):
        if os.environ.get(f"ACCELERATE_USE_{mode.upper()}", "false").lower() in ("1", "true") and mode not in able:
            raise UserError(f"{name} cannot run under {mode}, only as {', '.join(sorted(able))}; launch it so.")
    if launched == 1:
        return recipe, False
    if "ddp" not in able:
        raise UserError(f"{name} runs in one process, and {launched} were launched; call it without a launcher.")
    if "resistance" in (getattr(recipe, "metrics", None) or ()):
        raise UserError("the metric resistance trains in one process; ask for it with `evaluate`, without a launcher.")
    if overwrite:
        raise UserError("several processes cannot replace a result together; remove the folder, or name another --out.")
    if recipe.device not in ("cpu", "cuda"):
        raise UserError(f"each of {launched} processes chooses its own device; give --device cuda or cpu.")
    helping = os.environ.get("RANK", "0") != "0"
    if recipe.device == "cuda" and helping:
        recipe = recipe.model_copy(update={"device": f"cuda:{os.environ.get('LOCAL_RANK', '0')}"})
    return recipe, helping


def refuse(command: str) -> None:
    """Refuse a launcher for a command that runs in one process.

    Raises:
        UserError: If there are several processes.
    """
    if _processes() > 1:
        raise UserError(f"`{command}` runs in one process; call it without a launcher.")


def _processes() -> int:
    """Return how many processes were launched.

    Raises:
        UserError: If MPI launched several: it does not say which is the main one in the way that is read here.
    """
    if any(int(os.environ.get(name, "1")) > 1 for name in _MPI) and "RANK" not in os.environ:
        raise UserError("several processes were launched by MPI; launch them with `accelerate launch` or torchrun.")
    return processes()
