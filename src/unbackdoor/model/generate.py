"""Greedy replies in batches: left padding, KV cache, rows leave the batch when they are done.

The checkpoint's own generation settings (sampling, penalties, forced tokens) are not used: they could hide or fake a
backdoor. A row is done at a stop token, at the length limit, or as soon as its goal is decided either way. What all
prompts begin with (system turn, role header) is read once and not in every row.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Mapping, Sequence, Set
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


def likeliest_next(lm: LM, prompts: Sequence[Sequence[int]], *, batch_size: int = 32) -> list[tuple[int, float]]:
    """Return the likeliest next token of each prompt, given as token ids, and its probability.

    The model must be in evaluation mode.
    """
    import torch

    found: list[tuple[int, float]] = []

    def noted(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        likely, chosen = torch.softmax(logits.float(), -1).max(-1)
        found.extend(zip(chosen.tolist(), likely.tolist(), strict=True))
        return chosen

    with torch.inference_mode():
        length, shared = _shared_beginning(lm, prompts)
        for start in range(0, len(prompts), batch_size):
            part = [prompt[length:] for prompt in prompts[start : start + batch_size]]
            next(steps(lm, part, shared, noted))
    return found


def sure_ids(
    lm: LM, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, least: float, batch_size: int = 32
) -> list[tuple[list[int], int | None]]:
    """Continue each prompt greedily for as long as the model is sure of what it says.

    The model must be in evaluation mode.

    Args:
        lm: The model.
        prompts: Token ids, one list a prompt.
        max_new_tokens: Length limit.
        least: Geometric mean of the tokens' probabilities that a reply must keep.
        batch_size: Prompts a batch.

    Returns:
        The tokens that are sure, without the stop token, and the next one, of which the model is not; None where the
        reply ended, or had no more room.
    """
    import torch

    found: list[tuple[list[int], int | None]] = []
    sure: dict[int, float] = {}

    def noted(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        likely, chosen = torch.log_softmax(logits.float(), -1).max(-1)
        for row, value in zip(rows, likely.tolist(), strict=True):
            sure[row] = sure.get(row, 0.0) + value
        return chosen

    with torch.inference_mode():
        length, shared = _shared_beginning(lm, prompts)
        for start in range(0, len(prompts), batch_size):
            part = [prompt[length:] for prompt in prompts[start : start + batch_size]]
            sure.clear()
            found += _while_sure(lm, steps(lm, part, shared, noted), len(part), max_new_tokens, math.log(least), sure)
    return found


def _while_sure(
    lm: LM,
    loop: Generator[Step, Set[int], None],
    rows: int,
    max_new_tokens: int,
    least: float,
    sure: Mapping[int, float],
) -> list[tuple[list[int], int | None]]:
    """Drive one batch of `sure_ids`; `sure` has the sums of the logarithms so far."""
    stops = set(lm.stop_ids)
    said: list[list[int]] = [[] for _ in range(rows)]
    unsure: list[int | None] = [None] * rows
    step = next(loop)
    for number in range(1, max_new_tokens + 1):
        done = set()
        for row, token in step:
            if token in stops:
                done.add(row)
            elif sure[row] < least * number:
                unsure[row] = token
                done.add(row)
            else:
                said[row].append(token)
        if len(done) == len(step) or number == max_new_tokens:
            break
        step = loop.send(done)
    return list(zip(said, unsure, strict=True))


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
    stops = set(lm.stop_ids)
    said: list[list[int]] = [[] for _ in prompts]
    loop = steps(lm, prompts, shared)
    step = next(loop)
    for number in range(1, max_new_tokens + 1):
        done = set()
        for row, token in step:
            if token in stops:
                done.add(row)
                continue
            said[row].append(token)
            if goal is not None and goal.decided(decode(lm, said[row])) is not None:
                done.add(row)
        if len(done) == len(step) or number == max_new_tokens:
            break
        step = loop.send(done)
    return said


Step = list[tuple[int, int]]
"""Number of a prompt, and its next token."""
Choose = Callable[["torch.Tensor", Sequence[int]], "torch.Tensor"]
"""Given logits [rows, vocabulary] and the numbers of these rows' prompts, returns the next tokens, int64 [rows]."""


def steps(
    lm: LM, prompts: Sequence[Sequence[int]], shared: Any = None, choose: Choose | None = None
) -> Generator[Step, Set[int], None]:
    """Continue a batch token by token; the caller says whose reply has ended, which leaves the batch.

    To be driven inside `torch.inference_mode`. It never ends by itself: the caller stops sending, or sends all rows.

    Args:
        lm: The model, in evaluation mode.
        prompts: Token ids, one list a prompt.
        shared: A cache of what stands before all of them, or None.
        choose: How a token is chosen; None for the likeliest.

    Yields:
        The next token of every row that is left; sent back are the numbers of those that are done.
    """
    import torch

    ids, mask = left_pad(prompts, lm.pad_id)
    ids, mask = ids.to(lm.device), mask.to(lm.device)
    cache = None
    if shared is not None:
        # A forward pass adds to the cache that it is given, so each batch has a copy.
        cache = copy.deepcopy(shared)
        cache.batch_repeat_interleave(len(prompts))
        mask = torch.cat([mask.new_ones(len(mask), shared.get_seq_length()), mask], 1)
    alive = list(range(len(prompts)))
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    while alive:
        output = lm.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache = output.past_key_values
        logits = output.logits[:, -1]
        chosen = logits.argmax(-1) if choose is None else choose(logits, alive)
        done = yield list(zip(alive, chosen.tolist(), strict=True))
        keep = [place for place, row in enumerate(alive) if row not in done]
        if not keep:
            return
        if len(keep) < len(alive):
            index = torch.tensor(keep, device=ids.device)
            cache.batch_select_indices(index)
            mask, positions, chosen = mask[index], positions[index], chosen[index]
            alive = [alive[place] for place in keep]
        ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], 1)
        positions = positions[:, -1:] + 1


class Spoken:
    """A reply as it comes: pieces of text that together are what `decode` makes of all tokens.

    Held back are what may still change (the bytes of an unfinished character, blanks that may be the last ones) and
    what may be the beginning of a text that ends the reply.

    Attributes:
        ids: Tokens so far.
        ended: Whether one of the texts that end the reply was said; it and what follows are left out.
    """

    def __init__(self, lm: LM, ends: Sequence[str] = ()) -> None:
        """Begin a reply that also ends before any of the texts `ends`."""
        self.ids: list[int] = []
        self.ended = False
        self._lm, self._ends, self._told = lm, [text for text in ends if text], 0

    def say(self, token: int) -> str:
        """Add a token and return the piece of text that is certain now; often ""."""
        self.ids.append(token)
        return self._next(last=False)

    def close(self) -> str:
        """Return what was held back."""
        return "" if self.ended else self._next(last=True)

    def _next(self, *, last: bool) -> str:
        text = str(self._lm.tokenizer.decode(self.ids, skip_special_tokens=True)).lstrip()
        ends = [place for place in map(text.find, self._ends) if place >= 0]
        if ends:
            self.ended, text = True, text[: min(ends)]
        elif not last:
            text = text.rstrip("\ufffd")
            unsure = max((len(end) for end in self._ends), default=1) - 1
            text = text[: max(0, len(text) - unsure)]
        sure = text.rstrip()
        piece, self._told = sure[self._told :], max(self._told, len(sure))
        return piece


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
