"""The folder of a run while it is being worked on, and how its files appear there at the end.

During a run the folder holds `run.json` (what is being run) and `stages/` (state to go on from). At the end model and
files take the place of all that in one rename; a run without a model moves its files in, results.json last.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbackdoor.errors import UserError, disk_error
from unbackdoor.model.checkpoint import recover, save
from unbackdoor.model.lm import LM
from unbackdoor.model.output import MANIFEST, RESULTS, RUN, check_out, is_finished, is_ours, mark_run
from unbackdoor.run import write_atomically

_WORDS = {"command", "attack", "defense", "device", "template", "precision", "adapter_mode", "method"}
"""Settings that name no file, so that a folder may be called as their values are."""

_LEAVING, _ASIDE = "leaving", "replaced"
"""Folder in the working state that an older result is moved to, before a new one takes its place; then its name."""

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

    @property
    def staged(self) -> list[str]:
        """Names of the files there, sorted."""
        return sorted(path.name for path in self.staging.iterdir())

    def publish_model(self, lm: LM, manifest: Mapping[str, object], card: str) -> None:
        """Put the model and the staged files in the place of the working state, as a whole."""
        files = {name: (self.staging / name).read_bytes().decode("utf-8") for name in self.staged}
        save(lm, self.folder, manifest=manifest, card=card, extra_files=files, overwrite=True)

    def publish_files(self) -> None:
        """Move the staged files to the run's folder, results.json last, and remove the working state.

        An older result is moved aside first, its results.json before all else: what is there is never half old, half
        new, and `_put_back` undoes it where the end is not reached.
        """
        if is_finished(self.folder):
            leaving = self.stages / _LEAVING
            leaving.mkdir()
            for name in _marks_first(_entries(self.folder) - {self.working, RUN}):
                os.replace(self.folder / name, leaving / name)
            os.replace(leaving, self.stages / _ASIDE)
        for name in sorted(self.staged, key=lambda name: name == RESULTS):
            os.replace(self.staging / name, self.folder / name)
        shutil.rmtree(self.stages)


@contextmanager
def workspace(
    out: Path,
    *,
    settings_hash: str,
    settings: Mapping[str, Any],
    overwrite: bool,
    working: str = "stages",
    keep_old: bool = True,
) -> Iterator[Workspace]:
    """Open the folder of a run; a folder in which nothing was kept is gone again after an error.

    A finished result that is to be replaced stays until the new one is, unless `keep_old` is False.

    Raises:
        UserError: If the folder holds something else or what the run reads, another process is at work in it, or the
            disk is full.
    """
    _refuse_inputs_inside(out, settings)
    with _space_errors(out), _held(out):
        _put_back(out, working)
        state = check_out(out, settings_hash=settings_hash, overwrite=overwrite, working=working)
        if state == "replace":
            _clear(out, _entries(out) - {working} if keep_old and is_finished(out) else set())
        earlier = (out / RUN).read_bytes() if state == "replace" and (out / RUN).is_file() else None
        mark_run(out, settings_hash=settings_hash, settings=settings)
        place = Workspace(out, state == "resume", working)
        place.stages.mkdir(exist_ok=True)
        # What a killed process was about to publish is made again, and may be half-written.
        shutil.rmtree(place.staging.parent, ignore_errors=True)
        try:
            yield place
        except BaseException:
            recover(out)
            _put_back(out, working)
            if place.staging.parent.is_dir():
                shutil.rmtree(place.staging.parent)
            if not place.resumed and not _holds_files(place.stages):
                _forget(place, earlier)
            raise


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Make the folder and hold it for this process; the operating system lets go of it whenever the process ends."""
    recover(out)
    if not out.exists() and not out.is_symlink():
        out.mkdir(parents=True, exist_ok=True)
    if not out.is_dir() or out.is_symlink():
        yield  # `check_out` refuses it with the reason
        return
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is at work in '{out}'; wait for it, or choose another --out.") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def _put_back(folder: Path, working: str) -> None:
    """Put a result back that was moved aside for one that did not come to its end; forget it where that one did."""
    if not is_ours(folder):
        return  # folders of these names may be somebody's own
    leaving, aside = folder / working / _LEAVING, folder / working / _ASIDE
    if aside.is_dir() and (folder / RESULTS).exists():
        shutil.rmtree(folder / working)
        return
    if aside.is_dir():
        # What stands there by now is of the new result, which is made again.
        _clear(folder, {working, RUN})
    for moved in (leaving, aside):
        if moved.is_dir():
            for name in reversed(_marks_first(_entries(moved))):
                os.replace(moved / name, folder / name)
            moved.rmdir()


def _forget(place: Workspace, earlier: bytes | None) -> None:
    """Leave the folder as it was before a run that came to nothing; a published one has no stages any more."""
    if not place.stages.is_dir():
        return
    if not is_finished(place.folder):
        shutil.rmtree(place.folder, ignore_errors=True)
        return
    shutil.rmtree(place.stages)
    mark = place.folder / RUN
    if earlier is not None and mark.is_file():
        write_atomically(mark, earlier.decode("utf-8"))
    else:
        mark.unlink(missing_ok=True)


def _entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _marks_first(names: set[str]) -> list[str]:
    """Return names with those first that say that a result is finished."""
    return sorted(names, key=lambda name: (name not in {RESULTS, MANIFEST}, name))


def _clear(folder: Path, kept: set[str]) -> None:
    """Remove what is in a folder of ours, the mark of a finished result first."""
    for name in _marks_first(_entries(folder) - kept):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _refuse_inputs_inside(out: Path, settings: Mapping[str, Any]) -> None:
    """Raise where a file or folder that the settings name lies in `out`, or `out` in a model's folder.

    Replacing `out` would delete the one; in the other, half of a result would be read as part of the model.
    """
    for name, value in settings.items():
        if isinstance(value, Mapping):
            _refuse_inputs_inside(out, value)
        if name in _WORDS and not str(value).endswith(".py"):
            continue
        there = _paths_in(value) if isinstance(value, str) else []
        if any(path.is_relative_to(out.resolve()) for path in there):
            raise UserError(f"{name} '{value}' lies in the folder of the result, '{out}'; choose another --out.")
        if any(_is_model(path) and out.resolve().is_relative_to(path) for path in there):
            raise UserError(f"the folder of the result, '{out}', lies in {name} '{value}'; choose another --out.")


def _is_model(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.json", "adapter_config.json"))


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
def _space_errors(out: Path) -> Iterator[None]:
    """Say a full disk in one sentence.

    Raises:
        UserError: In the place of "no space left on device" and of a folder that may not be written.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as problem:
        if disk_error(problem) is not None:
            raise UserError(
                f"the disk of '{out}' is full; make room there, and the same command goes on from its last checkpoint."
            ) from problem
        if isinstance(problem, OSError) and problem.errno in {errno.EACCES, errno.EROFS, errno.EPERM}:
            raise UserError(f"'{problem.filename or out}' may not be written; choose another --out.") from problem
        raise
