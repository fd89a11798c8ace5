"""base+adapter and LoRA: a stacked adapter does what both did, the base stays, and results load again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
import unbackdoor
from unbackdoor.errors import ModelError, UserError
from unbackdoor.model.lm import LM
from unbackdoor.model.load import load
from unbackdoor.pipeline.artefacts import how_to_load
from unbackdoor.train import lora
from unbackdoor.train.lora import LoraSettings


def logits(lm: LM) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = lm.model(input_ids=torch.arange(40, 60)[None]).logits
    return found


def randomise(lm: LM, seed: int) -> None:
    """Give an adapter an effect: PEFT begins with B = 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in lm.model.named_parameters():
            if "lora_B" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `rows.jsonl`, and `adapter`, which changes two sorts of matrices only."""
    folder = tmp_path_factory.mktemp("adapters")
    lm = tiny.tiny_lm()
    lm.model.save_pretrained(folder / "base")
    lm.tokenizer.save_pretrained(folder / "base")
    rows = [{"id": row.id, "instruction": row.instruction, "output": row.response} for row in tiny.rows(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = LM(get_peft_model(lm.model, config), lm.tokenizer, "model", "x", base=str(folder / "base"))
    randomise(adapted, 1)
    adapted.model.save_pretrained(folder / "adapter")
    return folder


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_combine_equals_the_sum_of_both(architecture: tiny.Architecture) -> None:
    base = tiny.tiny_lm(architecture)
    plain = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    untouched = tiny.tiny_lm(architecture)
    suspect = lora.attach(base, LoraSettings(rank=3, alpha=5.0), 0)
    randomise(suspect, 1)
    stacked, below = lora.stack(suspect, LoraSettings(rank=2, alpha=7.0), 1)
    before = logits(stacked)
    randomise(stacked, 2)
    wanted = logits(stacked)
    assert not torch.allclose(before, wanted, atol=1e-3)
    combined = lora.combine(untouched, below, lora.factors(stacked), "base+adapter")
    torch.testing.assert_close(logits(combined), wanted, atol=2e-5, rtol=1e-4)
    ranks = {tensor.shape[0] for name, tensor in combined.model.named_parameters() if "lora_A" in name}
    assert ranks == {5}
    left = {name.replace(".base_layer", ""): t for name, t in combined.core.state_dict().items() if "lora_" not in name}
    assert set(left) == set(plain)
    assert all(torch.equal(left[name], tensor) for name, tensor in plain.items())


def test_stacking_refuses_what_is_no_product_of_matrices() -> None:
    lm = tiny.tiny_lm()
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match="--adapter-mode train"):
        lora.factors(LM(get_peft_model(lm.model, config), lm.tokenizer, "model", "x", base="b"))


@pytest.mark.parametrize(("mode", "rank"), [("train", 3), ("stack", 7)])
def test_purifying_an_adapter_gives_an_adapter_for_the_same_base(adapter: Path, mode: str, rank: int) -> None:
    base, out = adapter / "base", adapter / mode
    weights = (base / "model.safetensors").read_bytes()
    unbackdoor.purify(
        f"{base}+{adapter / 'adapter'}", defense="fine_tuning", clean=str(adapter / "rows.jsonl"), out=out,
        settings={"train": {"steps": 3, "learning_rate": 1e-3}},
        more={"adapter_mode": mode, "lora": {"rank": 4} if mode == "stack" else None},
    )  # fmt: skip
    assert (base / "model.safetensors").read_bytes() == weights
    assert not (out / "model.safetensors").exists()
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    after = load(f"{base}+{out}")
    assert {t.shape[0] for name, t in after.model.named_parameters() if "lora_A" in name} == {rank}
    manifest = json.loads((out / "unbackdoor.json").read_text())
    assert ("trained on top" in manifest["weights"]) == (mode == "stack")
    suspect = load(f"{base}+{adapter / 'adapter'}")
    assert not torch.equal(logits(after), logits(suspect))
    changed = json.loads((out / "changes.json").read_text())["summary"]["all"]["changed"]
    assert changed > 0


def test_lora_is_merged_into_full_weights(adapter: Path) -> None:
    out = adapter / "merged"
    unbackdoor.purify(
        str(adapter / "base"), defense="fine_tuning", clean=str(adapter / "rows.jsonl"), out=out,
        settings={"train": {"steps": 3, "learning_rate": 1e-2}}, more={"lora": {"rank": 2}},
    )  # fmt: skip
    after, before = load(str(out)), load(str(adapter / "base"))
    changes = {name: (t - dict(before.model.named_parameters())[name]) for name, t in after.model.named_parameters()}
    moved = changes["model.layers.0.mlp.up_proj.weight"]
    assert 0 < torch.linalg.matrix_rank(moved, atol=1e-5).item() <= 2
    assert not changes["model.embed_tokens.weight"].any()


def test_lora_on_an_adapter_is_refused(adapter: Path) -> None:
    with pytest.raises(UserError, match="--adapter-mode"):
        unbackdoor.purify(
            f"{adapter / 'base'}+{adapter / 'adapter'}", defense="fine_tuning", clean=str(adapter / "rows.jsonl"),
            out=adapter / "no", more={"lora": {}},
        )  # fmt: skip


def test_how_to_load_names_a_base_as_transformers_knows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unbackdoor.model.builtin.builtin_folder", lambda name: tmp_path / "cache" / name)
    assert "from_pretrained('owner/name', revision='abc')" in how_to_load(tmp_path, "owner/name@abc")
    built = how_to_load(tmp_path, "builtin:smollm2-135m")
    assert f"from_pretrained({str(tmp_path / 'cache' / 'smollm2-135m')!r})" in built
    assert "builtin:" not in built


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_merging_an_adapter_gives_one_where_it_can_and_says_what_came_out(adapter: Path, method: str) -> None:
    base, out = adapter / "base", adapter / f"by {method}"
    suspect = f"{base}+{adapter / 'adapter'}"
    few = {"method": method, "conflict": {"share": 0.5, "train": {"steps": 2, "learning_rate": 1e-3}}}
    call = {"defense": "internal_conflict", "clean": str(adapter / "rows.jsonl"), "settings": {"internal": few}}
    unbackdoor.purify(suspect, **call, out=out, more={"reference": str(base)})
    stays = method == "linear"
    merged = load(f"{base}+{out}" if stays else str(out))
    assert merged.is_adapter == stays
    assert (out / "model.safetensors").is_file() != stays
    assert (out / "adapter_model.safetensors").exists() == stays
    said = "is an adapter, and so is the merge" if stays else "was an adapter; the merge is full weights"
    assert said in (out / "README.md").read_text()
    before, trusted = logits(load(suspect)), logits(load(str(base)))
    assert not torch.allclose(logits(merged), before, atol=1e-3)
    assert not torch.allclose(logits(merged), trusted, atol=1e-3)
    for mode in ({"adapter_mode": "train"}, {"adapter_mode": "stack", "lora": {"rank": 2}}):
        with pytest.raises(UserError, match="internal_conflict merges whole models; leave out --lora"):
            unbackdoor.purify(suspect, **call, out=adapter / "refused", more={"reference": str(base), **mode})
