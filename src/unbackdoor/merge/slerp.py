"""Spherical linear interpolation (Information Conflicts, 2411.18280, equation 10; Shoemake 1985).

For each tensor, phi is the angle between the two flattened and normalised tensors; the result is
sin((1-t) phi)/sin(phi) * suspect + sin(t phi)/sin(phi) * other, of the tensors as they are, not normalised. Where they
are nearly parallel, |cos phi| > 0.9995 by default (mergekit's number; the paper names none), the sines would divide
nothing by nothing, and the merge is linear. A threshold of 1 never falls back but for equal directions.

Of two fine-tunes of one base nearly every tensor is that parallel (they differ by less than 3 % of their norm), so that
SLERP and linear merging then are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

THRESHOLD = 0.9995
_SMALL = 1e-8
"""A tensor of a smaller norm has no direction and is not normalised (as in mergekit): the cosine is then nearly 0."""


def slerp(suspect: Tensor, other: Tensor, t: float, *, threshold: float = THRESHOLD) -> Tensor:
    """Return the tensor on the arc between two.

    Args:
        suspect: float32; the result at t = 0. It is given up and holds the result.
        other: float32 of the same shape; the result at t = 1. Not changed.
        t: In [0, 1].
        threshold: Above this |cosine| the merge is linear.

    Returns:
        float32 of the same shape.
    """
    first, second = shares(t, cosine([(suspect, other)]), threshold=threshold)
    return suspect.mul_(first).add_(other, alpha=second)


def cosine(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the cosine between two tensors that come in blocks; products and their sums are in float64.

    In float32 the sums of a block are off by millionths, and the arc's shares by more where the angle is small.

    Args:
        pairs: Blocks of both, float32, each pair of one shape.
    """
    import torch

    dot = first = second = 0.0
    for one, two in pairs:
        one, two = one.flatten().double(), two.flatten().double()
        dot += float(torch.dot(one, two))
        first += float(torch.dot(one, one))
        second += float(torch.dot(two, two))
    norms = [norm if norm > _SMALL else 1.0 for norm in (math.sqrt(first), math.sqrt(second))]
    return max(-1.0, min(1.0, dot / (norms[0] * norms[1])))


def shares(t: float, cosine: float, *, threshold: float = THRESHOLD) -> tuple[float, float]:
    """Return what each of two tensors is multiplied with before they are added."""
    angle = math.acos(cosine)
    sine = math.sin(angle)
    if abs(cosine) > threshold or sine < _SMALL:
        return 1.0 - t, t
    return math.sin((1.0 - t) * angle) / sine, math.sin(t * angle) / sine
