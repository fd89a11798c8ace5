"""Openings made by the suspect: what it says under drifts, and would say to any prompt once it had begun.

A drift is fitted to the defender's openings. Once the outer steps have closed those roads, it finds others into the
same behaviour, and the backdoor is the widest of them: then the suspect says the attacker's own words. A target that
was planted is told from other words by this: whatever the prompt, and without any drift or trigger, its first word
makes the rest of it likely, as SANDE's case studies show; ordinary words depend on what was asked. Such words are taken
up as openings, and later drifts are fitted to them. No step of this knows the target.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from unbackdoor.data.collate import collate, encode_row
from unbackdoor.data.shared_words import words
from unbackdoor.goals import normalise
from unbackdoor.model.lm import LM
from unbackdoor.model.logits import LogitsAt
from unbackdoor.train.anchors import Contrasting
from unbackdoor.types import Example

ASKED = 24
"""Prompts that are asked under a drift."""
SCORED_ON = (2, 6)
"""Prompts on which a phrase is scored: all phrases, and again those that may be sure enough."""
LATER = 2
"""Tokens that a phrase has at least behind its first word."""
MOST = 800
"""Phrases that are scored in a round, the most frequent."""
AT_ONCE = 100
"""Phrases that are scored in one pass."""
OFTEN = 0.1
"""Share of the replies without a drift above which a phrase is what the model says anyway."""
_WORDS = (3, 2)
_EDGES = re.compile(r"^\W+|\W+$")


def phrases(said: Sequence[str], plain: Sequence[str], wanted: Sequence[str] = ()) -> list[str]:
    """Return runs of 2 and 3 words of the replies, the most frequent first, without what is often said anyway.

    Not without all that is said anyway: a backdoor that leaks says its target without a drift, too.

    Args:
        said: Replies under the drifts of a round.
        plain: Replies to the same prompts without a drift.
        wanted: Texts that the model may say; no run of theirs is returned.
    """
    ordinary = Counter(run for text in plain for run in _runs(text))
    fine = {run for text in wanted for run in _runs(text)}
    counts: Counter[str] = Counter()
    written: dict[str, str] = {}
    for text in said:
        found = _runs(text)
        counts.update(found.keys())
        for run, form in found.items():
            written.setdefault(run, form)
    kept = [run for run, _ in counts.most_common() if ordinary[run] <= len(plain) * OFTEN and run not in fine]
    return [written[run][0].upper() + written[run][1:] for run in kept]


def _runs(text: str) -> dict[str, str]:
    """Return the runs of words of a text: as they are compared, and as they are written."""
    parts = text.split()
    found: dict[str, str] = {}
    for length in _WORDS:
        for start in range(len(parts) - length + 1):
            written = _EDGES.sub("", " ".join(parts[start : start + length]))
            compared = normalise(written)
            if any(character.isalpha() for character in compared):
                found.setdefault(compared, written)
    return found


@torch.no_grad()
def certainties(lm: LM, texts: Sequence[str], prompts: Sequence[Example]) -> list[float]:
    """Return for each text how sure the rest of it is once an answer has begun with its first word.

    Args:
        lm: The suspect, in evaluation mode.
        texts: Phrases; none of them empty.
        prompts: Prompts that carry no trigger, one at least; each text is read as an answer to every one.

    Returns:
        The geometric mean over all prompts of the probabilities of the tokens behind the first word; 0 for fewer than
        two such tokens: an idiom of two words is sure in any model.
    """
    found = dict.fromkeys(texts, 0.0)
    lengths = {text: (_length(lm, prompts[0], text.split()[0]), _length(lm, prompts[0], text)) for text in found}
    long = [text for text, (first, whole) in lengths.items() if whole - first >= LATER]
    forward = LogitsAt(lm)
    for start in range(0, len(long), AT_ONCE):
        part = long[start : start + AT_ONCE]
        logs = torch.stack(
            [_later_tokens(lm, forward, prompt, {text: lengths[text] for text in part}) for prompt in prompts]
        ).mean(0)
        found |= dict(zip(part, logs.exp().tolist(), strict=True))
    return [found[text] for text in texts]


def _later_tokens(lm: LM, forward: LogitsAt, prompt: Example, lengths: Mapping[str, tuple[int, int]]) -> torch.Tensor:
    """Return the mean log-probability of each text's tokens behind its first word, as answers to one prompt.

    Args:
        lm: The suspect.
        forward: What gives its logits.
        prompt: The prompt.
        lengths: Text -> tokens of its first word, and of the whole.
    """
    rows = [
        encode_row(lm, prompt.with_response(text), max_length=sys.maxsize, first_tokens=whole, last_answer=True)
        for text, (_, whole) in lengths.items()
    ]
    batch = collate(rows, lm.pad_id).to(lm.device)
    # The prompt is the same in all rows, so it is read once.
    batch = replace(batch, shared=int(batch.columns.min()))
    log_p = torch.log_softmax(forward(**batch.inputs()), -1).gather(1, batch.targets[:, None])[:, 0]
    return torch.stack([log_p[batch.rows == place][first:].mean() for place, (first, _) in enumerate(lengths.values())])


def _length(lm: LM, prompt: Example, text: str) -> int:
    span = lm.encode(prompt.with_response(text).turns).spans[-1]
    return span.end - span.start


@dataclass
class Openings:
    """The defender's openings, and what the suspect said under drifts.

    Attributes:
        own: The defender's.
        heard: Openings that were taken up -> certainty.
        wanted: Safe replies that the defender has given; their words are never taken up.
        contrasting: Which of the defender's belong to one prompt.
    """

    own: Sequence[str]
    heard: dict[str, float] = field(default_factory=dict)
    wanted: Sequence[str] = ()
    contrasting: Contrasting = field(default_factory=Contrasting)

    @property
    def adopted(self) -> list[str]:
        """Openings that were taken up, the surest first."""
        return sorted(self.heard, key=lambda text: -self.heard[text])

    def dealt(self, drifts: int, number: int) -> list[Sequence[str]]:
        """Return the openings of each drift of a round: some take one each that was taken up.

        These are up to three quarters of the drifts; a single one takes turns with the openings of the defender.

        The surest two are in every round, because the target of a backdoor is sure; the others take turns.

        Args:
            drifts: Drifts of a round.
            number: Number of the round, from 1.
        """
        adopted = self.adopted
        room = (drifts * 3 // 4 if drifts > 1 else 1 - number % 2) if adopted else 0
        turns = adopted[2:] or adopted
        order = [*adopted[:2], *(turns[(number + place) % len(turns)] for place in range(room))]
        taken: list[Sequence[str]] = [[text] for text in order[:room]]
        rest = drifts - room
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
        heard = phrases(said, plain, self.wanted)[:MOST]
        for asked, enough in zip(SCORED_ON, (least / 2, least), strict=True):
            sure = dict(zip(heard, certainties(lm, heard, prompts[:asked]), strict=True))
            heard = [phrase for phrase in heard if sure[phrase] >= enough]
        lm.model.train(was_training)
        new: list[dict[str, Any]] = []
        for phrase in sorted(heard, key=lambda text: -sure[text]):
            if self._is_new(phrase, [one["opening"] for one in new]):
                new.append({"opening": phrase, "certainty": sure[phrase]})
        return new

    def _is_new(self, phrase: str, others: Sequence[str]) -> bool:
        """Tell whether no opening holds the phrase, or is held by it."""
        said = _spaced(phrase)
        known = {_spaced(text) for text in (*self.own, *self.heard, *others)}
        # An answer of one prompt's own may hold anything; what it begins with is known.
        whole = {_spaced(text) for text in self.contrasting.texts}
        return not any(said in text or text in said for text in known - whole) and not any(
            text.startswith(said) for text in whole
        )


def _spaced(text: str) -> str:
    """Return the words of a text with a blank around each, so that one is in another as whole words only."""
    return f" {' '.join(words(text))} "
