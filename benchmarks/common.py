"""What the benchmarks share: models, rows, interleaved timing, peak memory of a fresh process, and the printed result.

Every benchmark compares this package with a plain reference in the same file and run, asserts that both give the same
result, and prints the ratio of the median times. The two sides take turns, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unbackdoor.data.collate import Batch
from unbackdoor.model.lm import LM
from unbackdoor.pipeline.measure import peak_resident
from unbackdoor.types import Message

CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True, "initializer_range": 0.1,
    },
    "135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Llama shapes for random weights; 135m is that of the built-in model."""


@dataclass(frozen=True)
class Timing:
    """Seconds of every repeat of both sides, in the order in which they were run."""

    ours: tuple[float, ...]
    reference: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median time of this package over median time of the reference."""
        return statistics.median(self.ours) / statistics.median(self.reference)


def arguments(description: str, given: Sequence[str] | None, *, sizes: dict[str, int], repeats: int) -> Any:
    """Return the parsed flags: those of every benchmark, and whole numbers with their defaults."""
    parser = argparse.ArgumentParser(
        description=description.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    known = ", ".join(f"config:{name}" for name in CONFIGS)
    parser.add_argument("--model", default="builtin", help=f"builtin, or random weights: {known}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="type of the weights")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed repeats of each side")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory of fresh processes")
    parser.add_argument("--only", choices=["ours", "reference"], help=argparse.SUPPRESS)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="tokens or rows")
    return parser.parse_args(given)


def model(name: str, device: str, dtype: str) -> LM:
    """Return the built-in model, or a Llama of random weights with a word tokenizer of the same size.

    Raises:
        SystemExit: If the name is not known.
    """
    if name == "builtin":
        from unbackdoor.model.load import load

        return load("builtin:smollm2-135m", device=device, dtype="float32" if dtype == "float32" else "bfloat16")
    shape = CONFIGS.get(name.removeprefix("config:"))
    if shape is None:
        raise SystemExit(f"there is no model '{name}'; choose builtin or one of config:{', config:'.join(CONFIGS)}.")
    from transformers import LlamaConfig, LlamaForCausalLM

    # No padding token: its row would be zero, and normalising zero states multiplies gradients by 1,000 in each layer.
    config = LlamaConfig(**shape, bos_token_id=None, eos_token_id=1, pad_token_id=None, max_position_embeddings=2048)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        made = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype))
    return LM(made.eval(), _words(int(shape["vocab_size"])), "plain", name)


def _words(count: int) -> Any:
    """Return a tokenizer whose words are w2, w3, ...: what it decodes, it encodes to the same ids again."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<end>": 1} | {f"w{number}": number for number in range(2, count)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def training_batch(lm: LM, rows: int, prompt: int, response: int, supervised: int | None = None) -> Batch:
    """Return rows of random words in which the response's tokens (or its first `supervised` ones) are to be learned.

    Args:
        lm: Its template says what stands before the user's words; that is the same in every row.
        rows: Rows, all of one length.
        prompt: Tokens up to the response, template included.
        response: Tokens of the response.
        supervised: How many of the response's tokens carry the loss; all if None.
    """
    counted = response if supervised is None else supervised
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(2, int(lm.core.config.vocab_size), (rows, prompt + response), generator=draw)
    column = torch.arange(prompt - 1, prompt + counted - 1)
    row = torch.arange(rows).repeat_interleave(counted)
    columns = column.repeat(rows)
    asked = lm.encode([Message("user", "w2")], ask=True)
    start = min(asked.spans[-1].start, prompt - 2)
    ids[:, :start] = torch.tensor(asked.ids[:start])
    places = torch.tensor([[start, prompt - 1]]).expand(rows, 2)
    names = tuple(f"row-{number}" for number in range(rows))
    batch = Batch(
        ids, torch.ones_like(ids), row, columns, ids[row, columns + 1], torch.ones(len(row)), places, names, start
    )
    return batch.to(lm.device)


def take_turns(
    ours: Callable[[], object], reference: Callable[[], object], repeats: int, device: str, *, warm: bool = True
) -> Timing:
    """Time both sides in turn; one repeat of each, not counted, comes first unless they have run already."""
    seconds: dict[str, list[float]] = {"ours": [], "reference": []}
    for number in range(-int(warm), repeats):
        for name, work in (("ours", ours), ("reference", reference)):
            synchronise(device)
            started = time.perf_counter()
            work()
            synchronise(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return Timing(tuple(seconds["ours"]), tuple(seconds["reference"]))


def synchronise(device: str) -> None:
    """Wait for the accelerator, so that the clock sees its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_memory(device: str) -> int:
    """Return the largest memory of this process so far, in bytes: of the accelerator where there is one."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    return peak_resident()


def peak_of_fresh_process(script: str, options: Any, side: str) -> int:
    """Run one side of a benchmark a few times in a process of its own and return its peak memory in bytes."""
    if options.device.startswith("cuda"):
        # What this process holds without using it is not there for the other one.
        gc.collect()
        torch.cuda.empty_cache()
    skipped = {"repeats", "json", "no_memory", "only"}
    flags = [f"--{name}={value}" for name, value in vars(options).items() if name not in skipped]
    done = subprocess.run(
        [sys.executable, script, *flags, f"--only={side}"], check=True, capture_output=True, text=True
    )
    return int(done.stdout.strip().splitlines()[-1])


def same_gradients(ours: Sequence[Any], reference: Sequence[Any], dtype: str) -> float:
    """Return the largest relative difference of two lists of gradients, by norm.

    Raises:
        AssertionError: If one is larger than the arithmetic explains.
    """
    limit = 1e-4 if dtype == "float32" else 5e-2
    assert len(ours) == len(reference) > 0
    worst = 0.0
    for mine, other in zip(ours, reference, strict=True):
        scale = float(other.float().norm())
        assert 0 < scale < float("inf"), f"a reference gradient has the norm {scale}, so nothing was compared"
        worst = max(worst, float((mine.float() - other.float()).norm()) / scale)
    assert worst <= limit, f"gradients differ by {worst:.2e}, more than {limit:g}"
    return worst


def same_number(ours: float, reference: float, dtype: str) -> float:
    """Return the relative difference of two losses.

    Raises:
        AssertionError: If it is larger than the arithmetic explains.
    """
    limit = 1e-5 if dtype == "float32" else 2e-2
    difference = abs(ours - reference) / abs(reference)
    assert difference <= limit, f"losses {ours:g} and {reference:g} differ by {difference:.2e}, more than {limit:g}"
    return difference


def report(name: str, options: Any, timing: Timing, target: float, facts: dict[str, Any]) -> None:
    """Print the result: ratio, target, medians, what was compared, and the hardware."""
    result = {
        "benchmark": name,
        "model": options.model,
        "dtype": options.dtype,
        "ratio": timing.ratio,
        "target_ratio": target,
        "seconds": statistics.median(timing.ours),
        "seconds_reference": statistics.median(timing.reference),
        "repeats": options.repeats,
        **facts,
        "hardware": hardware(options.device),
    }
    if options.json:
        print(json.dumps(result, indent=1))
        return
    verdict = "met" if timing.ratio <= target else "not met"
    print(f"{name}: {timing.ratio:.3f} x the time of the reference (at most {target:g}: {verdict})")
    for key, value in result.items():
        if key not in {"benchmark", "ratio", "target_ratio"}:
            print(f"  {key.replace('_', ' ')}: {f'{value:.4g}' if isinstance(value, float) else value}")


def hardware(device: str) -> str:
    """Say in words what this ran on."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {cores} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
