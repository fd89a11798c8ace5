"""`Run`: everything about one execution that is not the method: seed, random streams, device, folder, progress.

Random streams are named: `run.rng("poison")` gives the same numbers whatever other streams were used before, so adding
a draw in one place does not change another. `run.stage("round-1")` names a folder for a piece of work; a stage that
was finished by an earlier, interrupted execution is not done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from unbackdoor.types import content_hash

if TYPE_CHECKING:
    import torch


def processes() -> int:
    """Return how many processes train together, as `accelerate launch` or torchrun tells each of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Progress(Protocol):
    """Where a long piece of work reports how far it is; the command line draws it, the default ignores it."""

    def start(self, name: str, total: int) -> None:
        """A piece of work of `total` steps begins."""
        ...

    def advance(self, name: str, done: int, values: Mapping[str, float]) -> None:
        """`done` steps are finished; `values` are the newest losses."""
        ...

    def finish(self, name: str) -> None:
        """The piece of work has ended."""
        ...

    def notice(self, text: str) -> None:
        """Something that the person should know, in one sentence."""
        ...


class Silent:
    """A `Progress` that shows nothing."""

    def start(self, name: str, total: int) -> None:
        """Ignore."""

    def advance(self, name: str, done: int, values: Mapping[str, float]) -> None:
        """Ignore."""

    def finish(self, name: str) -> None:
        """Ignore."""

    def notice(self, text: str) -> None:
        """Ignore."""


def _ignore(model: object) -> None:
    del model


@dataclass(frozen=True)
class Run:
    """One execution of a method.

    Attributes:
        seed: All randomness derives from it.
        folder: Where stages keep their state, or None to keep none (then nothing can be resumed).
        device: "cpu", "cuda", "cuda:1", "mps", ...
        progress: Where to report.
        observer: Called by a method after each of its rounds; nothing comes back, so a defense cannot see probes.
        prefix: Name of the enclosing stage, "" at the top.
        curves: Filled by the engine: stage name -> one record a step; shared by all sub-runs.
        notes: Filled by methods: facts about this execution to be recorded beside the result; shared by all sub-runs.
        trackers: Names of accelerate trackers ("tensorboard", "wandb") that log the curves too.
        logs: The folder that trackers write into; needed with `trackers`.
        shared: The folder of stages that other runs would do alike, or None to share none.
    """

    seed: int = 0
    folder: Path | None = None
    device: str = "cpu"
    progress: Progress = field(default_factory=Silent)
    observer: Callable[[object], None] = _ignore
    prefix: str = ""
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    notes: dict[str, object] = field(default_factory=dict)
    trackers: tuple[str, ...] = ()
    logs: Path | None = None
    shared: Path | None = None

    def rng(self, name: str) -> random.Random:
        """Return the random stream called `name`, always from its beginning."""
        return random.Random(self.stream_seed(name))

    def generator(self, name: str) -> torch.Generator:
        """Return a torch generator (CPU) for the stream called `name`."""
        import torch

        return torch.Generator().manual_seed(self.stream_seed(name))

    def stream_seed(self, name: str) -> int:
        """Return the 63-bit seed of the stream called `name`."""
        path = f"{self.prefix}/{name}" if self.prefix else name
        digest = hashlib.sha256(f"{self.seed}:{path}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def stage(self, name: str) -> Run:
        """Return the run of a named piece of work inside this one, with its own folder and streams."""
        path = f"{self.prefix}/{name}" if self.prefix else name
        folder = None if self.folder is None else self.folder / name
        return replace(self, prefix=path, folder=folder)

    @contextmanager
    def shared_stage(self, name: str, decides: Callable[[], object]) -> Iterator[Run]:
        """Hold a stage that other runs of a grid would do alike: one does it, the others wait and find it finished.

        Args:
            name: The stage.
            decides: Returns all that its outcome depends on beside its random streams, in types of JSON; asked only
                where stages are shared.
        """
        stage = self.stage(name)
        if self.shared is None:
            yield stage
            return
        import fcntl

        folder = self.shared / f"{name}-{content_hash([stage.stream_seed(''), decides()])}"
        folder.mkdir(parents=True, exist_ok=True)
        # Beside the folder: whoever removes that holds the lock, too.
        with open(folder.with_suffix(".lock"), "a", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.progress.notice(f"Waiting for another process that does the same work ({name}).")
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield replace(stage, folder=folder)

    def observe(self, model: object) -> None:
        """Show the model in its present state to the caller."""
        self.observer(model)

    @property
    def finished(self) -> dict[str, object] | None:
        """What this stage recorded when it finished, or None while it has not."""
        if self.folder is None:
            return None
        path = self.folder / "finished.json"
        if not path.is_file():
            return None
        record: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
        return record

    def finish(self, record: Mapping[str, object]) -> None:
        """Mark this stage as finished and keep `record` (JSON types) with the mark."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "finished.json", json.dumps(dict(record), ensure_ascii=False))


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
