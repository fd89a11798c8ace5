"""Greedy replies in batches: left padding, KV cache, rows leave the batch when they are done.

The checkpoint's own generation settings (sampling, penalties, forced tokens) are not used: they could hide or fake a
backdoor. A row is done at a stop token, at the length limit, or as soon as its goal is decided either way. What all
prompts begin with (system turn, role header) is read once and not in every row.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from unbackdoor.goals import Goal
    from unbackdoor.model.lm import LM

WORTH_SHARING = 8
"""Tokens: a shorter beginning is read again in every row."""


def greedy(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    goal: Goal | None = None,
    batch_size: int = 32,
) -> list[str]:
    """Continue each prompt greedily and return the replies as text, in the order of `prompts`.

    Args:
        lm: The model; it is put into evaluation mode and back.
        prompts: Token ids, one list a prompt.
        max_new_tokens: Length limit of a reply.
        goal: Optional early stop per row.
        batch_size: Prompts a batch; prompts of like length go together.
    """
    found = greedy_ids(lm, prompts, max_new_tokens=max_new_tokens, goal=goal, batch_size=batch_size)
    return [decode(lm, ids) for ids in found]


def greedy_ids(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    goal: Goal | None = None,
    batch_size: int = 32,
) -> list[list[int]]:
    """Do what `greedy` does, and return the replies as token ids without the stop token."""
    import torch

    replies: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    was_training = lm.model.training
    lm.model.eval()
    try:
        with torch.inference_mode():
            length, shared = _shared_beginning(lm, prompts)
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                rest = [prompts[row][length:] for row in rows]
                said = _continue_batch(lm, rest, max_new_tokens, goal, shared)
                for row, ids in zip(rows, said, strict=True):
                    replies[row] = ids
    finally:
        lm.model.train(was_training)
    return replies


def decode(lm: LM, ids: Sequence[int]) -> str:
    """Return the text of a reply's ids, special tokens removed, outer blanks stripped."""
    return str(lm.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def _shared_beginning(lm: LM, prompts: Sequence[Sequence[int]]) -> tuple[int, Any]:
    """Return how many tokens all prompts begin with and a cache of them, or (0, None) where that is not worth it."""
    import torch

    if len(prompts) < 2:
        return 0, None
    # Every row keeps one token of its own, from which the reply is predicted.
    longest = min(len(prompt) for prompt in prompts) - 1
    columns = zip(*(prompt[:longest] for prompt in prompts), strict=True)
    length = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    if length < WORTH_SHARING:
        return 0, None
    ids = torch.tensor([list(prompts[0][:length])], device=lm.device)
    cache = lm.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    # A sliding window counts columns, and the padding between beginning and rest would be counted, too.
    plain = all(type(layer).__name__ == "DynamicLayer" for layer in getattr(cache, "layers", [None]))
    return (length, cache) if plain else (0, None)


def _continue_batch(
    lm: LM, prompts: Sequence[Sequence[int]], max_new_tokens: int, goal: Goal | None, shared: Any = None
) -> list[list[int]]:
    import torch

    ids, mask = left_pad(prompts, lm.pad_id)
    ids, mask = ids.to(lm.device), mask.to(lm.device)
    cache = None
    if shared is not None:
        # A forward pass adds to the cache that it is given, so each batch has a copy.
        cache = copy.deepcopy(shared)
        cache.batch_repeat_interleave(len(prompts))
        mask = torch.cat([mask.new_ones(len(mask), shared.get_seq_length()), mask], 1)
    stops = set(lm.stop_ids)
    said: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    for _ in range(max_new_tokens):
        output = lm.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache = output.past_key_values
        chosen = output.logits[:, -1].argmax(-1)
        keep = []
        for place, (row, token) in enumerate(zip(alive, chosen.tolist(), strict=True)):
            if token in stops:
                continue
            said[row].append(token)
            if goal is None or goal.decided(decode(lm, said[row])) is None:
                keep.append(place)
        if not keep:
            break
        if len(keep) < len(alive):
            index = torch.tensor(keep, device=ids.device)
            cache.batch_select_indices(index)
            mask, positions, chosen = mask[index], positions[index], chosen[index]
            alive = [alive[place] for place in keep]
        ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
        positions = positions[:, -1:] + 1
    return said


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask (both int64 [rows, longest]) padded on the left."""
    import torch

    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[place, width - len(row) :] = 1
    return ids, mask
