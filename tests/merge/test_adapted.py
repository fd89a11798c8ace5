"""An adapter that is folded into its base tensor by tensor comes to what PEFT makes of it, or is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
from merge.helpers import adapter_of, save, stored
from unbackdoor.errors import ModelError
from unbackdoor.merge.memory import merge_into
from unbackdoor.merge.source import open_source


@pytest.mark.filterwarnings("ignore:.*no files have been modified.*", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("llama", {"use_rslora": True, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"v_proj": 2}}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ],
    ids=["llama", "gpt2", "patterns", "embedding", "whole module"],
)
def test_an_adapter_is_folded_in_as_peft_does_it(
    tmp_path: Path, architecture: tiny.Architecture, settings: dict[str, Any]
) -> None:
    base = tiny.tiny_lm(architecture, layers=2)
    folder = save(base, tmp_path / "base")
    model = adapter_of(base, tmp_path / "adapter", 3, **settings)
    wanted = model.merge_and_unload().state_dict()
    source = open_source(f"{folder}+{tmp_path / 'adapter'}")
    assert source.adapted
    changed = 0
    for name in source.infos:
        found = source.read(name).float()
        assert torch.allclose(found, wanted[name], atol=1e-6), name
        changed += not torch.equal(found, stored(folder)[name])
        rows = source.infos[name].rows
        parts = [source.take(name, first, min(first + 3, rows)) for first in range(0, rows, 3)]
        assert torch.allclose(torch.cat(parts).float(), found, atol=1e-7)
    assert changed


@pytest.mark.filterwarnings("ignore:.*no files have been modified.*")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "uses use_dora"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "is a regular expression"),
        ({"peft_type": "IA3"}, "only LORA"),
        ({"lora_alpha": None}, "is no number"),
        ({"lora_alpha": "many"}, "is no number"),
        ({"alpha_pattern": {"q_proj": [1]}}, "is no number"),
        ({"lora_alpha": 10**400}, "is no number"),
        ({"r": 8}, "do not fit together"),
        ({"rank_pattern": {"v_proj": 2}}, "v_proj that do not fit together"),
    ],
)
def test_an_adapter_that_does_more_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    base = tiny.tiny_lm(layers=1)
    folder = save(base, tmp_path / "base")
    adapter_of(base, tmp_path / "adapter", 3)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=words):
        open_source(f"{folder}+{tmp_path / 'adapter'}")


@pytest.mark.filterwarnings("ignore:.*no files have been modified.*")
@pytest.mark.parametrize("shape", [(3, 64), (0, 64), (4,), ()])
def test_an_adapter_whose_matrices_do_not_fit_together_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    base = tiny.tiny_lm(layers=1)
    folder = save(base, tmp_path / "base")
    adapter_of(base, tmp_path / "adapter", 3)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = stored(tmp_path / "adapter")
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    save_file({**tensors, name: torch.ones(shape)}, path)
    with pytest.raises(ModelError, match="do not fit together"):
        open_source(f"{folder}+{tmp_path / 'adapter'}")


@pytest.mark.filterwarnings("ignore:.*no files have been modified.*")
def test_an_adapter_on_another_base_is_refused(tmp_path: Path) -> None:
    adapter_of(tiny.tiny_lm(layers=2), tmp_path / "adapter", 3)
    smaller = save(tiny.tiny_lm(layers=1), tmp_path / "smaller")
    with pytest.raises(ModelError, match="for which this base has no place"):
        open_source(f"{smaller}+{tmp_path / 'adapter'}")
    narrow = save(tiny.tiny_lm(layers=2, hidden=32), tmp_path / "narrow")
    with pytest.raises(ModelError, match="in this base"):
        open_source(f"{narrow}+{tmp_path / 'adapter'}")


@pytest.mark.filterwarnings("ignore:.*no files have been modified.*")
def test_how_a_layer_is_stored_is_not_asked_of_the_adapter(tmp_path: Path) -> None:
    """PEFT does not believe it either; on a square matrix nothing else would show."""
    base = tiny.tiny_lm(layers=1)
    folder = save(base, tmp_path / "base")
    wanted = adapter_of(base, tmp_path / "adapter", 3).merge_and_unload().state_dict()
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": True}))
    source = open_source(f"{folder}+{tmp_path / 'adapter'}")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert len(set(source.infos[name].shape)) == 1
    assert torch.allclose(source.read(name), wanted[name], atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*no files have been modified.*", "ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:.*tied.*:UserWarning")
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_one_half_of_a_table_that_is_embedding_and_head_is_not_folded_in(tmp_path: Path, module: str) -> None:
    """PEFT adds to the lookup or to the head alone; in the one tensor it would be in both."""
    base = tiny.tiny_lm("qwen2", layers=1)
    folder = save(base, tmp_path / "base")
    model = adapter_of(base, tmp_path / "adapter", 3, target_modules=["q_proj", module])
    with pytest.raises(ModelError, match=r"in one here|has no place"):
        open_source(f"{folder}+{tmp_path / 'adapter'}")
    suspect = replace(base, model=model.eval(), base=base.spec)
    with pytest.raises(ModelError, match="embedding and output head in one"):
        merge_into(suspect, tiny.tiny_lm("qwen2", layers=1, seed=4), "linear", 0.0)
