"""Train a LoRA adapter instead of all weights (Hu et al., 2106.09685), through PEFT.

`attach` and `merge` are for a model with full weights. A suspect that is an adapter itself can be trained as it is, or
a new adapter can be put on top: `stack` folds the suspect's adapter into its base for the time of the training, and
`combine` makes one adapter for the untouched base out of both, of the sum of their ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from unbackdoor.errors import ModelError
from unbackdoor.model.lm import LM
from unbackdoor.model.quarantine import printable

if TYPE_CHECKING:
    from torch import Tensor


class LoraSettings(BaseModel):
    """The adapter to attach."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(16, ge=1, description="rank of the update of each matrix")
    alpha: float = Field(32.0, gt=0, description="scale; the update is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapter's first matrix")


@dataclass(frozen=True)
class Factors:
    """One module's update, as a product: `up @ down`, scale included.

    Attributes:
        down: float32 [rank, inputs].
        up: float32 [outputs, rank].
    """

    down: Tensor
    up: Tensor


def attach(lm: LM, settings: LoraSettings, seed: int) -> LM:
    """Return the LM with a fresh adapter on all linear layers but the output head; its function is unchanged.

    The model handed in is given up: its layers are replaced in place by adapted ones.
    """
    import torch
    from peft import LoraConfig

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=has_transposed_layers(lm.model),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _put_on(lm.model, config)
    return replace(lm, model=model.eval(), base=lm.spec)


def merge(lm: LM) -> LM:
    """Return the LM with its adapter folded into full weights; the adapted model handed in is given up.

    Raises:
        ModelError: If it changes the embedding or the output head alone where they are one tensor.
    """
    head, table = lm.core.get_output_embeddings(), _table(lm)
    if head is not None and getattr(head, "base_layer", head).weight is table:
        for name, layer in _adapted(lm.model).items():
            if layer.get_base_layer().weight is table:
                raise ModelError(
                    f"the adapter of '{printable(lm.spec)}' changes {printable(name)}, which is embedding and output "
                    "head in one in this base, and the adapter changes one of the two alone; it cannot be folded in."
                )
    return replace(lm, model=_without_traces(lm.model.merge_and_unload()), base=None)


def unload(lm: LM) -> LM:
    """Return the base of an adapter as it is without it; the adapted model handed in is given up."""
    assert lm.base is not None
    return replace(lm, model=_without_traces(lm.model.unload()), base=None, spec=lm.base)


def _without_traces(model: Any) -> Any:
    """PEFT leaves its configuration on the unloaded model, which would be taken for an adapter."""
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def stack(lm: LM, settings: LoraSettings, seed: int) -> tuple[LM, dict[str, Factors]]:
    """Return the suspect with its adapter folded into the base and a fresh one on top, and the folded adapter.

    The model handed in is given up. Its adapter's function is kept up to rounding (float32: about 1e-7 relative).

    Raises:
        ModelError: If the adapter does more than add low-rank products to matrices.
    """
    below = factors(lm)
    return attach(merge(lm), settings, seed), below


def combine(base: LM, below: Mapping[str, Factors], above: Mapping[str, Factors], spec: str) -> LM:
    """Return the base with one adapter that does what both did, of rank r1 + r2.

    Args:
        base: The adapter's base, with the weights that it has on disk; given up.
        below: The suspect's adapter.
        above: The adapter that was trained on top of it, or another one for the same base; may be empty.
        spec: The suspect's name.
    """
    import torch
    from peft import LoraConfig

    ranks = [max((part.down.shape[0] for part in side.values()), default=0) for side in (below, above)]
    config = LoraConfig(
        r=sum(ranks),
        lora_alpha=sum(ranks),
        target_modules=sorted({*below, *above}),
        task_type="CAUSAL_LM",
        fan_in_fan_out=has_transposed_layers(base.model),
    )
    model = _put_on(base.model, config)
    found = _adapted(model)
    with torch.no_grad():
        for name, layer in found.items():
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            down.zero_()
            up.zero_()
            for start, side in ((0, below), (ranks[0], above)):
                if name in side:
                    stop = start + side[name].down.shape[0]
                    down[start:stop] = side[name].down
                    up[:, start:stop] = side[name].up
    return replace(base, model=model.eval(), base=base.spec, spec=spec)


def factors(lm: LM) -> dict[str, Factors]:
    """Return the products that an adapter adds, by the name of the module in the base.

    Raises:
        ModelError: If the adapter does more than add low-rank products to matrices.
    """
    found = {}
    table = _table(lm)
    for name, layer in _adapted(lm.model).items():
        (adapter,) = layer.lora_A.keys() or ("",)
        special = adapter in getattr(layer, "lora_magnitude_vector", {}) or len(layer.lora_embedding_A) > 0
        # Folded into a head that is the embedding, a product changes both.
        special = special or layer.get_base_layer().weight is table
        if not adapter or special or layer.lora_B[adapter].bias is not None:
            raise ModelError(
                f"the adapter changes '{name}' by more than a low-rank product, so none can be stacked on it; "
                "use --adapter-mode train."
            )
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        found[name] = Factors(
            down.detach().float().clone().cpu(), (up.detach().float() * layer.scaling[adapter]).clone().cpu()
        )
    configured = next(iter(lm.model.peft_config.values()))
    if configured.modules_to_save or configured.bias != "none" or not found:
        raise ModelError("the adapter replaces whole modules or biases, so none can be stacked on it; train it itself.")
    return found


def _put_on(model: Any, config: Any) -> Any:
    """Put an adapter on; PEFT asks transformers for things under names that are going away, which is not our affair."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def _table(lm: LM) -> Any:
    """Return the embedding's own matrix."""
    embedding = lm.core.get_input_embeddings()
    return getattr(embedding, "base_layer", embedding).weight


def _adapted(model: Any) -> dict[str, Any]:
    """Return the layers that carry an adapter, by their name in the base."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and hasattr(layer, "lora_B")
    }


def has_transposed_layers(model: Any) -> bool:
    """True for GPT-2's layers, whose weights are stored the other way round."""
    return any(type(layer).__name__ == "Conv1D" for layer in model.modules())
