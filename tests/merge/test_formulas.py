"""The methods as functions of tensors, against formulas written by hand in float64."""

from __future__ import annotations

import math

import pytest
import torch

from merge.helpers import ulps
from unbackdoor.errors import UserError
from unbackdoor.merge.dare import dare, stream, thin
from unbackdoor.merge.linear import linear
from unbackdoor.merge.passthrough import passthrough
from unbackdoor.merge.slerp import cosine, shares, slerp
from unbackdoor.merge.task_arithmetic import task_arithmetic
from unbackdoor.merge.ties import cut, ties, trim

SHAPE = (5, 7)


def tensors(count: int = 3, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=draw) for _ in range(count)]


def own(*given: torch.Tensor) -> list[torch.Tensor]:
    """Copies: the functions give up what they are given."""
    return [tensor.clone() for tensor in given]


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_linear_is_t_other_and_the_rest_suspect(t: float) -> None:
    a, b, _ = tensors()
    found = linear(own(a, b), [1 - t, t])
    assert found.dtype == torch.float32
    assert ulps(found, t * b.double() + (1 - t) * a.double(), torch.maximum(a.abs(), b.abs())) <= 1
    swapped = linear(own(b, a), [t, 1 - t])
    assert ulps(found, swapped.double(), torch.maximum(a.abs(), b.abs())) <= 1


def test_linear_divides_by_the_weights_only_where_asked() -> None:
    a, b, c = tensors()
    total = 2 * a.double() + b.double() + 5 * c.double()
    terms = torch.stack([2 * a, b, 5 * c]).abs().amax(0)
    assert ulps(linear(own(a, b, c), [2, 1, 5]), total, terms) <= 2
    assert ulps(linear(own(a, b, c), [2, 1, 5], normalize=True), total / 8, terms / 8) <= 2
    with pytest.raises(UserError, match="add up to 0"):
        linear(own(a, b), [1, -1], normalize=True)


