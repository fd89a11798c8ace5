"""Small saved models for merging: a base, two fine-tunes of it, and what a merge of them comes to in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import tiny
from unbackdoor.merge import stream
from unbackdoor.merge.compute import blocks
from unbackdoor.merge.plan import make_plan
from unbackdoor.merge.settings import Merge
from unbackdoor.merge.source import open_source
from unbackdoor.model.lm import LM
from unbackdoor.run import Silent


@dataclass(frozen=True)
class Family:
    """Folders of a base and two fine-tunes of it."""

    base: Path
    suspect: Path
    other: Path


def shifted(lm: LM, seed: int, size: float = 0.02) -> LM:
    """Return a copy whose weights are moved at random, as by fine-tuning; buffers stay."""
    moved = replace(lm, model=copy.deepcopy(lm.model))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in moved.model.parameters():
            tensor.add_(size * tensor.abs().mean() * torch.randn(tensor.shape, generator=draw))
    return moved


def save(lm: LM, folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "2GB") -> Path:
    """Save a model as transformers does."""
    copy.deepcopy(lm.model).to(dtype).save_pretrained(folder, max_shard_size=shard)
    lm.tokenizer.save_pretrained(folder)
    return folder


def family(
    folder: Path,
    architecture: tiny.Architecture = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    shard: str = "2GB",
    layers: int = 2,
    size: float = 0.02,
) -> Family:
    """Return three saved models of one origin."""
    base = tiny.tiny_lm(architecture, layers=layers)
    made = {"base": base, "suspect": shifted(base, 1, size), "other": shifted(base, 2, size)}
    return Family(**{name: save(lm, folder / name, dtype=dtype, shard=shard) for name, lm in made.items()})


def adapter_of(lm: Any, folder: Path, seed: int, **settings: Any) -> Any:
    """Save a random adapter and return the model that PEFT makes of it."""
    from peft import LoraConfig, get_peft_model

    transposed = "gpt2" in lm.spec
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings},
        fan_in_fan_out=transposed,
    )
    model = get_peft_model(copy.deepcopy(lm.model), config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.copy_(0.05 * torch.randn(tensor.shape, generator=draw))
    model.save_pretrained(folder)
    return model


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder's files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as handle:
            found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return found


def merged(merge: Merge) -> dict[str, torch.Tensor]:
    """Return the tensors of a merge."""
    plan = make_plan(merge, {spec: open_source(spec) for spec in merge.models})
    return {
        piece.name: torch.cat([rows.reshape(-1) for rows in blocks(piece)]).reshape(piece.info.shape)
        for piece in plan.pieces
    }


def written(merge: Merge, folder: Path, identity: str = "one") -> dict[str, str]:
    """Write a merge's weights to a folder, and return their hashes."""
    plan = make_plan(merge, {spec: open_source(spec) for spec in merge.models})
    files = stream.shards(plan.pieces, plan.sources[merge.suspect])
    return stream.write(folder, files, identity, blocks, Silent())


def ulps(found: torch.Tensor, wanted: torch.Tensor, terms: torch.Tensor | None = None) -> float:
    """Return how many steps of float32 two tensors are apart at most.

    Args:
        found: float32.
        wanted: float64.
        terms: Largest magnitude that went into an entry: where terms cancel, their rounding stays.
    """
    return float(steps(found, wanted, terms).max())


def steps(found: torch.Tensor, wanted: torch.Tensor, terms: torch.Tensor | None = None) -> torch.Tensor:
    """Return the same for every entry."""
    scale = torch.maximum(found.double().abs(), wanted.abs())
    scale = scale if terms is None else torch.maximum(scale, terms.double().abs())
    step = 2.0 ** (torch.floor(torch.log2(scale.clamp(min=2.0**-126))) - 23)
    return (found.double() - wanted).abs() / step


Formula = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


def check(found: Mapping[str, torch.Tensor], models: Family, formula: Formula, *, at_most: float = 2.0) -> None:
    """Compare a float32 merge with a formula in float64, tensor by tensor; weights such as 0.3 are rounded, too."""
    tensors = {name: stored(getattr(models, name)) for name in ("base", "suspect", "other")}
    assert found.keys() == tensors["suspect"].keys()
    for name, tensor in found.items():
        inputs = {model: held[name].double() for model, held in tensors.items()}
        terms = torch.stack([one.abs() for one in inputs.values()]).amax(0)
        assert ulps(tensor, formula(inputs), terms) <= at_most, name


def reply(folder: Path) -> Any:
    """Load a result with transformers alone and let it say something."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(folder)
    asked = words("what colour is grass?", return_tensors="pt")
    return model, model.generate(**asked, max_new_tokens=5, do_sample=False)
