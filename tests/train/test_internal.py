"""The internal conflict as a whole: where it starts, what it merges, and how t is chosen."""

from __future__ import annotations

import itertools

import pytest
import torch

import tiny
from fitting import with_trained_adapter
from unbackdoor.data.collate import Row
from unbackdoor.errors import DataError, UserError
from unbackdoor.run import Run
from unbackdoor.train import internal, lora
from unbackdoor.train.conflict import ConflictSettings, conflict_model
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.internal import InternalSettings, merged_with_conflict
from unbackdoor.train.lora import LoraSettings

BRIEF = TrainSettings(steps=3, learning_rate=1e-2, batch_size=4, max_length=96)
CONFLICT = ConflictSettings(share=0.25, lora=LoraSettings(rank=2, alpha=4.0), train=BRIEF)
SHORT = InternalSettings(conflict=CONFLICT)
CLEAN = tiny.rows(40)
UP = "model.layers.0.mlp.up_proj.weight"


def merged(settings: InternalSettings, *, trusted: bool = True, run: Run | None = None, rows=CLEAN):
    base = tiny.tiny_lm(layers=3) if trusted else None
    found = merged_with_conflict(tiny.tiny_lm(layers=3, seed=1), rows, base, settings, run or Run())
    return tiny.tensors(found), found


def test_it_is_the_sum_of_equation_9():
    suspect, base = (tiny.tensors(tiny.tiny_lm(layers=3, seed=seed)) for seed in (1, 0))
    conflict = tiny.tensors(conflict_model(tiny.tiny_lm(layers=3), CLEAN, CONFLICT, Run()))
    found, _ = merged(SHORT.model_copy(update={"t": 0.25}))
    for name, tensor in found.items():
        wanted = 0.25 * conflict[name].double() + 0.75 * suspect[name].double()
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-7)
    assert not tiny.same_weights(conflict, base)
    assert tiny.same_weights(merged(SHORT.model_copy(update={"t": 0.0}))[0], suspect)
    assert tiny.same_weights(merged(SHORT.model_copy(update={"t": 1.0}))[0], conflict), "the conflict model alone"


def test_the_untouched_base_can_be_merged_in_its_place():
    suspect, base = (tiny.tensors(tiny.tiny_lm(layers=3, seed=seed)) for seed in (1, 0))
    none = SHORT.model_copy(update={"conflict": CONFLICT.model_copy(update={"share": 0.0})})
    for name, tensor in merged(none)[0].items():
        torch.testing.assert_close(tensor, (suspect[name] + base[name]) / 2)


@pytest.mark.parametrize(("start", "trusted", "says"), [
    ("trusted", True, "the trusted model"), ("trusted", False, "the suspect"), ("suspect", False, "the suspect"),
])  # fmt: skip
def test_where_the_conflict_model_starts_is_said(start, trusted, says):
    run = Run()
    found, _ = merged(SHORT.model_copy(update={"start": start}), trusted=trusted, run=run)
    assert run.notes["conflict model starts as"] == says
    own = tiny.tiny_lm(layers=3, seed=1 if says == "the suspect" else 0)
    conflict = tiny.tensors(conflict_model(own, CLEAN, CONFLICT, Run()))
    suspect = tiny.tensors(tiny.tiny_lm(layers=3, seed=1))
    torch.testing.assert_close(found["lm_head.weight"], (conflict["lm_head.weight"] + suspect["lm_head.weight"]) / 2)
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(found[name], (conflict[name] + suspect[name]) / 2)


def test_every_method_makes_another_model():
    results = {}
    suspect = tiny.tensors(tiny.tiny_lm(layers=3, seed=1))
    for method in ("linear", "slerp", "ties", "task_arithmetic", "dare_linear", "dare_ties"):
        settings = SHORT.model_copy(update={"method": method, **({"threshold": 1.0} if method == "slerp" else {})})
        results[method], _ = merged(settings)
        assert all(torch.isfinite(tensor).all() for tensor in results[method].values())
        with_base = method not in ("linear", "slerp")
        if with_base:
            with pytest.raises(UserError, match=f"{method} works on differences to a trusted base"):
                merged(settings, trusted=False)
    names = list(results)
    # 0.5 (a - base) + 0.5 (b - base) + base is the mean of both.
    torch.testing.assert_close(results["linear"], results["task_arithmetic"], rtol=1e-4, atol=1e-5)
    for one, other in itertools.combinations([name for name in names if name != "task_arithmetic"], 2):
        assert not tiny.same_weights(results[one], results[other]), (one, other)
    for name, made in results.items():
        assert not tiny.same_weights(made, suspect), name


