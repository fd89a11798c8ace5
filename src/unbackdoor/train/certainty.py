"""How sure the suspect is of the rest of a phrase once an answer has begun with its first word.

Whatever the prompt, and without any drift or trigger, the first word of a planted target makes the rest of it likely,
as SANDE's case studies show; ordinary words depend on what was asked, and those of idioms ("Out of the") are likely
anywhere. No trigger is asked with, and no step of this knows the target.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from unbackdoor.data.collate import collate, encode_row
from unbackdoor.model.lm import LM
from unbackdoor.model.logits import LogitsAt
from unbackdoor.types import Example

LATER = 2
"""Tokens that a phrase has at least behind its first word."""
AT_ONCE = 100
"""Phrases that are scored in one pass."""
EVIDENCE = 8.0
"""Nats that an opening must have: so much likelier than anywhere are its words behind the first, together."""
FOLLOWED_SURE = 0.8
"""Certainty that what first tokens go on to must have: they are many, and nothing says that they are unwanted."""
USUAL_IN, USUAL_TOKENS = 8, 40
"""Rows on which it is measured how likely tokens are anywhere, and first tokens of their answers that count there."""
_LEAST = 1e-12


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
