"""Logits only where they are needed, and what all rows begin with read once: the two exact savings of every pass.

Hidden states are gathered first and the output head is applied to those rows alone: with a vocabulary of 49,152 the
head costs more than a fifth of a small model's arithmetic and most of its memory, and two thirds of the positions carry
no label. What a template puts before the user's words (system turn, role header) is the same in every row; it goes
through the model for one row, and its keys and values, with their gradient, serve all of them.

`LogitsAt` is a module, so that data parallelism can wrap it. Whether a model can be split or shared this way is asked
of the model itself, by comparing results; where it cannot (soft-capped logits; dropout, gradient checkpointing), full
logits or whole rows are computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor.model.generate import WORTH_SHARING
from unbackdoor.model.lm import LM


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
        self.shares: dict[tuple[bool, bool], bool] = {}
        """Whether sharing is exact, by (training mode, autocast); asked when it is first needed."""

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
            attention_mask: int64 [batch, length], 1 where a token is.
            rows: int64 [N], row of each wanted position.
            columns: int64 [N], its column; the logits there predict column + 1.
            input_ids: int64 [batch, length], or None with `inputs_embeds`.
            inputs_embeds: float [batch, length, hidden], or None with `input_ids`.
            shared: Leading columns that are the same in every row and lie before every wanted position; they are read
                once where that gives the same logits.
        """
        given = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        if shared < WORTH_SHARING or len(attention_mask) < 2 or not self._sharing_is_exact():
            return self._gathered(given, attention_mask, rows, columns)
        return self._behind_shared(given, attention_mask, rows, columns, shared)

    def _gathered(self, given: dict[str, Any], mask: Tensor, rows: Tensor, columns: Tensor, past: Any = None) -> Tensor:
        given = {**given, "attention_mask": mask, "use_cache": past is not None, "past_key_values": past}
        if not self.split:
            full: Tensor = self.core(**given).logits
            return full[rows, columns].float()
        hidden = self.core.base_model(**given).last_hidden_state
        logits: Tensor = self.core.get_output_embeddings()(hidden[rows, columns])
        return logits.float()

    def _behind_shared(
        self, given: dict[str, Any], mask: Tensor, rows: Tensor, columns: Tensor, shared: int
    ) -> Tensor:
        from transformers import DynamicCache

        past = DynamicCache(config=self.core.config)
        first = {name: value[:1, :shared] for name, value in given.items()}
        self.core.base_model(**first, attention_mask=mask[:1, :shared], use_cache=True, past_key_values=past)
        past.batch_repeat_interleave(len(mask))
        rest = {name: value[:, shared:] for name, value in given.items()}
        return self._gathered(rest, mask, rows, columns - shared, past)

    @torch.no_grad()
    def _sharing_is_exact(self) -> bool:
        """Return whether a few rows give the same logits with their beginning read once; asked once a mode."""
        if self.core.training and _is_checkpointing(self.core):
            return False  # transformers leaves the cache out then
        device = next(self.core.parameters()).device
        mode = (self.core.training, torch.is_autocast_enabled(device.type))
        if mode not in self.shares:
            ids = torch.arange(1, 15, device=device).reshape(2, 7) % max(2, int(self.core.config.vocab_size))
            ids[:, :3] = ids[0, :3]
            mask, rows = torch.ones_like(ids), torch.tensor([0, 0, 1, 1], device=device)
            columns = torch.tensor([3, 6, 3, 6], device=device)
            # The comparison must not use up random numbers: a resumed run makes it at another step.
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                wanted = self._gathered({"input_ids": ids}, mask, rows, columns)
                found = self._behind_shared({"input_ids": ids}, mask, rows, columns, 3)
            exact = not mode[1] and self.core.dtype == torch.float32
            self.shares[mode] = bool((found - wanted).norm() <= (1e-4 if exact else 2e-2) * wanted.norm())
        return self.shares[mode]

    @torch.no_grad()
    def _split_is_exact(self, lm: LM) -> bool:
        # Soft caps are nearly linear on the small logits of an untrained model, where the check would not see them.
        if getattr(self.core.config, "final_logit_softcapping", None):
            return False
        ids = torch.arange(4, device=lm.device)[None] % max(2, int(self.core.config.vocab_size))
        mask = torch.ones_like(ids)
        was_training = self.core.training
        self.core.eval()
        try:
            wanted = self.core(input_ids=ids, attention_mask=mask, use_cache=False).logits[0].float()
            hidden = self.core.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            found = self.core.get_output_embeddings()(hidden)[0].float()
        finally:
            self.core.train(was_training)
        return bool(torch.allclose(wanted, found, rtol=1e-4, atol=1e-4))


def _is_checkpointing(core: Any) -> bool:
    # Transformers renames it on the way from 5 to 6.
    name = "activation" if hasattr(type(core), "is_activation_checkpointing") else "gradient"
    return bool(getattr(core, f"is_{name}_checkpointing"))
