"""Configurations against the files beside them: honest ones of every supported architecture pass, others do not."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from unbackdoor.errors import ModelError
from unbackdoor.model.configuration import check_configuration, check_fit
from unbackdoor.model.load import load

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gpt2", "gptj", "gpt_neox", "gpt_neo", "opt"]
CUT = ["llama", "gpt2", "gptj", "gpt_neox"]


def write(kind, folder, *, tied=True, **more):
    """A random two-layer model of an architecture."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=40, tie_word_embeddings=tied, **_sizes(kind), **more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size="3KB" if tied else "1GB")
    return model


def _sizes(kind):
    if kind in {"gpt2", "gptj"}:
        return {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32, "rotary_dim": 4}
    shared = {"num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16, "max_position_embeddings": 32}
    if kind == "gpt_neo":
        return shared | {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    if kind == "opt":
        return shared | {"num_hidden_layers": 2, "ffn_dim": 24, "word_embed_proj_dim": 16}
    return shared | {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 8}


def check(folder):
    check_configuration(folder, "m")
    check_fit(folder, transformers.AutoConfig.from_pretrained(folder), "m")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_honest_models_pass_in_shards_and_whole(kind, tied, tmp_path):
    write(kind, tmp_path, tied=tied)
    assert (tmp_path / "model.safetensors.index.json").exists() == tied
    check(tmp_path)


def test_weights_without_the_prefix_of_their_architecture_pass(tmp_path):
    """As the published GPT-2 has them, with the buffers of older versions."""
    model = write("gpt2", tmp_path, tied=False)
    weights = {
        name.removeprefix("transformer."): value.clone() for name, value in model.transformer.state_dict().items()
    }
    weights |= {"h.0.attn.bias": torch.ones(32, 32), "h.1.attn.bias": torch.ones(32, 32)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    edited = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(edited))
    check(tmp_path)


@pytest.mark.parametrize("kind", CUT)
def test_more_layers_than_the_files_hold(kind, tmp_path):
    write(kind, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"n_layer": 2', '"n_layer": 3').replace('layers": 2', 'layers": 3'))
    with pytest.raises(ModelError, match="3 layers, but its files hold 2"):
        check_configuration(tmp_path, "m")


def test_a_model_cut_to_fewer_layers_than_its_files_hold_is_refused(tied_folder, tmp_path):
    copy = shutil.copytree(tied_folder, tmp_path / "copy")
    edited = json.loads((copy / "config.json").read_text()) | {"num_hidden_layers": 1}
    (copy / "config.json").write_text(json.dumps({k: v for k, v in edited.items() if k != "layer_types"}))
    with pytest.raises(ModelError, match=r"has 1 layers, but its files hold more \(model\.layers\.1\."):
        load(str(copy))


def test_a_tower_beside_the_model_is_left_out_and_recorded(tied_folder, tmp_path):
    copy = shutil.copytree(tied_folder, tmp_path / "copy")
    tower = {f"vision_tower.encoder.layers.{layer}.weight": torch.ones(2) for layer in range(4)}
    weights = load_file(copy / "model.safetensors") | tower
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert load(str(copy)).facts["ignored_tensors"] == sorted(tower)


def test_ignored_tensors_are_said_where_there_is_somebody_to_tell(tied_folder, tmp_path):
    from unbackdoor.pipeline.common import Noted
    from unbackdoor.pipeline.common import load as load_as_the_recipe_says
    from unbackdoor.pipeline.recipe import EvaluateRecipe
    from unbackdoor.run import Silent

    copy = shutil.copytree(tied_folder, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors") | {"model.extra.weight": torch.ones(2)}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    progress = Noted(Silent())
    load_as_the_recipe_says(EvaluateRecipe(model=str(copy)), str(copy), progress=progress)
    assert "holds 1 tensors that its architecture does not use (model.extra.weight)" in progress.notices[0]
