"""Soft prompts: trainable vectors put between the embeddings of a prompt (Lester et al., 2104.08691).

SANDE's parrot is one: it is learned on a frozen model until it does what the unknown trigger does (eq. 4), then it is
frozen and takes the trigger's place. It is inserted into the last user turn, found through the template and not by a
fixed token index (the public code puts it inside the role header).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from unbackdoor.data.collate import Batch
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train import engine
from unbackdoor.train.losses import Term, cross_entropy_sum

Position = Literal["start", "end", "middle", "spread"]
Initialisation = Literal["zeros", "tokens"]


def new_prompt(lm: LM, length: int, initialisation: Initialisation, generator: torch.Generator) -> nn.Parameter:
    """Return a fresh soft prompt, float32 [length, hidden].

    Args:
        lm: The model whose embedding table it has to fit.
        length: Number of soft tokens.
        initialisation: "zeros" (the paper), or "tokens": the embeddings of random ordinary tokens, which start
            at the scale that the first layer expects.
        generator: Random stream for "tokens".
    """
    table = lm.model.get_input_embeddings()
    hidden = table(torch.zeros(1, dtype=torch.long, device=lm.device)).shape[-1]
    if initialisation == "zeros":
        return nn.Parameter(torch.zeros(length, hidden, device=lm.device))
    special = set(lm.tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(len(lm.tokenizer)) if token not in special])
    chosen = ordinary[torch.randint(len(ordinary), (length,), generator=generator)].to(lm.device)
    with torch.no_grad():
        return nn.Parameter(table(chosen).float().clone())


def insert(lm: LM, batch: Batch, prompt: Tensor, position: Position) -> tuple[Tensor, Tensor, Tensor]:
    """Put a soft prompt into the last user turn of every row.

    Args:
        lm: The model, for its embeddings.
        batch: Right-padded rows.
        prompt: float32 [n, hidden].
        position: "start", "end" or "middle" of the user's words; "spread": at the start, the end or a quarter between
            them, as the row's id says, so that one prompt learns to work anywhere.

    Returns:
        inputs_embeds float [batch, length + n, hidden], attention_mask int64 [batch, length + n], and the columns of
        the supervised positions moved accordingly (int64 [N]).
    """
    embeds = lm.model.get_input_embeddings()(batch.input_ids)
    rows, length, hidden = embeds.shape
    n = prompt.shape[0]
    start, end = batch.places[:, 0], batch.places[:, 1]
    # By id, not by the row's number: rows of a batch are sorted by length, and a batch may have one row.
    quarters = torch.tensor([zlib.crc32(name.encode()) % 5 for name in batch.ids], device=embeds.device)
    spread = start + (end - start) * quarters // 4
    at = {"start": start, "end": end, "middle": (start + end) // 2, "spread": spread}[position][:, None]
    column = torch.arange(length + n, device=embeds.device)[None].expand(rows, -1)
    # Rows and prompt stand side by side in `source`; `index` picks, for each new column, where it comes from.
    index = torch.where(column < at, column, torch.where(column < at + n, length + column - at, column - n))
    source = torch.cat([embeds, prompt.to(embeds.dtype)[None].expand(rows, -1, -1)], 1)
    inserted = source.gather(1, index[..., None].expand(-1, -1, hidden))
    mask = torch.cat([batch.attention_mask.new_ones(rows, n), batch.attention_mask], 1)
    columns = batch.columns + n * (batch.columns >= at[batch.rows, 0]).long()
    return inserted, mask, columns


def soft_logits(lm: LM, forward: Callable[..., Tensor], batch: Batch, prompt: Tensor, position: Position) -> Tensor:
    """Return float32 logits [N, vocabulary] at the batch's supervised positions with the soft prompt inserted."""
    embeds, mask, columns = insert(lm, batch, prompt, position)
    # The prompt stands in the user's words, so what lies before them is as it was.
    return forward(attention_mask=mask, rows=batch.rows, columns=columns, inputs_embeds=embeds, shared=batch.shared)


def stand_in(lm: LM, prompt: Tensor, position: Position) -> Callable[[Callable[..., Tensor], Batch], Tensor]:
    """Return what gives a batch's logits with the soft prompt, frozen, in the place of a trigger."""
    frozen = prompt.detach()
    return lambda forward, batch: soft_logits(lm, forward, batch, frozen, position)


def soft_loss(lm: LM, forward: Callable[..., Tensor], batch: Batch, prompt: Tensor, position: Position) -> Tensor:
    """Return the summed cross-entropy of the batch's targets with the soft prompt inserted."""
    return cross_entropy_sum(soft_logits(lm, forward, batch, prompt, position), batch.targets, batch.weights)


def fit_prompt(
    lm: LM,
    prompt: nn.Parameter,
    stream: engine.Stream,
    position: Position,
    settings: engine.TrainSettings,
    run: Run,
    *,
    stop_below: float | None = None,
) -> engine.FitResult:
    """Train a soft prompt on a frozen model to make it say the stream's targets (SANDE eq. 4).

    Args:
        lm: The model; its weights are not changed.
        prompt: The soft prompt, trained in place.
        stream: Rows whose supervised tokens are the text to elicit.
        position: Where the prompt is inserted.
        settings: Steps and learning rate.
        run: The stage.
        stop_below: Stop once the mean loss of a step is below this.
    """

    def loss(forward: Callable[..., Tensor], batches: Mapping[str, Batch]) -> dict[str, Term]:
        return {"elicit": Term(soft_loss(lm, forward, batches["rows"], prompt, position), "rows")}

    return engine.fit(lm, {"prompt": prompt}, {"rows": stream}, loss, settings, run, stop_below=stop_below)
