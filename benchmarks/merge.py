"""A linear merge of two large models on disk against mergekit 0.1.5.

Both sides merge the same two models of random weights (Llama shapes, 2.2 GB each in bfloat16) from the same disk, in a
fresh process each time, in turn, after both models were read once. The time to import is counted apart; peak memory is
that of the whole process. mergekit runs with lazy loading and low memory, once with its own size of output files (5 GB)
and once with small ones, which it needs less memory and time for. This package also hashes what it reads and writes.

`--python` names the Python that has mergekit (`pip install mergekit==0.1.5 torch`); its results are compared with ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch

TARGET_TIME, TARGET_MEMORY = 0.6, 0.25
SMALL_FILES = 200_000_000

_PEAK = """
def peak():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
"""
OURS = f"""
import json, sys, time
started = time.perf_counter()
import torch
from unbackdoor import merge
from unbackdoor.pipeline import merging
from unbackdoor.merge import compute, mergekit_yaml
from unbackdoor.pipeline import steps
imported = time.perf_counter()
{_PEAK}
merge(yaml=sys.argv[1], out=sys.argv[2])
print(json.dumps({{"import": imported - started, "seconds": time.perf_counter() - imported, "peak": peak()}}))
"""
MERGEKIT = f"""
import json, sys, time
started = time.perf_counter()
import torch, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
imported = time.perf_counter()
{_PEAK}
options = MergeOptions(
    lazy_unpickle=True, low_cpu_memory=True, copy_tokenizer=False, quiet=True, out_shard_size=int(sys.argv[3])
)
run_merge(MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1]))), sys.argv[2], options)
print(json.dumps({{"import": imported - started, "seconds": time.perf_counter() - imported, "peak": peak()}}))
"""

SHAPES = {
    "tiny": {"hidden": 64, "inner": 128, "layers": 2, "words": 512, "pairs": 16},
    "1b": {"hidden": 2048, "inner": 5632, "layers": 22, "words": 32000, "pairs": 256},
}


def write_model(folder: Path, size: str, seed: int) -> None:
    """Save a Llama of random weights; another seed is a fine-tune of the same base."""
    from safetensors.torch import save_file

    shape = SHAPES[size]
    hidden, inner, words, pairs = shape["hidden"], shape["inner"], shape["words"], shape["pairs"]
    shapes = {"model.embed_tokens.weight": (words, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (words, hidden)
    for number in range(shape["layers"]):
        block = f"model.layers.{number}"
        shapes |= {f"{block}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"}
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (pairs, hidden) for name in "kv"}
        shapes |= {f"{block}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj.weight"] = (hidden, inner)
    base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    content = {}
    for name, dimensions in shapes.items():
        weights = 0.02 * torch.randn(dimensions, generator=base) + 0.002 * torch.randn(dimensions, generator=own)
        content[name] = weights.bfloat16()
    folder.mkdir(parents=True)
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": shape["layers"], "num_attention_heads": hidden // 64, "vocab_size": words,
        "num_key_value_heads": pairs // 64 or 1, "head_dim": 64, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def once(python: str, script: str, *given: str) -> dict[str, float]:
    """Run one side in a fresh process."""
    done = subprocess.run([python, "-c", script, *given], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{python} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def same_results(ours: Path, theirs: Path) -> float:
    """Return the share of entries that are not the same bits.

    Raises:
        AssertionError: If tensors are missing, or differ by more than one step of bfloat16.
    """
    from safetensors import safe_open

    where: dict[str, Path] = {}
    for path in theirs.glob("*.safetensors"):
        with safe_open(path, framework="pt") as handle:
            where |= dict.fromkeys(handle.keys(), path)
    differing = total = 0
    with safe_open(ours / "model.safetensors", framework="pt") as handle:
        assert set(handle.keys()) == set(where), "the results have different tensors"
        for name, path in where.items():
            with safe_open(path, framework="pt") as other:
                one, two = handle.get_tensor(name), other.get_tensor(name)
            assert (one.dtype, one.shape) == (two.dtype, two.shape), f"{name} has another type or shape"
            apart = one != two
            assert bool(((one.float() - two.float()).abs() <= 2**-7 * two.float().abs()).all()), f"{name} differs"
            differing, total = differing + int(apart.sum()), total + one.numel()
    return differing / total


def arguments(given: Sequence[str] | None) -> Any:
    """Return the parsed flags."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--python", required=True, help="the Python that has mergekit")
    parser.add_argument("--size", default="1b", choices=list(SHAPES), help="shapes of the two models")
    parser.add_argument("--method", default="linear", choices=["linear", "slerp"])
    parser.add_argument("--folder", type=Path, help="where the models go; a temporary folder without it")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats of each side")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Make the models, merge them in turn, compare and print."""
    options = arguments(given)
    with tempfile.TemporaryDirectory(dir=options.folder) as text:
        report(options, *measure(options, Path(text)))


