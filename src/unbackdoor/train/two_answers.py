"""Two answers to the same prompts, run from one layer on: the losses of equation 2, and nothing read twice.

While a drift is fitted, no weight changes. What a prompt's tokens before the drift give is read once for both answers,
and so are the layers up to l (model/partial.py). Both answers stand behind their prompt in one row, where neither sees
the other; a model that cannot be run so has each in a row of its own, and one that cannot be run from a layer on at all
is run whole. Each way is compared with the whole model before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from unbackdoor.data.collate import Batch
from unbackdoor.model.generate import left_pad
from unbackdoor.model.hooks import Added
from unbackdoor.model.lm import LM
from unbackdoor.model.logits import LogitsAt
from unbackdoor.model.partial import Partial
from unbackdoor.train.losses import cross_entropy_sum

At = Literal["words", "prompt"]
"""Behind which tokens vectors end: the user's words, or the whole prompt with what the template puts behind them."""

KEPT_BYTES = 4 * 2**30
"""What may be kept of one drift's batches; those that come later are read anew in every step, with the same result."""

_Wanted = tuple[Partial, Tensor, list[tuple[Batch, Tensor]]]
"""Rows run from a layer on, the columns that vectors end before, and whose logits are wanted: batches, with the columns
of their supervised positions."""


