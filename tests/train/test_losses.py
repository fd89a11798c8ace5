"""Losses against sums written out."""

from __future__ import annotations

import math

import pytest
import torch

from unbackdoor.train.losses import cross_entropy_sum, kl_each


def test_cross_entropy_is_the_sum_of_negative_log_probabilities():
    logits = torch.tensor([[math.log(0.2), math.log(0.8)], [math.log(0.5), math.log(0.5)]])
    found = cross_entropy_sum(logits, torch.tensor([1, 0]), torch.ones(2))
    assert float(found) == pytest.approx(-math.log(0.8) - math.log(0.5), rel=1e-6)


def test_cross_entropy_counts_each_position_by_its_weight():
    logits = torch.tensor([[math.log(0.2), math.log(0.8)], [math.log(0.5), math.log(0.5)]])
    found = cross_entropy_sum(logits, torch.tensor([1, 0]), torch.tensor([3.0, 0.5]))
    assert float(found) == pytest.approx(-3 * math.log(0.8) - 0.5 * math.log(0.5), rel=1e-6)


def test_kl_against_the_definition():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    after = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    found = kl_each(before, after)
    for row in range(5):
        p = [math.exp(v) for v in before[row].tolist()]
        q = [math.exp(v) for v in after[row].tolist()]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        assert float(found[row]) == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-9)
    assert kl_each(before, before).abs().max() < 1e-12
    assert (found > 0).all()
    assert not torch.allclose(found, kl_each(after, before)), "KL has a direction"
