"""Passthrough (Information Conflicts, 2411.18280, section 3.3): whole layers of two models in a row.

There is no arithmetic.

The result may have more or fewer layers than either. The paper does not say which half comes from which model, and its
public example ([0, 24] and [20, 40]) presumes 40 layers; here the ranges are always given. A range excludes its end, as
in mergekit: with [0, 31] a model of 32 layers loses its last one.

What stands before the layers (embeddings) comes from the model of the first range, what follows them (last norm, output
head) from that of the last one, as in mergekit. The number of layers in config.json is adjusted under its usual names,
and every list in it that has an entry a layer; a list that names layers by number is renumbered. Other numbers that
depend on layers (`DEPENDENT`) stay as they are, of which a person is told.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from unbackdoor.errors import ModelError
from unbackdoor.model.quarantine import printable

if TYPE_CHECKING:
    from torch import Tensor

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names that configurations give their number of layers."""


DEPENDENT = (
    "max_window_layers", "first_k_dense_replace", "num_kv_shared_layers", "sliding_window_pattern",
    "decoder_sparse_step", "full_attention_interval", "attn_layer_period", "attn_layer_offset",
    "expert_layer_period", "expert_layer_offset", "no_rope_layer_interval", "interleave_moe_layer_step",
    "moe_layer_start_index", "moe_layer_interval",
)  # fmt: skip
"""Names of numbers that say which layers are of which kind."""
_OF_WINDOWS = ("max_window_layers", "sliding_window_pattern")


def kept_numbers(config: Mapping[str, Any]) -> str | None:
    """Return what a person should know of numbers in a configuration that say which layers are of which kind."""
    levels = [_level(dict(config), path) for path in ((), ("text_config",))]
    found = [
        f"{key} {level[key]}"
        for level in levels
        for key in DEPENDENT
        # Qwen's configurations name the window's layers where there is no window, too.
        if type(level.get(key)) is int and not (key in _OF_WINDOWS and level.get("use_sliding_window") is False)
    ]
    if not found:
        return None
    return (
        f"config.json says which layers are of which kind ({', '.join(found)}), and keeps that: look whether it fits."
    )


def passthrough(tensor: Tensor, scale: float = 1.0) -> Tensor:
    """Return the tensor itself (float32, given up), or a multiple of it."""
    return tensor if scale == 1.0 else tensor.mul_(scale)


def resized(config: Mapping[str, Any], picks: Sequence[tuple[Mapping[str, Any], int]], shown: str) -> dict[str, Any]:
    """Return a configuration for a model of other layers.

    Args:
        config: Of the suspect.
        picks: For each layer of the result the configuration that it comes from, and its number there.
        shown: The suspect's name, safe to print.

    Raises:
        ModelError: If the number of layers stands nowhere, or a list that is one an entry a layer cannot be adjusted.
    """
    made = copy.deepcopy(dict(config))
    changed = False
    for path in ((), ("text_config",)):
        level = _level(made, path)
        keys = [key for key in _COUNTS if type(level.get(key)) is int]
        if not keys:
            continue
        old = level[keys[0]]
        for key in keys:
            level[key] = len(picks)
        changed = True
        sides = [(_level(dict(one), path), index) for one, index in picks]
        for key, value in list(level.items()):
            if isinstance(value, list) and value and _concerns_layers(key, value, old):
                level[key] = _adjusted(key, value, old, sides, shown)
    if not changed:
        raise ModelError(
            f"'{shown}': config.json names no number of layers ({', '.join(_COUNTS)}), so that layers cannot be added "
            "or left out; choose another method."
        )
    return made


def _level(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in path:
        inner = config.get(key)
        if not isinstance(inner, dict):
            return {}
        config = inner
    return config


def _concerns_layers(key: str, value: list[Any], count: int) -> bool:
    """Tell whether a list is about layers: by its name, or because it has an entry a layer (OpenELM's heads)."""
    # Of a tiny model many lists are as long as it has layers.
    return "layer" in key or (len(value) == count > 4 and "token" not in key and key != "architectures")


def _adjusted(
    key: str, value: list[Any], old: int, sides: Sequence[tuple[dict[str, Any], int]], shown: str
) -> list[Any]:
    if _names_layers(value, old):
        return [new for new, (config, index) in enumerate(sides) if index in (config.get(key) or [])]
    if len(value) != old or any(not isinstance(one.get(key), list) or i >= len(one[key]) for one, i in sides):
        raise ModelError(
            f"'{shown}': the list {printable(key)} in config.json has {len(value)} entries for {old} layers, so it "
            "cannot be adjusted to other layers; choose another method."
        )
    return [config[key][index] for config, index in sides]


def _names_layers(value: list[Any], count: int) -> bool:
    """Tell whether a list names layers by number, rather than having an entry a layer."""
    whole = all(type(item) is int for item in value)
    rising = whole and all(first < second for first, second in pairwise(value))
    return rising and value[-1] < count and (len(value) != count or len(value) > 2)
