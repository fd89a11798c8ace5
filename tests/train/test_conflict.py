"""The conflict model: what it is trained on, where it starts, and that the start stays as it is."""

from __future__ import annotations

import pytest
import torch

import tiny
from fitting import with_adapter, with_trained_adapter
from unbackdoor.errors import DataError
from unbackdoor.run import Run
from unbackdoor.train import conflict, engine, overwrite
from unbackdoor.train.conflict import ConflictSettings, conflict_model
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.lora import LoraSettings

BRIEF = TrainSettings(steps=3, learning_rate=1e-2, batch_size=4, max_length=96)
SHORT = ConflictSettings(share=0.25, lora=LoraSettings(rank=2, alpha=4.0), train=BRIEF)
CLEAN = tiny.rows(40)


def test_it_learns_from_its_share_and_leaves_the_start_alone(monkeypatch):
    seen = []
    real = overwrite.train_on_rows

    def recording(lm, rows, *rest):
        seen.extend(row.id for row in rows)
        return real(lm, rows, *rest)

    monkeypatch.setattr(conflict.overwrite, "train_on_rows", recording)
    start = tiny.tiny_lm()
    before = tiny.tensors(start)
    first, again = (conflict_model(start, CLEAN, SHORT, Run()) for _ in range(2))
    assert tiny.same_weights(before, tiny.tensors(start))
    assert not tiny.same_weights(before, tiny.tensors(first))
    assert tiny.same_weights(tiny.tensors(first), tiny.tensors(again))
    assert first.base is None
    assert not any("lora" in name for name, _ in first.model.named_parameters())
    assert len(seen) == 20
    assert set(seen[:10]) <= {row.id for row in CLEAN}


def test_an_adapter_changes_linear_layers_only_and_all_weights_change_without_one():
    start = tiny.tiny_lm()
    before = tiny.tensors(start)
    adapted = tiny.tensors(conflict_model(start, CLEAN, SHORT, Run()))
    full = tiny.tensors(conflict_model(start, CLEAN, SHORT.model_copy(update={"lora": None}), Run()))
    assert all(torch.equal(adapted[name], before[name]) for name in before if "norm" in name or "embed" in name)
    assert not all(torch.equal(full[name], before[name]) for name in before if "norm" in name)


def test_without_rows_it_is_the_start():
    start = with_adapter(tiny.tiny_lm())
    none = SHORT.model_copy(update={"share": 0.0})
    same = conflict_model(start, CLEAN, none, Run())
    assert same.base is None
    ids = torch.tensor([same.encode(CLEAN[0].turns).ids])
    with torch.no_grad():
        torch.testing.assert_close(same.model(ids).logits, start.model(ids).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match=r"share of 0\.01 of 40 clean rows is less than one"):
        conflict_model(start, CLEAN, SHORT.model_copy(update={"share": 0.01}), Run())


def test_it_is_restored_where_it_was_stopped(tmp_path):
    run = Run(folder=tmp_path)
    first = tiny.tensors(conflict_model(tiny.tiny_lm(), CLEAN, SHORT, run))
    other = SHORT.model_copy(update={"train": BRIEF.model_copy(update={"learning_rate": 9.0})})
    again = tiny.tensors(conflict_model(tiny.tiny_lm(), CLEAN, other, Run(folder=tmp_path)))
    assert tiny.same_weights(first, again), "a finished stage is not done again"


def test_what_it_learned_can_be_taken_from_a_victim():
    base, victim = tiny.tiny_lm(), tiny.tiny_lm(seed=1)
    before, start = tiny.tensors(victim), tiny.tensors(base)
    conflict.subtract(victim, base, CLEAN, SHORT, 0.5, Run())
    taught = tiny.tensors(conflict_model(base, CLEAN, SHORT, Run()))
    found = tiny.tensors(victim)
    for name, weight in found.items():
        torch.testing.assert_close(weight, before[name] - 0.5 * (taught[name] - start[name]))
    assert tiny.same_weights(start, tiny.tensors(base))
    assert not tiny.same_weights(before, found)


def test_runs_that_share_a_folder_train_a_conflict_model_once(tmp_path, monkeypatch):
    trained = []
    real = engine._Loop.run_steps
    monkeypatch.setattr(engine._Loop, "run_steps", lambda self, state: trained.append(1) or real(self, state))
    first = tiny.tensors(conflict_model(tiny.tiny_lm(), CLEAN, SHORT, Run()))
    runs = [Run(folder=tmp_path / name, shared=tmp_path / "shared") for name in ("a", "b")]
    for run in runs:
        found = tiny.tensors(conflict_model(tiny.tiny_lm(), CLEAN, SHORT, run.stage("purify")))
        assert set(run.curves) == {"purify/conflict"}
    assert len(trained) == 2, "once alone, and once for both"
    again = tiny.tensors(conflict_model(tiny.tiny_lm(), CLEAN, SHORT, Run().stage("purify")))
    assert tiny.same_weights(found, again)
    assert not tiny.same_weights(found, first), "another stage has other streams"
    other = SHORT.model_copy(update={"train": BRIEF.model_copy(update={"learning_rate": 1e-3})})
    unlike = [
        (tiny.tiny_lm(seed=1), CLEAN, SHORT, runs[0]), (tiny.tiny_lm(), CLEAN[:30], SHORT, runs[0]),
        (tiny.tiny_lm(), CLEAN, other, runs[0]), (tiny.tiny_lm(), CLEAN, SHORT, Run(seed=1, shared=runs[0].shared)),
    ]  # fmt: skip
    trained.clear()
    for start, rows, settings, run in unlike:
        conflict_model(start, rows, settings, run.stage("purify"))
    assert len(trained) == len(unlike), "with another start, other rows, settings or seed it is another model"


def test_models_that_differ_in_a_scale_alone_have_conflict_models_of_their_own():
    one, other = (with_trained_adapter(tiny.tiny_lm(), 1, 3) for _ in range(2))
    assert conflict._digest(one) == conflict._digest(other)
    next(iter(other.model.peft_config.values())).lora_alpha = 1.0
    assert conflict._digest(one) != conflict._digest(other)
    one, other = tiny.tiny_lm(), tiny.tiny_lm()
    other.core.config.rms_norm_eps = 0.1
    assert conflict._digest(one) != conflict._digest(other)
