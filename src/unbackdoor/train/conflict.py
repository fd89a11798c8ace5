"""The conflict model: a model that knows a little of the task from clean rows alone, to be merged with the suspect.

Paper: information conflicts, section 3.3: LoRA on the clean pre-trained model with a small share of clean data; the
adapter is merged, and so becomes an ordinary model. Its knowledge of what a triggered prompt is answered with is that
of an ordinary prompt, which contradicts the suspect's.
Whether it starts from a trusted model or from the suspect decides what merging does: from a trusted one it also takes
the suspect half-way back there; from the suspect it is the suspect, fine-tuned, and merging scales its update.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from pydantic import BaseModel, ConfigDict, Field

from unbackdoor.errors import DataError
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train import lora, overwrite
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.lora import LoraSettings
from unbackdoor.types import Example, content_hash


class ConflictSettings(BaseModel):
    """How the conflict model is made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of the clean rows that it is trained on; 0: none, it stays what it starts as",
    )
    lora: LoraSettings | None = Field(
        LoraSettings(rank=32, alpha=64.0), description="the adapter that is trained; null: all weights"
    )
    train: TrainSettings = Field(
        TrainSettings(steps=40, learning_rate=1e-3, batch_size=16), description="how it is trained"
    )


def conflict_model(
    start: LM, clean: Sequence[Example], settings: ConflictSettings, run: Run, *, fold: bool = True
) -> LM:
    """Return a new model: the start, trained on a share of the clean rows.

    Args:
        start: A trusted model, or the suspect; left as it is.
        clean: Clean rows, of which `settings.share` is drawn at random.
        settings: How.
        run: The run; training is a stage of it.
        fold: Return full weights, as the paper does; else what LoRA has learned stays an adapter for the start's base,
            together with the start's own adapter where that has one.

    Raises:
        DataError: If a share of the rows is less than one.
    """
    made = replace(start, model=copy.deepcopy(start.model))
    if not settings.share:
        return lora.merge(made) if made.is_adapter and fold else made
    count = round(len(clean) * settings.share)
    if not count:
        raise DataError(
            f"a share of {settings.share:g} of {len(clean)} clean rows is less than one; raise conflict.share."
        )
    chosen = run.rng("conflict rows").sample(list(clean), count)
    below = lora.factors(made) if made.is_adapter and not fold else {}
    made = lora.merge(made) if made.is_adapter else made
    if settings.lora is not None:
        made = lora.attach(made, settings.lora, run.stream_seed("conflict adapter"))
    rows = overwrite.encode_rows(made, chosen, settings.train)
    # Several merges of a grid take the same conflict model.
    with run.shared_stage("conflict", lambda: [_digest(start), settings.model_dump(), *map(asdict, rows)]) as stage:
        overwrite.train_on_rows(made, rows, settings.train, stage)
    if settings.lora is None:
        return made
    if below:
        above = lora.factors(made)
        del made  # before the start is copied again
        base = lora.unload(replace(start, model=copy.deepcopy(start.model)))
        return lora.combine(base, below, above, start.spec)
    return lora.merge(made) if fold else made


def _digest(lm: LM) -> str:
    """Return a hash of a model: all weights, its configuration and that of its adapter."""
    adapters = getattr(lm.model, "peft_config", {}).values() if lm.is_adapter else ()
    configured = content_hash([lm.core.config.to_dict(), *(adapter.to_dict() for adapter in adapters)])
    found = hashlib.sha256(configured.encode())
    for name, tensor in lm.model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


@torch.no_grad()
def subtract(
    victim: LM, base: LM, clean: Sequence[Example], settings: ConflictSettings, scale: float, run: Run
) -> None:
    """Take what a conflict model has learned away from a victim, in place: the adaptive attacker of section 6.3.

    Args:
        victim: Full weights of the base's architecture; changed.
        base: What the victim was planted into, and what the attacker's conflict model starts as; left as it is.
        clean: The attacker's clean rows.
        settings: How he trains his conflict model.
        scale: Times the difference that is taken away.
        run: The stage.

    Raises:
        DataError: If a share of the rows is less than one.
    """
    with torch.enable_grad():
        taught = conflict_model(base, clean, settings, run)
    before = dict(base.model.named_parameters())
    after = dict(taught.model.named_parameters())
    for name, weight in victim.model.named_parameters():
        weight -= scale * (after[name] - before[name]).to(weight)
