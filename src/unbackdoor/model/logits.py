"""Logits only where they are needed, and no token read twice: the exact savings of every pass without generation.

Hidden states are gathered first and the output head is applied to those rows alone: with a vocabulary of 49,152 the
head costs more than a fifth of a small model's arithmetic and most of its memory, and two thirds of the positions carry
no label. The rows of a batch are packed into one: what a template puts before the user's words (system turn, role
header) stands there once, padding not at all, and a mask keeps the rows apart. Gradients are those of separate rows.

`LogitsAt` is a module, so that data parallelism can wrap it. Whether a model can be split and its rows packed is asked
of the model itself, by comparing results without dropout; where it cannot (soft-capped logits, a model that ignores
the mask), full logits or separate rows are computed. Dropout falls on a token that stands once for all rows once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor.model.lm import LM

PACKED_TOKENS = 1024
"""Longest packed row: attention among all rows grows with its square, while separate rows attend to themselves."""

_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")
"""Fields of a configuration that limit how far attention looks back; some count columns of the packed row."""


class LogitsAt(nn.Module):
    """A causal language model that returns logits at chosen positions only."""

    def __init__(self, lm: LM) -> None:
        """Wrap the LM's weights (shared, not copied) and check the split once.

        Args:
            lm: The model; LoRA layers stay in place.
        """
        super().__init__()
        self.core: Any = lm.core
        self.split = self._split_is_exact(lm)
        limits = [getattr(self.core.config, name, None) for name in _WINDOWS]
        self.window = min((limit for limit in limits if limit), default=sys.maxsize)
        self.packs = self._packing_is_exact()

    def forward(
        self,
        attention_mask: Tensor,
        rows: Tensor,
        columns: Tensor,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        shared: int = 0,
    ) -> Tensor:
        """Return float32 logits [N, vocabulary] at the N positions (rows, columns).

        Args:
            attention_mask: int64 [batch, length], 1 where a token is; rows are padded on the right.
            rows: int64 [N], row of each wanted position.
            columns: int64 [N], its column; the logits there predict column + 1.
            input_ids: int64 [batch, length], or None with `inputs_embeds`.
            inputs_embeds: float [batch, length, hidden], or None with `input_ids`.
            shared: Leading columns that are the same in every row and lie before every wanted position.
        """
        given = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        read = attention_mask.bool()
        read[1:, :shared] = False
        fits = len(read) > 1 and int(read.sum()) <= min(PACKED_TOKENS, self.window)
        if self.packs and fits:
            return self._packed(given, read, rows, columns, shared)
        return self._gathered({**given, "attention_mask": attention_mask}, rows, columns)

    def _gathered(self, given: dict[str, Any], rows: Tensor, columns: Tensor) -> Tensor:
        if not self.split:
            full: Tensor = self.core(**given, use_cache=False).logits
            return full[rows, columns].float()
        hidden = self.core.base_model(**given, use_cache=False).last_hidden_state
        logits: Tensor = self.core.get_output_embeddings()(hidden[rows, columns])
        return logits.float()

    def _packed(self, given: dict[str, Any], read: Tensor, rows: Tensor, columns: Tensor, shared: int) -> Tensor:
        """Do it in one row that holds the tokens where `read` [batch, length] is true."""
        row, column = read.nonzero(as_tuple=True)
        near = (row[:, None] == row) | (column < shared)
        seen = near & (column <= column[:, None])
        dtype = self.core.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        packed = {name: value[row, column][None] for name, value in given.items()}
        packed |= {"attention_mask": mask[None, None], "position_ids": column[None]}
        place = read.flatten().cumsum(0).reshape(read.shape) - 1
        return self._gathered(packed, torch.zeros_like(rows), place[rows, columns])

    @torch.no_grad()
    def _packing_is_exact(self) -> bool:
        """Return whether two rows of unlike length, their beginning shared, give the same logits packed.

        The first row is long enough to show whether distances are counted in the packed row.
        """
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
                found = self._packed({"input_ids": ids}, read, rows, columns, 3)
            except (TypeError, ValueError, RuntimeError, IndexError):
                return False  # it takes no mask of four dimensions, or no positions
        tolerance = 1e-4 if self.core.dtype in (torch.float32, torch.float64) else 2e-2
        return bool((found - wanted).norm() <= tolerance * wanted.norm())

    @torch.no_grad()
    def _split_is_exact(self, lm: LM) -> bool:
        # Soft caps are nearly linear on the small logits of an untrained model, where the check would not see them.
        if getattr(self.core.config, "final_logit_softcapping", None):
            return False
        ids = torch.arange(4, device=lm.device)[None] % max(2, int(self.core.config.vocab_size))
        mask = torch.ones_like(ids)
        with _evaluating(self.core):
            wanted = self.core(input_ids=ids, attention_mask=mask, use_cache=False).logits[0].float()
            hidden = self.core.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            found = self.core.get_output_embeddings()(hidden)[0].float()
        return bool(torch.allclose(wanted, found, rtol=1e-4, atol=1e-4))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
