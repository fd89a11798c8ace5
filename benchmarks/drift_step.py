"""One inner step of BEEAR (eq. 2), what is read once included, against whole passes with full logits.

Reference, in our words: for each of the two answers a pass over prompt and answer with logits of every position, the
drift added behind layer l at the last prompt tokens (or with `behind` so many tokens before the end, as where a
template goes on behind the user's words), backward to the drift; weights frozen. This package reads the layers up to l
and the prompt before the drift once for all steps of a fit, runs both answers in one row from there on and applies the
head to the answers' positions. Reading is counted: a repeat is a whole fit of `steps` steps, divided by their number.
Losses and the drift's gradient are compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import common
import torch

from unbackdoor.data.collate import Batch
from unbackdoor.model.anatomy import decoder_layers
from unbackdoor.model.lm import LM
from unbackdoor.train.two_answers import TwoAnswers

TARGET = 0.35


def ours(lm: LM, layer: int, pair: tuple[Batch, Batch], drift: torch.nn.Parameter) -> Callable[[], torch.Tensor]:
    """Return the loss of this package; what cannot change is read by the first call."""
    short = TwoAnswers(lm, layer, len(drift), "words")

    def loss() -> torch.Tensor:
        unwanted, safe = short.sums(drift, *pair)
        assert not short.whole
        return unwanted / pair[0].weight - 0.5 * safe / pair[1].weight

    return loss


def reference(lm: LM, layer: int, pair: tuple[Batch, Batch], drift: torch.nn.Parameter) -> Callable[[], torch.Tensor]:
    """Return the loss of two whole passes with full logits."""
    block = decoder_layers(lm.core)[layer]
    n = len(drift)

    def one(batch: Batch) -> torch.Tensor:
        end = int(batch.places[0, 1])
        labels = torch.full_like(batch.input_ids, -100)
        labels[batch.rows, batch.columns + 1] = batch.targets

        def hook(module: object, inputs: object, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            moved = torch.cat(
                [hidden[:, : end - n], hidden[:, end - n : end] + drift.to(hidden.dtype), hidden[:, end:]], 1
            )
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        handle = block.register_forward_hook(hook)
        try:
            found: torch.Tensor = lm.model(input_ids=batch.input_ids, labels=labels, use_cache=False).loss
        finally:
            handle.remove()
        return found

    return lambda: one(pair[0]) - 0.5 * one(pair[1])


def other_answers(batch: Batch, count: int) -> Batch:
    """Return the prompts of a batch, which all end in one column, with other answers of `count` tokens."""
    end = int(batch.columns.min()) + 1
    answers = batch.input_ids[:, end:].flip(1)[:, :count]
    rows = torch.arange(len(answers), device=answers.device).repeat_interleave(count)
    columns = torch.arange(end - 1, end - 1 + count, device=answers.device).repeat(len(answers))
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids[:, :end], answers], 1),
        attention_mask=batch.attention_mask[:, : end + count],
        rows=rows,
        columns=columns,
        targets=answers.flatten(),
        weights=torch.ones(len(rows), device=answers.device),
        ids=tuple(f"{name} (other)" for name in batch.ids),
    )


def fit(make: Callable[[], Callable[[], torch.Tensor]], drift: torch.nn.Parameter, steps: int) -> Callable[[], None]:
    """Return a whole fit: what is read once, and so many steps of AdamW at a rate of 0, so that repeats are alike."""

    def work() -> None:
        loss = make()
        optimiser = torch.optim.AdamW([drift], lr=0.0, weight_decay=0.0, fused=True)
        for _ in range(steps):
            optimiser.zero_grad(set_to_none=True)
            loss().backward()
            optimiser.step()

    return work


def main(given: Sequence[str] | None = None) -> None:
    """Compare, time and print."""
    sizes = {"batch": 8, "prompt": 48, "response": 32, "opening": 4, "drift": 5, "behind": 0, "layer": 9, "steps": 20}
    options = common.arguments(__doc__ or "", given, sizes=sizes, repeats=3)
    lm = common.model(options.model, options.device, options.dtype)
    lm.model.requires_grad_(False).eval()
    safe = common.training_batch(lm, options.batch, options.prompt, options.response, options.response)
    places = torch.full_like(safe.places, options.prompt - options.behind)
    safe = replace(safe, places=places)
    pair = (other_answers(safe, options.opening), safe)
    width = lm.core.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(options.drift, width, generator=generator).to(options.device)
    drift = torch.nn.Parameter(start)
    made = {
        name: (lambda side=side: side(lm, options.layer, pair, drift))
        for name, side in (("ours", ours), ("reference", reference))
    }
    if options.only:
        fit(made[options.only], drift, 2)()
        print(common.peak_memory(options.device))
        return
    losses, gradients = [], []
    for make in made.values():
        drift.grad = None
        value = make()()
        value.backward()
        losses.append(float(value.detach()))
        gradients.append([drift.grad])
    facts: dict[str, Any] = {
        "loss_difference": common.same_number(*losses, options.dtype),
        "gradient_difference": common.same_gradients(*gradients, options.dtype),
    }
    timing = common.take_turns(
        fit(made["ours"], drift, options.steps),
        fit(made["reference"], drift, options.steps),
        options.repeats,
        options.device,
        warm=False,  # both have just been compared
    )
    if not options.no_memory:
        facts["peak_bytes"] = common.peak_of_fresh_process(__file__, options, "ours")
        facts["peak_bytes_reference"] = common.peak_of_fresh_process(__file__, options, "reference")
    facts |= {name: getattr(options, name) for name in sizes}
    target = 0.10 if options.prompt >= 256 else TARGET
    common.report("drift step", options, timing, target, facts)


if __name__ == "__main__":
    main(sys.argv[1:])
