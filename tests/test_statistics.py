"""Paired tests against values worked out by hand and by enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from unbackdoor.statistics import mcnemar_exact, paired_bootstrap, paired_shares, sign_flip


@pytest.mark.parametrize(
    ("lost", "gained", "expected"),
    [
        (0, 0, 1.0),
        (5, 0, 2 / 32),
        (0, 5, 2 / 32),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (3, 3, 1.0),
        (98, 0, 2.0**-97),
        (1200, 0, 0.0),  # 2^-1199 is below the smallest float; it must not raise
    ],
)
def test_mcnemar_against_binomial_tails_by_hand(lost: int, gained: int, expected: float) -> None:
    before = [True] * lost + [False] * gained + [True, False]
    after = [False] * lost + [True] * gained + [True, False]
    assert mcnemar_exact(before, after) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_against_enumeration_of_all_signs() -> None:
    lost, gained = 6, 1
    as_extreme = sum(
        abs(sum(signs)) >= lost - gained for signs in itertools.product((-1, 1), repeat=lost + gained)
    ) / 2 ** (lost + gained)
    before = [True] * lost + [False] * gained
    assert mcnemar_exact(before, [not value for value in before]) == pytest.approx(as_extreme)


def test_bootstrap_against_enumeration_of_all_resamples() -> None:
    before, after = [0.0, 0.0, 0.0, 0.0], [-1.0, 2.0, 3.0, 4.0]
    means = [sum(draw) / 4 for draw in itertools.product(after, repeat=4)]
    difference, low, high = paired_bootstrap(before, after, seed=1, rounds=20_000)
    assert difference == 2.0
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.26)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.26)


def test_bootstrap_pairs_the_scores() -> None:
    # Probes differ by 1000, the pairs by exactly 1: unpaired, the interval would be hundreds wide.
    before = [0.0, 1000.0, 2000.0, 3000.0]
    assert paired_bootstrap(before, [value + 1 for value in before], seed=0) == (1.0, 1.0, 1.0)


def test_bootstrap_without_change_and_with_a_seed() -> None:
    assert paired_bootstrap([1.0, 2.0], [1.0, 2.0], seed=0) == (0.0, 0.0, 0.0)
    assert sign_flip([1.0, 2.0], [1.0, 2.0], seed=0) == 1.0
    scores = [float(value) for value in range(30)]
    shifted = [value + math.sin(value) for value in scores]
    assert paired_bootstrap(scores, shifted, seed=4) == paired_bootstrap(scores, shifted, seed=4)
    assert paired_bootstrap(scores, shifted, seed=4) != paired_bootstrap(scores, shifted, seed=5)


def test_scores_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="2 before, 1 after"):
        mcnemar_exact([True, False], [True])
    with pytest.raises(ValueError, match="nothing to compare"):
        paired_bootstrap([], [], seed=0)
    with pytest.raises(ValueError, match="at least one round"):
        paired_bootstrap([1.0], [2.0], seed=0, rounds=0)
    with pytest.raises(ValueError, match="nothing to compare"):
        sign_flip([], [], seed=0)


def test_bootstrap_weighs_pairs_by_what_stands_behind_them() -> None:
    before, after = [0.0, 0.0, 0.0], [1.0, -1.0, -1.0]
    assert paired_bootstrap(before, after, seed=0)[0] == pytest.approx(-1 / 3)
    difference, low, high = paired_bootstrap(before, after, seed=0, weights=[8.0, 1.0, 1.0])
    assert difference == pytest.approx(0.6)
    assert low == -1.0  # no draw of the heavy pair
    assert high == 1.0
    # A pair of weight 2 is as good as the pair twice, in the mean.
    assert (
        paired_bootstrap([0.0, 0.0, 0.0], [3.0, 3.0, 0.0], 0)[0]
        == paired_bootstrap([0.0, 0.0], [3.0, 0.0], 0, weights=[2.0, 1.0])[0]
    )
    with pytest.raises(ValueError, match="2 weights for 3 pairs"):
        paired_bootstrap(before, after, seed=0, weights=[1.0, 2.0])


def test_sign_flips_against_enumeration() -> None:
    changes, weights = [0.5, -0.1, 0.7, 0.2, 0.9], [1.0, 4.0, 1.0, 2.0, 1.0]
    observed = abs(sum(change * weight for change, weight in zip(changes, weights, strict=True)))
    flipped = [
        abs(sum(sign * change * weight for sign, change, weight in zip(signs, changes, weights, strict=True)))
        for signs in itertools.product((-1, 1), repeat=5)
    ]
    expected = sum(value >= observed - 1e-12 for value in flipped) / len(flipped)
    assert sign_flip([0.0] * 5, changes, seed=0, weights=weights) == pytest.approx(expected)
    assert sign_flip([0.0] * 5, changes, seed=3, rounds=31, weights=weights) == pytest.approx(expected, abs=0.25)


def test_few_pairs_are_never_significant_and_many_are() -> None:
    assert sign_flip([1.0, 2.0], [5.0, 9.0], seed=0) == 0.5
    assert sign_flip([1.0] * 5, [5.0, 9.0, 4.0, 3.0, 2.0], seed=0) == 2 / 32
    assert sign_flip([0.0] * 40, [1.0 + value for value in range(40)], seed=0) == 1 / 10_000


def test_sign_flips_hold_their_level() -> None:
    # Without an effect a p of 0.05 or less comes about once in twenty times, also where the bootstrap is too bold.
    generator = np.random.default_rng(0)
    noise = generator.standard_t(3, size=(400, 12))
    found = [sign_flip([0.0] * 12, list(row), seed=0) for row in noise]
    assert 0.02 < sum(p <= 0.05 for p in found) / len(found) < 0.09


def test_the_interval_of_a_change_of_shares_by_hand() -> None:
    # Of 40 pairs 7 were lost and 2 gained: 8/42 and 3/42, their difference, and its standard error.
    before = [True] * 7 + [False] * 2 + [True] * 20 + [False] * 11
    after = [False] * 7 + [True] * 2 + [True] * 20 + [False] * 11
    difference, low, high = paired_shares(before, after)
    assert difference == pytest.approx(-5 / 40)
    error = math.sqrt((11 / 42 - (5 / 42) ** 2) / 42)
    assert low == pytest.approx(-5 / 42 - 1.96 * error, abs=1e-4)
    assert high == pytest.approx(-5 / 42 + 1.96 * error, abs=1e-4)


def test_the_interval_of_a_change_of_shares_holds_it_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    kinds = generator.choice(4, size=(2000, 100), p=[0.6, 0.15, 0.05, 0.2])
    held = 0
    for drawn in kinds:
        _, low, high = paired_shares(list(drawn <= 1), list((drawn == 0) | (drawn == 2)))
        held += low <= 0.05 - 0.15 <= high
    assert 0.94 <= held / 2000 <= 0.97
    assert paired_shares([True] * 20, [True] * 20)[1:] == pytest.approx((-0.126, 0.126), abs=1e-3)
