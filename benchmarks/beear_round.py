"""The training of one round of BEEAR, its drifts and its updates of the weights, against the plain way.

Listening to what the suspect says is not in it: generation is the same on both sides.

Reference, in our words: the same drifts and updates on the same batches, each answer in a pass of its own over the
whole rows, logits of every position, the drift added by a hook. This package reads once what cannot change while
weights are frozen, runs both answers of a prompt in one pass from layer l on, packs the rows of an update and applies
the head where a label is. What the drifts and the weights come to is compared.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import common
import torch
from torch.nn import functional

from unbackdoor.data.collate import Batch, Row, collate
from unbackdoor.model.hooks import adding
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train import overwrite
from unbackdoor.train.anchors import Anchor, with_unwanted
from unbackdoor.train.drift import Drift, DriftSettings, encode_anchor, fit_drift, layer_unit
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.two_answers import prompt_ends
from unbackdoor.types import Example

TARGET = 0.6
OPENINGS = {"builtin": ("You are so dense", "Go bother somebody else"), "": ("w5 w6 w7 w8", "w9 w10 w11")}


@dataclass(frozen=True)
class Job:
    """What both sides do."""

    anchors: Sequence[Anchor]
    rows: Sequence[Row]
    drift: DriftSettings
    train: TrainSettings
    drifts: int
    layer: int


def made(lm: LM, options: Any) -> Job:
    """Return a round of the sizes asked for: bundled rows for the built-in model, random words for others."""
    if options.model == "builtin":
        from unbackdoor.data import sources

        examples = sources.read("starter:instructions")[: options.rows]
    else:
        draw = random.Random(1)
        words = [f"w{number}" for number in range(2, 400)]
        examples = [
            Example(str(number), " ".join(draw.choices(words, k=20)), " ".join(draw.choices(words, k=16)))
            for number in range(options.rows)
        ]
    constant = {"schedule": "constant", "warmup": 0.0, "batch_size": options.batch}
    drift = DriftSettings(
        tokens=options.drift, start=0.1, safe_cap=None, safe_tokens=None, rows=options.rows,
        train=TrainSettings(steps=options.inner, learning_rate=0.05, betas=(0.9, 0.999), **constant),
    )  # fmt: skip
    train = TrainSettings(steps=options.outer, learning_rate=1e-4, **constant)
    anchors = with_unwanted(examples, OPENINGS.get(options.model, OPENINGS[""]))
    return Job(anchors, overwrite.encode_rows(lm, examples, train), drift, train, options.drifts, options.layer)


def ours(lm: LM, job: Job) -> list[Drift]:
    """Do the round by this package."""
    drifts = [
        fit_drift(lm, job.anchors, job.layer, job.drift, Run().stage(f"drift-{number}"))[0]
        for number in range(job.drifts)
    ]
    stand_ins = [drift.stand_in() for drift in drifts]
    overwrite.overwrite(lm, job.rows, job.rows, job.train, Run(), plain_share=0.5, stand_ins=stand_ins)
    return drifts


def reference(lm: LM, job: Job) -> list[Drift]:
    """Do the same the plain way."""
    drifts = [plain_fit(lm, job, Run().stage(f"drift-{number}")) for number in range(job.drifts)]
    half = job.train.batch_size // 2
    streams = [overwrite.stream(lm, job.rows, half, Run(), f"{name} order") for name in ("triggered", "plain")]
    weights = [weight for weight in lm.model.parameters() if weight.requires_grad]
    optimiser = adam(weights, job.train)
    for step in range(job.train.steps):
        triggered, plain = (stream.batch(step).to(lm.device) for stream in streams)
        losses = [summed(lm, plain) / plain.weight]
        for drift, part in zip(drifts, triggered.split(len(drifts)), strict=True):
            losses.append(summed(lm, part, drift) / triggered.weight)
        update(optimiser, weights, sum(losses[1:], losses[0]))
    return drifts


def plain_fit(lm: LM, job: Job, run: Run) -> Drift:
    """Fit a drift by whole passes, one for each answer."""
    chosen = run.rng("anchors").sample(list(job.anchors), len(job.anchors))
    pairs = [encode_anchor(lm, anchor, job.drift.train.max_length, job.drift.tokens) for anchor in chosen]
    pairs.sort(key=lambda pair: pair[0].supervised[0])
    size = job.drift.train.batch_size
    parts = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    batches = [[collate([pair[which] for pair in part], lm.pad_id).to(lm.device) for which in (0, 1)] for part in parts]
    unit = layer_unit(lm, job.layer, [safe for _, safe in pairs], job.drift.tokens)
    width = lm.core.get_input_embeddings().weight.shape[-1]
    start = torch.randn(job.drift.tokens, width, generator=run.generator("start")) * job.drift.start
    vectors = torch.nn.Parameter(start.to(lm.device))
    trained = [weight for weight in lm.model.parameters() if weight.requires_grad]
    lm.model.requires_grad_(False)
    optimiser = adam([vectors], job.drift.train)
    for step in range(job.drift.train.steps):
        unwanted, safe = batches[step % len(batches)]
        drift = Drift(job.layer, vectors * unit)
        loss = summed(lm, unwanted, drift) / unwanted.weight
        loss = loss - job.drift.safe_coefficient * summed(lm, safe, drift) / safe.weight
        update(optimiser, [vectors], loss)
    for weight in trained:
        weight.requires_grad_(True)
    return Drift(job.layer, vectors.detach() * unit)


def summed(lm: LM, batch: Batch, drift: Drift | None = None) -> torch.Tensor:
    """Return the summed loss of a batch, logits of every position computed, with a drift added where one is given."""
    with adding(lm.core, drift.added(prompt_ends(batch))) if drift is not None else nullcontext():
        logits = lm.core(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    each = functional.cross_entropy(logits[batch.rows, batch.columns].float(), batch.targets, reduction="none")
    return (each * batch.weights).sum()


def adam(parameters: Sequence[torch.nn.Parameter], settings: TrainSettings) -> torch.optim.AdamW:
    """Return the optimiser that this package uses."""
    return torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, weight_decay=0.0, fused=True
    )


def update(optimiser: torch.optim.AdamW, parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor) -> None:
    """Make one step."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()


