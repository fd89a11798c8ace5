"""Information conflict: a conflict inside the weights, and evidence outside against what is left of the backdoor.

Paper: information conflicts (2411.18280), the whole of section 3; its Tables 4 and 5 show each part alone.
Equations: those of `internal_conflict` (7 to 12) and then those of `external_conflict` (6, 13 to 16).
Needs to know: clean rows; a source of evidence. Uses a trusted model.
Deviations: those of its two parts.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from unbackdoor.defenses.base import Defense, Knowledge, Need
from unbackdoor.evidence.conflict import EvidenceSettings, guarded
from unbackdoor.method import Parallel
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train.internal import InternalSettings, merged_with_conflict


class InformationConflict(Defense):
    """Merge with a conflict model, and put contradicting evidence before every query."""

    paper: ClassVar[str] = "information conflicts, 2411.18280, section 3"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CLEAN, Need.EVIDENCE})
    uses: ClassVar[frozenset[Need]] = frozenset({Need.REFERENCE})
    merges: ClassVar[bool] = True
    revision: ClassVar[int] = 2  # since a query whose words all weigh little has keywords, too
    parallel: ClassVar[frozenset[Parallel]] = frozenset({"single", "ddp"})

    internal: InternalSettings = Field(InternalSettings(), description="the conflict model and the merge")
    external: EvidenceSettings = Field(EvidenceSettings(), description="how evidence is made and used")

    def apply(self, victim: LM, known: Knowledge, run: Run) -> LM:
        """Merge, then attach the guard."""
        merged = merged_with_conflict(victim, known.clean, known.reference, self.internal, run)
        run.observe(merged)
        return guarded(merged, known.evidence, self.external)
