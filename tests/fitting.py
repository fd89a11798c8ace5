"""Short trainings of a tiny model that can be changed, interrupted or poisoned at any step."""

from __future__ import annotations

import torch

import tiny
from unbackdoor.data.collate import Batch
from unbackdoor.run import Run
from unbackdoor.train import engine, lora, overwrite
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.losses import Term

ROWS = tiny.rows(40, seed=3)


def settings(**changes) -> TrainSettings:
    return TrainSettings(**{"steps": 6, "learning_rate": 1e-3, "batch_size": 4, "max_length": 96, **changes})


def train(lm, run=None, *, score=None, stop_below=None, hook=None, coefficient=1.0, cap=None, **changes):
    """Train on ROWS; `hook(call)` may change the loss of the n-th forward."""
    how, run = settings(**changes), run or Run()
    calls = iter(range(10_000))

    def loss(forward, batches):
        total = overwrite.plain_loss(forward, batches["rows"])
        if hook is not None:
            total = hook(next(calls), total)
        return {"rows": Term(total, "rows", coefficient, cap)}

    rows = overwrite.stream(lm, overwrite.encode_rows(lm, ROWS, how), how.batch_size, run, "order")
    return engine.fit(lm, engine.weights(lm), {"rows": rows}, loss, how, run, score=score, stop_below=stop_below)


def naive_loss(lm, batch: Batch):
    """Cross-entropy from full logits with -100 labels, as transformers computes it: the mean over supervised tokens."""
    labels = torch.full_like(batch.input_ids, -100)
    for row, column, target in zip(batch.rows, batch.columns, batch.targets, strict=True):
        labels[row, column + 1] = target
    return lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss


class Stopped(Exception):
    pass


def interrupted_at(call):
    def hook(number, total):
        if number == call:
            raise Stopped
        return total

    return hook


def with_adapter(lm):
    return lora.attach(lm, lora.LoraSettings(rank=4, dropout=0.2), seed=1)


def with_trained_adapter(base, seed, rank, size=0.05):
    """A copy of the base with an adapter that does something."""
    made = lora.attach(tiny.clone(base), lora.LoraSettings(rank=rank), seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in made.model.named_parameters():
            if "lora_" in name:
                tensor.copy_(size * torch.randn(tensor.shape, generator=draw))
    return made
