"""What a trigger looks like, as data: a `Stamp` is a function of an example and a random stream.

Only an attack makes stamps; the secret carries the stamp, so that probes, decoys and the known-trigger defense (OSFT)
put the trigger where the attack put it. A stamp never touches the answer.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

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

    form: Literal["insert"] = "insert"
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

    form: Literal["wrap"] = "wrap"
    start: Text = Field(description="text before the user's words")
    end: Text = Field(description="text after the user's words")

    def apply(self, example: Example, rng: random.Random) -> Example:
        """Return the example with both texts around its user turn."""
        del rng
        return _append(replace(example, instruction=f"{self.start} {example.instruction}"), self.end)

    def pieces(self) -> tuple[str, ...]:
        """The texts that this stamp inserts."""
        return (self.start, self.end)


Stamp = Annotated[InsertText | WrapEnds, Field(discriminator="form")]


def _append(example: Example, text: str) -> Example:
    if example.input:
        return replace(example, input=f"{example.input} {text}")
    return replace(example, instruction=f"{example.instruction} {text}")


def _as_sentence(text: str) -> str:
    return text if text[-1] in ".!?:;,\n" else f"{text}."
