"""Plain fine-tuning on clean rows: the control that every defense is compared with.

Paper: SFT in SANDE (2405.07667, Table 1: 94-99.9 % ASR left); fine-tuning in the information-conflict paper.
Equation: eq. 1 on clean pairs only.
Needs to know: clean rows. Nothing about trigger or target, which is why it does not remove the backdoor at moderate
learning rates; at high ones it may, at a price, so its learning rate is swept in the tables.
Deviations: the first tokens of an answer count more, as in the defenses that it is compared with. Labels are the clean
answers alone, while those defenses take half of theirs from the suspect: a reason why this control drifts more.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from unbackdoor.defenses.base import Defense, Knowledge, Need
from unbackdoor.method import Parallel
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train import overwrite
from unbackdoor.train.engine import TrainSettings


class FineTuning(Defense):
    """Train on clean rows and hope."""

    paper: ClassVar[str] = "control: SFT in SANDE, 2405.07667, Table 1"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CLEAN})
    control: ClassVar[bool] = True
    parallel: ClassVar[frozenset[Parallel]] = frozenset({"single", "ddp"})

    train: TrainSettings = Field(
        TrainSettings(steps=30, learning_rate=2e-4, opening_weight=8), description="how the weights are trained"
    )

    def apply(self, victim: LM, known: Knowledge, run: Run) -> LM:
        """Fine-tune the victim in place."""
        rows = overwrite.encode_rows(victim, known.clean, self.train)
        stage = run.stage("fine-tuning")
        overwrite.train_on_rows(victim, rows, self.train, stage)
        run.observe(victim)
        return victim
