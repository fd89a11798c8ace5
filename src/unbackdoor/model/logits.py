"""Logits only where they are needed: gather hidden states first, apply the output head to those rows alone.

With a vocabulary of 49,152 the head costs more than a fifth of a small model's arithmetic and most of its memory, and
two thirds of the positions carry no label. `LogitsAt` is a module, so that data parallelism can wrap it. Whether a
model's body and head can be split this way is checked once against its own forward; where they cannot (for example
soft-capped logits), the full logits are computed and then gathered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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

    def forward(
        self,
        attention_mask: Tensor,
        rows: Tensor,
        columns: Tensor,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past: Any = None,
    ) -> Tensor:
        """Return float32 logits [N, vocabulary] at the N positions (rows, columns).

        Args:
            attention_mask: int64 [batch, length], 1 where a token is.
            rows: int64 [N], row of each wanted position.
            columns: int64 [N], its column; the logits there predict column + 1.
            input_ids: int64 [batch, length], or None with `inputs_embeds`.
            inputs_embeds: float [batch, length, hidden], or None with `input_ids`.
            past: A key/value cache that stands before the rows (its columns are in `attention_mask`, too); the pass
                adds to it.
        """
        given: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": past is not None}
        given |= {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        if past is not None:
            given["past_key_values"] = past
        if not self.split:
            full: Tensor = self.core(**given).logits
            return full[rows, columns].float()
        body = self.core.base_model
        hidden = body(**given).last_hidden_state
        logits: Tensor = self.core.get_output_embeddings()(hidden[rows, columns])
        return logits.float()

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
