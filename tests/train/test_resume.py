"""Stopped, resumed, diverged, or no longer better: what the training loop leaves behind."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from fitting import Stopped, interrupted_at, train, with_adapter
from unbackdoor.errors import Diverged
from unbackdoor.run import Run


@pytest.mark.parametrize(
    ("make", "accumulation"),
    [(lambda: tiny.tiny_lm("gpt2"), 1), (lambda: tiny.tiny_lm("gpt2"), 2), (lambda: with_adapter(tiny.tiny_lm()), 1)],
    ids=["gpt2-dropout", "gpt2-dropout-accumulation", "lora-dropout"],
)
def test_a_resumed_run_gives_the_same_bits(tmp_path, make, accumulation):
    whole = make()
    probabilities = {m.p for m in whole.model.modules() if isinstance(m, torch.nn.Dropout)}
    assert max(probabilities) > 0, "without dropout the random state would not be tested"
    changes = {"steps": 9, "save_every": 3, "accumulation": accumulation}
    straight = train(whole, Run(folder=tmp_path / "a"), **changes)
    broken = make()
    with pytest.raises(Stopped):
        train(broken, Run(folder=tmp_path / "b"), hook=interrupted_at(8 * accumulation), **changes)
    fresh = make()
    torch.manual_seed(999)
    resumed = train(fresh, Run(folder=tmp_path / "b"), **changes)
    assert tiny.same_weights(tiny.tensors(whole), tiny.tensors(fresh))
    assert not tiny.same_weights(tiny.tensors(whole), tiny.tensors(broken))
    drop = [{k: v for k, v in record.items() if k != "seconds"} for record in straight.history]
    assert drop == [{k: v for k, v in record.items() if k != "seconds"} for record in resumed.history]
    assert resumed.steps == 9


def test_a_resume_goes_on_from_the_checkpoint_and_not_from_the_start(tmp_path):
    with pytest.raises(Stopped):
        train(tiny.tiny_lm(), Run(folder=tmp_path), hook=interrupted_at(7), steps=8, save_every=3)
    done = []
    train(tiny.tiny_lm(), Run(folder=tmp_path), hook=lambda n, total: (done.append(n), total)[1], steps=8, save_every=3)
    assert len(done) == 2


def test_a_finished_stage_is_restored_and_not_done_again(tmp_path):
    lm = tiny.tiny_lm()
    first = train(lm, Run(folder=tmp_path))
    again = tiny.tiny_lm()
    second = train(again, Run(folder=tmp_path), hook=interrupted_at(0))
    assert tiny.same_weights(tiny.tensors(lm), tiny.tensors(again))
    assert (second.steps, second.history) == (first.steps, first.history)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final.safetensors", "finished.json"]


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_loss_that_is_not_finite_stops_with_the_last_checkpoint(tmp_path, on_disk):
    folder = tmp_path / "run" if on_disk else None
    good = tiny.tiny_lm()
    with pytest.raises(Stopped):
        train(good, Run(folder=None), hook=interrupted_at(4), save_every=4, warmup=0.0, schedule="constant")
    lm = tiny.tiny_lm()
    poison = lambda number, total: total * math.nan if number == 5 else total  # noqa: E731
    with pytest.raises(Diverged, match=r"diverged at step 6 \(loss nan.*back at step 4.*smaller learning rate"):
        train(lm, Run(folder=folder), hook=poison, save_every=4, warmup=0.0, schedule="constant")
    assert tiny.same_weights(tiny.tensors(lm), tiny.tensors(good))


def test_a_weight_that_is_not_finite_stops_at_once():
    lm = tiny.tiny_lm()
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[5, 0] = math.inf
    with pytest.raises(Diverged, match="step 1 "):
        train(lm)


def test_a_gradient_that_is_not_finite_stops_though_the_loss_is_finite():
    def hook(number, total):
        return total + torch.sqrt(total - total.detach()) if number == 1 else total

    with pytest.raises(Diverged, match=r"gradient norm (nan|inf)"):
        train(tiny.tiny_lm(), hook=hook)


def scores_of(values):
    rest = iter(values)
    return lambda: next(rest)


def test_early_stopping_keeps_the_weights_of_the_best_score(tmp_path):
    stopped = tiny.tiny_lm()
    result = train(
        stopped, Run(folder=tmp_path), score=scores_of([3.0, 1.0, 2.0, 2.0]), steps=20, evaluate_every=2, patience=2,
        schedule="constant", warmup=0.0,
    )  # fmt: skip
    assert (result.steps, result.stopped) == (8, "early")
    assert [record.get("held_out") for record in result.history] == [None, 3.0, None, 1.0, None, 2.0, None, 2.0]
    best = tiny.tiny_lm()
    train(best, steps=4, schedule="constant", warmup=0.0)
    assert tiny.same_weights(tiny.tensors(stopped), tiny.tensors(best))


def test_early_stopping_remembers_the_best_score_over_an_interruption(tmp_path):
    changes = {"steps": 12, "evaluate_every": 2, "patience": 9, "save_every": 3, "schedule": "constant", "warmup": 0.0}
    with pytest.raises(Stopped):
        train(
            tiny.tiny_lm(),
            Run(folder=tmp_path),
            score=scores_of([1.0, 2.0, 2.0, 2.0]),
            hook=interrupted_at(7),
            **changes,
        )
    lm, best = tiny.tiny_lm(), tiny.tiny_lm()
    train(lm, Run(folder=tmp_path), score=scores_of([2.0] * 9), **changes)
    train(best, steps=2, schedule="constant", warmup=0.0)
    assert tiny.same_weights(tiny.tensors(lm), tiny.tensors(best))
