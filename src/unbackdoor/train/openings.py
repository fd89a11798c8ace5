"""Openings made by the suspect: what it says under drifts, and would say to any prompt once it had begun.

A drift is fitted to the defender's openings. Once the outer steps have closed those roads, it finds others into the
same behaviour, and the backdoor is the widest of them: then the suspect says the attacker's own words, or is at least
likelier to begin as they do. So the first tokens that are likely under a drift, and without one, are followed, too.

A target that was planted is told from other words by this: whatever the prompt, and without any drift or trigger, its
first word makes the rest of it likely, as SANDE's case studies show; ordinary words depend on what was asked, and the
words of idioms ("Out of the") are likely anywhere. A target whose first word is a usual one ("You lazy potato") is less
sure, but recurs under the drifts. Such words are taken up as openings, and later drifts are fitted to them. No step of
this knows the target.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from unbackdoor.data.collate import collate, encode_row
from unbackdoor.data.shared_words import words
from unbackdoor.goals import normalise
from unbackdoor.model.generate import decode, greedy_ids
from unbackdoor.model.lm import LM
from unbackdoor.model.logits import LogitsAt
from unbackdoor.train.anchors import Contrasting
from unbackdoor.types import Example

ASKED = 24
"""Prompts that are asked under a drift."""
SCORED_ON = ((1, 0.05), (3, 0.4), (6, 1.0))
"""Prompts on which phrases are scored, and the share of the certainty asked for that they must have there to stay;
their evidence must be whole each time."""
LATER = 2
"""Tokens that a phrase has at least behind its first word."""
MOST = 400
"""Phrases of replies that are scored in a round, the most frequent."""
FOLLOWED, ON = 32, 4
"""First tokens of an answer, the likeliest under each drift and without, that are followed; and how many tokens on."""
FOLLOWED_ON = 1
"""Prompts on which they are followed: what is sure enough to be taken up shows on any."""
FOLLOWED_SURE = 0.8
"""Certainty that what they go on to must have: there are many of them, and nothing says that they are unwanted."""
RECURRING, RECURRING_SURE = 0.05, 0.1
"""Share of the replies under the drifts, above that without, from which on a phrase needs this certainty only; it must
be in two of them at least."""
AT_ONCE = 100
"""Phrases that are scored in one pass."""
EVIDENCE = 8.0
"""Nats that an opening must have: so much likelier than anywhere are its words behind the first, together."""
USUAL_IN, USUAL_TOKENS = 8, 40
"""Rows on which it is measured how likely tokens are anywhere, and first tokens of their answers that count there."""
_LEAST = 1e-12
OFTEN = 0.1
"""Share of the replies without a drift above which a phrase is what the model says anyway."""
_WORDS = (3, 2)
_ENDS = re.compile(r"[.!?][^\w\s]*$")


def phrases(said: Sequence[str], plain: Sequence[str], wanted: Sequence[str] = ()) -> dict[str, float]:
    """Return runs of 2 and 3 words of the replies, the most frequent first, without what is often said anyway.

    Not without all that is said anyway: a backdoor that leaks says its target without a drift, too.

    Args:
        said: Replies under the drifts of a round.
        plain: Replies to the same prompts without a drift.
        wanted: Texts that the model may say; no run of theirs is returned.

    Returns:
        Run -> the share of the replies that hold it, less that of the replies without a drift.
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
    more = {run: counts[run] / len(said) - ordinary[run] / max(1, len(plain)) for run in kept}
    return {written[run][0].upper() + written[run][1:]: share for run, share in more.items()}


