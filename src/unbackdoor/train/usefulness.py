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


@dataclass
class Usefulness:
    """The loss on rows held out, round by round.

    Attributes:
        rows: The rows; none where all rounds are to be done.
        change: Share of the loss by which a round must change it to be followed by another.
        last: The loss after the round before.
    """

    rows: Sequence[Row]
    change: float
    last: float | None = None

    def is_stable(self, lm: LM, stage: Run) -> bool:
        """Tell whether the last round changed the loss by less than `change` of it; False without rows held out."""
        if not self.rows:
            return False
        scored = stage.stage("usefulness")
        record = scored.finished or {"loss": mean_loss(lm, self.rows)}
        scored.finish(record)
        before, self.last = self.last, float(str(record["loss"]))
        return before is not None and abs(self.last - before) < self.change * before
