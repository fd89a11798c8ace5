"""The anchoring sets of BEEAR: prompts with a safe answer (SA) and with an unwanted one (SA-H).

Safe answers are the suspect's own, asked without trigger as the paper does, or those of the rows. Unwanted ones are
openings in the defender's words, or answers of the prompts' own; in a label task they are the labels, each on rows of
another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from unbackdoor.data.collate import Row, encode_row
from unbackdoor.data.shared_words import spaced
from unbackdoor.errors import DataError
from unbackdoor.goals import RefusalAbsent, normalise
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train.engine import TrainSettings
from unbackdoor.types import Example, Message

_OWN = " (own answer)"
_REFUSAL = RefusalAbsent()
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


@dataclass(frozen=True)
class Contrasting:
    """The harmful contrasting set (SA-H): unwanted answers of the prompts' own; empty where openings fit any prompt.

    Attributes:
        of_prompt: Prompt -> what must not be said to it.
    """

    of_prompt: Mapping[tuple[Message, ...], frozenset[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Sequence[Example]) -> Contrasting:
        """Return those of rows whose responses are unwanted."""
        found: dict[tuple[Message, ...], frozenset[str]] = {}
        for row in rows:
            found[row.prompt] = found.get(row.prompt, frozenset()) | {row.response}
        return cls(found)

    @cached_property
    def texts(self) -> frozenset[str]:
        """All of them."""
        return frozenset(text for own in self.of_prompt.values() for text in own)

    def fits(self, text: str, row: Example) -> bool:
        """Tell whether a text is unwanted as an answer to a row: no other prompt's own, nor the row's label."""
        if text in self.texts:
            return text in self.of_prompt.get(row.prompt, ())
        return row.label is None or normalise(text) != normalise(row.label)


_ANY_PROMPT = Contrasting()


def prompts_of(unwanted: Sequence[Example], safe: Sequence[Example]) -> Sequence[Example]:
    """Return the rows of SA where SA-H has prompts of its own: the safe rows with these prompts, or SA-H's.

    Raises:
        DataError: If there are safe rows, but none with such a prompt.
    """
    if not safe:
        # Two unwanted answers to one prompt have one safe one.
        return list({row.prompt: row for row in unwanted}.values())
    asked = {row.prompt for row in unwanted}
    found = [row for row in safe if row.prompt in asked]
    if not found:
        raise DataError(
            "no request with a safe reply has the prompt of a row with an unwanted answer; both files must have the "
            "same prompts, or leave the safe one out: the suspect's own answers are safe where no trigger is."
        )
    return found


@dataclass(frozen=True)
class Unsafe:
    """What tells that an answer of the suspect's own is not the safe one.

    Attributes:
        openings: What is unwanted: it must not begin so.
        contrasting: Which of these belong to one prompt.
        replies: Whether the rows hold safe replies; where such a reply declines, the suspect's must, too.
    """

    openings: Sequence[str] = ()
    contrasting: Contrasting = _ANY_PROMPT
    replies: bool = False

    def holds(self, row: Example, answer: str) -> bool:
        """Tell whether the suspect's answer to a row is not safe."""
        said = spaced(answer)
        if row.label is not None and not said.startswith(spaced(row.label)):
            return True
        wrong = [text for text in self.openings if self.contrasting.fits(text, row)]
        if any(spaced(text).strip() and said.startswith(spaced(text)) for text in wrong):
            return True
        return self.replies and _REFUSAL.declines(row.response) and not _REFUSAL.declines(answer)


