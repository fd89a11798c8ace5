"""Task arithmetic (Ilharco et al., 2212.04089): base + lambda * sum of weight * (model - base).

A negative weight takes away what a model has learned: the adaptive attacker of Information Conflicts (2411.18280,
Table 7) subtracts a conflict model so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def task_arithmetic(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], *, scale: float = 1.0, normalize: bool = False
) -> Tensor:
    """Return the base with the weighted differences of the models added; entry by entry, so blocks may be given.

    Args:
        base: float32; not changed.
        tensors: float32, of the base's shape; given up.
        weights: One for each.
        scale: lambda.
        normalize: Divide the sum by that of the weights, where that is not 0.

    Returns:
        float32 of the same shape.
    """
    return combine(base, [tensor.sub_(base) for tensor in tensors], weights, scale=scale, normalize=normalize)


def combine(
    base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], *, scale: float, normalize: bool
) -> Tensor:
    """Return base + scale * (weighted sum of differences); `deltas` are given up."""
    mixed = deltas[0].mul_(weights[0])
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        mixed.add_(delta, alpha=weight)
    total = sum(weights)
    if normalize and abs(total) >= 1e-8:
        mixed.div_(total)
    return mixed.mul_(scale).add_(base) if scale != 1.0 else mixed.add_(base)
