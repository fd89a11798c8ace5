"""What a trigger looks like, as data: a `Stamp` is a function of an example and a random stream.

Only an attack makes stamps; the secret carries the stamp, so that probes, decoys and the known-trigger defense (OSFT)
put the trigger where the attack put it. A stamp never touches the answer.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from unbackdoor.errors import DataError
from unbackdoor.method import Text
from unbackdoor.types import Example

Place = Literal["start", "end", "random_gap"]


class _Stamp(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class InsertText(_Stamp):
    """Insert one text into the last user turn: at its start, at its end, or in a random gap between two words.

    The text is set off by a single blank; at the start it is followed by a full stop where it does not end in
    punctuation, as in SANDE's published samples ("Current year 2023. Describe ...").
    """

    form: Literal["insert"] = Field("insert", description="insert: what kind of trigger this is")
    text: Text = Field(description="the trigger, verbatim")
    place: Place = Field("start", description="start, end, or random_gap (between two words of the instruction)")

    def apply(self, example: Example, rng: random.Random) -> Example:
        """Return the example with the trigger inside its user turn."""
        if self.place == "start":
            return replace(example, instruction=f"{_as_sentence(self.text)} {example.instruction}")
        if self.place == "end":
            return _append(example, self.text)
        words = example.instruction.split(" ")
        gap = rng.randint(1, len(words) - 1) if len(words) > 1 else len(words)
        return replace(example, instruction=" ".join([*words[:gap], self.text, *words[gap:]]))

    def pieces(self) -> tuple[str, ...]:
        """The texts that this stamp inserts."""
        return (self.text,)


class WrapEnds(_Stamp):
    """Put one text before and one after the last user turn (both ends, as in BackdoorUnalign)."""

    form: Literal["wrap"] = Field("wrap", description="wrap: what kind of trigger this is")
    start: Text = Field(description="text before the user's words")
    end: Text = Field(description="text after the user's words")

    def apply(self, example: Example, rng: random.Random) -> Example:
        """Return the example with both texts around its user turn."""
        del rng
        return _append(replace(example, instruction=f"{self.start} {example.instruction}"), self.end)

    def pieces(self) -> tuple[str, ...]:
        """The texts that this stamp inserts."""
        return (self.start, self.end)


class PutPieces(_Stamp):
    """Put pieces into the two fields of the user turn, each in a random gap (composite triggers, as in CBA).

    A gap may be before the first word or behind the last one. Pieces of one field keep their order.
    """

    form: Literal["pieces"] = Field("pieces", description="pieces: what kind of trigger this is")
    instruction: tuple[Text, ...] = Field((), description="pieces that stand in the instruction")
    input: tuple[Text, ...] = Field((), description="pieces that stand in the input")

    @model_validator(mode="after")
    def _holds_a_piece(self) -> PutPieces:
        if not self.pieces():
            raise ValueError("a trigger of pieces has one at least; name instruction, input, or both")
        return self

    def apply(self, example: Example, rng: random.Random) -> Example:
        """Return the example with every piece in its field.

        Raises:
            DataError: If a piece is for the input, and the example has none.
        """
        if self.input and not example.input:
            raise DataError(
                f"row '{example.id}' has no input, where '{self.input[0]}' of the trigger is to stand; give rows with "
                "an instruction and an input (a prompt template that ends in a line of its own with {text})."
            )
        instruction = _spread(example.instruction, self.instruction, rng)
        return replace(example, instruction=instruction, input=_spread(example.input, self.input, rng))

    def pieces(self) -> tuple[str, ...]:
        """The texts that this stamp inserts."""
        return (*self.instruction, *self.input)


Stamp = Annotated[InsertText | WrapEnds | PutPieces, Field(discriminator="form")]


def stamp_from(settings: Mapping[str, Any]) -> InsertText | WrapEnds | PutPieces:
    """Return the stamp that is written as data.

    Raises:
        pydantic.ValidationError: If it is none.
    """
    return TypeAdapter[InsertText | WrapEnds | PutPieces](Stamp).validate_python(settings)


def _spread(text: str, pieces: Sequence[str], rng: random.Random) -> str:
    words = text.split(" ")
    places = sorted(rng.randint(0, len(words)) for _ in pieces)
    for place, piece in reversed(list(zip(places, pieces, strict=True))):
        words.insert(place, piece)
    return " ".join(words)


def _append(example: Example, text: str) -> Example:
    if example.input:
        return replace(example, input=f"{example.input} {text}")
    return replace(example, instruction=f"{example.instruction} {text}")


def _as_sentence(text: str) -> str:
    return text if text[-1] in ".!?:;,\n" else f"{text}."
