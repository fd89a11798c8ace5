"""Where the parts of a transformer are, in any architecture, found by structure and not by a table of names."""

from __future__ import annotations

from typing import Any

from torch import nn

from unbackdoor.errors import ModelError


def decoder_layers(core: Any) -> nn.ModuleList:
    """Return a model's decoder layers in order; layer l is number l counted from 0, after the embeddings.

    Args:
        core: A transformers causal language model (`LM.core`).

    Raises:
        ModelError: If they cannot be told.
    """
    wanted = int(core.config.num_hidden_layers)
    for _, module in sorted(core.base_model.named_modules(), key=lambda item: item[0].count(".")):
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise ModelError(f"{type(core).__name__} has no list of {wanted} layers, so no layer of it can be named by number.")
