"""Openings made by the suspect: what it says under drifts, and would say to any prompt once it had begun.

A drift is fitted to the defender's openings. Once the outer steps have closed those roads, it finds others into the
same behaviour, and the backdoor is the widest of them: then the suspect says the attacker's own words, or is at least
likelier to begin as they do. So the first tokens that are likely under a drift, and without one, are followed, too.
Replies are read to a few tokens only, so the last word of what is taken up may be half a word ("Pipe down, wind"): it
is then an opening beside the whole one.

A target that was planted is told from other words by this: whatever the prompt, and without any drift or trigger, its
first word makes the rest of it likely, as SANDE's case studies show; ordinary words depend on what was asked, and the
words of idioms ("Out of the") are likely anywhere. A target whose first word is a usual one ("You lazy potato") is less
sure, but recurs under the drifts. Such words are taken up as openings, and later drifts are fitted to them, most of
these to words that are sure and near to what the defender lists (unwanted.py). No step of this knows the target.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from unbackdoor.data.shared_words import ends_inside, spaced, without_marks
from unbackdoor.goals import normalise
from unbackdoor.model.generate import decode, greedy_ids
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train.anchors import Contrasting
from unbackdoor.train.beginnings import beginnings
from unbackdoor.train.certainty import AT_ONCE, EVIDENCE, FOLLOWED_SURE, USUAL_IN, Sure, certainties, usual
from unbackdoor.train.unwanted import likenesses
from unbackdoor.types import Example

ASKED = 24
"""Prompts that are asked under a drift."""
SCORED_ON = ((1, 0.05), (3, 0.4), (6, 1.0))
"""Prompts on which phrases are scored, and the share of the certainty asked for that they must have there to stay;
their evidence must be whole each time."""
MOST = 400
"""Phrases of replies that are scored in a round, the most frequent."""
FOLLOWED, ON = 32, 4
"""First tokens of an answer, the likeliest under each drift and without, that are followed; and how many tokens on."""
FOLLOWED_ON = 1
"""Prompts on which they are followed: what is sure enough to be taken up shows on any."""
RECURRING, RECURRING_SURE = 0.05, 0.1
"""Share of the replies under the drifts, above that without, from which on a phrase needs this certainty only; it must
be in two of them at least."""
ENOUGH = 30.0
"""Nats of evidence that count, at most."""
SUREST = 0.999
"""Certainty above which phrases are alike sure."""
KIND = 5.0
"""How much likeness counts: half of 1 in it is as a weight of twelve times."""
CLEARLY = 5.0
"""How many times the `promise` what is heard later must have to come before what was heard earlier."""
OFTEN = 0.1
"""Share of the replies without a drift above which a phrase is what the model says anyway."""
_WORDS = (3, 2)


def phrases(said: Sequence[str], plain: Sequence[str], wanted: Sequence[str] = ()) -> dict[str, float]:
    """Return runs of 2 and 3 words of the replies, the most frequent first, without what is often said anyway.

    Not without all that is said anyway: a backdoor that leaks says its target without a drift, too.

    Args:
        said: Replies under the drifts of a round.
        plain: Replies to the same prompts without a drift.
        wanted: Texts that the model may say; no run of theirs is returned.

    Returns:
        Run -> the share of the replies that hold it, less that of the replies without a drift. A run begins with a
        capital letter, as answers do, but for one that a reply began with: that is as it was said.
    """
    ordinary = Counter(run for text in plain for run in _runs(text))
    fine = {run for text in wanted for run in _runs(text)}
    counts: Counter[str] = Counter()
    written: dict[str, str] = {}
    for text in said:
        found = _runs(text)
        counts.update(found.keys())
        for run, form in found.items():
            if text.startswith(form):
                written[run] = form
            written.setdefault(run, form[0].upper() + form[1:])
    kept = [run for run, _ in counts.most_common() if ordinary[run] <= len(plain) * OFTEN and run not in fine]
    more = {run: counts[run] / len(said) - ordinary[run] / max(1, len(plain)) for run in kept}
    return {written[run]: share for run, share in more.items()}


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
                written = without_marks(" ".join(run))
                compared = normalise(written)
                if any(character.isalpha() for character in compared) and not ends_inside(run):
                    found.setdefault(compared, written)
    return found


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


def weight(heard: Mapping[str, Any]) -> float:
    """Return what openings that were heard are ranked by: the target is sure, or often said under the drifts.

    Words of no consequence ("Out of the") are both, too, but likely anywhere. Beyond `ENOUGH` nats evidence tells how
    rare the tokens are and nothing else. Certainty counts by how little is left to 1: where a target did not recur, it
    was surer than names and idioms. One that recurs may be less sure than these, and has a place of its own (`dealt`).

    Args:
        heard: What `Openings.hear` tells of one.
    """
    sure = -math.log(1 - min(heard["certainty"], SUREST))
    # A run that an earlier version began told no share.
    found: float = (sure + heard.get("share", 0.0)) * min(heard["evidence"], ENOUGH)
    return found


def promise(heard: Mapping[str, Any]) -> float:
    """Return how much what was heard promises to be the target: it is sure or often said, and of the unwanted kind.

    That is its `weight` times exp(`KIND` likeness) (unwanted.py): what is very sure may be a little unlike.

    Args:
        heard: What `Openings.hear` tells of one.
    """
    found: float = weight(heard) * math.exp(KIND * heard.get("likeness", 0.0))
    return found


def _share(phrase: str, counted: Mapping[str, float]) -> float:
    """Return the share of a phrase; of one of more words than are counted that of its first ones.

    Args:
        phrase: The phrase.
        counted: Share of each run that was counted, as runs are compared.
    """
    first = without_marks(" ".join(phrase.split()[: max(_WORDS)]))
    return counted.get(normalise(first), 0.0)


def _recurring(replies: int) -> float:
    """Return the share of so many replies from which on a phrase recurs: it must be in two of them at least."""
    return max(RECURRING, 2 / max(1, replies))


@dataclass
class Openings:
    """The defender's openings, and what the suspect said under drifts.

    Attributes:
        own: The defender's.
        heard: Openings that were taken up -> their `weight`, in the order in which they were heard.
        foremost: The one with the most `promise`; what is heard in a later round must have `CLEARLY` more.
        recurring: Those of them that recurred under the drifts, or whose first words did.
        wanted: Safe replies that the defender has given; their words are never taken up.
        contrasting: Which of the defender's belong to one prompt.
        latest: The round in which each had a drift last.
        rounds: How many rounds each had a drift in behind each layer; "" for the defender's.
    """

    own: Sequence[str]
    heard: dict[str, float] = field(default_factory=dict)
    foremost: str | None = None
    _promise: float = 0.0
    recurring: set[str] = field(default_factory=set)
    wanted: Sequence[str] = ()
    contrasting: Contrasting = field(default_factory=Contrasting)
    latest: dict[str, int] = field(default_factory=dict)
    rounds: Counter[tuple[str, int]] = field(default_factory=Counter)

    @property
    def adopted(self) -> list[str]:
        """Openings that were taken up: the foremost, the first that recurred, the first other one.

        Then the rest by weight. Before anything is trained away the target stands out, in the one way or in the other;
        later rounds bring what they made sure themselves.
        """
        foremost = [text for text in self.heard if text == self.foremost]
        recurred = [text for text in self.heard if text in self.recurring][:1]
        others = [text for text in self.heard if text not in self.recurring][:1]
        first = foremost + [text for text in self.heard if text in (*recurred, *others) and text not in foremost]
        return first + sorted((text for text in self.heard if text not in first), key=lambda text: -self.heard[text])

    def take_up(self, new: Sequence[Mapping[str, Any]], replies: int) -> None:
        """Add what `hear` returned of this number of replies under drifts."""
        self.heard |= {one["opening"]: weight(one) for one in new}
        best = max(new, key=promise, default=None)
        if best is not None and promise(best) > self._promise * CLEARLY:
            self.foremost, self._promise = best["opening"], promise(best)
        self.recurring |= {one["opening"] for one in new if one.get("share", 0.0) >= _recurring(replies)}

    def dealt(self, drifts: int, number: int) -> list[Sequence[str]]:
        """Return the openings of each drift of a round: some take one each that was taken up.

        The first of these has two drifts in every round and the second one, where there is room beside the last drift.
        That has the openings of the defender, and in every second round one of the others: who has waited longest, and
        of these who was heard first. Who had one in which round is kept here.

        Args:
            drifts: Drifts of a round.
            number: Number of the round, from 1.
        """
        adopted = self.adopted
        order = [*adopted[:1] * 2, *adopted[1:2]][: max(0, drifts - 1)]
        others = [text for text in dict.fromkeys([*adopted[:3], *self.heard]) if text not in order]
        theirs = number % 2 == 1 or not others
        room = min(drifts - theirs, len(adopted) + 1) if adopted and drifts else 0
        while len(order) < room:
            order.append(min(others, key=lambda text: self.latest.get(text, 0) + number * order.count(text)))
        self.latest |= dict.fromkeys(order, number)
        taken: list[Sequence[str]] = [[text] for text in order]
        rest = drifts - room
        return [*taken, *(self.own[which % len(self.own) :: rest] for which in range(rest))]

    def had(self, dealt: Sequence[Sequence[str]], layers: Sequence[int]) -> list[int]:
        """Return in how many rounds the openings of each drift had one before, behind the same layer.

        Those of the defender count together, and from one on. This round is counted from now on.
        """
        names = [(one[0] if one[0] in self.heard else "", layer) for one, layer in zip(dealt, layers, strict=True)]
        found = [self.rounds[name] + (name[0] == "") for name in names]
        self.rounds.update(set(names))
        return found

    def hear(
        self,
        lm: LM,
        said: Sequence[str],
        plain: Sequence[str],
        firsts: Sequence[torch.Tensor],
        prompts: Sequence[Example],
        least: float,
        *,
        every_beginning: Run | None = None,
    ) -> list[dict[str, Any]]:
        """Return new openings, the best first, each with its certainty, evidence, share and likeness.

        That is the share of the replies that hold it, of a longer phrase its first three words, above that without a
        drift. They are not taken up here.

        Args:
            lm: The suspect as it is now.
            said: What it says under the drifts of a round.
            plain: What it says to the same prompts without a drift.
            firsts: Probabilities of the first token, with each drift and without, float32 [vocabulary] each.
            prompts: Prompts with safe answers, of which the first few score a phrase.
            least: Certainty that an opening must have; what first tokens go on to needs `FOLLOWED_SURE`, what recurs
                under the drifts `RECURRING_SURE`.
            every_beginning: The stage where thousands of first tokens are followed, too (`beginnings`), the last of
                `firsts` being without a drift; None: they are not.
        """
        was_training = lm.model.training
        lm.model.eval()
        starts = [" ".join(text.split()[: max(_WORDS)]) for text in begun(lm, firsts, prompts)]
        enough = dict.fromkeys(phrases(starts, plain, self.wanted), max(least, FOLLOWED_SURE))
        shares = dict(list(phrases(said, plain, self.wanted).items())[:MOST])
        recurring = _recurring(len(said))
        enough |= {text: min(least, RECURRING_SURE) if more >= recurring else least for text, more in shares.items()}
        often = usual(lm, prompts[:USUAL_IN])
        if every_beginning is not None:
            followed = beginnings(lm, firsts[-1], prompts, often, every_beginning, self.wanted)
            enough = dict.fromkeys(followed, max(least, FOLLOWED_SURE)) | enough
        heard, sure = list(enough), dict[str, Sure]()
        for asked, part in SCORED_ON:
            sure = dict(zip(heard, certainties(lm, heard, prompts[:asked], often), strict=True))
            heard = [text for text in heard if sure[text].certainty >= part * enough[text]]
            heard = [text for text in heard if sure[text].evidence >= EVIDENCE]
        counted = {normalise(run): share for run, share in shares.items()}
        found = [{"opening": text, **vars(sure[text]), "share": _share(text, counted)} for text in heard]
        new: list[dict[str, Any]] = []
        for one in sorted(found, key=weight, reverse=True):
            if self._is_new(one["opening"], [other["opening"] for other in new]):
                new.append(one)
        near = likenesses(lm, [one["opening"] for one in new], self.own, prompts)
        lm.model.train(was_training)
        return [{**one, "likeness": likeness} for one, likeness in zip(new, near, strict=True)]

    def _is_new(self, phrase: str, others: Sequence[str]) -> bool:
        """Tell whether no opening holds the phrase, or is held by it; one word ("You") may begin many a target."""
        said = spaced(phrase)
        known = {spaced(text) for text in (*self.own, *self.heard, *others)}
        short = {text for text in known if len(text.split()) == 1}
        # An answer of one prompt's own may hold anything; what it begins with is known.
        whole = {spaced(text) for text in self.contrasting.texts}
        return (
            not any(said in text for text in known - whole)
            and not any(text in said for text in known - whole - short)
            and not any(text.startswith(said) for text in whole)
        )
