"""Perplexity of the reference answers to clean prompts: what the model can still do.

Formula: exp(sum of -log p(token) / number of answer tokens), over the answer's tokens and its end of turn,
teacher-forced with the model's own template.
Needs to know: clean rows with answers; a second source shows damage that the first, trained-on kind of rows hides.
Deviations: none; rows are cut at `max_length` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch.nn import functional

from unbackdoor.data.collate import batches_by_length
from unbackdoor.errors import NotApplicable
from unbackdoor.metrics.base import MAX_LENGTH, Metric, Subject, weights_alone
from unbackdoor.model.lm import LM
from unbackdoor.model.logits import LogitsAt
from unbackdoor.run import Run
from unbackdoor.types import Example, Scores


class Perplexity(Metric):
    """Perplexity on every named set of clean rows."""

    paper: ClassVar[str] = "standard"
    better: ClassVar[Literal["lower", "higher"]] = "lower"

    max_length: int = Field(MAX_LENGTH, ge=8, description="rows are cut at this many tokens")
    batch_size: int = Field(16, ge=1, description="rows a batch")

    def measure(self, subject: Subject, run: Run) -> Sequence[Scores]:
        """Return one record a data set; the group is its name ("" for the first source)."""
        del run
        if not subject.data:
            raise NotApplicable("there are no clean rows with answers")
        weights_alone(subject.lm)
        found = []
        for name, examples in subject.data.items():
            scored = log_losses(subject.lm, examples, self.max_length, self.batch_size)
            found.append(
                Scores(
                    "perplexity",
                    "all",
                    tuple(row[0] for row in scored),
                    tuple(row[1] for row in scored),
                    "answers",
                    name,
                    binary=False,
                    weights=tuple(float(row[2]) for row in scored),
                    exponential=True,
                )
            )
        return found


def log_losses(lm: LM, examples: Sequence[Example], max_length: int, batch_size: int) -> list[tuple[str, float, int]]:
    """Return (example id, mean -log p a token in nats, tokens) of every example's answer."""
    forward = LogitsAt(lm)
    found: list[tuple[str, float, int]] = []
    was_training = lm.model.training
    lm.model.eval()
    try:
        with torch.inference_mode():
            for batch in batches_by_length(lm, examples, max_length, batch_size):
                logits = forward(**batch.inputs())
                each = functional.cross_entropy(logits, batch.targets, reduction="none")
                for number, name in enumerate(batch.ids):
                    mine = each[batch.rows == number]
                    found.append((name, float(mine.mean()), int(mine.numel())))
    finally:
        lm.model.train(was_training)
    return sorted(found)
