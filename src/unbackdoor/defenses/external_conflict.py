"""External conflict: evidence against the suspect's own answers, put before every query; no weight is changed.

Paper: Information Conflicts (2411.18280), 3.4, Algorithm 1 and equations 6 and 13 to 16.
Equation 6: y = M(x + E). The defense attaches the guard `evidence` to the model; it acts whenever unbackdoor asks the
model, and is saved beside the weights. Other programs that load the folder do not know of it.
Needs to know: a source of evidence (--evidence): an endpoint, a local model, or the dictionary WordNet. Neither the
trigger nor the target nor clean rows.
Deviations: those of the procedure (evidence/conflict.py). It suppresses and does not remove: the paper's own ablation
has it lower an ASR by a few points alone.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from unbackdoor.defenses.base import Defense, Knowledge, Need
from unbackdoor.evidence.conflict import EvidenceSettings, guarded
from unbackdoor.model.lm import LM
from unbackdoor.run import Run


class ExternalConflict(Defense):
    """Attach the guard that puts contradicting evidence before the query."""

    paper: ClassVar[str] = "Information Conflicts, 2411.18280, 3.4, Algorithm 1, eq. 6 and 13 to 16"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.EVIDENCE})
    trains: ClassVar[bool] = False
    revision: ClassVar[int] = 2  # since a query whose words all weigh little has keywords, too

    conflict: EvidenceSettings = Field(EvidenceSettings(), description="how evidence is made and used")

    def apply(self, victim: LM, known: Knowledge, run: Run) -> LM:
        """Return the model with the guard; an earlier guard of this name is replaced."""
        del run
        return guarded(victim, known.evidence, self.conflict)
