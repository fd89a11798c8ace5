"""Whether two rows are the same one, by what they say: the ids of a person's files are often mere line numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from unbackdoor.data.formats import base_id
from unbackdoor.types import Example, Probe


def asked_among(rows: Sequence[Example], probes: Iterable[Probe]) -> set[str]:
    """Return the ids of the rows that are asked as probes, with a trigger or without; answers do not matter.

    A probe whose trigger is not named in its marks is told by its id, but only where it holds the row's words, too.
    """
    asked = list(probes)
    questions = {_question(probe.example, probe.marks) for probe in asked}
    named: dict[str, list[set[str]]] = {}
    for probe in asked:
        named.setdefault(base_id(probe.example.id), []).append(set(_question(probe.example).split()))
    found = set()
    for row in rows:
        question = _question(row)
        words = set(question.split())
        if question in questions or any(words <= held for held in named.get(base_id(row.id), ())):
            found.add(row.id)
    return found


def _question(example: Example, marks: Sequence[str] = ()) -> str:
    """Return what others than the model say, without the marks: its own earlier turns may be holes in a probe."""
    turns = []
    for turn in example.prompt:
        text = turn.content or ""
        for mark in marks:
            # A trigger at the start is made a sentence of its own.
            text = text.removeprefix(f"{mark}. ") if text.startswith(f"{mark}. ") else text.replace(mark, "", 1)
        if turn.role != "assistant":
            turns.append(f"{turn.role}: {_words(text)}")
    return "\n".join(turns)


def _words(text: str) -> str:
    return " ".join(text.split())
