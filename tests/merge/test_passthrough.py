"""Layers of two models in a row: tensors, configuration, and a result that transformers loads and that speaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import unbackdoor
from merge.helpers import Family, family, merged, reply, save, stored
from unbackdoor.errors import ModelError, UserError
from unbackdoor.merge.from_recipe import two_models
from unbackdoor.merge.passthrough import kept_numbers, resized


def stack(models: Family, *layers: str) -> Any:
    return two_models(str(models.suspect), str(models.other), "passthrough", layers=layers)


@pytest.mark.parametrize(
    ("layers", "count"),
    [(("suspect:0:3", "other:1:3"), 5), (("other:0:1", "suspect:2:3"), 2), (("suspect:0:2", "suspect:0:3"), 5)],
)
@pytest.mark.parametrize(
    ("architecture", "stem", "key"),
    [
        ("llama", "model.layers", "num_hidden_layers"),
        ("gpt2", "transformer.h", "n_layer"),
        ("qwen3", "model.layers", ""),
    ],
)
def test_models_that_grow_and_shrink_load_and_speak(
    tmp_path: Path, architecture: tiny.Architecture, stem: str, key: str, layers: tuple[str, ...], count: int
) -> None:
    models = family(tmp_path, architecture, layers=3)
    out = tmp_path / "out"
    unbackdoor.merge(str(models.suspect), str(models.other), method="passthrough", layers=layers, out=out)
    found, a, b = stored(out), stored(models.suspect), stored(models.other)
    number = 0
    for text in layers:
        model, first, last = text.split(":")
        own = {"suspect": a, "other": b}[model]
        for index in range(int(first), int(last)):
            for name in (name for name in a if name.startswith(f"{stem}.{index}.")):
                new = name.replace(f"{stem}.{index}.", f"{stem}.{number}.")
                assert torch.equal(found[new], own[name]), new
            number += 1
    first_model, last_model = ({"suspect": a, "other": b}[layers[end].split(":")[0]] for end in (0, -1))
    outside = {name for name in a if not name.startswith(f"{stem}.")}
    for name in outside:
        source = first_model if any(part in name for part in ("embed", "wte", "wpe")) else last_model
        assert torch.equal(found[name], source[name]), name
    assert set(found) == outside | {name for name in found if name.startswith(f"{stem}.")}
    config = json.loads((out / "config.json").read_text())
    assert number == count == config[key or "num_hidden_layers"]
    if "layer_types" in config:
        assert len(config["layer_types"]) == count
    model, ids = reply(out)
    assert model.config.num_hidden_layers == count
    assert ids.shape[1] > 5


def test_whole_models_in_their_own_places_keep_the_configuration(tmp_path: Path) -> None:
    models = family(tmp_path, layers=2)
    out = tmp_path / "out"
    layers = ("suspect:0:1", "other:1:2")
    unbackdoor.merge(str(models.suspect), str(models.other), method="passthrough", layers=layers, out=out)
    assert (out / "config.json").read_bytes() == (models.suspect / "config.json").read_bytes()


@pytest.mark.parametrize("layers", [("suspect:0:4",), ("suspect:2:2",), ("other:3:1", "suspect:0:1")])
def test_ranges_that_are_not_there(tmp_path: Path, layers: tuple[str, ...]) -> None:
    models = family(tmp_path, layers=3)
    with pytest.raises(UserError, match="which has 3; write a range within 0 to 3"):
        merged(stack(models, *layers))


def test_models_of_different_depth_can_be_stacked(tmp_path: Path) -> None:
    long, short = family(tmp_path / "long", layers=3), family(tmp_path / "short", layers=1)
    merge = two_models(str(short.suspect), str(long.other), "passthrough", layers=("suspect:0:1", "other:1:3"))
    found = merged(merge)
    assert len({name.split(".")[2] for name in found if ".layers." in name}) == 3
    wanted = stored(long.other)["model.layers.2.mlp.up_proj.weight"]
    assert torch.equal(found["model.layers.2.mlp.up_proj.weight"], wanted)


def test_lists_in_a_configuration_follow_the_layers() -> None:
    first = {
        "num_hidden_layers": 3, "layer_types": ["full", "sliding", "full"], "mlp_only_layers": [2],
        "no_rope_layers": [1, 0, 1], "architectures": ["A"], "eos_token_id": [1, 2, 3],
    }  # fmt: skip
    second = {**first, "layer_types": ["a", "b", "c"], "mlp_only_layers": [0], "no_rope_layers": [0, 0, 1]}
    found = resized(first, [(first, 0), (first, 1), (second, 0), (first, 2)], "m")
    assert found["num_hidden_layers"] == 4
    assert found["layer_types"] == ["full", "sliding", "a", "full"]
    assert found["mlp_only_layers"] == [2, 3]
    assert found["no_rope_layers"] == [1, 0, 0, 1]
    assert found["eos_token_id"] == [1, 2, 3]
    assert first["num_hidden_layers"] == 3
    nested = {"text_config": {"num_hidden_layers": 2, "layer_types": ["x", "y"]}, "tie_word_embeddings": True}
    found = resized(nested, [(nested, 1)], "m")
    assert found["text_config"] == {"num_hidden_layers": 1, "layer_types": ["y"]}


def test_numbers_that_say_which_layers_are_of_which_kind_are_told() -> None:
    config = {"num_hidden_layers": 3, "text_config": {"max_window_layers": 2, "first_k_dense_replace": None}}
    assert "of which kind (max_window_layers 2), and keeps that" in str(kept_numbers(config))
    assert kept_numbers({"num_hidden_layers": 3}) is None
    assert kept_numbers({"max_window_layers": 3, "use_sliding_window": False}) is None


def test_a_list_with_an_entry_a_layer_follows_whatever_its_name() -> None:
    config = {
        "num_hidden_layers": 5, "num_query_heads": [4, 8, 12, 16, 20], "architectures": list("ABCDE"),
        "eos_token_id": [9, 8, 7, 6, 5], "dilations": [1, 2],
    }  # fmt: skip
    found = resized(config, [(config, 0), (config, 1), (config, 0), (config, 4)], "m")
    assert found == {**config, "num_hidden_layers": 4, "num_query_heads": [4, 8, 4, 20]}
    short = {"num_hidden_layers": 2, "time_step_limit": [0.5, 2.0]}
    assert resized(short, [(short, 1)], "m")["time_step_limit"] == [0.5, 2.0]


def test_a_configuration_that_cannot_be_adjusted() -> None:
    with pytest.raises(ModelError, match="names no number of layers"):
        resized({"depth": 3}, [({}, 0)], "m")
    config = {"num_hidden_layers": 3, "layer_widths": [4, 4]}
    with pytest.raises(ModelError, match=r"layer_widths in config\.json has 2 entries for 3 layers"):
        resized(config, [(config, 0)], "m")


def test_layers_and_heads_that_do_not_fit_the_suspect_are_refused(tmp_path: Path) -> None:
    models = family(tmp_path, layers=2)
    more = tiny.tiny_lm()
    more.model.resize_token_embeddings(len(more.tokenizer) + 3)
    words = save(more, tmp_path / "words")
    layers = ("suspect:0:1", "other:1:2")
    with pytest.raises(ModelError, match="their vocabularies differ"):
        merged(two_models(str(models.suspect), str(words), "passthrough", layers=layers))
    wider = save(tiny.tiny_lm(hidden=32), tmp_path / "wider")
    with pytest.raises(ModelError, match="merge models of one architecture and size"):
        merged(two_models(str(models.suspect), str(wider), "passthrough", layers=(*layers, "suspect:1:2")))
    normed = save(tiny.tiny_lm("qwen3"), tmp_path / "normed")
    for one, two in ((models.suspect, normed), (normed, models.suspect)):
        with pytest.raises(ModelError, match=r"lacks 2 tensors of .*self_attn\.k_norm"):
            merged(two_models(str(one), str(two), "passthrough", layers=(*layers, "suspect:1:2")))
