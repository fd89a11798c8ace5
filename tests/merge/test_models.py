"""Whole saved models merged: against formulas, with tied, sharded, half-precision, adapted and mismatched ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import tiny
import unbackdoor
from merge.helpers import Family, check, family, merged, reply, save, shifted, stored, ulps, written
from unbackdoor.errors import ModelError, UserError
from unbackdoor.merge.from_recipe import two_models
from unbackdoor.merge.match import directions, warning
from unbackdoor.merge.settings import Filtered
from unbackdoor.merge.source import open_source


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family(tmp_path_factory.mktemp("llama"))


def two(models: Family, method: Any = "linear", t: Any = 0.5, **more: Any) -> Any:
    base = str(models.base) if method not in {"linear", "slerp"} else None
    return two_models(str(models.suspect), str(models.other), method, t, base=base, **more)


def by_sign(x: torch.Tensor, y: torch.Tensor, t: float) -> torch.Tensor:
    """TIES without trimming, entry by entry."""
    found = torch.zeros_like(x).flatten()
    for place, (a, b) in enumerate(zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)):
        positive = (1 - t) * a + t * b >= 0
        agree = [(w, v) for w, v in ((1 - t, a), (t, b)) if (v > 0 if positive else v < 0)]
        found[place] = sum(w * v for w, v in agree) / (sum(w for w, _ in agree) or 1.0)
    return found.reshape(x.shape)


def arc(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    phi = torch.arccos(((a / a.norm()) * (b / b.norm())).sum())
    return torch.sin((1 - t) * phi) / torch.sin(phi) * a + torch.sin(t * phi) / torch.sin(phi) * b


def test_linear_and_task_arithmetic_of_whole_models(models: Family) -> None:
    check(merged(two(models, t=0.3)), models, lambda m: 0.7 * m["suspect"] + 0.3 * m["other"])
    check(
        merged(two(models, "task_arithmetic", 0.3, scale=0.5)),
        models,
        lambda m: m["base"] + 0.5 * (0.7 * (m["suspect"] - m["base"]) + 0.3 * (m["other"] - m["base"])),
    )


def test_slerp_and_ties_of_whole_models(tmp_path: Path) -> None:
    far = family(tmp_path, layers=1, size=0.5)
    check(merged(two(far, "slerp", 0.3, threshold=1.0)), far, lambda m: arc(m["suspect"], m["other"], 0.3))
    held = [stored(folder) for folder in (far.base, far.suspect, far.other)]
    for name, tensor in merged(two(far, "ties", 0.4, density=1.0)).items():
        base, a, b = (one[name].double() for one in held)
        wanted = base + by_sign(a - base, b - base, 0.4)
        # Where the two differences cancel, rounding elects.
        sure = (0.6 * (a - base) + 0.4 * (b - base)).abs() > 1e-6 * (a.abs() + b.abs() + base.abs())
        assert float(sure.double().mean()) > 0.99
        terms = torch.stack([base, a, b]).abs().amax(0)
        assert ulps(tensor[sure], wanted[sure], terms[sure]) <= 4, name


def test_trimming_leaves_the_base_where_nothing_is_kept(models: Family) -> None:
    found, base = merged(two(models, "ties", density=0.1)), stored(models.base)
    for name, tensor in found.items():
        changed = float((tensor != base[name]).double().mean())
        assert 0 < changed <= 0.2 + 2 / tensor.numel(), name


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "task_arithmetic", "dare_linear"])
def test_the_ends_are_the_models_bit_for_bit(
    tmp_path: Path, architecture: tiny.Architecture, dtype: torch.dtype, method: str
) -> None:
    models = family(tmp_path, architecture, dtype=dtype, layers=1)
    whole = {"density": 1.0} if method in {"ties", "dare_linear"} else {}
    for t, folder in ((0, models.suspect), (1, models.other)):
        found, wanted = merged(two(models, method, t, **whole)), stored(folder)
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            assert tensor.dtype == wanted[name].dtype
            assert torch.equal(tensor.view(torch.uint8), wanted[name].view(torch.uint8)), name


def test_negative_zeros_survive_at_the_ends(tmp_path: Path) -> None:
    models = family(tmp_path, layers=1)
    content = stored(models.suspect)
    content["model.norm.weight"][:4] = torch.tensor([-0.0, 0.0, -0.0, 1.0])
    save_file(content, models.suspect / "model.safetensors", metadata={"format": "pt"})
    found = merged(two(models, t=0.0))["model.norm.weight"]
    assert torch.equal(found.view(torch.int32), content["model.norm.weight"].view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    models = family(tmp_path, dtype=dtype, layers=1)
    a, b = stored(models.suspect), stored(models.other)
    for name, tensor in merged(two(models, t=0.3)).items():
        exact = (0.7 * a[name].double() + 0.3 * b[name].double()).to(dtype)
        # float32 may land on the other side of a tie between two values of the type.
        assert float((tensor != exact).double().mean()) < 0.001, name
        assert tensor.dtype == dtype


def test_types_may_differ_and_the_result_has_those_of_the_suspect(tmp_path: Path) -> None:
    base = tiny.tiny_lm(layers=1)
    first, second = shifted(base, 1), shifted(base, 2)
    half = save(first, tmp_path / "half", dtype=torch.bfloat16)
    full = save(second, tmp_path / "full")
    found = merged(two_models(str(half), str(full), t=0.5))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    a, b = stored(half)["model.norm.weight"], stored(full)["model.norm.weight"]
    assert torch.equal(found["model.norm.weight"], ((a.float() + b) / 2).bfloat16())
    back = merged(two_models(str(full), str(half), t=0.5))
    assert {tensor.dtype for tensor in back.values()} == {torch.float32}


def test_sharded_models_come_out_in_the_same_shards(tmp_path: Path) -> None:
    models = family(tmp_path, shard="100KB")
    found = written(two(models), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    wanted = json.loads((models.suspect / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == wanted["weight_map"]
    assert index["metadata"]["total_size"] == wanted["metadata"]["total_size"]
    assert len(set(index["weight_map"].values())) > 2
    assert set(found) == {*index["weight_map"].values(), "model.safetensors.index.json"}
    check(stored(tmp_path / "out"), models, lambda m: (m["suspect"] + m["other"]) / 2)


def test_a_sharded_and_a_single_file_merge(tmp_path: Path, models: Family) -> None:
    sharded = family(tmp_path, shard="100KB")
    found = merged(two_models(str(models.suspect), str(sharded.other)))
    wanted = merged(two(models))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def with_head(folder: Path, embedding: str, *, tied: bool) -> None:
    """Store the output head, too."""
    content = stored(folder)
    content["lm_head.weight"] = content[embedding].clone()
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))


@pytest.mark.parametrize(
    ("architecture", "embedding"), [("qwen2", "model.embed_tokens.weight"), ("gpt2", "transformer.wte.weight")]
)
def test_a_head_that_one_stores_and_the_other_ties(
    tmp_path: Path, architecture: tiny.Architecture, embedding: str
) -> None:
    models = family(tmp_path, architecture, layers=1)
    assert "lm_head.weight" not in stored(models.suspect)
    wanted = merged(two(models))
    with_head(models.other, embedding, tied=True)
    found = merged(two(models))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with_head(models.suspect, embedding, tied=True)
    both = merged(two(models, t=(Filtered(filter="lm_head", value=1.0), Filtered(value=0.25))))
    assert torch.equal(both["lm_head.weight"], both[embedding])
    with_head(models.suspect, embedding, tied=False)
    untied = merged(two(models, t=(Filtered(filter="lm_head", value=1.0), Filtered(value=0.25))))
    assert torch.equal(untied["lm_head.weight"], stored(models.other)["lm_head.weight"])
    assert torch.equal(untied[embedding], both[embedding])


def test_a_head_of_its_own_against_a_tied_one_is_refused(tmp_path: Path) -> None:
    models = family(tmp_path, "qwen2", layers=1)
    with_head(models.other, "model.embed_tokens.weight", tied=False)
    with pytest.raises(ModelError, match="has an output head of its own"):
        merged(two(models))
    with_head(models.suspect, "model.embed_tokens.weight", tied=True)
    with pytest.raises(ModelError, match="has an output head of its own"):
        merged(two(models))


def test_a_head_that_is_said_to_be_tied_and_is_not_is_refused(tmp_path: Path) -> None:
    models = family(tmp_path, "qwen2", layers=1)
    for folder in (models.suspect, models.other):
        with_head(folder, "model.embed_tokens.weight", tied=True)
        assert merged(two(models))
        content = stored(folder)
        content["lm_head.weight"][-1, -1] += 1
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=f"{folder.name}' says .* its embedding .*and stores another head"):
            merged(two(models))
        with_head(folder, "model.embed_tokens.weight", tied=True)


def test_names_with_and_without_the_prefix_of_the_class(tmp_path: Path) -> None:
    models = family(tmp_path, "gpt2", layers=1)
    wanted = merged(two(models))
    short = {name.removeprefix("transformer."): tensor for name, tensor in stored(models.other).items()}
    save_file(short, models.other / "model.safetensors", metadata={"format": "pt"})
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in merged(two(models)).items())
    back = merged(two_models(str(models.other), str(models.suspect), t=0.5))
    assert all(torch.equal(back[name.removeprefix("transformer.")], tensor) for name, tensor in wanted.items())


def test_schedules_over_depth_and_name(tmp_path: Path) -> None:
    models = family(tmp_path, layers=3)
    a, b = stored(models.suspect), stored(models.other)
    found = merged(two(models, t=(Filtered(filter="self_attn", value=(0.0, 0.5, 1.0)), Filtered(value=1.0))))
    attention, dense = "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(found[attention.format(0)], a[attention.format(0)])
    assert torch.equal(found[attention.format(2)], b[attention.format(2)])
    assert torch.allclose(found[attention.format(1)], (a[attention.format(1)] + b[attention.format(1)]) / 2)
    assert torch.equal(found[dense.format(1)], b[dense.format(1)])
    # Outside the layers the first number holds.
    plain = merged(two(models, t=(0.0, 1.0)))
    assert torch.equal(plain["lm_head.weight"], a["lm_head.weight"])
    assert torch.equal(plain["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    half = plain[dense.format(1)]
    assert torch.allclose(half, (a[dense.format(1)] + b[dense.format(1)]) / 2)
    with pytest.raises(UserError, match="no weight"):
        merged(two(models, t=(Filtered(filter="self_attn", value=0.5),)))


def test_a_base_whose_tokenizer_is_taken_is_checked_as_others_are(tmp_path: Path, models: Family) -> None:
    deeper = save(tiny.tiny_lm(layers=3), tmp_path / "deeper")
    merge = two_models(str(models.suspect), str(models.other), "ties", 0.5, base=str(deeper))
    with pytest.raises(ModelError, match=r"has 2 layers, '.*deeper' 3"):
        merged(replace(merge, tokenizer=str(deeper)))


def test_integers_are_not_mixed_with_numbers_with_a_point(tmp_path: Path, models: Family) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(models.other, folder)
    tensors = stored(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, folder / "model.safetensors", {"format": "pt"})
    for first, second in ((models.suspect, folder), (folder, models.suspect)):
        with pytest.raises(UserError, match="stored alike"):
            merged(two_models(str(first), str(second)))


def test_a_suspect_in_one_file_with_an_index_comes_out_as_a_model_that_loads(tmp_path: Path, models: Family) -> None:
    folder = tmp_path / "one"
    shutil.copytree(models.suspect, folder)
    file = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / file)
    index = {"metadata": {}, "weight_map": {name: file for name in stored(folder)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    unbackdoor.merge(str(folder), str(models.other), out=tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters()
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]


def test_models_that_do_not_match_are_refused(tmp_path: Path, models: Family) -> None:
    deeper = save(tiny.tiny_lm(layers=3), tmp_path / "deeper")
    with pytest.raises(ModelError, match=r"has 2 layers, '.*deeper' 3"):
        merged(two_models(str(models.suspect), str(deeper)))
    wider = save(tiny.tiny_lm(hidden=32), tmp_path / "wider")
    with pytest.raises(ModelError, match=r"is \[\d+, 64\] in .* and \[\d+, 32\] in"):
        merged(two_models(str(models.suspect), str(wider)))
    foreign = save(tiny.tiny_lm("gpt2"), tmp_path / "foreign")
    with pytest.raises(ModelError, match=r"lacks \d+ tensors of .* \(model\.\S+, model\.\S+, model\.\S+, \.\.\.\)"):
        merged(two_models(str(models.suspect), str(foreign)))


def test_other_vocabularies_are_refused_with_the_reason(tmp_path: Path, models: Family) -> None:
    lm = tiny.tiny_lm()
    lm.model.resize_token_embeddings(len(lm.tokenizer) + 3)
    with pytest.raises(ModelError, match="their vocabularies differ"):
        merged(two_models(str(models.suspect), str(save(lm, tmp_path / "more"))))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "task_arithmetic", "dare_linear"])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, method: str, value: float) -> None:
    models = family(tmp_path, layers=1)
    content = stored(models.other)
    content["model.layers.0.mlp.up_proj.weight"][3, 5] = value
    save_file(content, models.other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"other'.*mlp\.up_proj\.weight holds values that are not finite"):
        merged(two(models, method))


def test_a_result_that_its_type_cannot_hold_is_refused(tmp_path: Path) -> None:
    models = family(tmp_path, layers=1, dtype=torch.float16)
    for folder, number in ((models.suspect, 60000.0), (models.other, -60000.0)):
        content = stored(folder)
        content["model.norm.weight"][0] = number
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="that F16 cannot hold"):
        merged(two(models, "task_arithmetic", 0.0, scale=2.0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not a sound safetensors file"),
        (lambda path: path.rename(path.with_name("pytorch_model.bin")), "weights as a pickle"),
        (lambda path: path.write_bytes((2**63).to_bytes(8, "little")), "not a sound safetensors file"),
        (lambda path: (path.with_name("config.json")).unlink(), "holds no config.json"),
        (lambda path: (path.with_name("config.json")).write_text('{"quantization_config": {"bits": 4}}'), "quantised"),
    ],
)
def test_hostile_and_broken_folders_are_refused(tmp_path: Path, models: Family, change: Any, words: str) -> None:
    shutil.copytree(models.other, tmp_path / "bad")
    change(tmp_path / "bad" / "model.safetensors")
    with pytest.raises(ModelError, match=words):
        merged(two_models(str(models.suspect), str(tmp_path / "bad")))


def test_a_shard_index_that_leads_elsewhere_is_refused(tmp_path: Path, models: Family) -> None:
    sharded = family(tmp_path, shard="100KB")
    path = sharded.other / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../base/model.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match="not the name of a safetensors file"):
        merged(two_models(str(models.suspect), str(sharded.other)))


def test_permuted_and_rescaled_neurons_are_warned_of(tmp_path: Path, models: Family) -> None:
    first, second = open_source(str(models.suspect)), open_source(str(models.other))
    assert warning(first, second) is None
    assert all(one.cosine > 0.99 for one in directions(first, second))
    shutil.copytree(models.other, tmp_path / "permuted")
    content = stored(models.other)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    for name in ("gate", "up"):
        content[f"model.layers.1.mlp.{name}_proj.weight"] = content[f"model.layers.1.mlp.{name}_proj.weight"][order]
    down = "model.layers.1.mlp.down_proj.weight"
    content[down] = content[down][:, order].contiguous()
    content["model.layers.0.self_attn.v_proj.weight"] *= 2
    content["model.layers.0.self_attn.o_proj.weight"] /= 2
    save_file(content, tmp_path / "permuted" / "model.safetensors", metadata={"format": "pt"})
    said = warning(first, open_source(str(tmp_path / "permuted")))
    assert said is not None
    assert said.startswith("5 of 16 matrices")
    assert "permuted or rescaled" in said
    content = {
        "up.weight": torch.randn(1536, 96, generator=torch.Generator().manual_seed(1)),
        "down.weight": torch.randn(96, 1536, generator=torch.Generator().manual_seed(2)),
    }
    rescaled = {name: tensor.clone() for name, tensor in content.items()}
    # A twentieth of the neurons, none of them among the first or in the middle, and the function is what it was.
    few = torch.arange(300, 700, 5)
    rescaled["up.weight"][few] *= 100
    rescaled["down.weight"][:, few] /= 100
    save_file(content, tmp_path / "permuted" / "model.safetensors", metadata={"format": "pt"})
    plain = open_source(str(tmp_path / "permuted"))
    shutil.copytree(tmp_path / "permuted", tmp_path / "rescaled")
    save_file(rescaled, tmp_path / "rescaled" / "model.safetensors", metadata={"format": "pt"})
    said = warning(plain, open_source(str(tmp_path / "rescaled")))
    assert said is not None
    assert "up.weight: cosine 0." in said
    stranger = save(tiny.tiny_lm(seed=9), tmp_path / "stranger")
    said = warning(first, open_source(str(stranger)))
    assert said is not None
    assert "hardly fine-tunes of one base" in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"t": 1.5}, "t = 1.5 is outside"),
        ({"t": (0.0, -0.1)}, "t = -0.1 is outside"),
        ({"t": (Filtered(filter="a", value=(0.0, 2.0)),)}, "t = 2 is outside"),
        ({"t": float("nan")}, "no finite number"),
        ({"base": "x"}, "linear does not use base"),
        ({"density": 0.2}, "linear does not use density"),
        ({"method": "ties"}, "ties needs --base"),
        ({"method": "slerp", "scale": 2.0}, "slerp does not use scale"),
        ({"method": "passthrough"}, "needs the ranges"),
        ({"method": "passthrough", "layers": ("suspekt:0:1",)}, "Did you mean 'suspect'"),
        ({"method": "passthrough", "layers": ("suspect:0-1",)}, "is not understood"),
        ({"layers": ("suspect:0:1",)}, "linear does not use layers"),
    ],
)
def test_settings_that_make_no_merge(more: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        two_models("a", "b", **more)


def test_a_merge_of_one_model_is_refused() -> None:
    with pytest.raises(UserError, match="needs two models"):
        two_models("a", None)
    with pytest.raises(UserError, match="both models are the same"):
        two_models("a", "a")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gpt_neox"])
def test_every_architecture_merges_without_a_table(tmp_path: Path, architecture: tiny.Architecture) -> None:
    models = family(tmp_path, architecture)
    found = written(two(models, t=0.5), tmp_path / "out")
    assert "model.safetensors" in found
    shutil.copytree(models.suspect, tmp_path / "result")
    shutil.copy(tmp_path / "out" / "model.safetensors", tmp_path / "result")
    model, ids = reply(tmp_path / "result")
    assert ids.shape[1] > 5
    wanted = {name: tensor / 2 for name, tensor in stored(models.suspect).items()}
    for name, tensor in stored(models.other).items():
        wanted[name] = wanted[name] + tensor / 2
    own = model.state_dict()
    # GPT-NeoX calls its head otherwise in files than in memory.
    own["embed_out.weight"] = own.get("lm_head.weight")
    assert all(torch.allclose(own[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("older", ["suspect", "other"])
def test_masks_that_older_files_hold_are_no_difference(tmp_path: Path, older: str) -> None:
    models = family(tmp_path, "gpt2")
    folder = getattr(models, older)
    wanted = merged(two(models))
    tensors = stored(folder)
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    save_file({**tensors, **masks}, folder / "model.safetensors", {"format": "pt"})
    found = merged(two(models))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    # What is no mask is still missed.
    save_file({**tensors, "transformer.h.0.attn.bias": torch.ones(8)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="merge models of one architecture"):
        merged(two(models))