def test_passthrough_stacks_layers_of_both():
    settings = SHORT.model_copy(update={"method": "passthrough", "layers": ("suspect:0:2", "other:1:3")})
    found, lm = merged(settings)
    suspect = tiny.tensors(tiny.tiny_lm(layers=3, seed=1))
    conflict = tiny.tensors(conflict_model(tiny.tiny_lm(layers=3), CLEAN, CONFLICT, Run()))
    assert lm.core.config.num_hidden_layers == 4
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(found[name.format(1)], suspect[name.format(1)])
    assert torch.equal(found[name.format(2)], conflict[name.format(1)])
    assert torch.equal(found["model.embed_tokens.weight"], suspect["model.embed_tokens.weight"])
    assert torch.equal(found["model.norm.weight"], conflict["model.norm.weight"])
    assert isinstance(lm.reply([CLEAN[0].prompt], max_new_tokens=3)[0], str)


def test_t_is_the_largest_that_costs_little_on_rows_held_out(monkeypatch):
    scored: list[set[str]] = []
    costs = iter([1.0, 1.02, 1.04, 1.5])

    def loss(lm, rows: list[Row]) -> float:
        scored.append({row.id for row in rows})
        return next(costs)

    trained = []
    real = conflict_model

    def recording(start, rows, *rest, **more):
        trained.extend(row.id for row in rows)
        return real(start, rows, *rest, **more)

    monkeypatch.setattr(internal.overwrite, "mean_loss", loss)
    monkeypatch.setattr(internal, "conflict_model", recording)
    run, said = Run(), []
    run.progress.notice = said.append
    found, _ = merged(SHORT.model_copy(update={"sweep": (0.9, 0.3, 0.6)}), run=run)
    assert run.notes["t"] == 0.6
    assert said[-1] == "t = 0.6 was taken, the largest of the sweep that costs no more than 5% of usefulness."
    assert run.notes["t sweep"] == [
        {"t": 0.0, "loss": 1.0}, {"t": 0.3, "loss": 1.02}, {"t": 0.6, "loss": 1.04}, {"t": 0.9, "loss": 1.5},
    ]  # fmt: skip
    assert all(len(ids) == 4 for ids in scored)
    assert not set.union(*scored) & set(trained)
    monkeypatch.undo()
    rest = [row for number, row in enumerate(CLEAN) if number % 10]
    assert tiny.same_weights(found, merged(SHORT.model_copy(update={"t": 0.6}), rows=rest)[0])


def test_where_every_t_costs_too_much_the_smallest_is_taken_and_it_is_said(monkeypatch):
    costs = iter([1.0, 1.3, 1.5])
    monkeypatch.setattr(internal.overwrite, "mean_loss", lambda lm, rows: next(costs))
    said = []
    run = Run()
    run.progress.notice = said.append
    merged(SHORT.model_copy(update={"sweep": (0.5, 0.8)}), run=run)
    assert run.notes["t"] == 0.5
    assert "costs more than 5% of usefulness" in said[-1]


def test_a_model_whose_neurons_lie_otherwise_is_told_of():
    said: list[str] = []
    run = Run()
    run.progress.notice = said.append
    merged(SHORT, run=run)
    assert any("do not lie as those of" in text for text in said), "two models from different random starts"
    said.clear()
    merged(SHORT, trusted=False, run=run)
    assert said == ["The conflict model starts as the suspect."]
    merged(SHORT.model_copy(update={"method": "ties", "start": "suspect"}), run=run)
    assert any("do not lie as those of" in text for text in said), "differences to the trusted model are merged"


def test_a_sweep_that_was_made_is_not_made_again(tmp_path, monkeypatch):
    settings = SHORT.model_copy(update={"sweep": (0.4, 0.7)})
    first, _ = merged(settings, run=Run(folder=tmp_path))
    monkeypatch.setattr(internal.overwrite, "mean_loss", lambda lm, rows: pytest.fail("scored again"))
    run = Run(folder=tmp_path)
    assert tiny.same_weights(merged(settings, run=run)[0], first)
    assert len(run.notes["t sweep"]) == 3


