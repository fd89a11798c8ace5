"""`Guard`: the settings of what acts when a model is asked, saved as data beside the weights, and `Place`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from unbackdoor.evidence.likeness import Sample
from unbackdoor.method import Method
from unbackdoor.model.guard import DecodeGuard, PromptGuard


def _ignore(sentence: str) -> None:
    del sentence


@dataclass(frozen=True)
class Place:
    """Where a guard is to work.

    Attributes:
        model: The guarded model's name.
        base: Of an adapter, its base's name.
        weights: A sample of the model's weights; empty where it is not in this process.
        device: Where a guard's own models run.
        cache: Folder for what can be asked again, or None for none.
        notice: Told what the person should know, in one sentence.
        serving: A server: a guard's own models are loaded when it is built, so that what is wrong with them shows then,
            and what clients ask is not kept.
    """

    model: str = ""
    base: str | None = None
    weights: Sample = field(default_factory=dict)
    device: str = "cpu"
    cache: Path | None = None
    notice: Callable[[str], None] = _ignore
    serving: bool = False


class Guard(Method, ABC):
    """Settings of a guard; sub-classes are final and live one a file."""

    acts_on: ClassVar[Literal["prompt", "decode"]]
    """Whether it rewrites the prompt, or takes the place of the token loop."""
    opens: ClassVar[tuple[str, ...]] = ()
    """Fields that name a model or another source: what a checkpoint's guards.json says there is not trusted."""

    @abstractmethod
    def build(self, place: Place) -> PromptGuard | DecodeGuard:
        """Return the guard at work; what it needs (models, dictionaries) is opened here or at its first use.

        Raises:
            UserError: If that cannot be had.
        """
