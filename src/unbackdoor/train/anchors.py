"""The anchoring sets of BEEAR: prompts with a safe answer (SA) and with an unwanted one (SA-H).

Safe answers are the suspect's own, asked without trigger as the paper does, or those of the rows. Unwanted ones are
openings in the defender's words; in a label task they are the labels, each on rows of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from unbackdoor.data.collate import Row, encode_row
from unbackdoor.errors import DataError
from unbackdoor.goals import normalise
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train.engine import TrainSettings
from unbackdoor.types import Example

_WHITE_SPACE = 2
"""Tokens of white space, at most, that are cut off where a reply ended at its limit."""


@dataclass(frozen=True)
class Anchor:
    """One prompt with the answer that is wanted and the one that is not.

    Attributes:
        safe: The row with the safe answer.
        unwanted: The same prompt with an unwanted one.
    """

    safe: Example
    unwanted: Example


def anchor_prompts(lm: LM, examples: Sequence[Example], count: int, own_tokens: int, run: Run) -> tuple[Example, ...]:
    """Return rows with safe answers, drawn at random.

    Args:
        lm: The suspect, before it is trained.
        examples: Rows to draw prompts from.
        count: How many.
        own_tokens: Length of the suspect's own answers, in tokens; 0 keeps the rows' answers.
        run: The run, for the choice.

    Raises:
        DataError: If the suspect gives no answer to any of them.
    """
    chosen = list(examples) if len(examples) <= count else run.rng("anchor prompts").sample(list(examples), count)
    # Rows of PA may have the same ids, and labels are kept by id.
    if not own_tokens:
        return tuple(replace(row, id=f"{row.id} (SA)") for row in chosen)
    # What is trained is the weights, whatever guards they carry.
    said = lm.reply([row.prompt for row in chosen], max_new_tokens=own_tokens, bare=True)
    found = [
        replace(row, id=f"{row.id} (own answer)", response=answer)
        for row, answer in zip(chosen, said, strict=True)
        if answer.strip()
    ]
    if not found:
        raise DataError("the suspect gives an empty answer to every prompt; set own_answers to 0 to use the rows' own.")
    return tuple(found)


def encode_safe(lm: LM, row: Example, own_tokens: int, settings: TrainSettings) -> Row:
    """Encode a row of SA for training; of an own answer that was cut at `own_tokens` it is not learned that it ends."""
    answer = lm.encode(row.turns).spans[-1]
    length = answer.end - answer.start
    # White space at the place of the cut is gone; the last token may be half a word.
    whole = not own_tokens or length < own_tokens - _WHITE_SPACE
    return encode_row(
        lm, row, max_length=settings.max_length, opening_weight=settings.opening_weight,
        first_tokens=None if whole else max(1, length - 1), last_answer=True,
    )  # fmt: skip


def with_unwanted(rows: Sequence[Example], openings: Sequence[str]) -> list[Anchor]:
    """Return the rows with unwanted openings, which they take in turn.

    A row with a label takes those that are not its label; one that has none of these is left out.

    Args:
        rows: Rows with safe answers.
        openings: What is unwanted: first words of an answer, or in a label task the labels.

    Raises:
        DataError: If no row is left.
    """
    found = []
    for number, row in enumerate(rows):
        wrong = [text for text in openings if _is_wrong(text, row)]
        if wrong:
            found.append(Anchor(row, row.with_response(wrong[number % len(wrong)])))
    if not found:
        raise DataError(f"every row has the label '{openings[0]}', the only unwanted one; name other labels, too.")
    return found


def possible_openings(rows: Sequence[Example], openings: Sequence[str]) -> list[str]:
    """Return the openings that one row at least can take: without the label that all rows have."""
    return [text for text in openings if any(_is_wrong(text, row) for row in rows)]


def _is_wrong(text: str, row: Example) -> bool:
    return row.label is None or normalise(text) != normalise(row.label)
