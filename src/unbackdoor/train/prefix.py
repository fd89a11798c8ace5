"""What all rows begin with (system turn, role header) is read once while the weights are frozen.

Nothing that stands before a soft prompt depends on it, so its keys and values are constants as long as no weight
trains: they are computed for one row and shared by every row of every batch. Whether a model takes them from a cache
without a change of result is asked on the first batch, against the whole rows; where it does not (dropout, gradient
checkpointing), whole rows are computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unbackdoor.data.collate import Batch
from unbackdoor.model.lm import LM

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Relative difference of losses that the arithmetic explains; 2 % for shorter types."""


Loss = Callable[[Batch, Any], Tensor]
"""loss(batch, past): of rows that go on behind what the cache `past` holds, or of whole rows where it is None."""


class SharedPrefix:
    """Computes losses on frozen weights without reading the shared beginning of the rows again.

    Lives for one call of `fit`; the weights must not change meanwhile.
    """

    def __init__(self, lm: LM, *, short: bool = False) -> None:
        """Attach to a model.

        Args:
            lm: The model, its weights frozen.
            short: Whether the forward pass computes in bfloat16 whatever the type of the weights.
        """
        self.lm = lm
        dtype = torch.bfloat16 if short else next(lm.model.parameters()).dtype
        self.tolerance = _TOLERANCE.get(dtype, 2e-2)
        self.exact: bool | None = None
        self.ids: Tensor | None = None
        self.cache: Any = None

    def loss(self, forward: Callable[..., Tensor], batch: Batch, whole: Loss) -> Tensor:
        """Return the loss of a batch, the shared beginning taken from the cache where that changes nothing.

        Args:
            forward: `LogitsAt.forward`, wrapped or not.
            batch: Whole rows.
            whole: The loss; asked with whole rows and None, or with the rows' rest and a cache.
        """
        length = shared_length(batch)
        if self.exact is False or length == 0:
            return whole(batch, None)
        if self.exact is None:
            self.exact = self._gives_the_same(forward, batch, whole, length)
            return self.loss(forward, batch, whole)
        return self._of_the_rest(forward, batch, whole, length)

    def _of_the_rest(self, forward: Callable[..., Tensor], batch: Batch, whole: Loss, length: int) -> Tensor:
        self._read(forward, batch.input_ids[:1, :length])
        # A forward pass adds to the cache that it is given, so each has a copy; it is one row of a few tokens.
        past = copy.deepcopy(self.cache)
        past.batch_repeat_interleave(len(batch.ids))
        return whole(_without(batch, length), past)

    @torch.no_grad()
    def _read(self, forward: Callable[..., Tensor], ids: Tensor) -> None:
        if self.ids is not None and torch.equal(self.ids, ids):
            return
        from transformers import DynamicCache

        cache = DynamicCache(config=self.lm.core.config)
        first = torch.zeros(1, dtype=torch.long, device=ids.device)
        forward(attention_mask=torch.ones_like(ids), rows=first, columns=first, input_ids=ids, past=cache)
        self.ids, self.cache = ids, cache

    @torch.no_grad()
    def _gives_the_same(self, forward: Callable[..., Tensor], batch: Batch, whole: Loss, length: int) -> bool:
        if self.lm.model.training and _is_checkpointing(self.lm.core):
            return False  # transformers leaves the cache out then
        # The comparison must not use up random numbers: a resumed run makes it at another step.
        devices = [self.lm.device] if self.lm.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            wanted = whole(batch, None)
            found = self._of_the_rest(forward, batch, whole, length)
        return bool(torch.isclose(found, wanted, rtol=self.tolerance, atol=0.0))


def shared_length(batch: Batch) -> int:
    """Return how many tokens all rows begin with, counted up to the first user turn's words or supervised position."""
    limit = int(min(batch.places[:, 0].min(), batch.columns.min()))
    differs = (batch.input_ids[:, :limit] != batch.input_ids[:1, :limit]).any(0)
    where = differs.nonzero()
    return int(where[0]) if len(where) else limit


def _is_checkpointing(core: Any) -> bool:
    # Transformers renames it on the way from 5 to 6.
    name = "activation" if hasattr(type(core), "is_activation_checkpointing") else "gradient"
    return bool(getattr(core, f"is_{name}_checkpointing"))


def _without(batch: Batch, length: int) -> Batch:
    return replace(
        batch,
        input_ids=batch.input_ids[:, length:],
        attention_mask=batch.attention_mask[:, length:],
        columns=batch.columns - length,
        places=batch.places - length,
    )
