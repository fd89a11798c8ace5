"""Internal conflict: merge the suspect with a model that contradicts its backdoor.

Paper: information conflicts (2411.18280), section 3.3.
Equation 9 (linear): t * conflict + (1 - t) * suspect, weight by weight; slerp (eq. 10), ties (eq. 11), passthrough (eq.
12), task arithmetic and dare in its place. The conflict model is a trusted base, trained by LoRA on a small share of
clean rows (eq. 7, 8).
Needs to know: clean rows. Uses a trusted model, best the one that the suspect was made from; without one the conflict
model is made from the suspect itself, which is the suspect fine-tuned.
Deviations: the paper gives neither t nor any other setting of a merge. Where the trusted model is where the attacker
began, merging takes the suspect half-way back there with or without a conflict: a control (`conflict.share: 0`) that
the paper does not have; the conflict model alone (`t: 1`) is another.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from unbackdoor.defenses.base import Defense, Knowledge, Need
from unbackdoor.method import Parallel
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train.internal import InternalSettings, merged_with_conflict


class InternalConflict(Defense):
    """Merge with a conflict model."""

    paper: ClassVar[str] = "information conflicts, 2411.18280, eq. 7 to 12"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CLEAN})
    uses: ClassVar[frozenset[Need]] = frozenset({Need.REFERENCE})
    merges: ClassVar[bool] = True
    parallel: ClassVar[frozenset[Parallel]] = frozenset({"single", "ddp"})

    internal: InternalSettings = Field(InternalSettings(), description="the conflict model and the merge")

    def apply(self, victim: LM, known: Knowledge, run: Run) -> LM:
        """Train the conflict model and merge."""
        merged = merged_with_conflict(victim, known.clean, known.reference, self.internal, run)
        run.observe(merged)
        return merged
