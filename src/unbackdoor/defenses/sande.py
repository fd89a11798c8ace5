"""SANDE: simulate the unknown trigger by a soft parrot prompt, then overwrite what the parrot does.

Paper: Simulate and Eliminate (2405.07667).
Equation 4: learn the parrot p on the frozen model, minimising -log P(target | p, x); equation 3 with p in the place of
the trigger: minimise -log P(y | p, x), y the clean answer, p frozen.
Needs to know: clean rows; the target text (what the backdoor says). Not the trigger, nor where it stands.
Deviations: the default runs many short rounds (30 updates at 2e-4 in all; paper: 2e-5 to 4e-5), each with a fresh
parrot (8 tokens at 1e-2; public code: 6 at 1e-3) that starts at the embeddings of random tokens and is trained until it
makes the model say the target; it keeps plain rows in the batch, and the first tokens of an answer, where the target is
said or not, count more. Half of every label is what the suspect itself predicts without parrot (train/own_labels.py),
so that a model stays as it was otherwise. One parrot is learned and overwritten at places all over the user's words,
because nobody knows where the trigger stands. Of several targets each has a parrot of its own in every round, all
overwritten together; in a single round fewer parrots than targets share them by rows, as in the paper. Preset `paper`
is one round, a parrot of zeros at their start, no plain rows, clean answers alone, and all tokens alike (the public
code puts the parrot at a fixed token index; here the template finds it).
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


class Sande(Defense):
    """Learn a parrot of the trigger from the target text, then overwrite it."""

    paper: ClassVar[str] = "SANDE, 2405.07667, eq. 3 and 4"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CLEAN, Need.TARGET})
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
            known.target,
            first_tokens=None,
            rounds=self.rounds,
            parrots=self.parrots,
            plain_share=self.plain_share,
            own_share=self.own_share,
            parrot=self.parrot,
            train=self.train,
            run=run,
        )
