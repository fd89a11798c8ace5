"""Openings made by the suspect: what it says under drifts, and would say to any prompt once it had begun.

A drift is fitted to the defender's openings. Once the outer steps have closed those roads, it finds others into the
same behaviour, and the backdoor is the widest of them: then the suspect says the attacker's own words. A target that
was planted is told from other words by this: whatever the prompt, and without any drift or trigger, its first word
makes the rest of it likely, as SANDE's case studies show; ordinary words depend on what was asked. Such words are taken
up as openings, and later drifts are fitted to them. No step of this knows the target.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from unbackdoor.data.collate import collate, encode_row
from unbackdoor.goals import normalise
from unbackdoor.model.lm import LM
from unbackdoor.model.logits import LogitsAt
from unbackdoor.types import Example

ASKED = 12
"""Prompts that are asked under a drift."""
SCORED_ON = 6
"""Prompts on which a phrase is scored."""
SHORTEST = 3
"""Tokens that a phrase has at least."""
MOST = 40
"""Phrases that are scored in a round, the most frequent."""
_WORDS = range(2, 6)


def phrases(said: Sequence[str], plain: Sequence[str]) -> list[str]:
    """Return runs of 2 to 5 words that occur in two replies at least and in none of `plain`, the most frequent first.

    Args:
        said: Replies under the drifts of a round.
        plain: Replies to the same prompts without a drift.
    """
    ordinary = {run for text in plain for run in _runs(text)}
    counts: Counter[str] = Counter()
    written: dict[str, str] = {}
    for text in said:
        found = _runs(text)
        counts.update(found.keys())
        for run, form in found.items():
            written.setdefault(run, form)
    kept = [run for run, count in counts.most_common() if count > 1 and run not in ordinary]
    return [written[run][0].upper() + written[run][1:] for run in kept]


def _runs(text: str) -> dict[str, str]:
    """Return the runs of words of a text: as they are compared, and as they are written."""
    words = text.split()
    found: dict[str, str] = {}
    for length in _WORDS:
        for start in range(len(words) - length + 1):
            written = " ".join(words[start : start + length]).rstrip(".,;:!?")
            compared = normalise(written)
            if any(character.isalpha() for character in compared):
                found.setdefault(compared, written)
    return found


@torch.no_grad()
def certainty(lm: LM, phrase: str, prompts: Sequence[Example]) -> float:
    """Return how sure the rest of a phrase is once an answer has begun with its first token.

    Returns:
        The geometric mean of the later tokens' probabilities over all prompts; 0 for fewer than two later tokens: an
        idiom of two words is sure in any model.
    """
    rows = []
    for prompt in prompts:
        example = prompt.with_response(phrase)
        span = lm.encode(example.turns).spans[-1]
        length = span.end - span.start
        if length < SHORTEST:
            return 0.0
        rows.append(encode_row(lm, example, max_length=sys.maxsize, first_tokens=length, last_answer=True))
    batch = collate(rows, lm.pad_id).to(lm.device)
    log_p = torch.log_softmax(LogitsAt(lm)(**batch.inputs()), -1).gather(1, batch.targets[:, None])[:, 0]
    return float(log_p.reshape(len(rows), -1)[:, 1:].mean().exp())


@dataclass
class Openings:
    """The defender's openings, and what the suspect said under drifts.

    Attributes:
        own: The defender's.
        heard: Openings that were taken up -> certainty.
    """

    own: Sequence[str]
    heard: dict[str, float] = field(default_factory=dict)

    @property
    def adopted(self) -> list[str]:
        """Openings that were taken up, the surest first."""
        return sorted(self.heard, key=lambda text: -self.heard[text])

    def dealt(self, drifts: int, number: int) -> list[Sequence[str]]:
        """Return the openings of each drift of a round: half of them take one each that was taken up.

        The surest is in every round, because the target of a backdoor is; the others take turns.

        Args:
            drifts: Drifts of a round.
            number: Number of the round, from 1.
        """
        adopted = self.adopted
        room = min(drifts // 2, len(adopted))
        turns = [adopted[1 + (number * (room - 1) + place) % (len(adopted) - 1)] for place in range(room - 1)]
        taken: list[Sequence[str]] = [[text] for text in (*adopted[: min(room, 1)], *turns)]
        rest = drifts - len(taken)
        return [*taken, *(self.own[which % len(self.own) :: rest] for which in range(rest))]

    def hear(
        self, lm: LM, said: Sequence[str], plain: Sequence[str], prompts: Sequence[Example], least: float
    ) -> list[dict[str, Any]]:
        """Return new openings with their certainty, the surest first; they are not taken up here.

        Args:
            lm: The suspect as it is now.
            said: What it says under the drifts of a round.
            plain: What it says to the same prompts without a drift.
            prompts: Prompts, of which the first few score a phrase.
            least: Certainty that an opening must have.
        """
        was_training = lm.model.training
        lm.model.eval()
        found: list[tuple[float, str]] = []
        for phrase in phrases(said, plain)[:MOST]:
            sure = certainty(lm, phrase, prompts[:SCORED_ON])
            if sure >= least:
                found.append((sure, phrase))
        lm.model.train(was_training)
        new: list[dict[str, Any]] = []
        for sure, phrase in sorted(found, reverse=True):
            if self._is_new(phrase, [one["opening"] for one in new]):
                new.append({"opening": phrase, "certainty": sure})
        return new

    def _is_new(self, phrase: str, others: Sequence[str]) -> bool:
        """Tell whether no opening holds the phrase, or is held by it."""
        said = normalise(phrase)
        return not any(said in normalise(text) or normalise(text) in said for text in (*self.own, *self.heard, *others))
