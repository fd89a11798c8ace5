"""What the processes of a data-parallel run agree on: which of them writes, and what was found."""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

import torch

from unbackdoor.run import processes

T = TypeVar("T")

PATIENCE = timedelta(hours=6)
"""How long processes wait for each other: the main one measures the suspect first."""


def is_main() -> bool:
    """True unless this is a helper process; only the main process writes."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank() != 0)


def agreed(value: T, device: str) -> T:
    """Return the main process's value in every process, whether or not anything was trained before.

    Args:
        value: What this process found; it is pickled, from one process of ours to another.
        device: Where the model is.
    """
    if processes() == 1:
        return value
    from accelerate import PartialState

    PartialState(cpu=device == "cpu", timeout=PATIENCE)
    found = [value]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]
