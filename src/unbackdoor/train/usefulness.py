"""Stop when usefulness is stable: the rule of BEEAR for a defender who has no trigger to ask with.

The paper looks at MT-Bench; here it is the loss on clean rows that nothing is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unbackdoor.data.collate import Row
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train.overwrite import mean_loss
from unbackdoor.train.together import agreed, is_main


@dataclass
class Usefulness:
    """The loss on rows held out, round by round.

    Attributes:
        rows: The rows; none where all rounds are to be done.
        change: Share of the loss by which a round must change it to be followed by another.
        first: The suspect's own loss.
        last: The loss after the round before.
    """

    rows: Sequence[Row]
    change: float
    first: float = 0.0
    last: float | None = None

    def begin(self, lm: LM, run: Run) -> None:
        """Look at the suspect, before anything is trained."""
        if self.rows:
            self.first = self._loss(lm, run)

    def is_stable(self, lm: LM, stage: Run) -> bool:
        """Tell whether the last round changed the loss by less than `change` of it; False without rows held out.

        Not before the rounds together have changed it by so much: steps that are too small to change anything are
        stable from the first one on.
        """
        if not self.rows:
            return False
        before, self.last = self.last, self._loss(lm, stage)
        moved = abs(self.last - self.first) >= self.change * self.first
        return moved and before is not None and abs(self.last - before) < self.change * before

    def _loss(self, lm: LM, run: Run) -> float:
        scored = run.stage("usefulness")
        record = agreed(scored.finished or {"loss": mean_loss(lm, self.rows)}, run.device)
        if is_main():
            scored.finish(record)
        return float(str(record["loss"]))
