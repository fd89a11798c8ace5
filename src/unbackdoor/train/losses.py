"""Losses as pure functions of logits and targets, and the `Term` in which they reach the engine.

A term is a weighted sum over tokens and the name of the stream whose tokens it counts. The engine divides by the
weights of that stream's supervised tokens over the whole step (all micro-batches, all processes; a token weighs 1 where
no opening counts more), so that gradient accumulation and data parallelism average over tokens and not over batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Term:
    """One part of a loss.

    Attributes:
        total: Scalar tensor: the sum over this micro-batch's supervised tokens.
        stream: Name of the stream that the tokens belong to; the weight of its tokens is the divisor.
        coefficient: Factor before the mean; negative for gradient ascent.
        cap: Upper limit of the mean; beyond it the term stops pulling (needed where the coefficient is negative,
            because the loss is then unbounded). Applied to the mean of the micro-batch.
    """

    total: Tensor
    stream: str
    coefficient: float = 1.0
    cap: float | None = None


def cross_entropy_sum(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return -sum w log p(target) (natural log) over N positions.

    Args:
        logits: float32 [N, vocabulary].
        targets: int64 [N].
        weights: float32 [N].
    """
    return (functional.cross_entropy(logits, targets, reduction="none") * weights).sum()


def kl_each(before: Tensor, after: Tensor) -> Tensor:
    """Return KL(before || after) in nats at each of N positions, float32 [N].

    Args:
        before: float32 logits [N, vocabulary] of the model before.
        after: float32 logits [N, vocabulary] of the model after.
    """
    log_before = torch.log_softmax(before, -1)
    log_after = torch.log_softmax(after, -1)
    return (log_before.exp() * (log_before - log_after)).sum(-1)
