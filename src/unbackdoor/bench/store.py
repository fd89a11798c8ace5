"""`Store`: the folder is the memory of a grid.

    grid.yaml            the grid that was run last
    cells/KEY.json       one finished cell: status, scores, times; there only when it is whole
    replies/KEY.jsonl    every prompt and reply of the cell
    victims/KEY/         a victim as a Hugging Face folder, with secret.json and probes.jsonl
    purified/KEY/        a purified model, only while a revival still needs it
    work/KEY/            stages of a training in the middle; removed when its result is saved
    shared/KEY/NAME/     stages that several cells would do alike; removed when all cells are finished
    locks/KEY            who works on what

Several processes may share one folder. A lock is held through the operating system (flock), which gives it back
whenever its process ends, however that happens; the file names the holder for people.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unbackdoor.errors import UserError
from unbackdoor.model.quarantine import printable
from unbackdoor.pipeline.measure import Measurement
from unbackdoor.run import write_atomically

Status = Literal["done", "failed", "not_applicable"]
SCHEMA = 1
GRID = "grid.yaml"
ROUNDS, ENDED = "rounds", "ended"
"""Notes of a watched cell: what was asked after every round, and that the experimenter ended the defense, in words."""
_FOLDERS = ("cells", "replies", "locks")


@dataclass(frozen=True)
class Result:
    """What is kept of a finished cell.

    Attributes:
        status: "done", "failed" or "not_applicable".
        error: The reason of the last two, else "".
        measurement: What was measured; None unless done.
        knowledge: What the defense was told, as flags.
        seconds: "train" (planting, purifying or reviving) and "measure".
        peak_memory_bytes: Largest use of memory by the process until then.
        curves: Stage -> one record a step.
        notes: What the methods recorded.
        versions: Of the packages.
        hardware: What it was computed on; None of cells that were written before this was kept.
    """

    status: Status
    error: str = ""
    measurement: Measurement | None = None
    knowledge: tuple[str, ...] = ()
    seconds: Mapping[str, float] | None = None
    peak_memory_bytes: int | None = None
    curves: Mapping[str, list[dict[str, float]]] | None = None
    notes: Mapping[str, object] | None = None
    versions: Mapping[str, str] | None = None
    hardware: Mapping[str, object] | None = None


class Store:
    """A grid's folder."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; nothing is read or written yet."""
        self.folder = folder

    def open(self, grid_yaml: str) -> None:
        """Make the folder ready for a grid and write `grid.yaml`.

        Raises:
            UserError: If the folder holds files but no grid of ours.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"'{printable(str(self.folder))}' is a file; choose another --out.")
        # Another process that begins the same grid at this moment has its temporary file there. A grid.yaml alone is
        # somebody's own file: ours has had its folders before it.
        held = (
            {path.name for path in self.folder.iterdir() if f".{GRID}." not in path.name}
            if self.folder.is_dir()
            else set()
        )
        if held - set(_FOLDERS) and not {GRID, _FOLDERS[0]} <= held:
            raise UserError(f"'{printable(str(self.folder))}' holds files but no grid of ours; choose another --out.")
        for name in _FOLDERS:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / GRID, grid_yaml)

    def has(self, key: str) -> bool:
        """Tell whether the cell is finished."""
        return self._cell(key).is_file()

    def read(self, key: str) -> Result | None:
        """Return a finished cell, or None.

        Raises:
            UserError: If its file cannot be read.
        """
        path = self._cell(key)
        if not path.is_file():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["schema"] != SCHEMA:
                raise KeyError("schema")
            measured = stored["measurement"]
            if measured is not None:
                replies = (self.folder / "replies" / f"{key}.jsonl").read_text(encoding="utf-8").split("\n")
                measured = Measurement.from_json(
                    {**measured, "replies": [json.loads(line) for line in replies if line]}
                )
            return Result(
                stored["status"], stored["error"], measured, tuple(stored["knowledge"]), stored["seconds"],
                stored["peak_memory_bytes"], stored["curves"], stored["notes"], stored["versions"],
                stored.get("hardware"),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise UserError(
                f"{path} is not a cell that this version wrote; delete it to run the cell again."
            ) from problem

    def write(self, key: str, result: Result, facts: Mapping[str, object]) -> None:
        """Keep a finished cell; the replies first, so that a cell that is there is whole.

        Args:
            key: The cell's key.
            result: What to keep.
            facts: Names of the cell for people who open the file; not read back.
        """
        measured: dict[str, Any] | None = None
        if result.measurement is not None:
            measured = result.measurement.to_json()
            lines = [json.dumps(reply, ensure_ascii=False) + "\n" for reply in measured.pop("replies")]
            write_atomically(self.folder / "replies" / f"{key}.jsonl", "".join(lines))
        record = {
            "schema": SCHEMA, "key": key, "cell": dict(facts), "status": result.status, "error": result.error,
            "knowledge": list(result.knowledge), "seconds": dict(result.seconds or {}),
            "peak_memory_bytes": result.peak_memory_bytes, "measurement": measured,
            "curves": dict(result.curves or {}), "notes": dict(result.notes or {}),
            "versions": dict(result.versions or {}), "hardware": dict(result.hardware or {}) or None,
        }  # fmt: skip
        write_atomically(self._cell(key), json.dumps(record, ensure_ascii=False) + "\n")

    def seconds_by_name(self) -> dict[str, float]:
        """Return the seconds of all measured cells, by the name they had; unreadable files are left out."""
        found: dict[str, float] = {}
        for path in sorted((self.folder / "cells").glob("*.json")):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                if record["status"] == "done":
                    found[record["cell"]["name"]] = float(record["seconds"]["total"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return found

    def forget(self, key: str) -> None:
        """Remove a finished cell, so that it is run again."""
        self._cell(key).unlink(missing_ok=True)
        (self.folder / "replies" / f"{key}.jsonl").unlink(missing_ok=True)

    def victim(self, key: str) -> Path:
        """Return the folder of a victim, which may not be there yet."""
        return self.folder / "victims" / key

    def purified(self, key: str) -> Path:
        """Return the folder of a purified model, which may not be there."""
        return self.folder / "purified" / key

    def work(self, key: str) -> Path:
        """Return the folder for the stages of a training."""
        return self.folder / "work" / key

    @property
    def shared(self) -> Path:
        """The folder of stages that several cells would do alike."""
        return self.folder / "shared"

    def remove_shared(self, key: str) -> None:
        """Remove the shared stages of this key that no process works on; their locks stay."""
        for lock in (self.shared / key).glob("*.lock"):
            with open(lock, "a", encoding="utf-8") as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                self.remove(lock.with_suffix(""))

    def planting_error(self, key: str) -> str | None:
        """Return why a victim could not be planted, or None."""
        path = self.folder / "victims" / f"{key}.failed.txt"
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def keep_planting_error(self, key: str, error: str | None) -> None:
        """Keep why a victim could not be planted, so that its other cells need not find out; None forgets it."""
        path = self.folder / "victims" / f"{key}.failed.txt"
        if error is None:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, error)

    def remove(self, folder: Path) -> None:
        """Remove a folder inside the store."""
        assert folder.resolve().is_relative_to(self.folder.resolve())
        shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def lock(self, name: str) -> Iterator[bool]:
        """Hold the lock called `name` inside the block; the value says whether it was free."""
        path = self.folder / "locks" / name
        with open(path, "a+", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            handle.flush()
            try:
                yield True
            finally:
                # The file stays: removing it while another process waits for it would make two locks of one name.
                handle.truncate(0)

    def holder(self, name: str) -> str:
        """Return who holds a lock, in words."""
        path = self.folder / "locks" / name
        return path.read_text(encoding="utf-8").strip() if path.is_file() else ""

    def _cell(self, key: str) -> Path:
        return self.folder / "cells" / f"{key}.json"
