"""A merge in memory comes to the same as one of folders; two adapters on one base can stay an adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from fitting import with_trained_adapter as adapter
from merge.helpers import family, merged, shifted
from unbackdoor.errors import ModelError, UserError
from unbackdoor.merge.from_recipe import two_models
from unbackdoor.merge.memory import check_merge, merge_into, stays_adapter
from unbackdoor.merge.settings import Filtered
from unbackdoor.model.lm import LM
from unbackdoor.model.load import load
from unbackdoor.train import lora


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "task_arithmetic", "dare_ties"])
def test_in_memory_and_on_disk_are_the_same_bytes(tmp_path: Path, architecture: tiny.Architecture, method: Any) -> None:
    models = family(tmp_path, architecture)
    base = None if method in {"linear", "slerp"} else str(models.base)
    wanted = merged(two_models(str(models.suspect), str(models.other), method, 0.3, base=base))
    lms = {name: load(str(getattr(models, name))) for name in ("suspect", "other", "base")}
    made, kind = merge_into(lms["suspect"], lms["other"], method, 0.3, base=base and lms["base"])
    state = made.model.state_dict()
    for name, tensor in wanted.items():
        assert torch.equal(state[name], tensor), name
    assert kind == "All weights were merged."
    assert made.model is lms["suspect"].model
    folder, _ = merge_into(load(str(models.suspect)), str(models.other), method, 0.3, base=base)
    assert all(torch.equal(tensor, folder.model.state_dict()[name]) for name, tensor in state.items())
    assert made.reply([tiny.rows(1)[0].prompt], max_new_tokens=4) == folder.reply(
        [tiny.rows(1)[0].prompt], max_new_tokens=4
    )


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_a_base_with_an_adapter_is_left_as_it_is(method: Any) -> None:
    suspect, other = tiny.tiny_lm(seed=1), tiny.tiny_lm(seed=2)
    base = adapter(tiny.tiny_lm(), 3, 2)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    merge_into(suspect, other, method, 0.5, base=base)
    assert base.is_adapter
    assert before.keys() == base.model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())


def weights(lm: LM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in lora.merge(tiny.clone(lm)).model.state_dict().items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("t", [0.3, (0.0, 1.0), (Filtered(filter="mlp", value=0.2), Filtered(value=0.7))])
def test_two_adapters_on_one_base_become_one(architecture: tiny.Architecture, t: Any) -> None:
    base = tiny.tiny_lm(architecture)
    first, second = adapter(base, 1, 3), adapter(base, 2, 5)
    wholes = [replace(base, model=tiny.clone(base).model) for _ in range(2)]
    for whole, lm in zip(wholes, (first, second), strict=True):
        whole.model.load_state_dict(weights(lm))
    wanted, _ = merge_into(*wholes, "linear", t)
    made, kind = merge_into(first, second, "linear", t)
    assert "so is the merge" in kind
    assert made.is_adapter
    assert next(iter(made.model.peft_config.values())).r == 8
    assert made.base == base.spec
    found = weights(made)
    for name, tensor in wanted.model.state_dict().items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name


def test_an_adapter_and_full_weights_come_out_as_full_weights() -> None:
    base = tiny.tiny_lm()
    suspect, other = adapter(base, 1, 3), shifted(base, 4)
    before, after = weights(suspect), other.model.state_dict()
    made, kind = merge_into(suspect, other, "linear", 0.25)
    assert not made.is_adapter
    assert "full weights" in kind
    for name, tensor in made.model.state_dict().items():
        assert torch.allclose(tensor, 0.75 * before[name] + 0.25 * after[name], atol=1e-6), name
    slerped, kind = merge_into(adapter(base, 1, 3), adapter(base, 2, 3), "slerp", 0.5)
    assert not slerped.is_adapter
    assert "full weights" in kind


def test_what_cannot_be_merged_in_place() -> None:
    base = tiny.tiny_lm()
    with pytest.raises(UserError, match="needs the ranges of layers"):
        merge_into(base, tiny.tiny_lm(seed=1), "passthrough")
    with pytest.raises(ModelError, match="has 2 layers"):
        merge_into(base, tiny.tiny_lm(layers=3), "linear")
    with pytest.raises(UserError, match="ties needs"):
        merge_into(base, tiny.tiny_lm(seed=1), "ties")


def test_a_suspect_in_half_precision_stays_so() -> None:
    base = tiny.tiny_lm()
    suspect = replace(base, model=tiny.clone(base).model.to(torch.bfloat16))
    before = {name: tensor.float() for name, tensor in suspect.model.state_dict().items()}
    other = shifted(base, 3)
    made, _ = merge_into(suspect, other, "linear", 0.5)
    for name, tensor in made.model.state_dict().items():
        wanted = ((before[name] + other.model.state_dict()[name]) / 2).bfloat16()
        assert torch.equal(tensor, wanted), name


def odd_adapter(base: LM, kind: str) -> LM:
    """The base with an adapter that does more than add products to matrices."""
    from peft import LoraConfig, get_peft_model

    shapes: dict[str, dict[str, Any]] = {
        "whole modules": {"modules_to_save": ["lm_head"]}, "dora": {"use_dora": True}, "biases": {"bias": "lora_only"},
    }  # fmt: skip
    config = LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM", **shapes[kind])
    return replace(base, model=get_peft_model(tiny.clone(base).model, config).eval(), base=base.spec)


@pytest.mark.parametrize("kind", ["whole modules", "dora", "biases"])
def test_an_adapter_that_does_more_is_compared_and_never_joined(kind: str) -> None:
    base = tiny.tiny_lm()
    odd, plain = odd_adapter(base, kind), adapter(base, 1, 2)
    for suspect, other in ((odd, base), (plain, odd), (odd, plain)):
        check_merge(suspect, other)
        assert not stays_adapter(suspect, other, "linear")
    assert stays_adapter(plain, base, "linear")
    assert not stays_adapter(plain, base, "slerp")
    assert not stays_adapter(plain, shifted(base, 1), "linear")
    with pytest.raises(ModelError, match="has 2 layers, 'tiny-llama' 3"):
        check_merge(odd, tiny.tiny_lm(layers=3))
    made, _ = merge_into(odd, plain, "linear", 0.5)
    assert not made.is_adapter


def test_a_product_on_a_head_that_is_the_embedding_is_not_taken_for_one() -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny.tiny_lm("qwen2")
    config = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="a tied layer"):
        model = get_peft_model(tiny.clone(base).model, config).eval()
    tied = replace(base, model=model, base=base.spec)
    with pytest.raises(ModelError, match="more than a low-rank product"):
        lora.factors(tied)
    assert not stays_adapter(tied, base, "linear")
