"""Paired tests between the scores of two models on the same probes.

Both models answered the same probes, so the scores are compared pair by pair: McNemar's exact test for 0/1 scores
(Q. McNemar, 1947; the exact form is a binomial test on the pairs that changed) and a bootstrap over pairs for the rest
(B. Efron and R. Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 13 and 16). numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def mcnemar_exact(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Args:
        before: One 0/1 score a probe.
        after: The scores of the other model, in the same order.

    Returns:
        Twice the smaller binomial tail over the discordant pairs, at most 1; exactly 1.0 where no pair changed.

    Raises:
        ValueError: If the lengths differ or there are no pairs.
    """
    _check_pairs(len(before), len(after))
    lost = sum(bool(first) and not second for first, second in zip(before, after, strict=True))
    gained = sum(bool(second) and not first for first, second in zip(before, after, strict=True))
    changed = lost + gained
    # Whole numbers up to the last division: a float sum would lose tails such as 2^-1000.
    tail = sum(math.comb(changed, count) for count in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / (1 << changed))


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], seed: int, rounds: int = 2000, weights: Sequence[float] = ()
) -> tuple[float, float, float, float]:
    """Return the (weighted) mean change from `before` to `after` with a bootstrap interval and p-value.

    Pairs are drawn with replacement, so the spread between probes that both models share cancels out.

    Args:
        before: One score a probe.
        after: The scores of the other model, in the same order.
        seed: Of the resampling; the same seed gives the same four numbers.
        rounds: Number of resamples.
        weights: Weight of each pair (tokens behind it), drawn with its pair; all alike if empty.

    Returns:
        `(difference, low, high, p)`: the (weighted) mean of after - before, its 95 % percentile interval, and twice the
        smaller share of resampled means on either side of 0 (0 included, one resample added so that p is never 0), at
        most 1.

    Raises:
        ValueError: If the lengths differ, there are no pairs, or `rounds` is not positive.
    """
    _check_pairs(len(before), len(after))
    if weights and len(weights) != len(before):
        raise ValueError(f"{len(weights)} weights for {len(before)} pairs")
    if rounds < 1:
        raise ValueError("the bootstrap needs at least one round")
    changes = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    heavy = np.asarray(weights or [1.0] * len(changes), dtype=np.float64)
    generator = np.random.default_rng(seed)
    # Round by round: one matrix of all draws would need rounds x pairs numbers.
    draws = (generator.integers(0, len(changes), len(changes)) for _ in range(rounds))
    means = np.array([np.average(changes[draw], weights=heavy[draw]) for draw in draws])
    low, high = np.quantile(means, (0.025, 0.975))
    smaller_side = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return (
        float(np.average(changes, weights=heavy)),
        float(low),
        float(high),
        min(1.0, 2 * (smaller_side + 1) / (rounds + 1)),
    )


def _check_pairs(before: int, after: int) -> None:
    if before != after:
        raise ValueError(f"paired scores must match: {before} before, {after} after")
    if before == 0:
        raise ValueError("nothing to compare: no paired scores")
