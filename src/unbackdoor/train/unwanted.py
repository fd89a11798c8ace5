"""Which of the words that were heard are of the unwanted kind: in the suspect their states are near the openings'.

What is sure on any prompt is the attacker's target, or an idiom, or a name. The defender does not know the target, but
he has said what kind of answer is unwanted, and the suspect itself can tell an insult from an explorer's name. So each
phrase is read as an answer to a few prompts, as the openings and the first words of safe answers are, `FIRST` tokens at
most; with h the mean state of its tokens behind the layer at two thirds of the depth, every entry standardised over
openings and safe words,

    likeness = cos(h, mean of the openings) - cos(h, mean of the safe words)

where both means are of normalised states. It orders what was heard and excludes nothing: a target of another kind (an
address, a language, a brand) is hardly nearer than a name. No paper that we follow has it; how well it tells targets
from idioms and names is measured in docs/development-victims.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from unbackdoor.data.collate import collate, encode_row
from unbackdoor.model.anatomy import decoder_layers
from unbackdoor.model.hooks import hidden_of, output_of
from unbackdoor.model.lm import LM
from unbackdoor.types import Example

DEPTH = 2 / 3
"""Where states are read, as a share of the layers: halfway they tell nearly as well, at the end less."""
READ_ON = 2
"""Prompts on which a text is read."""
WORDS, FIRST = 4, 32
"""First words of a safe answer, and first tokens of any text, that are read: a defender may know whole answers."""
_AT_ONCE = 32
_LEAST = 1e-3


@torch.no_grad()
def likenesses(lm: LM, texts: Sequence[str], openings: Sequence[str], rows: Sequence[Example]) -> list[float]:
    """Return how much nearer each text is to the openings than to safe answers, in [-2, 2].

    The states are float32 [texts, hidden].

    Args:
        lm: The suspect, in evaluation mode.
        texts: What was heard.
        openings: The defender's.
        rows: Rows with safe answers, one at least; none of them empty.
    """
    if not texts:
        return []
    firsts = [" ".join(row.response.split()[:WORDS]) for row in rows]
    ordinary = [text for text in firsts if text]
    prompts = rows[:READ_ON]
    states = _states(lm, [*texts, *openings, *ordinary], prompts)
    known = states[len(texts) :]
    scaled = normalize((states - known.mean(0)) / (known.std(0, correction=0) + _LEAST), dim=-1)
    heard, near, far = torch.split(scaled, [len(texts), len(openings), len(ordinary)])
    found: list[float] = (heard @ (normalize(near.mean(0), dim=0) - normalize(far.mean(0), dim=0))).tolist()
    return found


def _states(lm: LM, texts: Sequence[str], prompts: Sequence[Example]) -> Tensor:
    """Return the mean state of every text's tokens as an answer: float32 [texts, hidden], over the prompts."""
    layer = max(0, round(DEPTH * len(decoder_layers(lm.core))) - 1)
    total: Tensor | None = None
    for prompt in prompts:
        parts = [_read(lm, layer, prompt, texts[start : start + _AT_ONCE]) for start in range(0, len(texts), _AT_ONCE)]
        read = torch.cat(parts)
        total = read if total is None else total + read
    assert total is not None, "one prompt at least"
    return total / len(prompts)


def _read(lm: LM, layer: int, prompt: Example, texts: Sequence[str]) -> Tensor:
    rows = [
        encode_row(lm, prompt.with_response(text), max_length=sys.maxsize, first_tokens=FIRST, last_answer=True)
        for text in texts
    ]
    batch = collate(rows, lm.pad_id).to(lm.device)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    states = hidden_of(output_of(lm.core, layer, given)).float()
    found = torch.zeros(len(rows), states.shape[-1], device=states.device)
    # A supervised column is the one before its token.
    found.index_add_(0, batch.rows, states[batch.rows, batch.columns + 1])
    return found / torch.bincount(batch.rows, minlength=len(rows))[:, None]
