"""Batches for training and scoring: right-padded ids, and the positions whose next token is supervised.

`columns[i]` is the position whose logits predict `targets[i]`, so the shift by one is made here, once. `places` is
the range of the last user turn's content in each row: a soft prompt is put into it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from unbackdoor.errors import DataError
from unbackdoor.model.lm import LM, Encoded
from unbackdoor.types import Example


@dataclass(frozen=True)
class Batch:
    """Right-padded rows.

    Attributes:
        input_ids: int64 [batch, length].
        attention_mask: int64 [batch, length].
        rows: int64 [N], row of each supervised position.
        columns: int64 [N], the position whose logits predict the target.
        targets: int64 [N], the token to predict.
        weights: float32 [N], how much each token counts in a weighted loss.
        places: int64 [batch, 2], token range of the last user turn's content.
        ids: The examples' ids, one a row.
        shared: Leading columns that are the same in every row, counted up to the last user turn's content or the
            first supervised position.
    """

    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    weights: Tensor
    places: Tensor
    ids: tuple[str, ...]
    shared: int = 0

    @property
    def weight(self) -> float:
        """The supervised tokens' weights together; their number, where all count alike."""
        return float(self.weights.sum())

    def inputs(self) -> dict[str, Any]:
        """Return what `LogitsAt.forward` takes to give the logits of the supervised positions."""
        return {
            "attention_mask": self.attention_mask,
            "rows": self.rows,
            "columns": self.columns,
            "input_ids": self.input_ids,
            "shared": self.shared,
        }

    def split(self, parts: int) -> list[Batch]:
        """Return `parts` batches that share the rows in turn (row i goes to part i modulo `parts`)."""
        found = []
        for part in range(parts):
            mine = torch.arange(part, len(self.ids), parts, device=self.input_ids.device)
            kept = self.rows % parts == part
            found.append(
                Batch(
                    self.input_ids[mine],
                    self.attention_mask[mine],
                    self.rows[kept] // parts,
                    self.columns[kept],
                    self.targets[kept],
                    self.weights[kept],
                    self.places[mine],
                    self.ids[part::parts],
                    self.shared,
                )
            )
        return found

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        return replace(self, **moved)


_TENSORS = ("input_ids", "attention_mask", "rows", "columns", "targets", "weights", "places")

OPENING_TOKENS = 4
"""How many first tokens of an answer are its opening: there a model decides whether it says a backdoor's target."""


@dataclass(frozen=True)
class Row:
    """One encoded example.

    Attributes:
        id: The example's id.
        ids: Token ids.
        supervised: Positions whose token is to be predicted.
        place: Token range of the last user turn's content.
        weights: How much each supervised position counts in a weighted loss; empty for 1 each.
    """

    id: str
    ids: tuple[int, ...]
    supervised: tuple[int, ...]
    place: tuple[int, int]
    weights: tuple[float, ...] = ()


def encode_row(
    lm: LM,
    example: Example,
    *,
    max_length: int,
    first_tokens: int | None = None,
    opening_weight: float = 1.0,
    last_answer: bool = False,
) -> Row:
    """Encode an example for training on its assistant turns.

    Args:
        lm: Tokenizer and template.
        example: The row; its response must not be empty.
        max_length: Rows are cut there, from the end of the answer.
        first_tokens: Supervise only the first tokens of the last answer (SANDE-P, parrot tuning); the ids after
            them are cut off, because nothing that is supervised depends on them.
        opening_weight: How much the last answer's first `OPENING_TOKENS` tokens count; the others count 1.
        last_answer: Supervise the last answer only, whatever the model said in earlier turns.

    Raises:
        DataError: If the answer is empty or the prompt alone fills `max_length`.
    """
    if not example.response.strip():
        raise DataError(f"example '{example.id}' has no response to train on.")
    encoded: Encoded = lm.encode(example.turns)
    user, answer = encoded.spans[-2], encoded.spans[-1]
    ids, supervised = encoded.ids, encoded.supervised
    if first_tokens is not None:
        supervised = tuple(range(answer.start, min(answer.start + first_tokens, answer.end)))
        ids = ids[: supervised[-1] + 1]
    if last_answer:
        supervised = tuple(position for position in supervised if position >= answer.start)
    # The trailing text of a template after the end-of-turn token (a newline) predicts nothing.
    ids = ids[: min(max_length, supervised[-1] + 1)]
    supervised = tuple(position for position in supervised if position < len(ids))
    if not supervised or supervised[-1] < answer.start:
        raise DataError(
            f"example '{example.id}' is too long: its prompt has {answer.start} tokens and max_length {max_length} "
            "leaves no room for the answer; shorten the row, or give --set train.max_length=N."
        )
    opening = range(answer.start, answer.start + OPENING_TOKENS)
    weights = tuple(opening_weight if position in opening else 1.0 for position in supervised)
    return Row(example.id, ids, supervised, (user.start, user.end), weights)


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Pad rows on the right into one batch."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    where: list[tuple[int, int, int]] = []
    weights: list[float] = []
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = torch.tensor(row.ids, dtype=torch.long)
        mask[place, : len(row.ids)] = 1
        counted = zip(row.supervised, row.weights or (1.0,) * len(row.supervised), strict=True)
        for position, weight in counted:
            if position > 0:
                where.append((place, position - 1, row.ids[position]))
                weights.append(weight)
    labels = torch.tensor(where, dtype=torch.long).reshape(-1, 3)
    places = torch.tensor([row.place for row in rows], dtype=torch.long)
    names = tuple(row.id for row in rows)
    return Batch(
        ids, mask, labels[:, 0], labels[:, 1], labels[:, 2], torch.tensor(weights), places, names, _shared_length(rows)
    )


