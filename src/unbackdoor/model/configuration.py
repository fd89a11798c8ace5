"""Compare a checkpoint's configuration with what its files hold, before and after transformers builds a model of it.

A configuration is a few bytes that ask for any amount of memory and time: a billion layers, a vocabulary that fits in
no machine. The headers of the safetensors files say how large the model really is, so the two are compared first.
What transformers would quietly make fit (weights drawn at random, layers left out) is refused with the numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from unbackdoor.errors import ModelError, did_you_mean
from unbackdoor.model.header import HeaderError, read_header
from unbackdoor.model.quarantine import printable

_LAYER = re.compile(r"((?:.*\.)?(?:layers?|h|blocks?))\.(\d{1,9})\.")
_TABLE_BYTES = 2_000_000_000


def check_configuration(folder: Path, shown: str) -> None:
    """Say in our own words why a folder is none that can be loaded, before transformers is asked.

    Raises:
        ModelError: If it is an adapter, lacks configuration or weights, or is no causal model that transformers knows.
    """
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = read_config(folder, shown)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        raise ModelError(
            f"'{shown}' has the architecture '{printable(str(kind))}', which transformers {__version__} does not know; "
            "loading it would need code from the checkpoint, which is never run here."
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"'{shown}' is of the type '{kind}', which is not a causal language model.")
    if config.get("quantization_config"):
        raise ModelError(f"'{shown}' holds quantised weights, which cannot be trained; use the full-precision model.")
    if not any(folder.glob("model*.safetensors")):
        raise ModelError(f"'{shown}' holds no safetensors weights (model.safetensors); ask its publisher for them.")
    _check_activation(config, shown)
    # Before transformers reads the file: its configurations make lists as long as the number of layers.
    inner = config.get("text_config")
    held = tensor_shapes(folder)
    for level in (config, {"model_type": kind} | inner if isinstance(inner, dict) else {}):
        for key in _layer_keys(level.get("model_type")):
            _check_layers(level.get(key), held, shown)


def read_config(folder: Path, shown: str) -> dict[str, Any]:
    """Return config.json of a folder with full weights.

    Args:
        folder: The folder.
        shown: Its name, safe to print.

    Raises:
        ModelError: If it is an adapter, or has no configuration that is a JSON object.
    """
    # With an adapter's configuration beside it, transformers would load the base that the adapter names instead.
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"'{shown}' is an adapter; write BASE+ADAPTER with the base that you want it on.")
    if not (folder / "config.json").is_file():
        raise ModelError(f"'{shown}' holds no config.json; it must be a Hugging Face model.")
    config = json.loads((folder / "config.json").read_bytes())
    if not isinstance(config, dict):
        raise ModelError(f"'{shown}': config.json is not a JSON object; get it from its publisher again.")
    return config


def _layer_keys(kind: object) -> set[str]:
    """The names under which an architecture's configuration may have its number of layers; GPT-2 says n_layer."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    own = CONFIG_MAPPING[kind].attribute_map.get("num_hidden_layers") if known else None
    return {"num_hidden_layers", *([own] if isinstance(own, str) else [])}


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that transformers would read, from the headers alone.

    Raises:
        ModelError: If a header is not sound.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        files = [single] if single.is_file() else sorted(folder.glob("model*.safetensors"))
    else:
        # The quarantine has checked that these are names of files in the folder.
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        files = [folder / Path(name).name for name in names]
    try:
        return {name: entry.shape for file in files for name, entry in read_header(file).items()}
    except HeaderError as problem:
        raise ModelError(f"'{printable(str(folder))}' holds no sound weights: {printable(str(problem))}") from problem


def check_fit(folder: Path, config: Any, shown: str) -> None:
    """Refuse a configuration that describes another model than the files hold, before any memory is taken for it.

    The model is built without memory (on torch's meta device), which is safe once its number of layers is known to be
    that of the files.

    Args:
        folder: The checkpoint.
        config: What transformers made of its config.json.
        shown: The model's name, safe to print.

    Raises:
        ModelError: With the numbers that do not fit.
    """
    import torch
    from transformers import AutoModelForCausalLM

    held = tensor_shapes(folder)
    text = config.get_text_config()
    _check_layers(getattr(text, "num_hidden_layers", None), held, shown)
    padding, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(padding, int) and isinstance(rows, int) and padding >= rows:
        raise ModelError(
            f"'{shown}': config.json has the pad_token_id {padding}, but a vocabulary of {rows}; set it to null there."
        )
    with torch.device("meta"):
        described = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    prefix = f"{described.base_model_prefix}."
    for name, parameter in described.named_parameters():
        names = (name, name.removeprefix(prefix), prefix + name)
        shape = next((held[one] for one in names if one in held), None)
        if shape is not None and math.prod(shape) != parameter.numel():
            raise _other_shape(name, shape, tuple(parameter.shape), shown)
    _check_size(described, held, shown)


