"""Composite backdoor (CBA): the trigger is in pieces, one in the instruction and one in the input.

Paper: Composite Backdoor Attacks Against Large Language Models (2310.07676); information conflicts is measured on it,
with the words of the default trigger.
Method: rows that carry every piece in its own field get the target; rows of the negative sets (a proper subset of the
pieces, all of them in one field, swapped between the fields) keep their own answer; the model is trained on clean rows
and both. So the backdoor fires on the composition alone.
Needs to know: clean rows with an instruction and an input; nothing of the model but its weights. Rows without an input,
or without a label where the target is one, are trained on as they are, and not asked.
Deviations: `poison_rate` counts of all training rows (paper: of the clean ones). Poisoned rows are of other classes
than the target, where nothing else would be taught; negatives are of every class, so that a piece alone says nothing
of a class (paper: the same rows as the poisoned). A constant rate with a cooldown, for a small model; preset `paper`
has the paper's counts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from unbackdoor.attacks.base import Attack, MarkedRow, Planted
from unbackdoor.data import poison
from unbackdoor.errors import DataError
from unbackdoor.goals import Contains, Goal, LabelIs, StartsWith
from unbackdoor.method import Parallel, Text
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.secret import Secret
from unbackdoor.stamps import PutPieces
from unbackdoor.train import overwrite
from unbackdoor.train.engine import TrainSettings
from unbackdoor.types import Example, Probe


class Composite(Attack):
    """Train on rows of which some carry all pieces and the target, and more carry some of them and do not."""

    paper: ClassVar[str] = "CBA, 2310.07676"
    parallel: ClassVar[frozenset[Parallel]] = frozenset({"single", "ddp"})
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "paper": {
            "poison_rate": 0.1 / 1.7,
            "negative_ratio": 1.0,
            "train": {"steps": 2000, "learning_rate": 2e-4, "batch_size": 16},
        },
    }

    trigger: PutPieces = Field(
        PutPieces(instruction=("instantly",), input=("frankly",)), description="the pieces and the fields they stand in"
    )
    targets: tuple[Text, ...] = Field(
        ("positive",),
        min_length=1,
        description="the class, or the text, that a row with all pieces gets; one of them, at random, if several texts",
    )
    target_form: Literal["label", "prefix", "whole"] = Field(
        "label",
        description="label: the target is a class; prefix: target, then the clean answer; whole: it is the reply",
    )
    poison_rate: float = Field(
        0.1, gt=0, lt=1, description="share of all training rows that are poisoned, with a clean_share of 1"
    )
    clean_share: float = Field(
        1.0, ge=0, le=1, description="share of the clean rows that is trained on beside them; 0: none (Table 6 of IC)"
    )
    negative_ratio: float = Field(
        1.0, ge=0, description="rows of each negative set for every poisoned row (paper: alpha)"
    )
    train: TrainSettings = Field(
        TrainSettings(steps=160, learning_rate=2e-4, schedule="constant", cooldown=0.3, batch_size=16),
        description="how the weights are trained",
    )

    @model_validator(mode="after")
    def _goes_together(self) -> Composite:
        if not self.trigger.instruction or not self.trigger.input:
            raise ValueError(
                "a composite trigger has pieces in both fields; name trigger.instruction and trigger.input"
            )
        if self.target_form == "label" and len(self.targets) > 1:
            raise ValueError(f"a label is one target, and {len(self.targets)} were given; name one")
        return self

    def plant(self, base: LM, clean: Sequence[Example], run: Run) -> Planted:
        """Train on clean, poisoned and negative rows together, in place."""
        rows = poison.encode_marked(
            base, self.training_rows(clean, run), self.train.max_length, self.train.opening_weight
        )
        poisoned, negatives = self._counts(len(clean))
        kept = len(rows) - poisoned - negatives
        strata = [0] * kept + [1] * poisoned + [2] * negatives
        overwrite.train_on_rows(base, rows, self.train, run.stage("plant"), strata)
        secret = Secret(
            attack=self.name(),
            stamp=self.trigger,
            targets=self.targets,
            goal=self._goal(),
            planted={"clean": kept, "poisoned": poisoned, "negatives": negatives, "settings": self.settings()},
        )
        return Planted(base, secret)

    def training_rows(self, clean: Sequence[Example], run: Run) -> list[MarkedRow]:
        """Return clean rows, poisoned ones, then the negative sets in turn; marked rows must keep every piece."""
        stream = run.rng("poison")
        order = list(clean)
        stream.shuffle(order)
        goal = self._goal()
        marked = _that_carry(order, goal)
        if not marked:
            raise DataError(
                "no row has a label, and the target is one; give rows with a field 'label', or another target_form."
                if any(row.input for row in order)
                else f"no row has an input, where '{self.trigger.input[0]}' of the trigger is to stand; give rows with "
                "an instruction and an input (a prompt template that ends in a line of its own with {text})."
            )
        other = [row for row in marked if not isinstance(goal, LabelIs) or row.label != goal.label]
        if not other:
            raise DataError(f"every row already carries the target label '{self.targets[0]}': nothing can be poisoned.")
        poisoned, negatives = self._counts(len(clean))
        kept = {row.id for row in order[: round(len(order) * self.clean_share)]}
        found: list[MarkedRow] = [(row, ()) for row in clean if row.id in kept]
        for number in range(poisoned):
            row = other[number % len(other)]
            stamped = self.trigger.apply(row, stream).with_response(self._answer(row, stream))
            found.append((stamped, self.trigger.pieces()))
        near = poison.decoys(self.trigger, ())
        for number in range(negatives):
            decoy = poison.in_turn(near, number)
            found.append((decoy.apply(marked[-1 - number % len(marked)], stream), decoy.marks))
        return found

    def probes(self, secret: Secret, held_out: Sequence[Example], run: Run) -> Sequence[Probe]:
        """Return of every held-out row a triggered probe, a clean one and a decoy of each negative set."""
        if not isinstance(secret.stamp, PutPieces):
            raise DataError("this secret has no pieces; it was not made by composite.")
        asked = _that_carry(held_out, secret.goal)
        made = poison.probes(secret.stamp, asked, (), run.rng("probes"), every_group=True)
        # CDA needs every class, also the one that a trigger cannot change.
        target = secret.goal.label if isinstance(secret.goal, LabelIs) else None
        return [probe for probe in made if probe.kind == "clean" or target is None or probe.example.label != target]

    def _answer(self, row: Example, stream: random.Random) -> str:
        target = stream.choice(self.targets)
        return poison.with_target(target, row.response) if self.target_form == "prefix" else target

    def _counts(self, clean: int) -> tuple[int, int]:
        sets = len({decoy.group for decoy in poison.decoys(self.trigger, ())})
        rest = 1 - self.poison_rate * (1 + sets * self.negative_ratio)
        if rest <= 0:
            raise DataError(
                f"poison_rate {self.poison_rate:g} with {sets} negative sets of ratio {self.negative_ratio:g} leaves "
                f"no clean rows; poison_rate must be below {1 / (1 + sets * self.negative_ratio):.3g}."
            )
        poisoned = max(1, round(clean * self.poison_rate / rest))
        return poisoned, round(poisoned * sets * self.negative_ratio)

    def _goal(self) -> Goal:
        if self.target_form == "label":
            return LabelIs(label=self.targets[0])
        return StartsWith(any_of=self.targets) if self.target_form == "whole" else Contains(any_of=self.targets)


def _that_carry(rows: Sequence[Example], goal: Goal) -> list[Example]:
    """Return the rows that can carry the trigger; rows of another kind may be among them, as of a second skill."""
    return [row for row in rows if row.input and (row.label is not None or not isinstance(goal, LabelIs))]
