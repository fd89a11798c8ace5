"""DARE (Yu et al., 2311.03099): drop entries of the differences at random, and rescale the others.

Every entry of a model's difference to the base is kept with the probability `density` (the paper's 1 - p) and then
divided by it, so that the expected difference is the whole one. What is left is added up as in task arithmetic, or
where signs agree as in TIES. The draw of a tensor depends on seed, name and model alone, not on the order of the work.

Deviation from mergekit, which rescales by the ratio of the L1 norms before and after: there the same in expectation,
here the paper's 1 / (1 - p).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from unbackdoor.merge.task_arithmetic import combine
from unbackdoor.merge.ties import merge_agreeing
from unbackdoor.run import Run

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def dare(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    draws: Sequence[torch.Generator],
    *,
    scale: float = 1.0,
    normalize: bool = False,
    agreeing: bool = False,
) -> Tensor:
    """Return the base with the models' thinned differences added; blocks may be given, in order, with the same draws.

    Args:
        base: float32; not changed.
        tensors: float32, of the base's shape; given up.
        weights: One for each.
        densities: For each the probability that an entry is kept, in [0, 1].
        draws: A random stream for each.
        scale: lambda.
        normalize: Divide by the sum of the weights, with `agreeing` of those that agree.
        agreeing: Leave out entries whose sign is not the elected one (TIES).

    Returns:
        float32 of the same shape.
    """
    given = zip(tensors, densities, draws, strict=True)
    deltas = [thin(tensor.sub_(base), density, draw) for tensor, density, draw in given]
    merge = merge_agreeing if agreeing else combine
    return merge(base, deltas, weights, scale=scale, normalize=normalize)


def thin(delta: Tensor, density: float, draw: torch.Generator) -> Tensor:
    """Return a difference of which each entry is kept with the probability `density` and rescaled; it is given up."""
    import torch

    if density >= 1.0:
        return delta
    if not density:
        return delta.zero_()
    return delta.mul_(torch.rand(delta.shape, generator=draw) < density).div_(density)


def stream(seed: int, name: str, model: int) -> torch.Generator:
    """Return the random stream of a tensor of the model that is the `model`-th, from its beginning."""
    return Run(seed).generator(f"dare/{model}/{name}")
