import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from unbackdoor.errors import ModelError
from unbackdoor.model.changes import changed_tensors, module_type, summarise


@pytest.fixture
def changed(plain_folder, tmp_path):
    folder = shutil.copytree(plain_folder, tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 3.0
    tensors["model.layers.0.mlp.up_proj.weight"][1, 1] -= 4.0
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.bfloat16)
    tensors["model.extra.weight"] = torch.full((4,), 2.0)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_norms_against_hand_made_changes(plain_folder, changed):
    before = load_file(plain_folder / "model.safetensors")
    records = {record.name: record for record in changed_tensors(plain_folder, changed)}
    assert set(records) == {*before, "model.extra.weight"}
    moved = records["model.layers.0.mlp.up_proj.weight"]
    assert moved.status == "changed"
    assert moved.shape == (24, 16)
    assert moved.norm_change == pytest.approx(5.0, rel=1e-5)
    norm = math.sqrt(float((before[moved.name].double() ** 2).sum()))
    assert moved.norm_before == pytest.approx(norm, rel=1e-6)
    assert moved.relative == pytest.approx(5.0 / norm, rel=1e-5)
    added, removed = records["model.extra.weight"], records["lm_head.weight"]
    assert (added.status, added.norm_before, added.norm_change, added.relative) == ("added", 0.0, 4.0, None)
    assert (removed.status, removed.relative) == ("removed", 1.0)
    # Ones are exact in bfloat16: same values in another dtype are no change.
    assert (records["model.norm.weight"].status, records["model.norm.weight"].dtype) == ("same", "BF16")
    assert {record.status for name, record in records.items() if "layers.1" in name} == {"same"}


def test_summary_adds_squares_by_module_type(plain_folder, changed):
    table = summarise(changed_tensors(plain_folder, changed))
    assert set(table) == {"all", "attention", "embeddings", "mlp", "norms", "other", "output head"}
    assert (table["mlp"]["tensors"], table["mlp"]["changed"]) == (6, 1)
    assert table["mlp"]["norm_change"] == pytest.approx(5.0, rel=1e-5)
    assert table["attention"] == {
        "tensors": 8, "changed": 0, "norm_change": 0.0, "relative": 0.0,
        "norm_before": pytest.approx(table["attention"]["norm_before"]),
    }  # fmt: skip
    assert table["other"]["relative"] is None
    head = load_file(plain_folder / "model.safetensors")["lm_head.weight"].norm()
    assert table["all"]["norm_change"] == pytest.approx(math.sqrt(25 + 16 + float(head) ** 2), rel=1e-5)
    json.dumps(table, allow_nan=False)


def test_another_shape_is_removed_and_added(plain_folder, tmp_path):
    folder = shutil.copytree(plain_folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors") | {"model.norm.weight": torch.ones(8)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = [record for record in changed_tensors(plain_folder, folder) if record.name == "model.norm.weight"]
    assert [(record.status, record.shape) for record in found] == [("removed", (16,)), ("added", (8,))]


def test_shards_are_compared_like_one_file(plain_folder, changed, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(plain_folder).save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert {record.status for record in changed_tensors(plain_folder, tmp_path / "shards")} == {"same"}
    assert changed_tensors(tmp_path / "shards", changed) == changed_tensors(str(plain_folder), str(changed))


def test_adapters_are_compared_with_adapters_only(plain_folder, tmp_path):
    for name, value in (("a", 1.0), ("b", 1.5)):
        (tmp_path / name).mkdir()
        save_file({"x.lora_A.weight": torch.full((2, 2), value)}, tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (record,) = changed_tensors(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (record.norm_before, record.norm_change, record.relative) == (2.0, 1.0, 0.5)
    with pytest.raises(ModelError, match="one is an adapter"):
        changed_tensors(plain_folder, tmp_path / "a")
    with pytest.raises(ModelError, match="no safetensors weights"):
        changed_tensors(tmp_path, plain_folder)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.layers.0.self_attn.q_norm.weight", "norms"),
        ("model.layers.0.post_attention_layernorm.weight", "norms"),
        ("model.layers.0.mlp.gate_proj.weight", "mlp"),
        ("model.embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "output head"),
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("transformer.h.0.mlp.c_fc.weight", "mlp"),
        ("transformer.h.0.ln_1.weight", "norms"),
        ("transformer.ln_f.bias", "norms"),
        ("transformer.wte.weight", "embeddings"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", "mlp"),
        ("something.weight", "other"),
    ],
)
def test_module_types(name, kind):
    assert module_type(name) == kind
