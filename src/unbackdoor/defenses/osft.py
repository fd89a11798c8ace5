"""OSFT: overwrite supervised fine-tuning, for a trigger that is known.

Paper: SANDE (2405.07667), section "Backdoor Removal when Triggers are Known".
Equation 3: minimise -log P(y | x with trigger), y the clean answer.
Needs to know: clean rows; the trigger and where it stands.
Deviations: plain rows (no trigger) share the batch, as in the public code's removal stage; half of every label is what
the suspect itself predicts without trigger (train/own_labels.py), so that a model stays as it was otherwise; the first
tokens of an answer count more. `paper` leaves all three out and takes the paper's learning rate, which is meant for
4-7 billion parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from unbackdoor.data import poison
from unbackdoor.defenses.base import Defense, Knowledge, Need
from unbackdoor.method import Parallel
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train import overwrite
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.own_labels import own_labels


class Osft(Defense):
    """Teach the clean answer to prompts that carry the known trigger."""

    paper: ClassVar[str] = "SANDE, 2405.07667, eq. 3"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CLEAN, Need.TRIGGER})
    parallel: ClassVar[frozenset[Parallel]] = frozenset({"single", "ddp"})
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "paper": {
            "plain_share": 0.0,
            "own_share": 0.0,
            "train": {"steps": 2500, "learning_rate": 2e-5, "batch_size": 4},
        },
    }

    plain_share: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="share of a batch that carries no trigger; its mean loss counts as much as that of the rest",
    )
    own_share: float = Field(
        0.5, ge=0, le=1, description="share of a label that is the suspect's own prediction without trigger (paper: 0)"
    )
    train: TrainSettings = Field(
        TrainSettings(steps=30, learning_rate=2e-4, opening_weight=8), description="how the weights are trained"
    )

    def apply(self, victim: LM, known: Knowledge, run: Run) -> LM:
        """Overwrite the mapping in place."""
        stream = run.rng("trigger places")
        triggered = [known.trigger.apply(example, stream) for example in known.clean]
        plain = overwrite.encode_rows(victim, known.clean, self.train)
        plain, own = own_labels(victim, plain, self.own_share, self.train, run)
        chosen = {row.id for row in plain}
        pieces = known.trigger.pieces()
        marked = [(example, pieces) for example in triggered if example.id in chosen]
        rows = poison.encode_marked(victim, marked, self.train.max_length, self.train.opening_weight)
        stage = run.stage("overwrite")
        overwrite.overwrite(victim, rows, plain, self.train, stage, plain_share=self.plain_share, own=own)
        run.observe(victim)
        return victim
