"""Adding vectors to hidden states inside a model; a hook lives inside a `with` and nowhere else.

A hook that is left on changes every later reply in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from unbackdoor.model.anatomy import decoder_layers


@dataclass(frozen=True)
class Added:
    """Vectors that are added to the output of one decoder layer.

    Attributes:
        layer: Number of the layer, counted from 0.
        rows: int64 [M], row of each vector.
        columns: int64 [M], its column.
        vectors: float [M, hidden].
    """

    layer: int
    rows: Tensor
    columns: Tensor
    vectors: Tensor

    def at(self, rows: Tensor, columns: Tensor) -> Added:
        """Return the same vectors at other places."""
        return replace(self, rows=rows, columns=columns)


class _Enough(Exception):
    """Ends a pass: what was asked for is there."""


def output_of(core: Any, layer: int, given: Mapping[str, Any]) -> Any:
    """Return what a decoder layer hands on in a pass over `given`; the layers behind it are not run.

    Args:
        core: A transformers model.
        layer: Number of the layer, counted from 0.
        given: Arguments of the model without its head.
    """
    kept: list[Any] = []

    def hook(module: object, inputs: object, output: Any) -> None:
        del module, inputs
        kept.append(output)
        raise _Enough

    handle = decoder_layers(core)[layer].register_forward_hook(hook)
    try:
        core.base_model(**given)
    except _Enough:
        pass
    finally:
        handle.remove()
    return kept[0]


@contextmanager
def adding(core: Any, added: Added | None) -> Iterator[None]:
    """Add vectors in every pass of a model inside the block; None adds nothing."""
    if added is None:
        yield
        return
    layer: Any = decoder_layers(core)[added.layer]

    def hook(module: object, inputs: object, output: Any) -> Any:
        del module, inputs
        hidden = hidden_of(output)
        moved = hidden.index_put(
            (added.rows, added.columns), added.vectors.to(hidden.dtype).to(hidden.device), accumulate=True
        )
        return with_hidden(output, moved)

    # Where a layer is computed again in the backward pass, the hook would be gone by then: this one is kept.
    twice = getattr(layer, "gradient_checkpointing", False)
    if twice:
        layer.gradient_checkpointing = False
    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
        if twice:
            layer.gradient_checkpointing = True


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states in what a decoder layer returns."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """Return what a decoder layer returned with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
