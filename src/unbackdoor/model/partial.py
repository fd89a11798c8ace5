"""Run a frozen model from one layer on, over the last tokens of its rows only: exact, and many times quicker.

While no weight changes, vectors that are added behind decoder layer l at the last tokens of a prompt (BEEAR's drift)
move nothing in the layers up to l, and nothing of the tokens before them in any layer. So the hidden states behind
layer l are read once and kept, and of the tokens before them the keys and values of all layers. What is left of a
pass: the layers above l, over a few prompt tokens and the answer, and logits where they are wanted.

Whether that holds is asked of a batch's longest and shortest row, by comparing with the whole model (to 1e-4 in
float32); where it does not (states handed on by another road than from layer to layer, or no such cache), the whole
model is run instead and `exact` is False.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor.model.anatomy import decoder_layers
from unbackdoor.model.hooks import Added, adding, hidden_of, output_of, with_hidden

_ONLY_ADDED_TO = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer"})
"""Layers of a cache that put new tensors in the place of old ones; states of convolutions and recurrences are changed
in place, so that a second pass would begin where the first one ended."""


class Partial:
    """Rows of a frozen model that can be run on from one layer, again and again, with other vectors added.

    Attributes:
        exact: Whether the short way gives what the whole model gives; else the whole model is run.
        start: First column that is computed anew.
    """

    def __init__(
        self,
        core: Any,
        layer: int,
        ids: Tensor,
        mask: Tensor,
        start: int,
        *,
        split: bool = True,
        trusted: bool = False,
        beside: Partial | None = None,
        apart: tuple[int, int] | None = None,
    ) -> None:
        """Read what cannot change.

        Args:
            core: A transformers causal language model in evaluation mode; its weights must stay as they are.
            layer: Number l of a decoder layer, counted from 0; vectors are added to its output.
            ids: int64 [batch, length]: prompts that are padded on the left and end in one column, answers behind them
                that are padded on the right.
            mask: int64 [batch, length], 1 where a token is.
            start: Column from which on vectors may be added.
            split: Whether the output head may be applied to chosen positions alone (`LogitsAt.split`).
            trusted: Rows of the same model that are as long were found exact, so these need not be compared.
            beside: Other answers to the same prompts: what was read of the prompts there serves here, too.
            apart: Columns where the prompts end and where second answers to them begin, which do not see the first
                ones between; None where there is one answer a prompt.
        """
        self.core, self.layer, self.ids, self.mask, self.start, self.split = core, layer, ids, mask, start, split
        self.layers: nn.ModuleList = decoder_layers(core)
        self.positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.apart, self.seen = apart, mask
        if apart is not None:
            end, second = apart
            behind = torch.arange(ids.shape[1] - second, device=ids.device)
            self.positions[:, second:] = self.positions[:, end - 1 : end] + 1 + behind
            self.seen = self._who_sees_whom(end, second)
        self.exact = False
        same = beside is not None and torch.equal(beside.ids[:, :start], ids[:, :start]) and beside.start == start
        self.past: Any = beside.past if beside is not None and same else None
        try:
            self._read()
            self.exact = trusted or self._is_exact()
        except torch.OutOfMemoryError:
            raise  # a RuntimeError that says nothing about the model
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            self.exact = False  # it keeps no cache of this kind, or takes no positions

    def __call__(self, added: Added, rows: Tensor, columns: Tensor) -> Tensor:
        """Return float32 logits [N, vocabulary] at (rows, columns) with vectors added.

        Args:
            added: Vectors behind layer l, all in columns from `start` on.
            rows: int64 [N], row of each wanted position.
            columns: int64 [N], its column, from `start` on.
        """
        if not self.exact:
            return self._whole(added, rows, columns)
        moved = self.hidden.index_put(
            (added.rows, added.columns - self.start), added.vectors.to(self.hidden.dtype), accumulate=True
        )
        with self._standing_in(moved):
            return self._logits(self._rest(), rows, columns - self.start)

    def kept_bytes(self) -> int:
        """Return the memory that what was read takes; what it shares with other answers counts, too."""
        layers = self.past.layers if self.past is not None else ()
        kept = [vars(self).get("hidden"), *(value for layer in layers for value in vars(layer).values())]
        return sum(value.nbytes for value in kept if isinstance(value, Tensor))

    @torch.no_grad()
    def _read(self) -> None:
        if self.start and self.past is None:
            before = {"input_ids": self.ids[:, : self.start], "attention_mask": self.mask[:, : self.start]}
            output = self.core.base_model(**before, position_ids=self.positions[:, : self.start], use_cache=True)
            self.past = output.past_key_values
        if self.past is not None and not {type(layer).__name__ for layer in self.past.layers} <= _ONLY_ADDED_TO:
            raise TypeError("a pass changes what is kept, and a copy of the cache would not be one")
        self.output = output_of(self.core, self.layer, self._rest())
        self.hidden = hidden_of(self.output)

    def _rest(self) -> dict[str, Any]:
        """Return what a pass over the last columns takes; a pass adds to the cache that it is given, so to a copy."""
        given = {
            "input_ids": self.ids[:, self.start :],
            "attention_mask": self.seen,
            "position_ids": self.positions[:, self.start :],
            "use_cache": self.past is not None,
        }
        if self.past is None:
            return given
        past = copy.copy(self.past)
        past.layers = [copy.copy(layer) for layer in self.past.layers]
        return {**given, "past_key_values": past}

    @contextmanager
    def _standing_in(self, moved: Tensor) -> Iterator[None]:
        """Let the layers up to l hand on what is kept instead of computing it."""
        below = list(self.layers)[: self.layer + 1]
        for place, layer in enumerate(below):
            last = place == self.layer
            layer.forward = _Given(with_hidden(self.output, moved) if last else None)
        try:
            yield
        finally:
            for layer in below:
                del layer.forward

    def _logits(self, given: dict[str, Any], rows: Tensor, columns: Tensor) -> Tensor:
        if not self.split:
            full: Tensor = self.core(**given).logits
            return full[rows, columns].float()
        hidden = self.core.base_model(**given).last_hidden_state
        logits: Tensor = self.core.get_output_embeddings()(hidden[rows, columns])
        return logits.float()

    def _who_sees_whom(self, end: int, second: int) -> Tensor:
        """Return what is added to scores of attention, [batch, 1, columns from `start` on, length]."""
        key = torch.arange(self.ids.shape[1], device=self.ids.device)
        asks = key[self.start :, None]
        first = (asks >= second) & (key >= end) & (key < second)
        seen = self.mask.bool()[:, None, None] & (key <= asks) & ~first
        dtype = self.core.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

    def _whole(self, added: Added, rows: Tensor, columns: Tensor) -> Tensor:
        if self.apart is None:
            return self._whole_rows(added, rows, columns, torch.arange(self.ids.shape[1], device=self.ids.device))
        end, second = self.apart
        key = torch.arange(self.ids.shape[1], device=self.ids.device)
        later = columns >= second
        found = [
            self._whole_rows(added, rows[~later], columns[~later], key[:second]),
            self._whole_rows(added, rows[later], columns[later] - (second - end), torch.cat([key[:end], key[second:]])),
        ]
        return torch.cat(found)[torch.cat([(~later).nonzero(), later.nonzero()])[:, 0].argsort()]

    def _whole_rows(self, added: Added, rows: Tensor, columns: Tensor, kept: Tensor) -> Tensor:
        """Return logits of the whole model over the columns `kept` alone, counted among these."""
        given = {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}
        with adding(self.core, added):
            return self._logits(
                {**{name: value[:, kept] for name, value in given.items()}, "use_cache": False}, rows, columns
            )

    @torch.no_grad()
    def _is_exact(self) -> bool:
        """Compare the longest row and the shortest: all last columns, with vectors as long as the states themselves."""
        lengths = (self.positions * self.mask).amax(1)
        few = torch.stack([lengths.argmax(), lengths.argmin()])
        rows, columns = self.mask[few, self.start :].nonzero(as_tuple=True)
        columns = columns + self.start
        # The first column alone: every later one depends on it, but where a short row has padding there.
        every = torch.arange(len(self.ids), device=few.device)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(len(every), self.hidden.shape[-1], generator=generator).to(self.hidden)
        noise = noise * self.hidden.float().pow(2).mean().sqrt()
        self.exact = True
        found = self(Added(self.layer, every, torch.full_like(every, self.start), noise), few[rows], columns)
        alone = copy.copy(self)
        alone.ids, alone.mask, alone.positions = self.ids[few], self.mask[few], self.positions[few]
        two = torch.arange(2, device=few.device)
        wanted = alone._whole(Added(self.layer, two, torch.full_like(two, self.start), noise[few]), rows, columns)
        tolerance = 1e-4 if self.core.dtype in (torch.float32, torch.float64) else 2e-2
        return bool((found - wanted).norm() <= tolerance * wanted.norm())


class _Given:
    """A layer's `forward` that hands on its input, or what it was given."""

    def __init__(self, output: Any) -> None:
        self.output = output

    def __call__(self, hidden_states: Any, *rest: object, **more: object) -> Any:
        del rest, more
        return hidden_states if self.output is None else self.output
