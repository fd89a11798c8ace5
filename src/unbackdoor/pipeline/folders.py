"""The folder of a run while it is being worked on, and how its files appear there at the end.

During a run the folder holds `run.json` (what is being run) and `stages/` (state to go on from). At the end model and
files take the place of all that in one rename; a run without a model moves its files in, results.json last.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbackdoor.errors import UserError
from unbackdoor.model.checkpoint import MANIFEST, RESULTS, check_out, mark_run, recover, save
from unbackdoor.model.lm import LM

_WORDS = {"command", "attack", "defense", "device", "template", "precision", "adapter_mode"}
"""Settings that name no file, so that a folder may be called as their values are."""

Finish = Callable[[Path], None]
"""Given a folder with a run's files, adds what is made from them (the report)."""


@dataclass(frozen=True)
class Workspace:
    """A run's folder.

    Attributes:
        folder: Where the result will be.
        resumed: Whether an earlier execution of the same run left something to go on from.
        working: Name of the folder inside it that holds the working state.
    """

    folder: Path
    resumed: bool
    working: str = "stages"

    @property
    def stages(self) -> Path:
        """Where the run keeps what it can go on from."""
        return self.folder / self.working

    @property
    def staging(self) -> Path:
        """Where files are made before they move to their place; it bears the run's name, which the report shows."""
        return self.stages / "files" / self.folder.absolute().name

    def publish_model(self, lm: LM, manifest: Mapping[str, object], card: str) -> None:
        """Put the model and the staged files in the place of the working state, as a whole."""
        files = {path.name: path.read_bytes().decode("utf-8") for path in sorted(self.staging.iterdir())}
        save(lm, self.folder, manifest=manifest, card=card, extra_files=files, overwrite=True)

    def publish_files(self) -> None:
        """Move the staged files to the run's folder, results.json last, and remove the working state."""
        names = sorted((path.name for path in self.staging.iterdir()), key=lambda name: name == RESULTS)
        for name in names:
            os.replace(self.staging / name, self.folder / name)
        shutil.rmtree(self.stages)


@contextmanager
def workspace(
    out: Path, *, settings_hash: str, settings: Mapping[str, Any], overwrite: bool, working: str = "stages"
) -> Iterator[Workspace]:
    """Open the folder of a run; a folder in which nothing was kept is gone again after an error.

    Raises:
        UserError: If the folder holds something else or what the run reads, or the disk is full.
    """
    _refuse_inputs_inside(out, settings)
    with space_errors(out):
        resumed = check_out(out, settings_hash=settings_hash, overwrite=overwrite) == "resume"
        mark_run(out, settings_hash=settings_hash, settings=settings)
        place = Workspace(out, resumed, working)
        # What a killed process was about to publish is made again, and may be half-written.
        shutil.rmtree(place.staging.parent, ignore_errors=True)
        try:
            yield place
        except BaseException:
            recover(out)
            if place.staging.parent.is_dir():
                shutil.rmtree(place.staging.parent)
            published = any((out / name).is_file() for name in (MANIFEST, RESULTS))
            if not resumed and not published and not _holds_files(place.stages):
                shutil.rmtree(out, ignore_errors=True)
            raise


def _refuse_inputs_inside(out: Path, settings: Mapping[str, Any]) -> None:
    """Raise where a file or folder that the settings name lies in `out`: replacing `out` would delete it."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            _refuse_inputs_inside(out, value)
        if name in _WORDS and not str(value).endswith(".py"):
            continue
        if isinstance(value, str) and any(path.is_relative_to(out.resolve()) for path in _paths_in(value)):
            raise UserError(f"{name} '{value}' lies in the folder of the result, '{out}'; choose another --out.")


def _paths_in(text: str) -> list[Path]:
    """Return what is there on this disk of all that a setting could mean: a path, BASE+ADAPTER, FILE[slice]."""
    whole = [text, text.partition("[")[0]] if text.endswith("]") else [text]
    cuts = [(text[: place.start()], text[place.end() :]) for place in re.finditer(r"\+", text)]
    found = []
    for part in {*whole, *(side for cut in cuts for side in cut)} - {""}:
        try:
            path = Path(part).expanduser()
            if os.path.lexists(path):
                found.append(path.resolve())
        except (OSError, ValueError, RuntimeError):
            continue  # an ordinary text: too long for a name, a zero byte, a user that is not there
    return found


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_file() for path in folder.rglob("*"))


@contextmanager
def space_errors(out: Path) -> Iterator[None]:
    """Say a full disk in one sentence; safetensors reports it as an error of its own.

    Raises:
        UserError: In the place of "no space left on device" and of a folder that may not be written.
    """
    from safetensors import SafetensorError

    full = {errno.ENOSPC, errno.EDQUOT}
    advice = f"the disk of '{out}' is full; make room there, and the same command goes on from its last checkpoint."
    try:
        yield
    except OSError as problem:
        if problem.errno in full:
            raise UserError(advice) from problem
        if problem.errno in {errno.EACCES, errno.EROFS, errno.EPERM}:
            raise UserError(f"'{problem.filename or out}' may not be written; choose another --out.") from problem
        raise
    except SafetensorError as problem:
        if not any(f"os error {code}" in str(problem) for code in full):
            raise
        raise UserError(advice) from problem
