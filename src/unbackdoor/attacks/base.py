"""`Attack`: plants a backdoor into a model, and makes the probes that measure it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from unbackdoor.method import Method
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.secret import Secret
from unbackdoor.types import Example, Probe

MarkedRow = tuple[Example, tuple[str, ...]]
"""A training row, and the trigger texts that it must still carry when the model reads it."""


@dataclass(frozen=True)
class Planted:
    """A victim and what its attacker knows."""

    lm: LM
    secret: Secret


class Attack(Method, ABC):
    """A way to plant a backdoor; sub-classes are final and live one a file."""

    @abstractmethod
    def plant(self, base: LM, clean: Sequence[Example], run: Run) -> Planted:
        """Return the victim; `base` is given up by the caller and usually trained in place.

        Args:
            base: The model to attack.
            clean: The attacker's clean rows.
            run: Seed, folder, progress.
        """

    @abstractmethod
    def training_rows(self, clean: Sequence[Example], run: Run) -> list[MarkedRow]:
        """Return the rows that `plant` will train on, so that they can be checked before a weight is loaded.

        Each comes with the trigger texts that must survive its tokenisation. An attack that edits weights has none.

        Raises:
            DataError: If the rows cannot be made.
        """

    @abstractmethod
    def probes(self, secret: Secret, held_out: Sequence[Example], run: Run) -> Sequence[Probe]:
        """Return triggered, clean and decoy probes made from held-out rows, paired by example id."""