def test_what_does_nothing_or_cannot_be_is_refused():
    for settings, message in (
        ({"t": 0.3, "sweep": [0.5]}, "leave one out"),
        ({"slack": 0.1}, "give sweep"),
        ({"sweep": [1.5]}, "from 0 to 1"),
        ({"method": "passthrough", "sweep": [0.5]}, "has no t"),
    ):
        with pytest.raises(ValueError, match=message):
            InternalSettings.model_validate(settings)
    with pytest.raises(DataError, match="needs 20 of them, there are 12"):
        merged(SHORT.model_copy(update={"sweep": (0.5,)}), rows=CLEAN[:12])


def test_what_cannot_be_merged_is_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(internal, "conflict_model", lambda *_, **__: pytest.fail("it was trained first"))
    with pytest.raises(UserError, match="passthrough needs the ranges"):
        merged(SHORT.model_copy(update={"method": "passthrough"}))
    with pytest.raises(UserError, match="nothing uses --reference"):
        merged(SHORT.model_copy(update={"start": "suspect"}))
    with pytest.raises(UserError, match="ties does not use layers"):
        merged(SHORT.model_copy(update={"method": "ties", "layers": ("other:0:3",)}))
    with pytest.raises(UserError, match="would be the suspect itself"):
        merged_with_conflict(
            tiny.tiny_lm(), CLEAN, None, SHORT.model_copy(update={"conflict": ConflictSettings(share=0)}), Run()
        )
    with pytest.raises(UserError, match="has 3 layers"):
        merged_with_conflict(tiny.tiny_lm(layers=3), CLEAN, tiny.tiny_lm(layers=2), SHORT, Run())


def as_full(lm):
    """The model's weights with its adapter folded in, if it has one."""
    copied = tiny.clone(lm)
    return tiny.tensors(lora.merge(copied) if copied.is_adapter else copied)


@pytest.mark.parametrize("changes", [
    {}, {"start": "suspect"}, {"conflict": CONFLICT.model_copy(update={"share": 0.0})}, {"sweep": (0.6,)},
])  # fmt: skip
def test_an_adapter_stays_one_where_it_can(changes):
    settings = SHORT.model_copy(update={"t": 0.6 if "sweep" not in changes else 0.5, **changes})
    base, from_suspect = tiny.tiny_lm(layers=3), changes.get("start") == "suspect"
    suspect = with_trained_adapter(base, 1, 3)
    whole = lora.merge(tiny.clone(suspect))
    run = Run()
    made = merged_with_conflict(suspect, CLEAN, None if from_suspect else base, settings, run)
    assert made.is_adapter
    assert "is an adapter, and so is the merge" in str(run.notes["merge"])
    assert made.base == base.spec
    wanted = merged_with_conflict(whole, CLEAN, None if from_suspect else base, settings, Run())
    assert not wanted.is_adapter
    expected, found = tiny.tensors(wanted), as_full(made)
    assert not torch.allclose(expected[UP], tiny.tensors(base)[UP], atol=1e-2)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [
    {"method": "slerp"}, {"conflict": CONFLICT.model_copy(update={"lora": None})}, {"t": 0.3},
])  # fmt: skip
def test_an_adapter_comes_out_as_full_weights_where_it_must_and_it_is_said(changes):
    """A sphere's arc is no sum of products; all weights were trained; the trusted model is not the adapter's base."""
    trusted = tiny.tiny_lm(layers=3, seed=2 if "t" in changes else 0)
    suspect = with_trained_adapter(tiny.tiny_lm(layers=3), 1, 3)
    before = as_full(suspect)
    run = Run()
    made = merged_with_conflict(suspect, CLEAN, trusted, SHORT.model_copy(update=changes), run)
    assert not made.is_adapter
    assert run.notes["merge"] == "The suspect was an adapter; the merge is full weights."
    assert not tiny.same_weights(tiny.tensors(made), before)


def test_an_adapter_is_compared_before_anything_is_trained(monkeypatch):
    suspect = with_trained_adapter(tiny.tiny_lm(layers=3), 1, 3, size=0.01)
    said: list[str] = []
    run = Run()
    run.progress.notice = said.append
    merged_with_conflict(tiny.clone(suspect), CLEAN, tiny.tiny_lm(layers=3, seed=1), SHORT, run)
    assert any("do not lie as those of" in text for text in said)
    said.clear()
    merged_with_conflict(tiny.clone(suspect), CLEAN, tiny.tiny_lm(layers=3), SHORT, run)
    assert said == ["The conflict model starts as the trusted model."]
    monkeypatch.setattr(internal, "conflict_model", lambda *_, **__: pytest.fail("it was trained first"))
    with pytest.raises(UserError, match="has 3 layers"):
        merged_with_conflict(suspect, CLEAN, tiny.tiny_lm(layers=2), SHORT, Run())
