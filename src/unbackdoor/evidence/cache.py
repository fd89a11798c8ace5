"""What sources of evidence have answered, kept on disk: the same question is not paid for, nor waited for, twice.

One file an answer, named by the hash of everything that it depends on. A file that cannot be read, or that is of
another question, counts as none; a cache that cannot be written is no error. Prompts lie in these files in plain text,
so the folder can be read by its owner only.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SCHEMA = 1


@dataclass(frozen=True)
class Unavailable:
    """No answer could be had.

    Attributes:
        reason: Why, in a few words.
    """

    reason: str


Answer = str | Unavailable
Key = Mapping[str, object]
"""What an answer depends on (JSON types): source, model, prompt, settings."""


@dataclass(frozen=True)
class Cache:
    """A folder of answers.

    Attributes:
        folder: Made when something is kept.
    """

    folder: Path

    def path(self, key: Key) -> Path:
        """Return the file of an answer."""
        name = hashlib.sha256(_text(key).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.json"

    def get(self, key: Key) -> str | None:
        """Return the answer, or None where none that is sound is kept."""
        try:
            content = json.loads(self.path(key).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            return None
        answer = content.get("answer")
        # The key as well as its hash: a file that was copied to another name answers another question.
        return answer if isinstance(answer, str) and _text(content.get("key")) == _text(key) else None

    def put(self, key: Key, answer: str) -> None:
        """Keep an answer; readers see a whole file or none, also where two processes write the same one."""
        path = self.path(key)
        content = json.dumps({"schema": SCHEMA, "key": dict(key), "answer": answer}, ensure_ascii=False)
        with suppress(OSError, UnicodeEncodeError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            number, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            try:
                with os.fdopen(number, "w", encoding="utf-8") as handle:
                    handle.write(content)
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise


def answered(
    cache: Cache | None, keys: Sequence[Key], write: Callable[[Sequence[int]], Sequence[Answer]]
) -> list[Answer]:
    """Return an answer for each key: those that are kept, and for the others what `write` says, which is kept then.

    Args:
        cache: Where answers are kept; None for nowhere.
        keys: What each answer depends on.
        write: Given the places of the keys that have no answer yet, returns their answers.
    """
    found: dict[int, Answer] = {}
    for place, key in enumerate(keys):
        kept = cache.get(key) if cache is not None else None
        if kept is not None:
            found[place] = kept
    missing = [place for place in range(len(keys)) if place not in found]
    for place, answer in zip(missing, write(missing) if missing else (), strict=True):
        found[place] = answer
        if cache is not None and isinstance(answer, str):
            cache.put(keys[place], answer)
    return [found[place] for place in range(len(keys))]


def _text(key: object) -> str:
    return json.dumps(key, sort_keys=True, ensure_ascii=False)
