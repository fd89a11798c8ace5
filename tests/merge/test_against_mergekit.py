"""The same YAML given to mergekit 0.1.5 and to this package: float32 models, tensor by tensor.

mergekit (LGPL) is a reference of this test alone and never imported here: UNBACKDOOR_MERGEKIT_PYTHON names a Python
that has it (`pip install mergekit==0.1.5 torch`). Where results are not the same to the last bit, they are one step of
float32 apart, measured at the largest number that went into an entry: where terms cancel, their rounding stays.

SLERP on the arc is the exception: mergekit finds the angle in float32, and was up to two steps away for fine-tunes of
one base and three for tensors that lie far apart; this package adds blocks up in float64 and stays within two steps of
the formula in float64, which is asked there. mergekit cannot stack layers of a model with `layer_types` in its
configuration (transformers refuses what it makes).

Known differences: `dtype` is the type of arithmetic in mergekit and of the result alone here; DARE rescales by the
ratio of L1 norms there and by 1 / density here; which of equal magnitudes TIES keeps.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tiny
from merge.helpers import Family, family, merged, steps, stored, ulps
from unbackdoor.merge.mergekit_yaml import read_merge

PYTHON = os.environ.get("UNBACKDOOR_MERGEKIT_PYTHON", "")

SCRIPT = """
import json, sys
from importlib.metadata import version
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
print(version("mergekit"))
for path in sys.argv[1:]:
    content = MergeConfiguration.model_validate(yaml.safe_load(open(path)))
    options = MergeOptions(copy_tokenizer=False, quiet=True, random_seed=0, write_model_card=False)
    run_merge(content, path.removesuffix(".yaml"), options)
