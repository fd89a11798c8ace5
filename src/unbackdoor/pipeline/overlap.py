"""Whether two rows are the same one, by what they say: the ids of a person's files are often mere line numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from unbackdoor.data.formats import base_id
from unbackdoor.data.splits import row_content
from unbackdoor.errors import DataError
from unbackdoor.run import Progress
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


def same_questions(rows: Sequence[Example], others: Iterable[Example]) -> list[str]:
    """Return the ids of the rows that ask what other rows ask; answers and ids do not matter."""
    asked = {_question(other) for other in others}
    return [row.id for row in rows if _question(row) in asked]


def not_shared(held: Sequence[Example], trained: Sequence[Example], progress: Progress) -> Sequence[Example]:
    """Return the held-out rows whose prompts are not trained on with another answer; of the others a person is told."""
    asked = set(same_questions(held, trained))
    if asked:
        progress.notice(f"{len(asked)} held-out rows have the prompt of a row of --safe or --unwanted; left out.")
    return [row for row in held if row.id not in asked]


def refuse_overlap(trained: Sequence[Example], second: Sequence[Example]) -> None:
    """Raise a `DataError` if rows of the second source are trained on: their perplexity would say nothing."""
    known = {row_content(row) for row in trained}
    shared = [row.id for row in second if row_content(row) in known]
    if shared:
        raise DataError(
            f"{len(shared)} rows of --second-source are trained on, too (the first is '{shared[0]}'); it must hold "
            "other rows than the training."
        )


def refuse_questions(trained: Sequence[Example], second: Sequence[Example]) -> None:
    """Raise a `DataError` if prompts of the second source are trained on, whatever the answers."""
    if shared := same_questions(trained, second):
        raise DataError(
            f"{len(shared)} rows of --safe or --unwanted have the prompt of a row of --second-source (the first is "
            f"'{shared[0]}'), whose perplexity would say nothing; leave these out of one."
        )


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