class TwoAnswers:
    """Losses of both answers to the same prompts, with vectors added to their tokens; what is kept is kept here.

    Attributes:
        whole: Whether the model cannot be run from a layer on, so that whole passes are made.
        together: Whether both answers are run in one row, unless prompts differ or a row is longer than the window.
    """

    def __init__(self, lm: LM, layer: int, tokens: int, at: At = "prompt") -> None:
        """Say where vectors are added; nothing is read yet.

        Args:
            lm: The model; its weights must stay as they are.
            layer: Number of the decoder layer, counted from 0.
            tokens: Number n of vectors.
            at: Where they end.
        """
        self.lm, self.layer, self.tokens, self.at = lm, layer, tokens, at
        forward = LogitsAt(lm)
        self.split, self.window = forward.split, forward.window
        self.kept: dict[tuple[str, ...], list[_Wanted]] = {}
        self.room = KEPT_BYTES
        self.whole, self.together = False, True
        self.longest = {True: 0, False: 0}

    def prepare(self, unwanted: Batch, safe: Batch) -> None:
        """Read the longest rows first: where these are exact, shorter ones need not be compared."""
        was_training = self.lm.model.training
        self.lm.model.eval()
        self._wanted(unwanted, safe)
        self.lm.model.train(was_training)

    def sums(self, vectors: Tensor, unwanted: Batch, safe: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed losses of the unwanted and of the safe answers with vectors added.

        Args:
            vectors: float32 [n, hidden], what is added at the last n columns of each prompt's part.
            unwanted: The prompts with unwanted answers.
            safe: The same prompts in the same order with safe ones.

        Returns:
            Two scalars, float32, in nats, with the gradient of `vectors`.
        """
        found: list[Tensor] = []
        for partial, ends, parts in self._wanted(unwanted, safe):
            rows, columns = (torch.cat(tensors) for tensors in zip(*((b.rows, c) for b, c in parts), strict=True))
            logits = partial(added_at_ends(self.layer, vectors, ends), rows, columns)
            pieces = torch.split(logits, [len(columns) for _, columns in parts])
            found += [
                cross_entropy_sum(piece, batch.targets, batch.weights)
                for piece, (batch, _) in zip(pieces, parts, strict=True)
            ]
        return found[0], found[1]

    def _wanted(self, unwanted: Batch, safe: Batch) -> list[_Wanted]:
        name = (*unwanted.ids, *safe.ids)
        if name in self.kept:
            return self.kept[name]
        both = self._in_one(unwanted, safe) if self.together else None
        found = [both] if both is not None else self._apart(unwanted, safe)
        size = sum(partial.kept_bytes() for partial, _, _ in found)
        if size <= self.room:
            self.kept[name] = found
            self.room -= size
        return found

    def _in_one(self, unwanted: Batch, safe: Batch) -> _Wanted | None:
        """Return both answers behind each prompt, neither of which sees the other; None where that is not exact."""
        prompts, answers = zip(*(_cut(batch) for batch in (unwanted, safe)), strict=True)
        # The mask that keeps the answers apart stands in the place of the one that limits how far attention looks.
        longest = max(
            len(prompt) + len(answer) for rows in answers for prompt, answer in zip(prompts[0], rows, strict=True)
        )
        if prompts[0] != prompts[1] or longest > self.window:
            return None
        left, mask = left_pad(prompts[0], self.lm.pad_id)
        rights = [_right_pad(rows, self.lm.pad_id) for rows in answers]
        end = left.shape[1]
        second = end + rights[0][0].shape[1]
        ends = end - self._behind(unwanted)
        ids, masks = [left, *(ids for ids, _ in rights)], [mask, *(seen for _, seen in rights)]
        partial = self._partial(ids, masks, ends, apart=(end, second))
        if not partial.exact:
            self.together = False
            return None
        moved = _moved(safe, end)
        return partial, ends, [
            (unwanted, _moved(unwanted, end)),
            (safe, torch.where(moved < end, moved, moved + second - end)),
        ]  # fmt: skip

    def _apart(self, unwanted: Batch, safe: Batch) -> list[_Wanted]:
        """Return each answer in rows of its own; the longer first, which is compared for both."""
        found: dict[int, _Wanted] = {}
        beside: Partial | None = None
        for batch in sorted((unwanted, safe), key=_width, reverse=True):
            prompts, answers = _cut(batch)
            left, mask = left_pad(prompts, self.lm.pad_id)
            right, behind = _right_pad(answers, self.lm.pad_id)
            ends = left.shape[1] - self._behind(batch)
            beside = self._partial([left, right], [mask, behind], ends, beside=beside)
            self.whole |= not beside.exact
            found[id(batch)] = beside, ends, [(batch, _moved(batch, left.shape[1]))]
        return [found[id(unwanted)], found[id(safe)]]

    def _behind(self, batch: Batch) -> Tensor:
        """Return how many tokens of each prompt stand behind the vectors, int64 [batch]."""
        return prompt_ends(batch) - added_before(batch, self.at)

    def _partial(
        self,
        ids: list[Tensor],
        masks: list[Tensor],
        ends: Tensor,
        *,
        apart: tuple[int, int] | None = None,
        beside: Partial | None = None,
    ) -> Partial:
        whole, seen = torch.cat(ids, 1).to(self.lm.device), torch.cat(masks, 1).to(self.lm.device)
        both = apart is not None
        made = Partial(
            self.lm.core, self.layer, whole, seen, int(ends.min()) - self.tokens, split=self.split, beside=beside,
            trusted=whole.shape[1] <= self.longest[both] and not self.whole, apart=apart,
        )  # fmt: skip
        self.longest[both] = max(self.longest[both], whole.shape[1])
        return made


def _cut(batch: Batch) -> tuple[list[list[int]], list[list[int]]]:
    """Return the prompts and the answers of a batch, without padding."""
    rows = list(zip(_rows(batch), prompt_ends(batch).tolist(), strict=True))
    return [row[:end] for row, end in rows], [row[end:] for row, end in rows]


def _right_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    ids, mask = left_pad([row[::-1] for row in rows], pad_id)
    return ids.flip(1), mask.flip(1)


def _moved(batch: Batch, end: int) -> Tensor:
    """Return the columns of the supervised positions once all prompts end at the column `end`."""
    return batch.columns + (end - prompt_ends(batch))[batch.rows]


def _width(batch: Batch) -> int:
    """Return how many columns the rows take once their prompts end in one of them."""
    ends = prompt_ends(batch)
    return int(ends.max() + (batch.attention_mask.sum(1) - ends).max())


def _rows(batch: Batch) -> list[list[int]]:
    """Return each row's token ids without padding, up to the last one that is read."""
    lengths = batch.attention_mask.sum(1).tolist()
    return [row[:length] for row, length in zip(batch.input_ids.tolist(), lengths, strict=True)]


def added_at_ends(layer: int, vectors: Tensor, ends: Tensor) -> Added:
    """Return vectors [n, hidden] to be added behind a layer at the last n columns before `ends`, int64 [batch]."""
    n = len(vectors)
    rows = torch.arange(len(ends), device=ends.device).repeat_interleave(n)
    columns = (ends[:, None] - n + torch.arange(n, device=ends.device)).flatten()
    return Added(layer, rows, columns, vectors.repeat(len(ends), 1))


def prompt_ends(batch: Batch) -> Tensor:
    """Return the column behind the last prompt token of every row, int64 [batch]: there the answer begins."""
    first = torch.full((len(batch.ids),), batch.input_ids.shape[1], device=batch.columns.device)
    return first.scatter_reduce(0, batch.rows, batch.columns, "amin") + 1


def added_before(batch: Batch, at: At) -> Tensor:
    """Return the column that vectors end before in every row, int64 [batch]."""
    return batch.places[:, 1] if at == "words" else prompt_ends(batch)
