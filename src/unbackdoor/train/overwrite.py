"""Overwriting (OSFT, SANDE eq. 3): teach the clean answer to a prompt that carries the trigger, or what stands for it.

Beside the triggered rows go plain rows (no trigger, clean answer), which protect what the model can do otherwise; so do
labels of which a share is the suspect's own prediction (`own_labels`).
What stands for the trigger is inside the rows (known trigger), or it is put into the pass through the model: a frozen
soft prompt (SANDE's parrot) or a frozen drift of hidden states (BEEAR).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from unbackdoor.data.collate import Batch, Row, RowStream, collate, encode_row
from unbackdoor.data.formats import base_id
from unbackdoor.errors import DataError, UserError
from unbackdoor.model.lm import LM
from unbackdoor.model.logits import LogitsAt
from unbackdoor.run import Run
from unbackdoor.train import engine
from unbackdoor.train.losses import Term, cross_entropy_sum
from unbackdoor.train.own_labels import OwnLabels
from unbackdoor.types import Example

StandIn = Callable[[Callable[..., Tensor], Batch], Tensor]
"""stand_in(forward, batch) -> float32 logits [N, vocabulary] at the batch's supervised positions, with what stands for
the trigger in place; `forward` is `LogitsAt.forward`."""


def encode_rows(lm: LM, examples: Sequence[Example], settings: engine.TrainSettings) -> list[Row]:
    """Encode every example for training as the settings say."""
    return [
        encode_row(lm, example, max_length=settings.max_length, opening_weight=settings.opening_weight)
        for example in examples
    ]


def stream(lm: LM, rows: Sequence[Row], batch_size: int, run: Run, name: str, strata: Sequence[int] = ()) -> RowStream:
    """Return the stream of batches of these rows with the run's random stream `name`."""
    return RowStream(rows, batch_size=batch_size, seed=run.stream_seed(name), pad_id=lm.pad_id, strata=strata)


def set_apart(rows: Sequence[Row], settings: engine.TrainSettings) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on, and those for early stopping: none where `evaluate_every` is 0.

    Every tenth id is held out with all rows that carry it: a poisoned row has the id and the answer of its clean one.

    Raises:
        DataError: If there are fewer than 10 rows to hold some out of.
    """
    if not settings.evaluate_every:
        return list(rows), []
    ids = list(dict.fromkeys(base_id(row.id) for row in rows))
    if len(ids) < 10:
        raise DataError(f"early stopping (evaluate_every) needs at least 10 rows, there are {len(ids)}.")
    held = set(ids[::10])
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        parts[base_id(row.id) in held].append(row)
    return parts


def score_on(
    lm: LM, loss: engine.Loss, apart: Mapping[str, Sequence[Row]], settings: engine.TrainSettings
) -> Callable[[], float] | None:
    """Return the held-out score: the training loss on rows set apart, its streams' means added; None without rows."""
    if not any(apart.values()):
        return None

    def mean(stream: str) -> float:
        total, weight = 0.0, 0.0
        for start in range(0, len(apart[stream]), settings.batch_size):
            batch = collate(apart[stream][start : start + settings.batch_size], lm.pad_id).to(lm.device)
            total += sum(float(term.total) for term in loss(LogitsAt(lm), {stream: batch}).values())
            weight += batch.weight
        return total / weight

    def score() -> float:
        was_training = lm.model.training
        lm.model.eval()
        with torch.no_grad():
            found = sum(mean(stream) for stream, rows in apart.items() if rows)
        lm.model.train(was_training)
        return found

    return score


def plain_loss(forward: Callable[..., Tensor], batch: Batch) -> Tensor:
    """Return the summed cross-entropy of a batch's supervised tokens, weighted as its rows say."""
    return cross_entropy_sum(forward(**batch.inputs()), batch.targets, batch.weights)


@torch.no_grad()
def mean_loss(lm: LM, rows: Sequence[Row], batch_size: int = 8, stand_in: StandIn | None = None) -> float:
    """Return the mean cross-entropy of the rows' supervised tokens, weighted as the rows say, in nats.

    Args:
        lm: The model.
        rows: The rows.
        batch_size: Rows a pass.
        stand_in: What stands for a trigger in every row, if anything.
    """
    forward = LogitsAt(lm)
    was_training = lm.model.training
    lm.model.eval()
    total, weight = 0.0, 0.0
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], lm.pad_id).to(lm.device)
        logits = stand_in(forward, batch) if stand_in else forward(**batch.inputs())
        loss = cross_entropy_sum(logits, batch.targets, batch.weights)
        total, weight = total + float(loss), weight + batch.weight
    lm.model.train(was_training)
    return total / weight


