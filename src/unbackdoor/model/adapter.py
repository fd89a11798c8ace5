"""Open a LoRA adapter on a base that the person named.

PEFT configurations can do more than place low-rank matrices: name modules to import, repeat layers of the base, start
from a decomposition that rewrites the base's weights. Only a plain LoRA is accepted, field by field against a list of
what is understood; an option of a later PEFT is refused until somebody has read what it does.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from unbackdoor.errors import ModelError
from unbackdoor.model.header import read_header
from unbackdoor.model.libraries import library_errors
from unbackdoor.model.quarantine import printable

WEIGHTS = "adapter_model.safetensors"

_UNDERSTOOD = {
    "task_type", "peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_dora",
    "lora_bias", "target_parameters", "init_lora_weights", "ensure_weight_tying",
}  # fmt: skip


def open_adapter(base: Any, folder: Path, shown: str, *, trainable: bool) -> Any:
    """Put the adapter of a folder on `base` (changed in place), not merged.

    Args:
        base: A transformers model.
        folder: A folder that has passed the quarantine.
        shown: The adapter's name for messages.
        trainable: Whether its matrices take gradients.

    Raises:
        ModelError: If it is no plain LoRA adapter or does not fit the base.
    """
    from peft import PeftModel

    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"the adapter '{shown}' holds no {WEIGHTS}; ask its publisher for safetensors.")
    check_adapter(folder, shown)
    try:
        # Matrices that do not fit are reported by a warning; they are compared and refused below.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(base, str(folder), is_trainable=trainable, torch_device="cpu")
    except library_errors() as problem:
        reason = printable(str(problem), 400)
        raise ModelError(f"the adapter '{shown}' does not fit its base: {reason}") from problem
    _check_tensors(model, folder, shown)
    return model


def check_adapter(folder: Path, shown: str) -> dict[str, Any]:
    """Return the configuration of a plain LoRA adapter.

    Raises:
        ModelError: If it is another kind of adapter, or sets something that is not understood.
    """
    from peft import LoraConfig

    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ModelError(f"'{shown}' holds no adapter_config.json; the part after '+' must be a PEFT adapter.")
    config = json.loads(path.read_bytes())
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = printable(str(config.get("peft_type"))) if isinstance(config, dict) else "unknown"
        raise ModelError(f"the adapter '{shown}' is of the type '{kind}'; only LORA adapters are loaded.")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        task = printable(str(config["task_type"]))
        raise ModelError(f"the adapter '{shown}' is for the task '{task}', not for a causal language model.")
    idle = LoraConfig().to_dict()
    for field, value in config.items():
        if field not in _UNDERSTOOD and value != idle.get(field) and value not in (None, False, [], {}):
            shown_value = printable(str(value), 60)
            raise ModelError(
                f"the adapter '{shown}' sets '{printable(field)}' to {shown_value}, which is not supported; "
                "merge it into its base with PEFT and give the merged folder."
            )
    # Other starts (PiSSA, OLoRA, LoftQ, ...) rewrite the base's weights while the adapter is put on.
    if config.get("init_lora_weights") not in (None, True, False, "gaussian"):
        raise ModelError(
            f"the adapter '{shown}' starts from '{printable(str(config['init_lora_weights']))}', which changes the "
            "base; merge it into its base with PEFT and give the merged folder."
        )
    return config


def _check_tensors(model: Any, folder: Path, shown: str) -> None:
    from peft import get_peft_model_state_dict

    stored = set(read_header(folder / WEIGHTS))
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if missing := sorted(wanted - stored):
        raise ModelError(f"the adapter '{shown}' lacks the tensor '{printable(missing[0])}' for this base.")
    if surplus := sorted(stored - wanted):
        raise ModelError(
            f"the adapter '{shown}' holds the tensor '{printable(surplus[0])}', for which this base has no place."
        )
