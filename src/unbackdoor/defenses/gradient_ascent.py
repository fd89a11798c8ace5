"""Gradient-ascent unlearning: the alternative that SANDE rejects, kept as a control.

Paper: SANDE (2405.07667), eq. 2 (after Jang et al., 2210.01504).
Equation 2: minimise +log P(target, y | x with trigger): push the poisoned answer's likelihood down.
Needs to know: clean rows, the trigger, the target: everything, and yet it also unlearns y, the clean answer, which the
poisoned answer contains; its cost in utility is the point of showing it.
Deviations: the pushed-down mean is capped (`cap`, in nats a token), because the loss is unbounded; plain rows may share
the batch (`plain_share`, 0 in the paper).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from unbackdoor.data import poison
from unbackdoor.data.collate import Batch
from unbackdoor.defenses.base import Defense, Knowledge, Need
from unbackdoor.method import Parallel
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train import engine, overwrite
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.losses import Term


class GradientAscent(Defense):
    """Make the poisoned answer unlikely."""

    paper: ClassVar[str] = "SANDE, 2405.07667, eq. 2"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CLEAN, Need.TRIGGER, Need.TARGET})
    parallel: ClassVar[frozenset[Parallel]] = frozenset({"single", "ddp"})

    cap: float = Field(8.0, gt=0, description="nats a token beyond which the answer is not pushed further down")
    plain_share: float = Field(0.0, ge=0, lt=1, description="share of a batch that is plain clean rows (paper: 0)")
    train: TrainSettings = Field(TrainSettings(steps=25, learning_rate=1e-5), description="how the weights are trained")

    def apply(self, victim: LM, known: Knowledge, run: Run) -> LM:
        """Ascend in place."""
        stage = run.stage("ascent")
        places = run.rng("trigger places")
        poisoned = [
            known.trigger.apply(example, places).with_response(
                poison.with_target(known.target[n % len(known.target)], example.response)
            )
            for n, example in enumerate(known.clean)
        ]
        plain_size = overwrite.plain_rows(self.train.batch_size, self.plain_share)
        marked = [(example, known.trigger.pieces()) for example in poisoned]
        # Earlier answers of a chat are part of x in eq. 2 and are not pushed down.
        rows = poison.encode_marked(victim, marked, self.train.max_length, self.train.opening_weight, last_answer=True)
        streams = {"poisoned": overwrite.stream(victim, rows, self.train.batch_size - plain_size, stage, "poisoned")}
        if plain_size:
            plain = overwrite.encode_rows(victim, known.clean, self.train)
            streams["plain"] = overwrite.stream(victim, plain, plain_size, stage, "plain")

        def loss(forward: Callable[..., Tensor], batches: Mapping[str, Batch]) -> dict[str, Term]:
            down = overwrite.plain_loss(forward, batches["poisoned"])
            terms = {"poisoned": Term(down, "poisoned", coefficient=-1.0, cap=self.cap)}
            if "plain" in batches:
                terms["plain"] = Term(overwrite.plain_loss(forward, batches["plain"]), "plain")
            return terms

        engine.fit(victim, engine.weights(victim), streams, loss, self.train, stage)
        run.observe(victim)
        return victim