"""

BOTH = "models: [{model: <suspect>, parameters: <p>}, {model: <other>, parameters: <q>}]"
WITH_BASE = f"{BOTH}\nbase_model: <base>"
SLICED = "slices: [{sources: [{model: <suspect>, layer_range: [0, 3]}, {model: <other>, layer_range: [0, 3]}]}]"
T = "[{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}, {value: 0.5}]"
CASES = {
    "linear": ("merge_method: linear", BOTH, "{weight: 0.3}", "{weight: 0.7}"),
    "linear-sum": ("merge_method: linear\nparameters: {normalize: false}", BOTH, "{weight: 0.5}", "{weight: 0.25}"),
    "linear-gradient": ("merge_method: linear", BOTH, "{weight: [1, 0.2, 0.4]}", "{weight: [0.1, 0.9]}"),
    "slerp": ("merge_method: slerp\nbase_model: <suspect>\nparameters: {t: 0.35}", BOTH, "{}", "{}"),
    "slerp-layers": (f"merge_method: slerp\nbase_model: <suspect>\nparameters: {{t: {T}}}", SLICED, "", ""),
    "task": ("merge_method: task_arithmetic", WITH_BASE, "{weight: 0.6}", "{weight: -0.5}"),
    "ties": ("merge_method: ties", WITH_BASE, "{weight: 0.5, density: 0.3}", "{weight: 0.5, density: 0.6}"),
    "ties-lambda": (
        "merge_method: ties\nparameters: {lambda: 0.7, normalize: false}",
        WITH_BASE, "{weight: 1, density: 0.5}", "{weight: 0.4, density: 1}",
    ),
    "passthrough": (
        "merge_method: passthrough",
        "slices: [{sources: [{model: <suspect>, layer_range: [0, 2]}]}, "
        "{sources: [{model: <other>, layer_range: [1, 3], parameters: {scale: 0.5}}]}]", "", "",
    ),
    "dare-linear": ("merge_method: dare_linear", WITH_BASE, "{weight: 1, density: 0.5}", "{weight: 0, density: 0.5}"),
}  # fmt: skip


@pytest.fixture(scope="module")
def python() -> str:
    if not PYTHON:
        pytest.skip("UNBACKDOOR_MERGEKIT_PYTHON names no Python that has mergekit")
    done = subprocess.run([PYTHON, "-c", "import mergekit"], check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"{PYTHON} cannot import mergekit")
    return PYTHON


def arc(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    phi = torch.arccos(((a / a.norm()) * (b / b.norm())).sum())
    return torch.sin((1 - t) * phi) / torch.sin(phi) * a + torch.sin(t * phi) / torch.sin(phi) * b


def yaml_of(case: str, models: Family) -> str:
    head, inputs, first, second = CASES[case]
    text = f"{head}\n{inputs.replace('<p>', first).replace('<q>', second)}\ndtype: float32\n"
    for name in ("base", "suspect", "other"):
        text = text.replace(f"<{name}>", str(getattr(models, name)))
    return text


@pytest.fixture(scope="module", params=["llama", "qwen2", "far"])
def merges(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, python: str
) -> tuple[Family, Path]:
    """All cases done by mergekit, on an untied and a tied model, and on two that lie far apart."""
    folder = tmp_path_factory.mktemp(request.param)
    architecture: tiny.Architecture = "qwen2" if request.param == "qwen2" else "llama"
    models = family(folder, architecture, layers=3, size=0.8 if request.param == "far" else 0.02)
    paths = []
    for case in CASES:
        if case == "passthrough" and architecture == "qwen2":
            continue
        path = folder / f"{case}.yaml"
        path.write_text(yaml_of(case, models))
        paths.append(str(path))
    done = subprocess.run([python, "-c", SCRIPT, *paths], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "0.1.5" in done.stdout
    return models, folder


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("dare")])
def test_the_same_to_one_step_of_float32(merges: tuple[Family, Path], case: str) -> None:
    models, folder = merges
    if not (folder / case).exists():
        pytest.skip("mergekit cannot stack the layers of this architecture")
    found, wanted = merged(read_merge(folder / f"{case}.yaml")), stored(folder / case)
    assert found.keys() == wanted.keys()
    inputs = [stored(one) for one in (models.base, models.suspect, models.other)]
    for name, tensor in found.items():
        terms = torch.stack([one.get(name, tensor) for one in inputs]).abs().amax(0)
        assert tensor.dtype == wanted[name].dtype == torch.float32
        if case == "slerp" and folder.name.startswith("far"):
            exact = arc(inputs[1][name].double(), inputs[2][name].double(), 0.35)
            assert ulps(tensor, exact, terms) <= 2, name
        elif case == "slerp-layers" and folder.name.startswith("far"):
            assert ulps(tensor, wanted[name].double(), terms) <= 4, name
        else:
            apart = steps(tensor, wanted[name].double(), terms) > (2 if case == "slerp-layers" else 1)
            # Two entries of one magnitude at the cut of TIES: each side keeps another one.
            assert int(apart.sum()) <= (4 if case.startswith("ties") else 0), name


def test_layers_and_configuration_of_a_stack_agree(merges: tuple[Family, Path]) -> None:
    _, folder = merges
    if not (folder / "passthrough").exists():
        pytest.skip("mergekit cannot stack the layers of this architecture")
    config = json.loads((folder / "passthrough" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4


def test_dare_is_the_same_in_its_statistics(merges: tuple[Family, Path]) -> None:
    models, folder = merges
    found, wanted = merged(read_merge(folder / "dare-linear.yaml", seed=5)), stored(folder / "dare-linear")
    base, suspect = stored(models.base), stored(models.suspect)
    for name, tensor in found.items():
        if tensor.numel() < 4000:
            continue
        ours, theirs, whole = tensor - base[name], wanted[name] - base[name], suspect[name] - base[name]
        kept = [float((delta.abs() > 1e-3 * whole.abs().mean()).double().mean()) for delta in (ours, theirs)]
        # Five standard deviations of the difference of two shares; a few entries of the whole are small themselves.
        assert abs(kept[0] - kept[1]) < 5 * (0.5 / tensor.numel()) ** 0.5 + 0.002, name
        sizes = [float(delta.abs().sum() / whole.abs().sum()) for delta in (ours, theirs)]
        assert sizes[1] == pytest.approx(1.0, abs=0.01)
        assert sizes[0] == pytest.approx(1.0, abs=0.1)


def benchmark() -> ModuleType:
    """The benchmark as a module; its name is that of this folder, so it is loaded by its path."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    spec = importlib.util.spec_from_file_location("merge_benchmark", folder / "merge.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(made)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("common", None)
    return made


def test_both_sides_of_the_benchmark_agree(python: str, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark().main(["--python", python, "--size", "tiny", "--repeats", "1", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["share_of_entries_that_differ"] == 0
    middle = result["medians"]
    assert result["ratios"]["mergekit"]["time"] == middle["ours"]["seconds"] / middle["mergekit"]["seconds"]
    assert all(side["peak"] > 2**26 for side in middle.values())


def test_the_benchmark_would_notice_another_result(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    right = {"w": torch.ones(4, 4, dtype=torch.bfloat16), "v": torch.ones(3)}
    wrong = {**right, "w": right["w"] * 1.02}
    for name, content in (("a", right), ("b", right), ("c", wrong), ("d", {"w": right["w"]})):
        (tmp_path / name).mkdir()
        save_file(content, tmp_path / name / "model.safetensors")
    same_results = benchmark().same_results
    assert same_results(tmp_path / "a", tmp_path / "b") == 0
    with pytest.raises(AssertionError, match="w differs"):
        same_results(tmp_path / "a", tmp_path / "c")
    with pytest.raises(AssertionError, match="different tensors"):
        same_results(tmp_path / "a", tmp_path / "d")
