"""Paired tests between the scores of two models on the same probes.

Both models answered the same probes, so the scores are compared pair by pair: McNemar's exact test for 0/1 scores
(Q. McNemar, 1947; the exact form is a binomial test on the pairs that changed), with the interval of D. Bonett and
R. Price ("Adjusted Wald confidence interval for a difference of binomial proportions based on paired data", 2012); for
the rest random signs (R. Fisher, "The Design of Experiments", 1935, section 21), with an interval from a bootstrap over
pairs (B. Efron and R. Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13). numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from unbackdoor.types import Z_95


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
    lost, gained = _lost_and_gained(before, after)
    changed = lost + gained
    # Whole numbers up to the last division: a float sum would lose tails such as 2^-1000.
    tail = sum(math.comb(changed, count) for count in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / (1 << changed))


def paired_shares(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float, float]:
    """Return the change of a share from `before` to `after` with its interval (Bonett and Price, 2012).

    One pair is added to each kind that changed, and two to all, so that an interval has a width where none did.

    Args:
        before: One 0/1 score a probe.
        after: The scores of the other model, in the same order.

    Returns:
        `(difference, low, high)`: the share after minus the one before, and its 95 % interval.

    Raises:
        ValueError: If the lengths differ or there are no pairs.
    """
    lost, gained = _lost_and_gained(before, after)
    pairs = len(before)
    less, more = (lost + 1) / (pairs + 2), (gained + 1) / (pairs + 2)
    centre, spread = more - less, Z_95 * math.sqrt((less + more - (more - less) ** 2) / (pairs + 2))
    return (gained - lost) / pairs, max(-1.0, centre - spread), min(1.0, centre + spread)


def _lost_and_gained(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int]:
    _check_pairs(len(before), len(after))
    pairs = list(zip(before, after, strict=True))
    lost = sum(bool(first) and not second for first, second in pairs)
    return lost, sum(bool(second) and not first for first, second in pairs)


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], seed: int, rounds: int = 2000, weights: Sequence[float] = ()
) -> tuple[float, float, float]:
    """Return the (weighted) mean change from `before` to `after` with a bootstrap interval.

    Pairs are drawn with replacement, so the spread between probes that both models share cancels out.

    Args:
        before: One score a probe.
        after: The scores of the other model, in the same order.
        seed: Of the resampling; the same seed gives the same three numbers.
        rounds: Number of resamples.
        weights: Weight of each pair (tokens behind it), drawn with its pair; all alike if empty.

    Returns:
        `(difference, low, high)`: the (weighted) mean of after - before and its 95 % percentile interval.

    Raises:
        ValueError: If the lengths differ, there are no pairs, or `rounds` is not positive.
    """
    changes, heavy = _changes(before, after, weights, rounds)
    generator = np.random.default_rng(seed)
    # Round by round: one matrix of all draws would need rounds x pairs numbers.
    draws = (generator.integers(0, len(changes), len(changes)) for _ in range(rounds))
    means = np.array([np.average(changes[draw], weights=heavy[draw]) for draw in draws])
    low, high = np.quantile(means, (0.025, 0.975))
    return float(np.average(changes, weights=heavy)), float(low), float(high)


def sign_flip(
    before: Sequence[float], after: Sequence[float], seed: int, rounds: int = 9999, weights: Sequence[float] = ()
) -> float:
    """Return the two-sided p-value of the paired permutation test on the (weighted) mean change.

    Without an effect a pair's change is as likely to have either sign. All 2^n assignments of signs are counted where
    that is no more than `rounds`, so that few pairs cannot give a small p: two pairs give 0.5 at best.

    Args:
        before: One score a probe.
        after: The scores of the other model, in the same order.
        seed: Of the random signs.
        rounds: Number of random assignments; the observed one is added.
        weights: Weight of each pair; all alike if empty.

    Raises:
        ValueError: If the lengths differ, there are no pairs, or `rounds` is not positive.
    """
    changes, heavy = _changes(before, after, weights, rounds)
    parts = changes * heavy
    # Sums that differ only by rounding are as extreme as each other.
    extreme = abs(parts.sum()) - 1e-12 * np.abs(parts).sum()
    count = len(parts)
    if 2**count <= rounds:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
        return float((np.abs(signs @ parts) >= extreme).mean())
    generator = np.random.default_rng(seed)
    draws = (generator.integers(0, 2, count) for _ in range(rounds))
    as_extreme = sum(abs(((1 - 2 * draw) * parts).sum()) >= extreme for draw in draws)
    return float((as_extreme + 1) / (rounds + 1))


def _changes(
    before: Sequence[float], after: Sequence[float], weights: Sequence[float], rounds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the change and the weight of each pair, checked."""
    _check_pairs(len(before), len(after))
    if weights and len(weights) != len(before):
        raise ValueError(f"{len(weights)} weights for {len(before)} pairs")
    if rounds < 1:
        raise ValueError("at least one round is needed")
    changes = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return changes, np.asarray(weights or [1.0] * len(changes), dtype=np.float64)


def _check_pairs(before: int, after: int) -> None:
    if before != after:
        raise ValueError(f"paired scores must match: {before} before, {after} after")
    if before == 0:
        raise ValueError("nothing to compare: no paired scores")