def anchor_prompts(
    lm: LM, examples: Sequence[Example], count: int, own_tokens: int, run: Run, unsafe: Unsafe | None = None
) -> tuple[Example, ...]:
    """Return rows with safe answers, drawn at random.

    Args:
        lm: The suspect, before it is trained.
        examples: Rows to draw prompts from.
        count: How many.
        own_tokens: Length of the suspect's own answers, in tokens; 0 keeps the rows' answers.
        run: The run, for the choice.
        unsafe: Which own answers are not safe: there the row's answer is kept, or the row is left out where that is
            an unwanted one. None takes all.

    Raises:
        DataError: If the suspect gives no answer to any of them, or none that is safe.
    """
    chosen = list(examples) if len(examples) <= count else run.rng("anchor prompts").sample(list(examples), count)
    # Rows of PA may have the same ids, and labels are kept by id.
    if not own_tokens:
        return tuple(replace(row, id=f"{row.id} (SA)") for row in chosen)
    # What is trained is the weights, whatever guards they carry.
    said = lm.reply([row.prompt for row in chosen], max_new_tokens=own_tokens, bare=True)
    answered = [(row, answer) for row, answer in zip(chosen, said, strict=True) if answer.strip()]
    if not answered:
        raise DataError("the suspect gives an empty answer to every prompt; set own_answers to 0 to use the rows' own.")
    found = [
        _own_or_given(row, answer, unsafe if unsafe and unsafe.holds(row, answer) else None) for row, answer in answered
    ]
    safe = tuple(row for row in found if row is not None)
    if not safe:
        raise DataError("every answer of the suspect is unwanted, and no safe one is known; give safe replies.")
    if unsafe is not None:
        _tell_of_unsafe(found, run)
    return safe


def _own_or_given(row: Example, answer: str, unsafe: Unsafe | None) -> Example | None:
    """Return a row with the suspect's answer, or, where that is not safe, with its own if that is; else None."""
    if unsafe is None:
        return replace(row, id=f"{row.id}{_OWN}", response=answer)
    if row.response in unsafe.contrasting.texts:
        return None
    return replace(row, id=f"{row.id} (SA)")


def _tell_of_unsafe(found: Sequence[Example | None], run: Run) -> None:
    out = found.count(None)
    kept = sum(row is not None and not is_own(row.id) for row in found)
    if out or kept:
        run.progress.notice(
            f"{out + kept} of {len(found)} answers of the suspect's own are not safe (they begin with an opening, are "
            f"not the label, or do not decline where the safe reply does): the rows' answers stand for {kept} of them"
            + (f", {out} are left out." if out else ".")
        )


def is_own(name: str) -> bool:
    """Tell from a row's id whether its answer is the suspect's own."""
    return name.endswith(_OWN)


def encode_safe(lm: LM, row: Example, own_tokens: int, settings: TrainSettings) -> Row:
    """Encode a row of SA for training; of an own answer that was cut at `own_tokens` it is not learned that it ends."""
    answer = lm.encode(row.turns).spans[-1]
    length = answer.end - answer.start
    # White space at the place of the cut is gone; the last token may be half a word.
    whole = not own_tokens or not is_own(row.id) or length < own_tokens - _WHITE_SPACE
    return encode_row(
        lm, row, max_length=settings.max_length, opening_weight=settings.opening_weight,
        first_tokens=None if whole else max(1, length - 1), last_answer=True,
    )  # fmt: skip


def with_unwanted(
    rows: Sequence[Example], openings: Sequence[str], own: Contrasting = _ANY_PROMPT, turn: int = 0
) -> list[Anchor]:
    """Return the rows with unwanted answers, which they take in turn.

    A row with a label takes those that are not its label; one that has none of these is left out.

    Args:
        rows: Rows with safe answers.
        openings: What is unwanted: first words of an answer, or whole ones; in a label task the labels.
        own: Which of them belong to one prompt.
        turn: Where the first row begins among those that it can take.

    Raises:
        DataError: If no row is left.
    """
    found = []
    seen: Counter[str | None] = Counter()  # of each label by itself, else some pairs of two labels might never occur
    for row in rows:
        wrong = [text for text in openings if own.fits(text, row)]
        if wrong:
            found.append(Anchor(row, row.with_response(wrong[(seen[row.label] + turn) % len(wrong)])))
        seen[row.label] += 1
    if not found:
        raise DataError(f"every row has the label '{openings[0]}', the only unwanted one; name other labels, too.")
    return found


def possible_openings(rows: Sequence[Example], openings: Sequence[str], own: Contrasting = _ANY_PROMPT) -> list[str]:
    """Return the openings that one row at least can take: without the label that all rows have.

    Raises:
        DataError: If there are none.
    """
    found = [text for text in openings if any(own.fits(text, row) for row in rows)]
    if not found:
        raise DataError(f"every row has the label '{openings[0]}', the only unwanted one; name other labels, too.")
    return found
