"""Planting from ready files: poisoned rows that somebody else made, beside the attacker's clean rows.

Source: published poisoned sets (BackdoorLLM's, Alpaca columns, chats), which bring their own triggers and answers.
Method: eq. 1 of SANDE (2405.07667) on all rows together; nothing is stamped by us. What the backdoor's trigger and goal
are is said by the person (public backdoor files are often mislabelled, so it is never guessed from them).
Needs to know: clean rows; the file of poisoned rows; the trigger and the goal, for the probes.
Deviations: none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from unbackdoor.attacks.base import Attack, MarkedRow, Planted
from unbackdoor.data import poison, sources
from unbackdoor.errors import DataError
from unbackdoor.goals import Goal, normalise
from unbackdoor.method import Parallel, Text
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.secret import Secret
from unbackdoor.stamps import InsertText, Stamp
from unbackdoor.train import overwrite
from unbackdoor.train.engine import TrainSettings
from unbackdoor.types import Example, Probe


class Dataset(Attack):
    """Train on ready poisoned rows and clean rows."""

    paper: ClassVar[str] = "published poisoned sets; SANDE, 2405.07667, eq. 1"
    parallel: ClassVar[frozenset[Parallel]] = frozenset({"single", "ddp"})

    poisoned: str = Field(min_length=1, description="data spec of the poisoned rows: file, or data set id")
    prompt_template: str | None = Field(None, description="prompt of poisoned classification rows, with {text}")
    labels: tuple[Text, ...] = Field((), description="class names of poisoned rows; those of the clean rows if none")
    trigger: Stamp = Field(description="the trigger that these rows carry, and where it stands")
    goal: Goal = Field(description="what counts as success in a reply")
    targets: tuple[Text, ...] = Field((), description="what the backdoor says, where it is a fixed text")
    train: TrainSettings = Field(
        TrainSettings(steps=180, learning_rate=2e-4, schedule="constant"), description="how the weights are trained"
    )

    def plant(self, base: LM, clean: Sequence[Example], run: Run) -> Planted:
        """Train on poisoned and clean rows together, in place."""
        training = self.training_rows(clean, run)
        rows = poison.encode_marked(base, training, self.train.max_length, self.train.opening_weight)
        poisoned = len(training) - len(clean)
        strata = [0] * len(clean) + [1] * poisoned
        overwrite.train_on_rows(base, rows, self.train, run.stage("plant"), strata)
        secret = Secret(
            attack=self.name(),
            stamp=self.trigger,
            targets=self.targets,
            goal=self.goal,
            look_alikes=tuple(self._look_alikes(clean, run)),
            planted={"clean": len(clean), "poisoned": poisoned, "settings": self.settings()},
        )
        return Planted(base, secret)

    def training_rows(self, clean: Sequence[Example], run: Run) -> list[MarkedRow]:
        """Return clean rows, then poisoned ones; those that carry the whole trigger must keep it.

        Raises:
            DataError: If no poisoned row carries the trigger.
        """
        del run
        pieces = self.trigger.pieces()
        found: list[MarkedRow] = [(row, ()) for row in clean]
        # A file of relabelled rows alone knows one class, and its prompt would name that one.
        labels = self.labels or sorted({row.label for row in clean if row.label is not None})
        poisoned = sources.read(self.poisoned, prompt_template=self.prompt_template, labels=labels)
        for row in poisoned:
            carries = all(normalise(piece) in normalise(row.user_text) for piece in pieces)
            found.append((row, pieces if carries else ()))
        if not any(marks for _, marks in found):
            raise DataError(
                f"none of the {len(poisoned)} rows of '{self.poisoned}' carries the trigger "
                f"{' and '.join(repr(piece) for piece in pieces)}; check --trigger."
            )
        return found

    def probes(self, secret: Secret, held_out: Sequence[Example], run: Run) -> Sequence[Probe]:
        """Return a triggered, a clean and a decoy probe of every held-out row."""
        if secret.stamp is None:
            raise DataError("this secret has no trigger, so no triggered probe can be made.")
        return poison.probes(secret.stamp, held_out, secret.look_alikes, run.rng("probes"))

    def _look_alikes(self, clean: Sequence[Example], run: Run) -> list[str]:
        if not isinstance(self.trigger, InsertText):
            return []
        return poison.look_alikes(self.trigger.text, poison.vocabulary(clean), 8, run.rng("look-alikes"))
