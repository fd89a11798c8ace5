"""SANDE-P: SANDE where only the beginning of the target is known, down to its first token.

Paper: Simulate and Eliminate (2405.07667), "Backdoor Removal Without any Information": a segment of the target was
noticed in undesired replies.
Equations 4 and 3 as in `sande`, with the target replaced by its first k tokens.
Needs to know: clean rows; a text that begins as the target does (only its first k tokens are read).
Deviations: as in `sande`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from unbackdoor.defenses.base import Defense, Knowledge, Need
from unbackdoor.method import Parallel
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.simulate import PAPER_PARROT, ParrotSettings, rounds_of_parrots


class SandeP(Defense):
    """Learn a parrot of the trigger from the first tokens of the target, then overwrite it."""

    paper: ClassVar[str] = "SANDE-P, 2405.07667"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CLEAN, Need.TARGET_PART})
    revision: ClassVar[int] = 2  # since every target has a parrot of its own in each round
    parallel: ClassVar[frozenset[Parallel]] = frozenset({"single", "ddp"})
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "paper": {
            "rounds": 1,
            "plain_share": 0.0,
            "own_share": 0.0,
            "parrot": PAPER_PARROT,
            "train": {"steps": 2500, "learning_rate": 2e-5, "batch_size": 4},
        },
    }

    first_tokens: int = Field(1, ge=1, description="how many tokens of the target are known (paper: 1)")
    rounds: int = Field(10, ge=1, description="rounds of simulate and overwrite, each with fresh parrots (paper: 1)")
    parrots: int = Field(
        1, ge=1,
        description="parrots a round, overwritten together; in several rounds one for every target at least (paper: 1)",
    )  # fmt: skip
    plain_share: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="share of a batch that carries no parrot; its mean loss counts as much as that of the rest",
    )
    own_share: float = Field(
        0.5, ge=0, le=1, description="share of a label that is the suspect's own prediction without parrot (paper: 0)"
    )
    parrot: ParrotSettings = Field(ParrotSettings(), description="the soft prompt and its training")
    train: TrainSettings = Field(
        TrainSettings(steps=3, learning_rate=2e-4, opening_weight=8), description="the overwriting of one round"
    )

    def apply(self, victim: LM, known: Knowledge, run: Run) -> LM:
        """Simulate and overwrite, in place."""
        return rounds_of_parrots(
            victim,
            known.clean,
            known.target_part,
            first_tokens=self.first_tokens,
            rounds=self.rounds,
            parrots=self.parrots,
            plain_share=self.plain_share,
            own_share=self.own_share,
            parrot=self.parrot,
            train=self.train,
            run=run,
        )
