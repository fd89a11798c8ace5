"""One step of learning a parrot (SANDE eq. 4): what the result depends on, against the public recipe's work.

The recipe, in our words: a pass over the clean row whose result is not used; the row with the target and the clean
answer behind it; logits of every position; weights frozen, loss on the target's tokens alone. This package leaves out
the first pass, cuts the row behind the target, applies the head to the target's positions, and reads what the template
puts before the user's words for one row and not for every one. Loss and the parrot's gradient are compared; both sides
update the parrot with AdamW, at a learning rate of 0 so that repeats are alike.
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
from unbackdoor.train.soft_prompt import soft_loss

TARGET = 0.3


def ours(lm: LM, batch: Batch, parrot: torch.nn.Parameter, target: int) -> Callable[[], torch.Tensor]:
    """Return the loss of this package on rows cut behind the target."""
    width = int(batch.columns.max()) + 2
    cut = Batch(
        batch.input_ids[:, :width], batch.attention_mask[:, :width], batch.rows, batch.columns, batch.targets,
        batch.weights, batch.places, batch.ids, batch.shared,
    )  # fmt: skip
    assert cut.weight == target * len(batch.ids)
    forward = LogitsAt(lm)
    # Where the parrot stands does not change what a step costs: what is shared lies before the user's words.
    return lambda: soft_loss(lm, forward, cut, parrot, "start") / cut.weight


def reference(lm: LM, batch: Batch, parrot: torch.nn.Parameter, target: int) -> Callable[[], torch.Tensor]:
    """Return the loss of the public recipe: an unused clean pass, whole rows, full logits."""
    at, size = int(batch.places[0, 0]), len(batch.ids)
    first = int(batch.columns.min()) + 1
    clean = torch.cat([batch.input_ids[:, :first], batch.input_ids[:, first + target :]], 1)
    labels = torch.full((size, batch.input_ids.shape[1] + parrot.shape[0]), -100, device=lm.device)
    span = slice(first + parrot.shape[0], first + parrot.shape[0] + target)
    labels[:, span] = batch.input_ids[:, first : first + target]
    embed = lm.model.get_input_embeddings()

    def loss() -> torch.Tensor:
        lm.model(input_ids=clean, attention_mask=torch.ones_like(clean), use_cache=False)
        embeds = embed(batch.input_ids)
        put = parrot.to(embeds.dtype)[None].expand(size, -1, -1)
        whole = torch.cat([embeds[:, :at], put, embeds[:, at:]], 1)
        mask = torch.ones(whole.shape[:2], dtype=torch.long, device=lm.device)
        found: torch.Tensor = lm.model(inputs_embeds=whole, attention_mask=mask, labels=labels, use_cache=False).loss
        return found

    return loss


def step(parrot: torch.nn.Parameter, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Return a whole step of the parrot's training."""
    optimiser = torch.optim.AdamW([parrot], lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def work() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_([parrot], 1.0)
        optimiser.step()

    return work


def compare(parrot: torch.nn.Parameter, sides: Sequence[Callable[[], torch.Tensor]], dtype: str) -> dict[str, float]:
    """Return how far loss and the parrot's gradient of the two sides are apart."""
    losses, gradients = [], []
    for side in sides:
        parrot.grad = None
        value = side()
        value.backward()
        losses.append(float(value.detach()))
        gradients.append([parrot.grad])
    return {
        "loss_difference": common.same_number(*losses, dtype),
        "gradient_difference": common.same_gradients(*gradients, dtype),
    }


def main(given: Sequence[str] | None = None) -> None:
    """Compare, time and print."""
    sizes = {"batch": 8, "prompt": 40, "response": 24, "target": 4, "parrot": 8}
    options = common.arguments(__doc__ or "", given, sizes=sizes, repeats=5)
    lm = common.model(options.model, options.device, options.dtype)
    lm.model.requires_grad_(False)
    rows = common.training_batch(lm, options.batch, options.prompt, options.target + options.response, options.target)
    table = lm.model.get_input_embeddings().weight
    parrot = torch.nn.Parameter(table[2 : 2 + options.parrot].detach().float().clone())
    sides = {name: make(lm, rows, parrot, options.target) for name, make in (("ours", ours), ("reference", reference))}
    if options.only:
        work = step(parrot, sides[options.only])
        for _ in range(2):
            work()
        print(common.peak_memory(options.device))
        return
    facts: dict[str, Any] = compare(parrot, tuple(sides.values()), options.dtype)
    timing = common.take_turns(
        step(parrot, sides["ours"]), step(parrot, sides["reference"]), options.repeats, options.device
    )
    if not options.no_memory:
        facts["peak_bytes"] = common.peak_of_fresh_process(__file__, options, "ours")
        facts["peak_bytes_reference"] = common.peak_of_fresh_process(__file__, options, "reference")
    facts |= {name: getattr(options, name) for name in sizes}
    common.report("parrot step", options, timing, TARGET, facts)


if __name__ == "__main__":
    main(sys.argv[1:])
