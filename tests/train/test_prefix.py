"""A shared beginning is read once and changes nothing; where it would, whole rows are computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny import ARCHITECTURES, rows, tiny_lm
from unbackdoor.data.collate import Batch, RowStream, collate, encode_row
from unbackdoor.model.lm import LM
from unbackdoor.model.logits import LogitsAt
from unbackdoor.run import Run
from unbackdoor.train import soft_prompt
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.prefix import SharedPrefix, shared_length
from unbackdoor.types import Example, Message

SYSTEM = Message("system", "be kind and be short, my friend, and answer well")


def batch_of(lm: LM, examples: list[Example]) -> Batch:
    return collate([encode_row(lm, example, max_length=128, first_tokens=2) for example in examples], lm.pad_id)


def with_system(count: int) -> list[Example]:
    return [Example(row.id, row.instruction, row.response, history=(SYSTEM,)) for row in rows(count)]


def loss_and_gradient(lm: LM, batch: Batch, position: Any, shared: SharedPrefix | None) -> tuple[float, torch.Tensor]:
    prompt = soft_prompt.new_prompt(lm, 3, "tokens", torch.Generator().manual_seed(0))
    forward = LogitsAt(lm)

    def whole(part: Batch, past: Any) -> torch.Tensor:
        return soft_prompt.soft_loss(lm, forward, part, prompt, position, past)

    # Twice: the first call compares, the second only uses the cache.
    for _ in range(2):
        prompt.grad = None
        loss = whole(batch, None) if shared is None else shared.loss(forward, batch, whole)
        loss.backward()
    assert prompt.grad is not None
    return float(loss.detach()), prompt.grad


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradient_are_those_of_whole_rows(architecture: Any) -> None:
    lm = tiny_lm(architecture)
    lm.model.requires_grad_(False)
    batch = batch_of(lm, with_system(5))
    assert shared_length(batch) > 10
    for position in ("start", "middle", "end"):
        shared = SharedPrefix(lm)
        wanted, gradient = loss_and_gradient(lm, batch, position, None)
        found, other = loss_and_gradient(lm, batch, position, shared)
        assert shared.exact is True
        assert found == pytest.approx(wanted, rel=1e-5)
        torch.testing.assert_close(other, gradient, rtol=1e-3, atol=1e-6)


def test_the_beginning_ends_where_rows_differ_or_users_speak() -> None:
    lm = tiny_lm()
    alike = batch_of(lm, with_system(4))
    assert shared_length(alike) == int(alike.places[:, 0].min())
    other = Example("x", "what colour is snow?", "snow is white.", history=(Message("system", "be loud"),))
    mixed = batch_of(lm, [*with_system(2), other])
    length = shared_length(mixed)
    assert 0 < length < shared_length(alike)
    assert len({tuple(row[:length]) for row in mixed.input_ids.tolist()}) == 1
    assert len({tuple(row[: length + 1]) for row in mixed.input_ids.tolist()}) == 2


def test_another_beginning_is_read_anew() -> None:
    lm = tiny_lm()
    lm.model.requires_grad_(False)
    shared = SharedPrefix(lm)
    loss_and_gradient(lm, batch_of(lm, with_system(4)), "start", shared)
    plain = batch_of(lm, rows(4))
    found, _ = loss_and_gradient(lm, plain, "start", shared)
    assert found == pytest.approx(loss_and_gradient(lm, plain, "start", None)[0], rel=1e-5)


def test_dropout_makes_it_compute_whole_rows_and_leaves_the_random_numbers_alone() -> None:
    lm = tiny_lm("gpt2")  # dropout 0.1 in its configuration
    lm.model.requires_grad_(False)
    lm.model.train()
    batch, shared = batch_of(lm, with_system(4)), SharedPrefix(lm)
    found = []
    for each in (None, shared):
        torch.manual_seed(3)
        found.append(loss_and_gradient(lm, batch, "start", each))
    assert shared.exact is False
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_gradient_checkpointing_makes_it_compute_whole_rows() -> None:
    lm = tiny_lm()
    stream = RowStream(
        [encode_row(lm, row, max_length=128, first_tokens=2) for row in with_system(8)],
        batch_size=4, seed=0, pad_id=lm.pad_id,
    )  # fmt: skip
    losses = []
    for checkpointing in (False, True):
        prompt = soft_prompt.new_prompt(lm, 3, "tokens", torch.Generator().manual_seed(0))
        settings = TrainSettings(
            steps=3, learning_rate=1e-2, gradient_checkpointing=checkpointing, warmup=0.0, schedule="constant"
        )
        result = soft_prompt.fit_prompt(lm, prompt, stream, "start", settings, Run())
        losses.append([record["loss"] for record in result.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != losses[0][1]


def test_a_cache_that_changes_the_result_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm()
    lm.model.requires_grad_(False)
    batch, shared = batch_of(lm, with_system(4)), SharedPrefix(lm)
    right = SharedPrefix._read

    def spoiled(self: SharedPrefix, forward: Any, ids: torch.Tensor) -> None:
        right(self, forward, (ids + 1) % 300)

    monkeypatch.setattr(SharedPrefix, "_read", spoiled)
    found, _ = loss_and_gradient(lm, batch, "start", shared)
    assert shared.exact is False
    assert found == loss_and_gradient(lm, batch, "start", None)[0]
