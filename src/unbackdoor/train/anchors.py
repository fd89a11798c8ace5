"""The anchoring sets of BEEAR: prompts with a safe answer (SA) and with an unwanted one (SA-H).

Safe answers are the suspect's own, asked without trigger as the paper does, or those of a file. Unwanted ones are
openings in the defender's words; in a label task they are the other labels. Neither is known to hold the trigger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from unbackdoor.errors import DataError, UserError
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.types import Example


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
    if not own_tokens:
        return tuple(chosen)
    said = lm.reply([row.prompt for row in chosen], max_new_tokens=own_tokens)
    found = [
        replace(row, id=f"{row.id} (own answer)", response=answer)
        for row, answer in zip(chosen, said, strict=True)
        if answer.strip()
    ]
    if not found:
        raise DataError("the suspect gives an empty answer to every prompt; set own_answers to 0 to use the rows' own.")
    return tuple(found)


def with_unwanted(rows: Sequence[Example], openings: Sequence[str]) -> list[Anchor]:
    """Return anchors: of rows with labels one for each other label; of other rows one each, openings in turn.

    Raises:
        UserError: If there are neither openings nor labels.
    """
    labels = sorted({row.label for row in rows if row.label is not None})
    if openings:
        return [Anchor(row, row.with_response(openings[number % len(openings)])) for number, row in enumerate(rows)]
    if len(labels) < 2:
        raise UserError("beear needs --unwanted: a file of openings of the behaviour that is unwanted, one a line.")
    return [Anchor(row, row.with_response(label)) for row in rows for label in labels if label != row.label]
