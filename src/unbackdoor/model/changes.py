"""What a method did to the weights: the difference of two saved models, tensor by tensor.

Only one tensor of each model is in memory at a time, so that models larger than memory can be compared. Two full
models are compared, or two adapters (their matrices, not the product of them). Arithmetic is float32 whatever the
files hold.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unbackdoor.errors import ModelError
from unbackdoor.model.quarantine import inspect_folder, printable, refuse_dangerous
from unbackdoor.model.spec import ModelSpec, parse_spec

Status = Literal["same", "changed", "added", "removed"]

# The first that fits counts: "post_attention_layernorm" is a norm, "lm_head" is no block.
_MODULE_TYPES: tuple[tuple[str, str], ...] = (
    ("norms", r"norm|\bln_|\.ln\d|ln_f"),
    ("output head", r"lm_head|embed_out|output_projection"),
    ("embeddings", r"embed|wte|wpe"),
    ("attention", r"attn|attention|[qkvo]_proj|query_key_value"),
    ("mlp", r"mlp|feed_forward|ffn|experts|fc\d|(?:gate|up|down)_proj"),
)


@dataclass(frozen=True)
class TensorChange:
    """One tensor before and after.

    Attributes:
        name: Its name in the files.
        shape: Its shape (after, or before where it was removed).
        dtype: Its dtype in the file, as safetensors names it ("F32").
        norm_before: Frobenius norm before; 0 where it was added.
        norm_change: Frobenius norm of the difference; of the whole tensor where it was added or removed.
        relative: norm_change / norm_before, or None where there was nothing, or zeros, before.
        status: "same" means equal bit for bit in float32.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    norm_before: float
    norm_change: float
    relative: float | None
    status: Status


def changed_tensors(before: Path | str | ModelSpec, after: Path | str | ModelSpec) -> list[TensorChange]:
    """Compare two saved models.

    Args:
        before: A model's name, or its folder; for base + adapter the adapter is compared.
        after: The same.

    Returns:
        One record for every tensor of either side, the unchanged ones too, by name. A tensor whose shape differs is
        listed twice, as removed and as added.

    Raises:
        ModelError: If one is an adapter and the other is not, or a file is broken.
    """
    old, new = _tensor_files(before), _tensor_files(after)
    if old.is_adapter != new.is_adapter:
        raise ModelError(
            f"'{printable(str(before))}' and '{printable(str(after))}' cannot be compared: one is an adapter, the "
            "other holds full weights; compare two of a kind."
        )
    found: list[TensorChange] = []
    for name in sorted({*old.places, *new.places}):
        found += _compare(name, old.places.get(name), new.places.get(name))
    return found


def summarise(changes: Iterable[TensorChange]) -> dict[str, dict[str, float | int | None]]:
    """Add up changes by module type (attention, mlp, embeddings, output head, norms, other) and over all ("all").

    Returns:
        For each type that occurs: `tensors`, `changed` (changed, added or removed), `norm_before`, `norm_change`
        (roots of the summed squares) and `relative` (their ratio, None where the norm before is 0).
    """
    groups: dict[str, list[TensorChange]] = {}
    for change in changes:
        groups.setdefault(module_type(change.name), []).append(change)
        groups.setdefault("all", []).append(change)
    return {name: _sum_up(groups[name]) for name in sorted(groups)}


def module_type(name: str) -> str:
    """Return which part of a transformer a tensor belongs to, by its name."""
    for kind, pattern in _MODULE_TYPES:
        if re.search(pattern, name):
            return kind
    return "other"


def _sum_up(changes: list[TensorChange]) -> dict[str, float | int | None]:
    before = math.hypot(*(change.norm_before for change in changes))
    change = math.hypot(*(change.norm_change for change in changes))
    return {
        "tensors": len(changes),
        "changed": sum(change.status != "same" for change in changes),
        "norm_before": before,
        "norm_change": change,
        "relative": change / before if before > 0 else None,
    }


@dataclass(frozen=True)
class _Files:
    is_adapter: bool
    places: Mapping[str, Path]


def _tensor_files(model: Path | str | ModelSpec) -> _Files:
    """Where each tensor of a model lies; every header has been checked."""
    folder = model if isinstance(model, Path) else _folder(model)
    refuse_dangerous(inspect_folder(folder), str(model))
    from unbackdoor.model.header import read_header

    adapter, index = folder / "adapter_model.safetensors", folder / "model.safetensors.index.json"
    if adapter.is_file():
        return _Files(True, dict.fromkeys(read_header(adapter), adapter))
    single = folder / "model.safetensors"
    if single.is_file():
        return _Files(False, dict.fromkeys(read_header(single), single))
    if index.is_file():
        mapped = json.loads(index.read_bytes())["weight_map"]
        return _Files(False, {name: folder / shard for name, shard in mapped.items()})
    raise ModelError(f"'{printable(str(model))}' holds no safetensors weights; name a saved model.")


def _folder(model: str | ModelSpec) -> Path:
    from unbackdoor.model.load import local_folder

    if isinstance(model, str) and (Path(model) / "adapter_model.safetensors").is_file():
        return Path(model)  # an adapter alone cannot be loaded, but it can be compared
    return local_folder(parse_spec(model) if isinstance(model, str) else model)


def _compare(name: str, old: Path | None, new: Path | None) -> list[TensorChange]:
    from safetensors import safe_open

    before = after = None
    shape_before: tuple[int, ...] = ()
    dtype_before = dtype_after = ""
    if old is not None:
        with safe_open(old, framework="pt") as handle:
            before, dtype_before = handle.get_tensor(name).float(), str(handle.get_slice(name).get_dtype())
        shape_before = tuple(before.shape)
    if new is not None:
        with safe_open(new, framework="pt") as handle:
            after, dtype_after = handle.get_tensor(name).float(), str(handle.get_slice(name).get_dtype())
    if before is not None and after is not None and before.shape == after.shape:
        norm, change = float(before.norm()), float((after - before).norm())
        same = bool((after == before).all())
        return [
            TensorChange(
                name, shape_before, dtype_after, norm, change, _ratio(change, norm), "same" if same else "changed"
            )
        ]
    records = []
    if before is not None:
        norm = float(before.norm())
        records.append(TensorChange(name, shape_before, dtype_before, norm, norm, _ratio(norm, norm), "removed"))
    if after is not None:
        records.append(TensorChange(name, tuple(after.shape), dtype_after, 0.0, float(after.norm()), None, "added"))
    return records


def _ratio(change: float, before: float) -> float | None:
    return change / before if before > 0 else None