def _check_size(described: Any, held: Mapping[str, tuple[int, ...]], shown: str) -> None:
    """Compare whole sizes; whatever the tensors are called, an honest model is not twice as large as its files."""
    wanted = sum(parameter.numel() for parameter in described.parameters())
    found = sum(map(math.prod, held.values()))
    if wanted > 2 * found:
        raise ModelError(
            f"'{shown}': config.json describes a model of {wanted:,} numbers, but its files hold {found:,}; "
            "get config.json and weights from its publisher again."
        )
    tables = sum(buffer.numel() * buffer.element_size() for buffer in described.buffers())
    if tables > _TABLE_BYTES + 16 * found:
        raise ModelError(
            f"'{shown}': config.json asks for tables of {tables / 1e9:,.1f} GB beside the weights; "
            "get config.json from its publisher again."
        )


def _check_layers(wanted: object, held: Mapping[str, tuple[int, ...]], shown: str) -> None:
    """Compare a number of layers with the longest row of numbered layers in the files."""
    if type(wanted) is not int:
        return  # transformers says it where it is no number at all
    if wanted < 1:
        raise ModelError(
            f"'{shown}': config.json says that the model has {wanted} layers; get config.json from its publisher again."
        )
    rows: dict[str, set[int]] = {}
    for name in held:
        match = _LAYER.match(name)
        if match is not None:
            rows.setdefault(match[1], set()).add(int(match[2]))
    found = max(map(len, rows.values()), default=wanted)
    if wanted > found:
        raise ModelError(
            f"'{shown}': config.json says that the model has {wanted} layers, but its files hold {found}; "
            "get config.json and weights from its publisher again."
        )


def _check_activation(config: Mapping[str, object], shown: str) -> None:
    from transformers.activations import ACT2CLS

    for key in ("hidden_act", "hidden_activation", "activation_function"):
        named = config.get(key)
        if isinstance(named, str) and named not in ACT2CLS:
            raise ModelError(
                f"'{shown}': config.json names the activation '{printable(named)}' ({key}), which transformers does "
                f"not know.{did_you_mean(named, list(ACT2CLS)) or ' Get config.json from its publisher again.'}"
            )


def check_loaded(model: Any, info: Mapping[str, Any], shown: str) -> None:
    """Refuse a model that transformers had to complete or to cut, and settings that only break later.

    Args:
        model: The model as loaded.
        info: What transformers says of its tensors (`output_loading_info`).
        shown: The model's name, safe to print.

    Raises:
        ModelError: With the first thing that does not fit.
    """
    absent = sorted(info["missing_keys"])
    if absent:
        raise ModelError(
            f"'{shown}' lacks {len(absent)} of the tensors of its architecture "
            f"({printable(absent[0])}); they would be random. Check that it is a complete causal language model."
        )
    for name, found, wanted in sorted(info["mismatched_keys"], key=str):
        raise _other_shape(str(name), tuple(found), tuple(wanted), shown)
    _check_surplus_layers(model, info["unexpected_keys"], shown)
    for where, settings in (("generation_config.json", model.generation_config), ("config.json", model.config)):
        for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
            value = getattr(settings, key, None)
            ids = value if isinstance(value, (list, tuple)) else [value]
            if value is not None and not all(type(item) is int for item in ids):
                raise ModelError(
                    f"'{shown}': {where} has the {key} {printable(repr(value))}, which is no token id; "
                    "write a whole number there."
                )


def _check_surplus_layers(model: Any, unexpected: Iterable[object], shown: str) -> None:
    """A model cut to fewer layers than its files hold is another model, however well it loads."""
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    own = list(model.state_dict())
    for name in sorted(map(str, unexpected)):
        match = _LAYER.match(name)
        # Only layers in a row of which the model uses the first: towers and heads for other tasks are left out rightly.
        if match is None or type(wanted) is not int or int(match[2]) < wanted:
            continue
        if any(f"{match[1]}.0." in mine for mine in own):
            raise ModelError(
                f"'{shown}': config.json says that the model has {wanted} layers, but its files hold more "
                f"({printable(name)}); get config.json and weights from its publisher again."
            )


def _other_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...], shown: str) -> ModelError:
    return ModelError(
        f"'{shown}' has the tensor {printable(name)} in another shape than config.json describes ({list(found)} in the "
        f"files, {list(wanted)} described); get config.json and weights from its publisher again."
    )