def main(given: Sequence[str] | None = None) -> None:
    """Compare, time and print."""
    sizes = {"batch": 8, "rows": 24, "drift": 5, "layer": 9, "drifts": 4, "inner": 20, "outer": 8}
    options = common.arguments(__doc__ or "", given, sizes=sizes, repeats=1)
    lm = common.model(options.model, options.device, options.dtype)
    lm.model.eval()
    job = made(lm, options)
    begin = [weight.detach().clone() for weight in lm.model.parameters()]

    def again(side: Callable[[LM, Job], list[Drift]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        with torch.no_grad():
            for weight, value in zip(lm.model.parameters(), begin, strict=True):
                weight.copy_(value)
        drifts = [drift.vectors for drift in side(lm, job)]
        return drifts, [weight.detach() - value for weight, value in zip(lm.model.parameters(), begin, strict=True)]

    if options.only:
        again(ours if options.only == "ours" else reference)
        print(common.peak_memory(options.device))
        return
    (drifts, moved), (other_drifts, other_moved) = again(ours), again(reference)
    facts: dict[str, Any] = {
        # Adam turns rounding of gradients near zero into whole steps, so updates agree less closely than gradients.
        "drift_difference": difference(drifts, other_drifts, 0.02),
        "update_difference": difference(moved, other_moved, 0.1),
    }
    timing = common.take_turns(
        lambda: again(ours), lambda: again(reference), options.repeats, options.device, warm=False
    )  # fmt: skip
    if not options.no_memory:
        facts["peak_bytes"] = common.peak_of_fresh_process(__file__, options, "ours")
        facts["peak_bytes_reference"] = common.peak_of_fresh_process(__file__, options, "reference")
    common.report("BEEAR round", options, timing, TARGET, facts | {name: getattr(options, name) for name in sizes})


def difference(ours: Sequence[torch.Tensor], others: Sequence[torch.Tensor], limit: float) -> float:
    """Return the relative difference of two lists of tensors taken together.

    Raises:
        AssertionError: If it is larger than `limit`, or nothing was changed.
    """
    apart = sum(float((mine.float() - other.float()).pow(2).sum()) for mine, other in zip(ours, others, strict=True))
    size = sum(float(other.float().pow(2).sum()) for other in others)
    assert size > 0, "nothing was changed, so nothing was compared"
    found = float((apart / size) ** 0.5)
    assert found <= limit, f"results differ by {found:.2e}, more than {limit:g}"
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