def by_hand(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Equation 10, in float64."""
    x, y = a.double().flatten(), b.double().flatten()
    phi = torch.arccos((x / x.norm()) @ (y / y.norm()))
    found = torch.sin((1 - t) * phi) / torch.sin(phi) * x + torch.sin(t * phi) / torch.sin(phi) * y
    return found.reshape(a.shape)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_is_equation_10_of_the_tensors_as_they_are(t: float) -> None:
    a, b, _ = tensors()
    terms = torch.maximum(a.abs(), b.abs())
    assert ulps(slerp(*own(a, 3 * b), t), by_hand(a, 3 * b, t), 3 * terms) <= 2
    assert ulps(slerp(*own(a, b), t), slerp(*own(b, a), 1 - t).double(), terms) <= 2


def test_slerp_of_orthogonal_vectors() -> None:
    x, y = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    found = slerp(*own(x, y), 0.5)
    assert found.tolist() == pytest.approx([math.sqrt(2), math.sqrt(2)])
    assert slerp(*own(x, y), 1 / 3).tolist() == pytest.approx([2 * math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)])
    assert float(found.norm()) == pytest.approx(2.0)


def test_slerp_is_linear_where_tensors_are_nearly_parallel_and_the_threshold_can_be_moved() -> None:
    a, b, _ = tensors()
    near = a + 0.02 * b
    assert 0.9995 < cosine([(a, near)]) < 0.99999
    terms = torch.maximum(a.abs(), near.abs())
    assert ulps(slerp(*own(a, near), 0.3), 0.7 * a.double() + 0.3 * near.double(), terms) <= 1
    arc = slerp(*own(a, near), 0.3, threshold=1.0)
    assert ulps(arc, by_hand(a, near, 0.3), terms) <= 2
    assert ulps(arc, 0.7 * a.double() + 0.3 * near.double(), terms) > 10
    far = slerp(*own(a, b), 0.3, threshold=0.0)
    assert ulps(far, 0.7 * a.double() + 0.3 * b.double(), torch.maximum(a.abs(), b.abs())) <= 1


@pytest.mark.parametrize("factor", [1.0, -1.0, 2.0])
def test_slerp_of_parallel_opposite_and_zero_tensors_is_finite(factor: float) -> None:
    a, _, _ = tensors()
    found = slerp(*own(a, factor * a), 0.25, threshold=1.0)
    assert ulps(found, (0.75 + 0.25 * factor) * a.double(), a.abs()) <= 2
    assert slerp(torch.zeros(3), torch.zeros(3), 0.5).tolist() == [0, 0, 0]
    assert slerp(torch.zeros(2), torch.tensor([0.0, 1.0]), 1.0).tolist() == [0, 1]


def test_shares_do_not_depend_on_how_a_tensor_comes_in_blocks() -> None:
    a, b, _ = tensors()
    assert cosine([(a, b)]) == pytest.approx(cosine(zip(a.split(2), b.split(2), strict=True)), abs=1e-7)
    assert sum(shares(0.5, 0.0)) == pytest.approx(math.sqrt(2))


def test_task_arithmetic_adds_weighted_differences() -> None:
    base, a, b = tensors()
    x, y = a.double() - base.double(), b.double() - base.double()
    terms = torch.stack([base, a, b]).abs().amax(0) * 2
    found = task_arithmetic(base, own(a, b), [0.5, -2.0], scale=0.7)
    assert ulps(found, base.double() + 0.7 * (0.5 * x - 2 * y), terms) <= 4
    even = task_arithmetic(base, own(a, b), [2.0, 2.0], normalize=True)
    assert ulps(even, base.double() + (x + y) / 2, terms) <= 4
    assert torch.equal(base, tensors()[0])


def test_ties_by_hand() -> None:
    """Trim half of four, elect by the larger sum, average those that agree."""
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    first = base + torch.tensor([-0.3, 0.5, 0.1, 0.2])
    second = base + torch.tensor([-0.1, -0.6, 0.05, 0.4])
    kept = ties(base, own(first, second), [1, 1], [1.0, 1.0])
    # Agreeing negatives stay negative; of +0.5 and -0.6 only the larger one counts, whole.
    assert (kept - base).tolist() == pytest.approx([-0.2, -0.6, 0.075, 0.3], abs=1e-6)
    trimmed = ties(base, own(first, second), [1, 1], [0.5, 0.5])
    # What is left: [-0.3, 0.5, 0, 0] and [0, -0.6, 0, 0.4].
    assert (trimmed - base).tolist() == pytest.approx([-0.3, -0.6, 0.0, 0.4], abs=1e-6)
    weighted = ties(base, own(first, second), [3, 1], [1.0, 1.0], scale=2.0)
    assert (weighted - base).tolist() == pytest.approx([-0.5, 1.0, 0.175, 0.5], abs=1e-6)
    summed = ties(base, own(first, second), [1, 1], [1.0, 1.0], normalize=False)
    assert (summed - base).tolist() == pytest.approx([-0.4, -0.6, 0.15, 0.6], abs=1e-6)


def test_ties_is_not_equation_11_taken_literally() -> None:
    """Sign times signed mean would turn two negatives into +0.2, and half an entry where one model agrees."""
    base = torch.zeros(2)
    found = ties(base, own(torch.tensor([-0.3, 0.4]), torch.tensor([-0.1, -0.1])), [1, 1], [1.0, 1.0])
    assert found.tolist() == pytest.approx([-0.2, 0.4])


def test_ties_in_either_order_is_the_same() -> None:
    base, a, b = tensors()
    first = ties(base, own(a, b), [1, 2], [0.4, 0.6])
    assert torch.equal(first, ties(base, own(b, a), [2, 1], [0.6, 0.4]))


@pytest.mark.parametrize(("density", "kept"), [(0.0, 0), (0.001, 1), (0.5, 17), (0.99, 34), (1.0, 35)])
def test_trim_keeps_the_largest(density: float, kept: int) -> None:
    (delta,) = tensors(1)
    found = trim(delta.clone(), density)
    assert int((found != 0).sum()) == kept
    if 0 < kept < 35:
        assert float(found[found != 0].abs().min()) > float(delta[found == 0].abs().max())
    assert torch.equal(found[found != 0], delta[found != 0])


def test_trim_among_equals_keeps_the_first() -> None:
    found = trim(torch.tensor([1.0, -1.0, 2.0, 1.0, -1.0, 0.5]), 0.5)
    assert found.tolist() == [1.0, -1.0, 2.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("density", [0.0, 0.001, 0.3, 0.5, 0.9])
def test_trimming_in_blocks_is_trimming_the_whole(density: float) -> None:
    draw = torch.Generator().manual_seed(1)
    smooth = torch.randn((40, 30), generator=draw)
    for delta in (smooth, smooth.bfloat16().float(), torch.zeros(40, 30), (smooth * 2).round()):
        found = cut(lambda delta=delta: delta.split(7), density, delta.numel())
        parts = torch.cat([found.apply(block.clone()) for block in delta.split(7)])
        order = delta.abs().flatten().sort(descending=True, stable=True).indices
        kept = max(1, int(density * delta.numel())) if density else 0
        wanted = torch.zeros(delta.numel())
        wanted[order[:kept]] = delta.flatten()[order[:kept]]
        assert torch.equal(parts.flatten(), wanted)
        assert torch.equal(trim(delta.clone(), density), parts)


def test_draws_in_blocks_are_those_of_the_whole() -> None:
    delta = torch.randn(1000)
    whole, parts = stream(3, "w", 0), stream(3, "w", 0)
    wanted = thin(delta.clone(), 0.5, whole)
    assert torch.equal(torch.cat([thin(block.clone(), 0.5, parts) for block in delta.split(37)]), wanted)


def test_dare_keeps_the_expected_difference() -> None:
    delta = torch.full((400, 500), 0.5)
    found = thin(delta.clone(), 0.25, stream(0, "w", 0))
    kept = (found != 0).double().mean()
    assert set(found.unique().tolist()) == {0.0, 2.0}
    # Five standard deviations of the share of 200,000 draws.
    assert float(kept) == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 200_000))
    assert float(found.double().mean()) == pytest.approx(0.5, rel=0.02)


def test_dare_draws_depend_on_seed_name_and_model_alone() -> None:
    base, a, b = tensors()

    def once(seed: int, name: str) -> torch.Tensor:
        draws = [stream(seed, name, number) for number in range(2)]
        return dare(base, own(a, b), [0.5, 0.5], [0.5, 0.5], draws)

    first = once(1, "w")
    once(1, "v")
    assert torch.equal(first, once(1, "w"))
    assert not torch.equal(first, once(2, "w"))
    assert not torch.equal(first, once(1, "v"))
    masks = [thin(torch.ones(64), 0.5, stream(1, "w", number)) for number in range(2)]
    assert not torch.equal(*masks)


def test_dare_that_drops_everything_is_the_base() -> None:
    assert torch.equal(thin(torch.ones(3, 4), 0.0, stream(0, "x", 0)), torch.zeros(3, 4))


def test_dare_with_nothing_dropped_is_task_arithmetic_or_ties() -> None:
    base, a, b = tensors()
    draws = [stream(0, "w", number) for number in range(2)]
    plain = dare(base, own(a, b), [0.5, 0.7], [1.0, 1.0], draws, scale=0.9)
    assert torch.equal(plain, task_arithmetic(base, own(a, b), [0.5, 0.7], scale=0.9))
    agreeing = dare(base, own(a, b), [0.5, 0.7], [1.0, 1.0], draws, agreeing=True, normalize=True)
    assert torch.equal(agreeing, ties(base, own(a, b), [0.5, 0.7], [1.0, 1.0]))


def test_passthrough_copies_or_scales() -> None:
    (a,) = tensors(1)
    assert torch.equal(passthrough(a.clone()), a)
    assert torch.equal(passthrough(a.clone(), 0.5), a / 2)
