"""YAML in mergekit's schema: what is understood comes to what it says, all else is refused with file and field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from merge.helpers import Family, family, merged, stored
from unbackdoor.errors import UserError
from unbackdoor.merge.from_recipe import two_models
from unbackdoor.merge.mergekit_yaml import read_merge
from unbackdoor.merge.settings import Merge


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family(tmp_path_factory.mktemp("yaml"), layers=3)


def read(models: Family, folder: Path, text: str, **more: Any) -> Merge:
    path = folder / "merge.yaml"
    for name in ("base", "suspect", "other"):
        text = text.replace(f"<{name}>", str(getattr(models, name)))
    path.write_text(text)
    return read_merge(path, **more)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


LINEAR = """
merge_method: linear
models:
  - model: <suspect>
    parameters: {weight: 1.0}
  - model: <other>
    parameters: {weight: 3.0}
"""
SLERP = """
merge_method: slerp
base_model: <suspect>
slices:
  - sources:
      - {model: <suspect>, layer_range: [0, 3]}
      - {model: <other>, layer_range: [0, 3]}
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 1]}
    - value: 0.25
dtype: bfloat16
"""
TIES = """
merge_method: ties
base_model: <base>
models:
  - model: <suspect>
    parameters: {weight: 0.7, density: 0.5}
  - model: <other>
    parameters: {weight: 0.3, density: 0.5}
parameters: {normalize: true, int8_mask: true, lambda: 1.0}
tokenizer_source: base
"""
PASSTHROUGH = """
merge_method: passthrough
slices:
  - sources: [{model: <suspect>, layer_range: [0, 2]}]
  - sources: [{model: <other>, layer_range: [1, 3], parameters: {scale: [{filter: o_proj, value: 0.5}, {value: 1}]}}]
"""


def test_linear_weights_are_normalised(models: Family, tmp_path: Path) -> None:
    found = merged(read(models, tmp_path, LINEAR))
    a, b = stored(models.suspect), stored(models.other)
    for name, tensor in found.items():
        assert torch.allclose(tensor, a[name] / 4 + b[name] * 3 / 4, atol=1e-7)
    plain = LINEAR + "parameters: {normalize: false}\n"
    name = "model.norm.weight"
    assert torch.allclose(merged(read(models, tmp_path, plain))[name], a[name] + 3 * b[name], atol=1e-6)


def test_slerp_with_gradients_filters_and_a_type(models: Family, tmp_path: Path) -> None:
    from unbackdoor.merge.settings import Filtered

    merge = read(models, tmp_path, SLERP)
    t = (Filtered(filter="self_attn", value=(0.0, 0.5, 1.0)), Filtered(value=0.25))
    wanted = merged(two_models(str(models.suspect), str(models.other), "slerp", t))
    found = merged(merge)
    assert merge.suspect == str(models.suspect)
    assert same(found, {name: tensor.bfloat16() for name, tensor in wanted.items()})
    swapped = SLERP.replace("base_model: <suspect>", "base_model: <other>")
    back = read(models, tmp_path, swapped)
    assert back.suspect == str(models.other)
    first = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(merged(back)[first], stored(models.other)[first].bfloat16())


def test_ties_and_the_tokenizer_of_the_base(models: Family, tmp_path: Path) -> None:
    merge = read(models, tmp_path, TIES)
    assert merge.tokenizer == str(models.base)
    assert merge.suspect == str(models.suspect)
    wanted = two_models(str(models.suspect), str(models.other), "ties", 0.3, base=str(models.base), density=0.5)
    assert same(merged(merge), merged(wanted))


def test_the_base_among_the_models_is_no_task(models: Family, tmp_path: Path) -> None:
    text = TIES.replace("models:\n", "models:\n  - model: <base>\n")
    assert same(merged(read(models, tmp_path, text)), merged(read(models, tmp_path, TIES)))


def test_the_base_among_the_models_of_a_mean_gives_the_configuration(models: Family, tmp_path: Path) -> None:
    merge = read(models, tmp_path, LINEAR + "base_model: <other>\n")
    assert merge.suspect == str(models.other)
    first = read(models, tmp_path, LINEAR)
    assert first.suspect == str(models.suspect)
    assert same(merged(merge), merged(first))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "task_arithmetic"])
def test_the_other_methods_with_a_base(models: Family, tmp_path: Path, method: str) -> None:
    text = TIES.replace("ties", method, 1).replace("density: 0.5", "density: 1.0").replace("normalize: true, ", "")
    found = merged(read(models, tmp_path, text, seed=4))
    if method == "dare_ties":
        # Nothing is dropped, so it is TIES without trimming.
        plain = TIES.replace("density: 0.5", "density: 1.0").replace("normalize: true, ", "normalize: false, ")
        assert same(found, merged(read(models, tmp_path, plain)))
        return
    base, a, b = (stored(folder) for folder in (models.base, models.suspect, models.other))
    for name, tensor in found.items():
        wanted = base[name] + 0.7 * (a[name] - base[name]) + 0.3 * (b[name] - base[name])
        assert torch.allclose(tensor, wanted, atol=1e-6), name


def test_passthrough_with_a_scale(models: Family, tmp_path: Path) -> None:
    found = merged(read(models, tmp_path, PASSTHROUGH))
    b = stored(models.other)
    assert torch.equal(found["model.layers.3.mlp.up_proj.weight"], b["model.layers.2.mlp.up_proj.weight"])
    scaled = found["model.layers.2.self_attn.o_proj.weight"]
    assert torch.equal(scaled, b["model.layers.1.self_attn.o_proj.weight"] / 2)


def test_passthrough_of_one_whole_model(models: Family, tmp_path: Path) -> None:
    text = "merge_method: passthrough\nmodels: [{model: <suspect>, parameters: {scale: [{filter: o_proj, value: 5e-1},"
    found, a = merged(read(models, tmp_path, f"{text} {{value: 1}}]}}}}]\n")), stored(models.suspect)
    assert found.keys() == a.keys()
    assert all(torch.equal(found[name], a[name] / 2 if "o_proj" in name else a[name]) for name in a)


def test_the_tokenizer_of_any_model_of_the_merge(models: Family, tmp_path: Path) -> None:
    assert read(models, tmp_path, LINEAR + "tokenizer_source: <other>\n").tokenizer == str(models.other)
    assert read(models, tmp_path, LINEAR + "tokenizer_source: <suspect>\n").tokenizer is None


def test_three_models_in_slices_with_weights_at_every_level(models: Family, tmp_path: Path) -> None:
    text = """
