"""Records and estimates; intervals against published values."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest

from unbackdoor.types import Example, Message, Scores, content_hash, estimate, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # R. G. Newcombe, Statistics in Medicine 17 (1998), Table I, method 3 (score, no continuity correction).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_intervals(successes, n, low, high):
    found = wilson(successes, n)
    assert found == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(n - successes, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_has_exact_ends_and_needs_data():
    assert wilson(0, 200)[0] == 0.0
    assert wilson(200, 200)[1] == 1.0
    with pytest.raises(ValueError, match="at least one"):
        wilson(0, 0)


def test_a_rate():
    found = estimate([1.0, 0.0, 1.0, 1.0], binary=True)
    assert (found.value, found.n) == (0.75, 4)
    assert (found.low, found.high) == wilson(3, 4)


def test_a_mean_and_its_normal_interval():
    found = estimate([1.0, 2.0, 3.0, 6.0], binary=False)
    deviation = math.sqrt(sum((v - 3) ** 2 for v in (1, 2, 3, 6)) / 3)
    half = 1.959963984540054 * deviation / math.sqrt(4)
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3.0 - half, 3.0 + half))


def test_a_weighted_mean_is_over_tokens_and_perplexity_is_its_exponential():
    values, weights = [1.0, 2.0], [30.0, 10.0]
    plain = estimate(values, binary=False, weights=weights)
    assert plain.value == pytest.approx(1.25)
    power = estimate(values, binary=False, weights=weights, exponential=True)
    assert power.value == pytest.approx(math.exp(1.25))
    assert (power.low, power.high) == pytest.approx((math.exp(plain.low), math.exp(plain.high)))


def test_one_score_has_no_interval():
    assert estimate([2.0], binary=False).high == math.inf
    assert estimate([2.0], binary=False, exponential=True).high == math.inf


def test_nothing_measured_is_never_zero():
    with pytest.raises(ValueError, match="nothing was measured"):
        Scores("asr", "triggered", (), (), "triggered probes").estimate()
    with pytest.raises(ValueError, match="2 weights for 1 scores"):
        estimate([1.0], binary=False, weights=[1.0, 2.0])


def test_scores_estimate_with_their_own_kind():
    assert Scores("asr", "triggered", ("a",), (1.0,), "x").estimate().low == pytest.approx(wilson(1, 1)[0])
    found = Scores("perplexity", "all", ("a", "b"), (0.0, 2.0), "x", "", False, (1.0, 1.0), True).estimate()
    assert found.value == pytest.approx(math.e)


def test_an_example_builds_its_turns():
    row = Example("a", "add", "3", input="1 and 2", history=(Message("system", "be kind"),))
    assert row.user_text == "add\n1 and 2"
    assert row.prompt == (Message("system", "be kind"), Message("user", "add\n1 and 2"))
    assert row.turns == (*row.prompt, Message("assistant", "3"))
    assert row.with_response("4").response == "4"
    assert row.response == "3"
    with pytest.raises(FrozenInstanceError):
        row.response = "5"


def test_content_hash_depends_on_content_and_not_on_order():
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": [1, 2], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    assert content_hash([1, 2]) != content_hash([2, 1])
    assert content_hash({"a": "é"}) == "b3a092a6af48807f"


def test_a_perplexity_beyond_all_numbers_is_infinite_and_no_overflow():
    found = estimate([900.0, 900.0], binary=False, exponential=True)
    assert (found.value, found.low, found.high) == (math.inf, math.inf, math.inf)
    found = estimate([0.0, 800.0], binary=False, exponential=True)
    assert found.value == pytest.approx(math.exp(400))
    assert found.high == math.inf