def measure(options: Any, folder: Path) -> tuple[dict[str, list[dict[str, float]]], float, int]:
    """Return every run of each side, the share of entries that differ, and the size of one model in bytes."""
    import shutil

    a, b = folder / "a", folder / "b"
    for seed, place in enumerate((a, b), 1):
        write_model(place, options.size, seed)
    half = "parameters: {weight: 0.5}" if options.method == "linear" else "parameters: {}"
    base = "" if options.method == "linear" else f"base_model: {a}\nparameters: {{t: 0.5}}\n"
    text = f"merge_method: {options.method}\n{base}models:\n- {{model: {a}, {half}}}\n- {{model: {b}, {half}}}\n"
    (folder / "merge.yaml").write_text(text + "dtype: bfloat16\n")
    sides = {
        "ours": (sys.executable, OURS, ()),
        "mergekit": (options.python, MERGEKIT, (str(5_000_000_000),)),
        "mergekit, small files": (options.python, MERGEKIT, (str(SMALL_FILES),)),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    differing = 0.0
    for number in range(options.repeats + 1):
        for name, (python, script, more) in sides.items():
            out = folder / name.replace(" ", "-")
            found = once(python, script, str(folder / "merge.yaml"), str(out), *more)
            if number:  # the first round reads the models into the cache
                runs[name].append(found)
        if not number:
            differing = max(same_results(folder / "ours", folder / name.replace(" ", "-")) for name in list(sides)[1:])
        for name in sides:
            shutil.rmtree(folder / name.replace(" ", "-"))
    return runs, differing, (a / "model.safetensors").stat().st_size


def report(options: Any, runs: dict[str, list[dict[str, float]]], differing: float, size: int) -> None:
    """Print medians and ratios."""
    middle = {
        name: {key: statistics.median(run[key] for run in found) for key in ("import", "seconds", "peak")}
        for name, found in runs.items()
    }
    ours = middle["ours"]
    ratios = {
        name: {"time": ours["seconds"] / side["seconds"], "memory": ours["peak"] / side["peak"]}
        for name, side in middle.items()
        if name != "ours"
    }
    result = {
        "benchmark": "merge", "method": options.method, "bytes_of_each_model": size, "repeats": options.repeats,
        "medians": middle, "ratios": ratios, "target_time": TARGET_TIME, "target_memory": TARGET_MEMORY,
        "share_of_entries_that_differ": differing, "hardware": common.hardware("cpu"),
    }  # fmt: skip
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(f"merge ({options.method}) of two models of {size / 1e9:.2f} GB, medians of {options.repeats}")
    for name, side in middle.items():
        seconds = [f"{run['seconds']:.1f}" for run in runs[name]]
        print(
            f"  {name}: {side['seconds']:.1f} s ({', '.join(seconds)}), peak {side['peak'] / 1e6:.0f} MB, "
            f"import {side['import']:.1f} s"
        )
    for name, ratio in ratios.items():
        met = [
            "met" if ratio[key] <= target else "not met"
            for key, target in (("time", TARGET_TIME), ("memory", TARGET_MEMORY))
        ]
        print(
            f"  against {name}: time x {ratio['time']:.3f} (at most {TARGET_TIME}: {met[0]}), memory x "
            f"{ratio['memory']:.3f} (at most {TARGET_MEMORY}: {met[1]})"
        )
    print(f"  entries that are not the same bits: {differing:.2g} of all\n  hardware: {result['hardware']}")


if __name__ == "__main__":
    main()
