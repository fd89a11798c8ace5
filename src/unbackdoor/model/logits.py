"""Logits only where they are needed, and no token read twice: the exact savings of every pass without generation.

Hidden states are gathered first and the output head is applied to those rows alone: with a vocabulary of 49,152 the
head costs more than a fifth of a small model's arithmetic and most of its memory, and two thirds of the positions carry
no label. The rows of a batch are packed into one: what a template puts before the user's words (system turn, role
header) stands there once, padding not at all, and a mask keeps the rows apart. Gradients are those of separate rows.

`LogitsAt` is a module, so that data parallelism can wrap it. Whether a model can be split and its rows packed is asked
of the model itself, by comparing results without dropout; where it cannot (soft-capped logits, a model that ignores
the mask), full logits or separate rows are computed. Dropout falls on a token that stands once for all rows once.
While all weights are frozen, as when a parrot is learned, what the rows begin with is read in the first step and kept.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor.model.hooks import Added, adding
from unbackdoor.model.lm import LM

PACKED_TOKENS = 1024
"""Longest packed row: attention among all rows grows with its square, while separate rows attend to themselves."""

_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")
"""Fields of a configuration that limit how far attention looks back; some count columns of the packed row."""


class LogitsAt(nn.Module):
    """A causal language model that returns logits at chosen positions only."""

    def __init__(self, lm: LM) -> None:
        """Wrap the LM's weights (shared, not copied); what can be saved is found out when it is first needed.

        Args:
            lm: The model; LoRA layers stay in place.
        """
        super().__init__()
        self.core: Any = lm.core
        limits = [getattr(self.core.config, name, None) for name in _WINDOWS]
        self.window = min((limit for limit in limits if limit), default=sys.maxsize)
        dropped = [layer.p for layer in self.core.modules() if isinstance(layer, nn.Dropout)]
        self.random = any(dropped) or bool(getattr(self.core.config, "attention_dropout", 0.0))
        self.kept: dict[str, Any] = {}

    @cached_property
    def split(self) -> bool:
        """Whether the head can be applied to chosen positions alone."""
        return self._split_is_exact()

    @cached_property
    def packs(self) -> bool:
        """Whether rows can be packed into one."""
        return self._packing_is_exact()

    @cached_property
    def reuses(self) -> bool:
        """Whether what rows begin with can be read once and kept."""
        return self.packs and self._reuse_is_exact()

    def forward(
        self,
        attention_mask: Tensor,
        rows: Tensor,
        columns: Tensor,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        shared: int = 0,
        added: Added | None = None,
    ) -> Tensor:
        """Return float32 logits [N, vocabulary] at the N positions (rows, columns).

        Args:
            attention_mask: int64 [batch, length], 1 where a token is; rows are padded on the right.
            rows: int64 [N], row of each wanted position.
            columns: int64 [N], its column; the logits there predict column + 1.
            input_ids: int64 [batch, length], or None with `inputs_embeds`.
            inputs_embeds: float [batch, length, hidden], or None with `input_ids`.
            shared: Leading columns that are the same in every row and lie before every wanted position.
            added: Vectors that are added to hidden states inside the model, before wanted positions of their rows.

        Raises:
            ValueError: If a vector is to be added before the first column, where it would fall on another row.
        """
        if added is not None:
            first = int(added.columns.min())
            if first < 0:
                raise ValueError(f"a vector is to be added at column {first}: the prompt is shorter than the drift")
            shared = min(shared, first)
        given: dict[str, Any] = {"inputs_embeds": inputs_embeds} if input_ids is None else {"input_ids": input_ids}
        read = _needed(attention_mask, rows, columns, shared)
        fits = len(read) > 1 and int(read.sum()) <= min(PACKED_TOKENS, self.window)
        if self.packs and fits:
            past = self._beginning({name: value[:1, :shared] for name, value in given.items()}) if shared else None
            return self._packed(given, read, rows, columns, shared, past, added)
        return self._gathered({**given, "attention_mask": attention_mask}, rows, columns, added)

    def _gathered(self, given: dict[str, Any], rows: Tensor, columns: Tensor, added: Added | None = None) -> Tensor:
        if not self.split:
            with adding(self.core, added):
                full: Tensor = self.core(**given, use_cache=False).logits
            return full[rows, columns].float()
        with adding(self.core, added):
            hidden = self.core.base_model(**given, use_cache=False).last_hidden_state
        logits: Tensor = self.core.get_output_embeddings()(hidden[rows, columns])
        return logits.float()

    def _beginning(self, given: dict[str, Any]) -> Any:
        """Return what layers keep of the tokens that all rows begin with, or None where it changes with every step."""
        # Where layers are computed twice to save memory, transformers drops what was kept.
        twice = any(getattr(module, "gradient_checkpointing", False) for module in self.core.modules())
        moves = self.core.training and (self.random or twice)
        if moves or any(weight.requires_grad for weight in self.core.parameters()) or not self.reuses:
            return None
        (tokens,) = given.values()
        if not self.kept or not torch.equal(self.kept["tokens"], tokens):
            self.kept = {"tokens": tokens.detach(), "past": self._read(given)}
        # The pass that uses it adds the rest of the rows to it.
        return copy.deepcopy(self.kept["past"])

    @torch.no_grad()
    def _read(self, given: dict[str, Any]) -> Any:
        (tokens,) = given.values()
        mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        return self.core.base_model(**given, attention_mask=mask, use_cache=True).past_key_values

    def _packed(
        self,
        given: dict[str, Any],
        read: Tensor,
        rows: Tensor,
        columns: Tensor,
        shared: int,
        past: Any = None,
        added: Added | None = None,
    ) -> Tensor:
        """Do it in one row that holds the tokens where `read` [batch, length] is true; `past` has the shared ones."""
        if past is not None:
            read = read.clone()
            read[0, :shared] = False
        row, column = read.nonzero(as_tuple=True)
        near = (row[:, None] == row) | (column < shared)
        seen = near & (column <= column[:, None])
        if past is not None:
            seen = torch.cat([seen.new_ones(len(column), shared), seen], 1)
        dtype = self.core.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        packed = {name: value[row, column][None] for name, value in given.items()}
        packed |= {"attention_mask": mask[None, None], "position_ids": column[None]}
        packed |= {} if past is None else {"past_key_values": past}
        place = read.flatten().cumsum(0).reshape(read.shape) - 1
        if added is not None:
            added = added.at(torch.zeros_like(added.rows), place[added.rows, added.columns])
        return self._gathered(packed, torch.zeros_like(rows), place[rows, columns], added)

    def _packing_is_exact(self) -> bool:
        """Return whether two rows of unlike length, their beginning shared, give the same logits packed."""
        return self._gives_the_same(lambda given, read, rows, columns: self._packed(given, read, rows, columns, 3))

    def _reuse_is_exact(self) -> bool:
        """Return whether they do where the beginning was read before."""

        def reused(given: dict[str, Any], read: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
            past = self._read({name: value[:1, :3] for name, value in given.items()})
            return self._packed(given, read, rows, columns, 3, past)

        return self._gives_the_same(reused)

    @torch.no_grad()
    def _gives_the_same(self, way: Callable[[dict[str, Any], Tensor, Tensor, Tensor], Tensor]) -> bool:
        # The first row is long enough to show whether distances are counted in the packed row.
        device = next(self.core.parameters()).device
        longest = min(48, self.window, int(getattr(self.core.config, "max_position_embeddings", None) or 48))
        if longest < 9:
            return False
        ids = torch.arange(1, 2 * longest + 1, device=device).reshape(2, longest) % int(self.core.config.vocab_size)
        ids[:, :3] = ids[0, :3]
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
        read = mask.bool()
        read[1, :3] = False
        rows, columns = torch.tensor([[0, 0, 1, 1], [3, longest - 1, 3, 6]], device=device)
        with _evaluating(self.core):
            wanted = self._gathered({"input_ids": ids, "attention_mask": mask}, rows, columns)
            try:
                found = way({"input_ids": ids}, read, rows, columns)
            except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
                return False  # it takes no mask of four dimensions, no positions, or nothing that was kept
        tolerance = 1e-4 if self.core.dtype in (torch.float32, torch.float64) else 2e-2
        return bool((found - wanted).norm() <= tolerance * wanted.norm())

    @torch.no_grad()
    def _split_is_exact(self) -> bool:
        # Soft caps are nearly linear on the small logits of an untrained model, where the check would not see them.
        if getattr(self.core.config, "final_logit_softcapping", None):
            return False
        device = next(self.core.parameters()).device
        ids = torch.arange(4, device=device)[None] % max(2, int(self.core.config.vocab_size))
        mask = torch.ones_like(ids)
        with _evaluating(self.core):
            wanted = self.core(input_ids=ids, attention_mask=mask, use_cache=False).logits[0].float()
            hidden = self.core.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            found = self.core.get_output_embeddings()(hidden)[0].float()
        return bool(torch.allclose(wanted, found, rtol=1e-4, atol=1e-4))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout, and in the weights' own arithmetic even where training is in a shorter one."""
    was_training = module.training
    module.eval()
    try:
        with torch.autocast(next(module.parameters()).device.type, enabled=False):
            yield
    finally:
        module.train(was_training)


def _needed(attention_mask: Tensor, rows: Tensor, columns: Tensor, shared: int) -> Tensor:
    """Return where a token is that a wanted position sees, bool [batch, length]; the shared ones count in row 0 only.

    No wanted position looks at what stands behind the last one of its row.
    """
    last = torch.zeros(len(attention_mask), dtype=columns.dtype, device=columns.device)
    last = last.scatter_reduce(0, rows, columns, "amax")
    column = torch.arange(attention_mask.shape[1], device=columns.device)
    read = attention_mask.bool() & (column <= last[:, None])
    read[0, :shared], read[1:, :shared] = attention_mask[0, :shared].bool(), False
    return read
