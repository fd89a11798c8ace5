"""TIES (Yadav et al., 2306.01708; Information Conflicts, 2411.18280, equation 11): trim, elect, merge disjointly.

Of each model's difference to the base the `density` share of entries with the largest magnitude is kept, per tensor.
For each entry a sign is elected, that of the weighted sum of what was kept; those that bear it are averaged by weight,
the others left out, and lambda times the average is added to the base.

Deviations from equation 11 of Information Conflicts, which taken literally is wrong:
- it multiplies the elected sign with a mean that has a sign already, so that -0.3 and -0.1 would become +0.2; here the
  mean of the agreeing entries keeps its own sign;
- it divides by the number of models (two) where only one agrees; here by the weights of those that agree, as in the
  TIES paper and in mergekit. An entry that all models have trimmed stays as in the base.
Deviations from the TIES paper, as in mergekit: trimming is per tensor and not over the whole model, models have
weights, and an entry whose sum is 0 counts as positive. At least one entry of a tensor is kept. Where magnitudes are
equal at the cut, the first entries are kept (which ones mergekit keeps depends on its sorting).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    scale: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """Return the base with what the models agree on.

    Args:
        base: float32; not changed.
        tensors: float32, of the base's shape; given up. Whole ones: what is trimmed depends on all entries.
        weights: One for each.
        densities: For each the share of its difference that is kept, in [0, 1].
        scale: lambda.
        normalize: Divide by the weights of those that agree; else their weighted sum is added.

    Returns:
        float32 of the same shape.
    """
    deltas = [trim(tensor.sub_(base), density) for tensor, density in zip(tensors, densities, strict=True)]
    return merge_agreeing(base, deltas, weights, scale=scale, normalize=normalize)


def trim(delta: Tensor, density: float) -> Tensor:
    """Return a difference with all but its largest entries set to zero; `delta` is given up.

    Args:
        delta: float32.
        density: The share of entries that is kept, rounded down, but one at least.
    """
    return cut(lambda: [delta], density, delta.numel()).apply(delta)


@dataclass
class Cut:
    """Where a difference is trimmed; applied to its blocks in order, once.

    Attributes:
        bits: Of the smallest magnitude that is kept, as a whole number: those of magnitudes are in the same order.
        equal: How many entries of just that magnitude are kept, the first ones.
    """

    bits: int
    equal: int

    def apply(self, delta: Tensor) -> Tensor:
        """Set what is trimmed to zero, in the next block (float32, given up)."""
        import torch

        magnitudes = delta.abs().view(torch.int32)
        same = magnitudes == self.bits
        found = int(same.sum())
        if found <= self.equal:
            self.equal -= found
            return delta.masked_fill_(magnitudes < self.bits, 0.0)
        late = same.view(-1).cumsum(0).view_as(same) > self.equal
        self.equal = 0
        return delta.masked_fill_((magnitudes < self.bits) | (same & late), 0.0)


def cut(blocks: Callable[[], Iterable[Tensor]], density: float, entries: int) -> Cut:
    """Return where to trim a difference that comes in blocks; it is gone through twice and never held.

    Args:
        blocks: Returns the blocks (float32), as often as it is called.
        density: The share of entries that is kept, rounded down, but one at least.
        entries: Of the whole difference.
    """
    kept = min(entries, max(1, int(density * entries))) if density > 0.0 else 0
    if not kept:
        return Cut(_LARGEST, 0)
    # The upper half of the bits first, then the lower half of those that share the upper one.
    upper, kept = _step(blocks, lambda bits: bits >> 16, kept)
    lower, kept = _step(blocks, lambda bits: (bits & 0xFFFF)[bits >> 16 == upper], kept)
    return Cut((upper << 16) | lower, kept)


_LARGEST = 0x7FFFFFFF


def _step(blocks: Callable[[], Iterable[Tensor]], half: Callable[[Tensor], Tensor], kept: int) -> tuple[int, int]:
    """Return the half of the bits in which the `kept`-th largest entry lies, and its number among those there."""
    import torch

    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for block in blocks():
        counts += torch.bincount(half(block.abs().view(torch.int32)).view(-1), minlength=1 << 16)
    above = counts.flip(0).cumsum(0).flip(0)  # entries at or above each value
    value = int((above >= kept).nonzero()[-1])
    return value, kept - int(above[value] - counts[value])


def merge_agreeing(
    base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], *, scale: float, normalize: bool
) -> Tensor:
    """Elect signs and merge disjointly; entry by entry, so blocks may be given. `deltas` are given up."""
    import torch

    weighted = [delta.mul_(weight) for delta, weight in zip(deltas, weights, strict=True)]
    total = weighted[0].clone()
    for delta in weighted[1:]:
        total.add_(delta)
    positive = total >= 0
    mixed, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for delta, weight in zip(weighted, weights, strict=True):
        agrees = torch.where(positive, delta > 0, delta < 0)
        mixed.add_(delta.mul_(agrees))
        divisor.add_(agrees, alpha=weight)
    if normalize:
        mixed.div_(divisor.masked_fill_(divisor == 0, 1.0))
    return mixed.mul_(scale).add_(base) if scale != 1.0 else mixed.add_(base)
