"""One training step of this package against transformers' own loss on full logits.

The output head is applied at supervised positions only, and what the template puts before the user's words is read
for one row and not for every one.

Both sides make a whole step as the engine does: forward, backward, clipping, fused AdamW. The learning rate is 0, so
that every repeat sees the same weights; the work is that of any other rate. Loss and every gradient are compared. Peak
memory is that of forward and backward in a process of its own: the optimiser's state is the same on both sides.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import common
import torch

from unbackdoor.data.collate import Batch
from unbackdoor.model.lm import LM
from unbackdoor.model.logits import LogitsAt
from unbackdoor.train.losses import cross_entropy_sum

TARGET = 0.9


def ours(lm: LM, batch: Batch) -> Callable[[], torch.Tensor]:
    """Return the loss of this package: hidden states are gathered before the head."""
    forward = LogitsAt(lm)

    def loss() -> torch.Tensor:
        logits = forward(**batch.inputs())
        return cross_entropy_sum(logits, batch.targets, batch.weights) / batch.weight

    return loss


def reference(lm: LM, batch: Batch) -> Callable[[], torch.Tensor]:
    """Return the plain loss: logits of every position, labels of -100 where nothing is learned."""
    labels = torch.full_like(batch.input_ids, -100)
    labels[batch.rows, batch.columns + 1] = batch.targets

    def loss() -> torch.Tensor:
        found: torch.Tensor = lm.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels, use_cache=False
        ).loss
        return found

    return loss


def step(lm: LM, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Return a whole training step."""
    parameters = list(lm.model.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def work() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()

    return work


def compare(lm: LM, batch: Batch, dtype: str) -> dict[str, float]:
    """Return how far loss and gradients of the two sides are apart."""
    losses, gradients = [], []
    for make in (ours, reference):
        lm.model.zero_grad(set_to_none=True)
        value = make(lm, batch)()
        value.backward()
        losses.append(float(value.detach()))
        gradients.append([parameter.grad for parameter in lm.model.parameters()])
    lm.model.zero_grad(set_to_none=True)
    return {
        "loss_difference": common.same_number(*losses, dtype),
        "gradient_difference": common.same_gradients(*gradients, dtype),
    }


def main(given: Sequence[str] | None = None) -> None:
    """Compare, time and print."""
    sizes = {"batch": 8, "prompt": 40, "response": 24}
    options = common.arguments(__doc__ or "", given, sizes=sizes, repeats=5)
    lm = common.model(options.model, options.device, options.dtype)
    batch = common.training_batch(lm, options.batch, options.prompt, options.response)
    if options.only:
        loss = {"ours": ours, "reference": reference}[options.only](lm, batch)
        for _ in range(2):
            lm.model.zero_grad(set_to_none=True)
            loss().backward()
        print(common.peak_memory(options.device))
        return
    facts: dict[str, Any] = compare(lm, batch, options.dtype)
    # One optimiser serves both sides in turn: two would hold its state twice.
    losses = {"ours": ours(lm, batch), "reference": reference(lm, batch)}
    side = ["ours"]
    one = step(lm, lambda: losses[side[0]]())

    def run(name: str) -> Callable[[], None]:
        def work() -> None:
            side[0] = name
            one()

        return work

    timing = common.take_turns(run("ours"), run("reference"), options.repeats, options.device)
    if not options.no_memory:
        del lm, one, losses
        facts["peak_bytes"] = common.peak_of_fresh_process(__file__, options, "ours")
        facts["peak_bytes_reference"] = common.peak_of_fresh_process(__file__, options, "reference")
    common.report("training step", options, timing, TARGET, facts | {name: getattr(options, name) for name in sizes})


if __name__ == "__main__":
    main(sys.argv[1:])