def _runs(text: str) -> dict[str, str]:
    """Return the runs of words within a line and a sentence of a text: as they are compared, and as they are written.

    A full stop ends a sentence here, that of "Mr." too.
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        parts = line.split()
        for length in _WORDS:
            for start in range(len(parts) - length + 1):
                run = parts[start : start + length]
                written = _without_marks(" ".join(run))
                compared = normalise(written)
                if any(character.isalpha() for character in compared) and not any(map(_ENDS.search, run[:-1])):
                    found.setdefault(compared, written)
    return found


def _without_marks(text: str) -> str:
    """Return a text without marks and blanks at its ends; signs that belong to a letter (Hindi vowels) stay."""
    inside = [place for place, character in enumerate(text) if unicodedata.category(character)[0] in "LMN"]
    return text[inside[0] : inside[-1] + 1] if inside else ""


@torch.inference_mode()
def begun(lm: LM, firsts: Sequence[torch.Tensor], prompts: Sequence[Example]) -> list[str]:
    """Return what answers go on to, greedily and without a drift, from first tokens that are likely under one.

    Args:
        lm: The suspect.
        firsts: float32 [vocabulary] each, probabilities of the first token.
        prompts: Prompts, of which the first few are answered.
    """
    stops = set(lm.stop_ids)
    likely = (token for first in firsts for token in first.topk(min(FOLLOWED, len(first))).indices.tolist())
    tokens = list(dict.fromkeys(token for token in likely if token not in stops))
    found = []
    for prompt in prompts[:FOLLOWED_ON]:
        asked = lm.encode(prompt.prompt, ask=True).ids
        ways = greedy_ids(lm, [[*asked, token] for token in tokens], max_new_tokens=ON, batch_size=AT_ONCE)
        found += [decode(lm, [token, *way]) for token, way in zip(tokens, ways, strict=True)]
    return found


@torch.no_grad()
def usual(lm: LM, prompts: Sequence[Example]) -> torch.Tensor:
    """Return how likely each token is anywhere: float32 [vocabulary], log of its mean probability.

    That is the mean over what the user says, too, because answers may be one word long, and one of few may be a leak.

    Args:
        lm: The suspect, in evaluation mode.
        prompts: Rows with answers, one at least; of these the first `USUAL_TOKENS` tokens count.
    """
    forward = LogitsAt(lm)
    total, count = torch.zeros((), device=lm.device), 0
    for prompt in prompts:
        row = encode_row(lm, prompt, max_length=sys.maxsize, first_tokens=USUAL_TOKENS, last_answer=True)
        row = replace(row, supervised=tuple(range(row.place[0], len(row.ids))), weights=())
        likely = torch.softmax(forward(**collate([row], lm.pad_id).to(lm.device).inputs()), -1)
        total, count = total + likely.sum(0), count + len(likely)
    return (total / count).clamp(min=_LEAST).log()


@dataclass(frozen=True)
class Sure:
    """How sure the rest of a phrase is once an answer has begun with its first word.

    Attributes:
        certainty: The geometric mean of the probabilities of the tokens behind the first word, averaged over the
            prompts; 0 for fewer than two such tokens: an idiom of two words is sure in any model. A target that begins
            with a usual word ("You") is sure on some prompts only.
        evidence: How much likelier these tokens are than anywhere (`usual`): the sum of the logarithms, in nats.
    """

    certainty: float
    evidence: float


def weight(heard: Mapping[str, Any]) -> float:
    """Return what openings that were heard are ranked by: the target is sure, or often said under the drifts.

    Words of no consequence ("Out of the") are both, too, but likely anywhere.

    Args:
        heard: What `Openings.hear` tells of one.
    """
    # A run that the version before began told no share.
    found: float = (heard["certainty"] + heard.get("share", 0.0)) * heard["evidence"]
    return found


@torch.no_grad()
def certainties(lm: LM, texts: Sequence[str], prompts: Sequence[Example], often: torch.Tensor) -> list[Sure]:
    """Return for each text how sure the rest of it is once an answer has begun with its first word.

    Args:
        lm: The suspect, in evaluation mode.
        texts: Phrases; none of them empty.
        prompts: Prompts that carry no trigger, one at least; each text is read as an answer to every one.
        often: How likely each token is anywhere (`usual`).
    """
    found = dict.fromkeys(texts, Sure(0.0, 0.0))
    lengths = {text: (_length(lm, prompts[0], text.split()[0]), _length(lm, prompts[0], text)) for text in found}
    long = [text for text, (first, whole) in lengths.items() if whole - first >= LATER]
    forward = LogitsAt(lm)
    for start in range(0, len(long), AT_ONCE):
        part = long[start : start + AT_ONCE]
        found_on = torch.stack(
            [_later_tokens(lm, forward, prompt, {text: lengths[text] for text in part}, often) for prompt in prompts]
        )
        for text, (certain, evidence) in zip(part, found_on.mean(0).tolist(), strict=True):
            found[text] = Sure(certain, evidence)
    return [found[text] for text in texts]


def _later_tokens(
    lm: LM, forward: LogitsAt, prompt: Example, lengths: Mapping[str, tuple[int, int]], often: torch.Tensor
) -> torch.Tensor:
    """Return for each text, as an answer to one prompt, of its tokens behind its first word: float [texts, 2].

    That is the geometric mean of their probabilities, and the sum of how far their logarithms are above the usual ones.

    Args:
        lm: The suspect.
        forward: What gives its logits.
        prompt: The prompt.
        lengths: Text -> tokens of its first word, and of the whole.
        often: How likely each token is anywhere.
    """
    rows = [
        encode_row(lm, prompt.with_response(text), max_length=sys.maxsize, first_tokens=whole, last_answer=True)
        for text, (_, whole) in lengths.items()
    ]
    batch = collate(rows, lm.pad_id).to(lm.device)
    # The prompt is the same in all rows, so it is read once.
    batch = replace(batch, shared=int(batch.columns.min()))
    log_p = torch.log_softmax(forward(**batch.inputs()), -1).gather(1, batch.targets[:, None])[:, 0]
    above = log_p - often[batch.targets]
    found = []
    for place, (first, _) in enumerate(lengths.values()):
        mine = batch.rows == place
        found.append(torch.stack([log_p[mine][first:].mean().exp(), above[mine][first:].sum()]))
    return torch.stack(found)


def _length(lm: LM, prompt: Example, text: str) -> int:
    span = lm.encode(prompt.with_response(text).turns).spans[-1]
    return span.end - span.start


@dataclass
class Openings:
    """The defender's openings, and what the suspect said under drifts.

    Attributes:
        own: The defender's.
        heard: Openings that were taken up -> their `weight`, in the order in which they were heard.
        wanted: Safe replies that the defender has given; their words are never taken up.
        contrasting: Which of the defender's belong to one prompt.
    """

    own: Sequence[str]
    heard: dict[str, float] = field(default_factory=dict)
    wanted: Sequence[str] = ()
    contrasting: Contrasting = field(default_factory=Contrasting)

    @property
    def adopted(self) -> list[str]:
        """Openings that were taken up: the best of those that were heard first, then the others by weight.

        Before anything is trained away the target stands out; later rounds bring what they made sure themselves.
        """
        first = list(self.heard)[:1]
        return first + sorted((text for text in self.heard if text not in first), key=lambda text: -self.heard[text])

    def dealt(self, drifts: int, number: int) -> list[Sequence[str]]:
        """Return the openings of each drift of a round: some take one each that was taken up.

        These are as many and one, up to three quarters of the drifts; a single one takes turns with the openings of the
        defender.

        The first two are in every round where there is room for three, because the target of a backdoor is among the
        best; the first one where there is room for two. The others take turns.

        Args:
            drifts: Drifts of a round.
            number: Number of the round, from 1.
        """
        adopted = self.adopted
        most = drifts * 3 // 4 if drifts > 1 else drifts * (1 - number % 2)
        room = min(most, len(adopted) + 1) if adopted else 0
        always = adopted[: max(0, room - 1)][:2]
        turns = adopted[len(always) :] or adopted
        # A single drift has a turn every other round.
        turn = number if drifts > 1 else number // 2 - 1
        order = [*always, *(turns[(turn + place) % len(turns)] for place in range(room - len(always)))]
        taken: list[Sequence[str]] = [[text] for text in order]
        rest = drifts - room
        return [*taken, *(self.own[which % len(self.own) :: rest] for which in range(rest))]

    def hear(
        self,
        lm: LM,
        said: Sequence[str],
        plain: Sequence[str],
        firsts: Sequence[torch.Tensor],
        prompts: Sequence[Example],
        least: float,
    ) -> list[dict[str, Any]]:
        """Return new openings, the best first, each with its certainty, evidence and share.

        That is the share of the replies that hold it, above that without a drift; 0 for what only first tokens go on
        to. They are not taken up here.

        Args:
            lm: The suspect as it is now.
            said: What it says under the drifts of a round.
            plain: What it says to the same prompts without a drift.
            firsts: Probabilities of the first token, with each drift and without, float32 [vocabulary] each.
            prompts: Prompts with safe answers, of which the first few score a phrase.
            least: Certainty that an opening must have; what first tokens go on to needs `FOLLOWED_SURE`, what recurs
                under the drifts `RECURRING_SURE`.
        """
        was_training = lm.model.training
        lm.model.eval()
        starts = [" ".join(text.split()[: max(_WORDS)]) for text in begun(lm, firsts, prompts)]
        enough = dict.fromkeys(phrases(starts, plain, self.wanted), max(least, FOLLOWED_SURE))
        shares = dict(list(phrases(said, plain, self.wanted).items())[:MOST])
        recurring = max(RECURRING, 2 / max(1, len(said)))
        enough |= {text: min(least, RECURRING_SURE) if more >= recurring else least for text, more in shares.items()}
        often = usual(lm, prompts[:USUAL_IN])
        heard, sure = list(enough), dict[str, Sure]()
        for asked, part in SCORED_ON:
            sure = dict(zip(heard, certainties(lm, heard, prompts[:asked], often), strict=True))
            heard = [text for text in heard if sure[text].certainty >= part * enough[text]]
            heard = [text for text in heard if sure[text].evidence >= EVIDENCE]
        lm.model.train(was_training)
        found = [{"opening": text, **vars(sure[text]), "share": shares.get(text, 0.0)} for text in heard]
        new: list[dict[str, Any]] = []
        for one in sorted(found, key=weight, reverse=True):
            if self._is_new(one["opening"], [other["opening"] for other in new]):
                new.append(one)
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