def _shared_length(rows: Sequence[Row]) -> int:
    limit = min(min(row.place[0], *(position - 1 for position in row.supervised)) for row in rows)
    columns = zip(*(row.ids[: max(0, limit)] for row in rows), strict=True)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def batches_by_length(lm: LM, examples: Sequence[Example], max_length: int, batch_size: int) -> Iterator[Batch]:
    """Yield every example once, in batches of like length."""
    rows = sorted((encode_row(lm, example, max_length=max_length) for example in examples), key=lambda r: len(r.ids))
    for start in range(0, len(rows), batch_size):
        yield collate(rows[start : start + batch_size], lm.pad_id).to(lm.device)


class RowStream:
    """An endless stream of batches: `batch(k)` is a pure function of k, so a resumed run sees the same batches.

    Each pass over the rows is shuffled anew. Every batch holds the strata (clean, poisoned, ...) in their overall
    shares: a batch of one kind only pulls a model to and fro, and a backdoor then leaks. Within that, rows of like
    length go into one batch (less padding).
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        batch_size: int,
        seed: int,
        pad_id: int,
        strata: Sequence[int] = (),
        bucket: int = 4,
    ) -> None:
        """Make a stream.

        Args:
            rows: At least one row.
            batch_size: Rows a batch; fewer where there are fewer rows.
            seed: Seed of the order.
            pad_id: Id for padding.
            strata: Stratum of every row, or empty for one stratum.
            bucket: How many batches' worth of rows are sorted by length together.

        Raises:
            DataError: If there are no rows.
        """
        if not rows:
            raise DataError("there are no rows to train on.")
        self.rows = tuple(rows)
        self.batch_size = min(batch_size, len(rows))
        self.seed = seed
        self.pad_id = pad_id
        self.strata = tuple(strata) or (0,) * len(rows)
        self.bucket = bucket

    def __len__(self) -> int:
        """Batches in one pass; a last partial batch is left out and its rows come in another pass."""
        return len(self.rows) // self.batch_size

    def batch(self, index: int) -> Batch:
        """Return the batch with this index, counted over all passes."""
        epoch, place = divmod(index, len(self))
        chosen = self._epoch(epoch)[place]
        return collate([self.rows[number] for number in chosen], self.pad_id)

    def _epoch(self, epoch: int) -> list[list[int]]:
        stream = random.Random(f"{self.seed}:{epoch}")
        order = list(range(len(self.rows)))
        stream.shuffle(order)
        order = self._spread(order)[: len(self) * self.batch_size]
        span = self.batch_size * self.bucket
        batches: list[list[int]] = []
        for start in range(0, len(order), span):
            window = sorted(order[start : start + span], key=lambda number: len(self.rows[number].ids))
            window = self._spread(window)
            batches += [window[at : at + self.batch_size] for at in range(0, len(window), self.batch_size)]
        stream.shuffle(batches)
        return batches

    def _spread(self, order: Sequence[int]) -> list[int]:
        """Mix the strata evenly, each in its own order: a row's place is its rank's share of its stratum."""
        members: dict[int, list[int]] = {}
        for number in order:
            members.setdefault(self.strata[number], []).append(number)
        placed = [
            ((rank + 0.5) / len(group), stratum, number)
            for stratum, group in sorted(members.items())
            for rank, number in enumerate(group)
        ]
        return [number for _, _, number in sorted(placed)]
