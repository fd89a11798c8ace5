"""Evidence: what contradicts the model's own answer is put before every query (external conflict).

Paper: Information Conflicts (2411.18280), 3.4. The procedure, and what deviates from the paper, is that of
evidence/conflict.py: the model's own evidence is rewritten to contradict its answer, or keywords of the query are
explained.
Needs to know: a source of evidence that the attacker does not write: an endpoint, a local model, or a dictionary. The
suspect itself is a bad source, and so is its base where that is not trusted; both are warned of, by name and by
weights.
Deviations: none but those of the procedure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from unbackdoor.evidence.conflict import EvidenceSettings, contradict
from unbackdoor.evidence.endpoint import same_place
from unbackdoor.evidence.likeness import alike, sample
from unbackdoor.evidence.sources import Asking, Source, open_source
from unbackdoor.guards.base import Guard, Place
from unbackdoor.method import Text
from unbackdoor.model.guard import Ask, PromptGuard, Refusal, Rewritten, Turns
from unbackdoor.model.lm import LM


class Evidence(Guard):
    """Puts contradicting evidence before the query."""

    paper: ClassVar[str] = "Information Conflicts, 2411.18280, 3.4, Algorithm 1, eq. 13 to 16"
    acts_on: ClassVar[Literal["prompt", "decode"]] = "prompt"
    opens: ClassVar[tuple[str, ...]] = ("source",)

    source: Text = Field(description="where evidence comes from: endpoint:URL#MODEL, a model's name, or wordnet")
    conflict: EvidenceSettings = Field(EvidenceSettings(), description="how evidence is made and used")

    def build(self, place: Place) -> PromptGuard:
        """Open the source; a local model is loaded at its first use, or at once where the place says so."""
        # What the clients of a server ask is theirs, and without end.
        kept = self.conflict.cached and not place.serving
        cache = place.cache / "evidence" if place.cache is not None and kept else None
        asking = Asking(
            self.conflict.temperature, self.conflict.timeout, self.conflict.repetitions, cache, place.device
        )

        def opened(lm: LM) -> None:
            if self.source not in (place.model, place.base) and alike(place.weights, sample(lm)):
                place.notice(_ALIKE)

        source = open_source(self.source, asking, opened)
        if self.source == place.model:
            place.notice(_OWN.format("the guarded model itself"))
        elif source.spec.kind == "endpoint" and same_place(source.spec.place, place.model):
            place.notice(_OWN.format("at the guarded server itself"))
        elif place.base is not None and self.source == place.base:
            place.notice(_OWN.format("the guarded model's base"))
        if place.serving and source.load is not None:
            source.load()
        return _Working(source, self.conflict)


_OWN = "the evidence LLM is {}: a backdoor in it writes the evidence, too. Name another model, an endpoint or wordnet."
_ALIKE = (
    "the evidence LLM may be the guarded model's base, or that model under another name, for their weights are alike: "
    "a backdoor in it writes the evidence, too. Name another model, an endpoint or wordnet, unless you trust it."
)


@dataclass(frozen=True)
class _Working:
    """The guard with its source open."""

    source: Source
    settings: EvidenceSettings

    def rewrite(self, conversations: Sequence[Turns], ask: Ask) -> list[Rewritten | Refusal]:
        """Return the conversations with evidence; those without as they were or refused, as the settings say."""
        found: list[Rewritten | Refusal] = []
        for one in contradict(conversations, ask, self.source, self.settings):
            facts = one.facts()
            if one.branch == "none" and self.settings.without == "refuse":
                found.append(Refusal(self.settings.refusal, {**facts, "refused": True}))
            else:
                found.append(Rewritten(one.turns, facts))
        return found
