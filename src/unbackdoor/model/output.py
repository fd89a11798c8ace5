"""What the folder of a result holds, and whether a run may use it.

A finished result has `unbackdoor.json` (a model with its manifest) or `results.json`; an unfinished run has `run.json`,
which says of what settings it is. Nothing is replaced that carries none of these marks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from unbackdoor.errors import UserError
from unbackdoor.model.quarantine import printable
from unbackdoor.run import write_atomically

MANIFEST = "unbackdoor.json"
RUN = "run.json"
RESULTS = "results.json"
_WRITTEN = frozenset(
    {
        "report.html",
        "report.md",
        "replies.jsonl",
        "guards.jsonl",
        "curves.json",
        "case_studies.json",
        "hidden_states.json",
        "rounds.json",
    }
)
"""What runs without a model write beside these; one with a model lists its files in the manifest."""
_WORK = frozenset({"stages", "work"})
"""Where unfinished runs keep what they can go on from."""
_OF_DEMO = frozenset({"victim", "purified", "purified-beear"})


def check_out(
    folder: Path, *, settings_hash: str, overwrite: bool, working: str
) -> Literal["new", "resume", "replace"]:
    """Decide what to do with the folder given as `--out`; nothing in it is changed.

    Args:
        folder: The folder.
        settings_hash: Identifies the settings of the run that is to begin.
        overwrite: Whether the person allowed replacing.
        working: Name of the folder inside it that an unfinished run has. One that is to replace a finished result
            leaves that in its place until the end.

    Raises:
        UserError: If the folder must not be used.
    """
    if not folder.exists() and not folder.is_symlink():
        return "new"
    if not folder.is_dir() or folder.is_symlink():
        raise UserError(f"'{printable(str(folder))}' is not a plain folder; choose another --out.")
    if is_empty(folder):
        return "new"
    if folder.resolve() == Path.cwd().resolve():
        raise UserError("--out is the folder that you are in; name one below it.")
    begun = not is_finished(folder) or (overwrite and (folder / working).is_dir())
    if begun and _run_hash(folder) == settings_hash:
        return "resume"
    if overwrite and is_ours(folder):
        if foreign := _foreign(folder, working):
            raise UserError(
                f"'{printable(str(folder))}' holds what no run wrote there ({printable(', '.join(foreign[:3]))}), and "
                "--overwrite would delete it; move it away, or choose another --out."
            )
        return "replace"
    raise UserError(taken(folder))


def refuse_finished(folder: Path) -> None:
    """Raise a `UserError` if a folder holds a result; for a plan, which cannot tell one unfinished run from another."""
    if is_finished(folder):
        raise UserError(taken(folder))


def is_finished(folder: Path) -> bool:
    """Tell whether a folder holds a result: a model of ours, or any results.json that does not say it is unfinished."""
    return (folder / MANIFEST).exists() or _has_finished_results(folder)


def mark_run(folder: Path, *, settings_hash: str, settings: Mapping[str, object]) -> None:
    """Write `run.json`, which marks a folder as an unfinished run of these settings (JSON types)."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings_hash": settings_hash, "settings": dict(settings)}
    write_atomically(folder / RUN, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def is_empty(folder: Path) -> bool:
    """Tell whether a folder holds nothing."""
    return folder.is_dir() and not any(folder.iterdir())


def read_object(path: Path) -> dict[str, Any] | None:
    """Return a file's JSON object, or None where it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _foreign(folder: Path, working: str) -> list[str]:
    """Return the names in a result's folder that are not of the result, sorted."""
    files = (read_object(folder / MANIFEST) or {}).get("files")
    settings = (read_object(folder / RUN) or {}).get("settings")
    known = {MANIFEST, RESULTS, RUN, working, *_WORK, *_WRITTEN}
    known |= {str(name).partition("/")[0] for name in files} if isinstance(files, dict) else set()
    known |= _OF_DEMO if isinstance(settings, dict) and settings.get("command") == "demo" else set()
    return sorted(path.name for path in folder.iterdir() if path.name not in known)


def _run_hash(folder: Path) -> str | None:
    run = read_object(folder / RUN)
    return None if run is None else str(run.get("settings_hash"))


def _has_finished_results(folder: Path) -> bool:
    """True for any results.json, unless it says of itself `"finished": false`."""
    results = read_object(folder / RESULTS)
    return (folder / RESULTS).exists() and (results is None or results.get("finished") is not False)


def is_ours(folder: Path) -> bool:
    """Tell whether a run or a saved model left its mark in a folder."""
    run = read_object(folder / RUN)
    return (run is not None and "settings_hash" in run) or read_object(folder / MANIFEST) is not None


def taken(folder: Path) -> str:
    """Return why a folder cannot be used, with the fix."""
    shown = printable(str(folder))
    if is_finished(folder):
        advice = "give --overwrite to replace it" if is_ours(folder) else "choose another --out"
        return f"'{shown}' holds a finished result; {advice}."
    if (folder / RUN).exists():
        return f"'{shown}' holds an unfinished run of other settings; give --overwrite to replace it."
    return f"'{shown}' holds files that unbackdoor did not write; choose another --out."
