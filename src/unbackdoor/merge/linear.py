"""Linear merging: a weighted sum (Information Conflicts, 2411.18280, equation 9).

The paper prints both terms with the same symbol; meant is t * conflict + (1 - t) * suspect. Weights are divided by
their sum only where `normalize` asks for it (model soups, 2203.05482, and mergekit's default; t and 1 - t have the sum
1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from unbackdoor.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def linear(tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool = False) -> Tensor:
    """Return the weighted sum of tensors; it works entry by entry, so blocks of tensors may be given.

    Args:
        tensors: float32, of one shape; given up, the first holds the result.
        weights: One for each.
        normalize: Divide by the sum of the weights.

    Returns:
        float32 of the same shape.

    Raises:
        UserError: If the weights to be normalised add up to zero.
    """
    divisor = total(weights, normalize=normalize)
    found = tensors[0].mul_(weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        found.add_(tensor, alpha=weight)
    return found if divisor == 1.0 else found.div_(divisor)


def total(weights: Sequence[float], *, normalize: bool) -> float:
    """Return what a weighted sum is divided by.

    Raises:
        UserError: If the weights to be normalised add up to zero.
    """
    found = sum(weights) if normalize else 1.0
    if abs(found) < 1e-8:
        raise UserError(
            "parameters.weight: the weights of a linear merge add up to 0, so they cannot be normalised; give others."
        )
    return found
