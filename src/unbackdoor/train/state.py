"""Keep the state of training on disk: checkpoints in the middle, tensors of finished stages, the best so far.

Everything is safetensors and JSON; nothing is pickled. A stage keeps its files in its own folder. The weights of a
model are large, so only the newest stage that trained them keeps them: a finished stage without a weights file was
followed by another one, whose file holds all that happened before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unbackdoor.run import Run, write_atomically
from unbackdoor.train.together import is_main


def save_finished(run: Run, parameters: Mapping[str, Tensor], record: Mapping[str, object]) -> None:
    """Keep the stage's final tensors and mark it as finished; checkpoints of its middle are removed."""
    if run.folder is None or not is_main():
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    _save(run.folder / "final.safetensors", parameters)
    run.finish(record)
    for name in ("partial.safetensors", "partial.json", "best.safetensors"):
        (run.folder / name).unlink(missing_ok=True)


def restore_finished(run: Run, parameters: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Put a finished stage's tensors back and return its record, or None where it has not finished."""
    record = run.finished
    if record is None or run.folder is None:
        return None
    path = run.folder / "final.safetensors"
    if path.is_file():
        _load(path, parameters)
    return dict(record)


def drop_final(run: Run) -> None:
    """Remove the tensors of a finished stage that a later finished stage has replaced."""
    # Other processes may be ahead of the one that writes.
    if run.folder is not None and is_main():
        (run.folder / "final.safetensors").unlink(missing_ok=True)


class Checkpoints:
    """The checkpoints of one stage: on disk where the run has a folder, else in memory (to go back, not to resume)."""

    def __init__(self, run: Run, parameters: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> None:
        """Attach to the tensors and the optimiser of one call of `fit`."""
        self.folder, self.parameters, self.optimiser = run.folder, parameters, optimiser
        self.memory: dict[str, Tensor] = {}

    def save(self, history: list[dict[str, float]], step: int) -> None:
        """Keep a checkpoint from which `step` (counted from 0) is the next step to do."""
        tensors = {f"weight/{name}": tensor.detach() for name, tensor in self.parameters.items()}
        for index, values in self.optimiser.state_dict()["state"].items():
            tensors.update({f"optimiser/{index}/{key}": value for key, value in values.items()})
        # The step count is inside the tensor file, so that file and count can never disagree.
        tensors["step"] = torch.tensor([step])
        if self.folder is None:
            self.memory = {name: tensor.clone() for name, tensor in tensors.items()}
            return
        if not is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "partial.json", json.dumps(history))
        _save(self.folder / "partial.safetensors", tensors)

    def restore(self, history: list[dict[str, float]]) -> int | None:
        """Put the newest checkpoint back into tensors, optimiser and history; return its next step, or None."""
        tensors = self._read()
        if not tensors:
            return None
        step = int(tensors["step"][0])
        moments: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for name, tensor in self.parameters.items():
                tensor.copy_(tensors[f"weight/{name}"])
        for key, tensor in tensors.items():
            if key.startswith("optimiser/"):
                _, index, name = key.split("/")
                moments.setdefault(int(index), {})[name] = tensor
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})
        if self.folder is not None:
            history[:] = json.loads((self.folder / "partial.json").read_text(encoding="utf-8"))[:step]
        return step

    def _read(self) -> dict[str, Tensor]:
        if self.folder is None:
            return {name: tensor.clone() for name, tensor in self.memory.items()}
        path = self.folder / "partial.safetensors"
        if not path.is_file():
            return {}
        from safetensors.torch import load_file

        return dict(load_file(str(path)))


def save_best(run: Run, parameters: Mapping[str, Tensor]) -> None:
    """Keep the tensors with the best held-out score so far."""
    assert run.folder is not None, "`fit` asks for one"
    if not is_main():
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    _save(run.folder / "best.safetensors", parameters)


def best_of(history: Sequence[Mapping[str, float]]) -> tuple[float, int] | None:
    """Return the best held-out score of the steps done before an interruption, and its step."""
    scored = [(record["held_out"], int(record["step"])) for record in history if "held_out" in record]
    return min(scored, default=None)


def restore_best(run: Run, parameters: Mapping[str, Tensor]) -> None:
    """Put the tensors with the best held-out score back."""
    if run.folder is not None:
        _load(run.folder / "best.safetensors", parameters)


def remove(folder: Path) -> None:
    """Remove all state below `folder`, when the result it led to has been saved."""
    shutil.rmtree(folder, ignore_errors=True)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, str(temporary))
    os.replace(temporary, path)


def _load(path: Path, parameters: Mapping[str, Tensor]) -> None:
    from safetensors import safe_open

    with safe_open(str(path), "pt") as reader, torch.no_grad():
        for name, tensor in parameters.items():
            tensor.copy_(reader.get_tensor(name))