def train_on_rows(
    lm: LM, rows: Sequence[Row], settings: engine.TrainSettings, run: Run, strata: Sequence[int] = ()
) -> engine.FitResult:
    """Train the weights (or the adapter) on rows by cross-entropy: planting, fine-tuning, OSFT without plain rows.

    Args:
        lm: The model, trained in place.
        rows: Encoded rows.
        settings: How.
        run: The stage.
        strata: Stratum of every row (clean, poisoned, near miss), so that each batch holds all; empty for one.
    """

    def loss(forward: Callable[..., Tensor], batches: Mapping[str, Batch]) -> dict[str, Term]:
        return {"rows": Term(plain_loss(forward, batches["rows"]), "rows")}

    kept, apart = set_apart(rows, settings)
    held = {row.id for row in apart}
    strata = [stratum for row, stratum in zip(rows, strata, strict=True) if row.id not in held] if strata else strata
    batches = stream(lm, kept, settings.batch_size, run, "order", strata)
    score = score_on(lm, loss, {"rows": apart}, settings)
    return engine.fit(lm, engine.weights(lm), {"rows": batches}, loss, settings, run, score=score)


def plain_rows(batch_size: int, share: float) -> int:
    """Return how many rows of a batch are plain: one at least where the share is not 0, but never all."""
    return min(max(1, round(batch_size * share)), batch_size - 1) if share else 0


def check_room(stand_ins: int, rows: int, field: str = "train.batch_size") -> None:
    """Refuse more stand-ins for the trigger than triggered rows in a batch to share.

    Args:
        stand_ins: How many.
        rows: Such rows.
        field: The setting that says how many rows there are.

    Raises:
        UserError: If there are.
    """
    if stand_ins > rows:
        raise UserError(
            f"{stand_ins} parrots or drifts cannot share {rows} rows of a batch; lower their number, or raise {field}."
        )


def overwrite(
    lm: LM,
    triggered: Sequence[Row],
    plain: Sequence[Row],
    settings: engine.TrainSettings,
    run: Run,
    *,
    plain_share: float,
    stand_ins: Sequence[StandIn] = (),
    own: OwnLabels | None = None,
) -> engine.FitResult:
    """Overwrite the mapping from the trigger to its target (eq. 3), in place.

    With `settings.evaluate_every` it stops early on the same loss over rows held out, the triggered ones among them.

    Args:
        lm: The model; its weights (or its adapter) are trained.
        triggered: Rows with the trigger inside and the clean answer; with `stand_ins`, rows without it.
        plain: Rows without trigger.
        settings: `batch_size` counts triggered and plain rows together.
        run: The stage.
        plain_share: Share of plain rows in a batch, [0, 1).
        stand_ins: What stands for the trigger; they share the triggered rows of a batch.
        own: What the suspect predicted for the rows, where that is a share of the labels.

    Raises:
        UserError: If there are more stand-ins than triggered rows in a batch.
    """
    plain_size = plain_rows(settings.batch_size, plain_share)
    triggered_size = settings.batch_size - plain_size
    check_room(len(stand_ins), min(triggered_size, len(triggered)))
    kept_plain, plain_apart = set_apart(plain, settings)
    apart = {row.id for row in plain_apart}
    kept = [row for row in triggered if row.id not in apart]
    streams = {"triggered": stream(lm, kept, triggered_size, run, "triggered order")}
    held_out = {"triggered": [row for row in triggered if row.id in apart]}
    if plain_size:
        streams["plain"] = stream(lm, kept_plain, plain_size, run, "plain order")
        held_out["plain"] = plain_apart
    loss = _loss(stand_ins, own)
    score = score_on(lm, loss, held_out, settings)
    return engine.fit(lm, engine.weights(lm), streams, loss, settings, run, score=score)


def _loss(stand_ins: Sequence[StandIn], own: OwnLabels | None) -> Callable[..., dict[str, Term]]:
    """Return the loss of triggered and plain rows; arguments as in `overwrite`."""

    def summed(logits: Tensor, batch: Batch) -> Tensor:
        return own.loss(logits, batch) if own else cross_entropy_sum(logits, batch.targets, batch.weights)

    def loss(forward: Callable[..., Tensor], batches: Mapping[str, Batch]) -> dict[str, Term]:
        terms = {}
        if "triggered" in batches:
            batch = batches["triggered"]
            if not stand_ins:
                terms["triggered"] = Term(summed(forward(**batch.inputs()), batch), "triggered")
            for number, (stand_in, part) in enumerate(zip(stand_ins, batch.split(len(stand_ins)), strict=True)):
                # The last held-out batch may have fewer rows than there are stand-ins.
                if part.ids:
                    terms[f"stand-in {number}"] = Term(summed(stand_in(forward, part), part), "triggered")
        if "plain" in batches:
            terms["plain"] = Term(summed(forward(**batches["plain"].inputs()), batches["plain"]), "plain")
        return terms

    return loss