merge_method: linear
slices:
  - sources:
      - {model: <suspect>, layer_range: [0, 1], parameters: {weight: 2}}
      - {model: <other>, layer_range: [2, 3]}
    parameters: {weight: 1}
  - sources:
      - {model: <base>, layer_range: [0, 1]}
parameters: {weight: 5}
"""
    found = merged(read(models, tmp_path, text))
    base, a, b = (stored(folder) for folder in (models.base, models.suspect, models.other))
    name = "model.layers.{}.mlp.up_proj.weight"
    wanted = (2 * a[name.format(0)] + b[name.format(2)]) / 3
    assert torch.allclose(found[name.format(0)], wanted, atol=1e-7)
    assert torch.equal(found[name.format(1)], base[name.format(0)])
    assert torch.equal(found["lm_head.weight"], base["lm_head.weight"])
    assert name.format(2) not in found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LINEAR.replace("linear", "karcher"), "merge_method: 'karcher' is not here"),
        (LINEAR.replace("linear", "slrep"), "Did you mean 'slerp'"),
        (LINEAR.replace("models:", "model:"), "Did you mean 'models'"),
        (LINEAR + "tokenizer: {source: union}\n", "tokenizer: is not supported: tokenizers are copied"),
        (LINEAR + "tokenizer_source: union\n", "tokenizer_source: 'union' is not supported"),
        (LINEAR + "chat_template: auto\n", "chat_template: is not supported"),
        (LINEAR + "modules: {}\n", "modules: is not supported"),
        (LINEAR + "dtype: int8\n", "dtype: 'int8' is not supported; write one of float32, bfloat16, float16"),
        (LINEAR + "dtype: [float32]\n", "dtype: '['float32']' is not supported"),
        (LINEAR + "base_model: <other>\ntokenizer_source: [base]\n", "tokenizer_source: '['base']' is not supported"),
        (LINEAR + "parameters: {t: 0.5}\n", "t: there is no such field in parameters"),
        (LINEAR.replace("weight: 3.0", "wieght: 3.0"), "Did you mean 'weight'"),
        (LINEAR.replace("weight: 3.0", "weight: heavy"), "models[1].parameters.weight: write a number"),
        (LINEAR.replace("weight: 3.0", "weight: .nan"), "models[1].parameters.weight"),
        (LINEAR.replace("weight: 3.0", "weight: []"), "is an empty list"),
        (LINEAR.replace("weight: 3.0", "weight: true"), "models[1].parameters.weight: write a number"),
        (LINEAR.replace("weight: 3.0", "weight: [{filters: a, value: 1}]"), "models[1].parameters.weight: write a num"),
        (LINEAR + "base_model: <base>\n", "base_model: linear has no base"),
        (LINEAR + "slices: []\n", "models: write either models or slices"),
        (LINEAR.replace("- model: <other>", "- modle: <other>"), "Did you mean 'model'"),
        (LINEAR + "merge_method: slerp\n", "line 8: is not YAML (the key 'merge_method' is there twice)"),
        (SLERP.replace("0.25", "1.25"), "parameters.t = 1.25 is outside [0, 1]"),
        (SLERP.replace("base_model: <suspect>\n", ""), "slerp needs one, the model at t = 0"),
        (SLERP.replace("[0, 3]", "[0, 3, 4]"), "sources[0].layer_range: write two whole numbers"),
        (SLERP + "    residual_weight: 1\n", "is not YAML"),
        (SLERP.replace("  - sources", "  - residual_weight: 1\n    sources"), "residual_weight: is not supported"),
        (TIES.replace("base_model: <base>\n", ""), "base_model: ties needs one"),
        (TIES.replace("normalize: true", "normalize: 1"), "parameters.normalize: write true or false"),
        (TIES.replace("normalize: true", "rescale: true"), "rescale: only dare rescales"),
        (TIES.replace("ties", "dare_ties", 1).replace("normalize: true", "rescale: false"), "dare always rescales"),
        (TIES.replace("density: 0.5", "density: 1.5"), "density = 1.5 is outside [0, 1]"),
        (PASSTHROUGH.replace("scale", "weight"), "there is no such field in slices[1].sources[0].parameters"),
        (
            "merge_method: passthrough\nmodels: [{model: a}, {model: b}]\n",
            "passthrough takes layers of several models in",
        ),
        ("merge_method: linear\nmodels: [{model: {path: a}}]\n", "models[0].model: must be a text"),
        ("merge_method: linear\nmodels: [{parameters: {}}]\n", "models[0].model: is missing"),
        ("- a\n", "file: must hold named fields"),
        ("merge_method: linear\nmodels: 3\n", "models: must be a list"),
        ("merge_method: linear\nmodels: [a]\n", "models[0]: must hold named fields"),
        ("merge_method: [linear]\n", "merge_method"),
        ("models: &a [*a]\nmerge_method: linear\n", "merge.yaml"),
    ],
)
def test_what_is_not_supported_is_refused(models: Family, tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as said:
        read(models, tmp_path, text)
    assert words in str(said.value)
    assert str(said.value).startswith(str(tmp_path / "merge.yaml"))
    assert "\n" not in str(said.value)


def test_a_filter_of_one_model_names_its_own_layers(models: Family, tmp_path: Path) -> None:
    text = """
merge_method: linear
slices:
  - sources:
      - {model: <suspect>, layer_range: [0, 1], parameters: {weight: 1.0}}
      - model: <other>
        layer_range: [2, 3]
        parameters: {weight: [{filter: layers.2., value: 0.0}, {value: 1.0}]}
"""
    found = merged(read(models, tmp_path, text))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found[name], stored(models.suspect)[name])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            LINEAR.replace("weight: 3.0", "weight: [{filter: mlp, value: 1}]"),
            "no weight .parameters.weight.*of .*other' is given for the",
        ),
        (SLERP.replace("[0, 3]", "[0, 4]"), "which has 3; write a range within 0 to 3"),
        (SLERP.replace("{model: <other>, layer_range: [0, 3]}", "{model: <other>, layer_range: [0, 2]}"), "as many of"),
        (SLERP.replace("      - {model: <other>, layer_range: [0, 3]}\n", ""), "slerp takes two models"),
        (LINEAR.replace("weight: 3.0", "weight: -1.0"), "add up to 0"),
    ],
)
def test_what_only_the_models_tell(models: Family, tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        merged(read(models, tmp_path, text))
