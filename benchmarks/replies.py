"""Greedy replies to many prompts: in batches, against transformers' `generate` on one prompt at a time.

This package sorts the prompts by length and reads what all of them begin with once. Both sides have the
same length limit, the same stop tokens and no other generation setting. The replies are compared token by token: in
float32 they must be identical; in bfloat16 a reply may part from the other where the two next tokens are as good as
equal, which is asked of the model itself.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import common
import torch

from unbackdoor.model.generate import greedy_ids
from unbackdoor.model.lm import LM
from unbackdoor.types import Message

TARGET = 0.2
TIE = 0.02
"""Share of the logits' spread below which two tokens are as good as equal in bfloat16."""


def questions(lm: LM, count: int) -> list[tuple[int, ...]]:
    """Return the prompts as ids: bundled instructions, or random words of 10 to 40 where the weights are random."""
    if lm.template == "model":
        from unbackdoor.data import sources

        asked = [row.prompt for row in sources.read(f"starter:instructions[:{count}]")]
    else:
        draw, words = random.Random(0), int(lm.core.config.vocab_size)
        asked = [
            (Message("user", " ".join(f"w{draw.randrange(2, words)}" for _ in range(draw.randint(10, 40)))),)
            for _ in range(count)
        ]
    return [lm.encode(turns, ask=True).ids for turns in asked]


def ours(lm: LM, prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
    """Return the replies of this package."""
    return greedy_ids(lm, prompts, max_new_tokens=limit)


def reference(lm: LM, prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
    """Return the replies of `generate`, one prompt after another, each cut at its stop token."""
    from transformers import GenerationConfig

    stops = list(lm.stop_ids)
    settings = GenerationConfig(
        max_new_tokens=limit, do_sample=False, num_beams=1, eos_token_id=stops, pad_token_id=lm.pad_id
    )
    replies = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=lm.device)
            found = lm.core.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            said = found[0, ids.shape[1] :].tolist()
            replies.append(said[: next((n for n, token in enumerate(said) if token in stops), len(said))])
    return replies


def compare(lm: LM, prompts: Sequence[Sequence[int]], dtype: str, *sides: list[list[int]]) -> dict[str, int]:
    """Return how many replies are identical, and how many part at a tie.

    Raises:
        AssertionError: If replies differ for another reason.
    """
    ties = 0
    for prompt, mine, other in zip(prompts, *sides, strict=True):
        if mine == other:
            continue
        assert dtype != "float32", f"replies differ: {mine} and {other}"
        assert _part_at_a_tie(lm, prompt, mine, other), f"replies differ without a tie: {mine} and {other}"
        ties += 1
    return {"identical_replies": len(prompts) - ties, "parted_at_a_tie": ties}


def _part_at_a_tie(lm: LM, prompt: Sequence[int], mine: list[int], other: list[int]) -> bool:
    stop = lm.stop_ids[0]
    place = next(n for n, (one, two) in enumerate(zip_longest(mine, other)) if one != two)
    tokens = [reply[place] if place < len(reply) else stop for reply in (mine, other)]
    ids = torch.tensor([[*prompt, *mine[:place]]], device=lm.device)
    with torch.inference_mode():
        logits = lm.core(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    return float((logits[tokens[0]] - logits[tokens[1]]).abs()) <= TIE * float(logits.max() - logits.min())


def main(given: Sequence[str] | None = None) -> None:
    """Compare, time and print."""
    sizes = {"prompts": 100, "tokens": 16}
    options = common.arguments(__doc__ or "", given, sizes=sizes, repeats=3)
    lm = common.model(options.model, options.device, options.dtype)
    prompts = questions(lm, options.prompts)
    if options.only:
        {"ours": ours, "reference": reference}[options.only](lm, prompts, options.tokens)
        print(common.peak_memory(options.device))
        return
    found: dict[str, list[list[int]]] = {}

    def run(name: str) -> None:
        found[name] = {"ours": ours, "reference": reference}[name](lm, prompts, options.tokens)

    # The first call of either side sets up its kernels.
    for side in (ours, reference):
        side(lm, prompts[:2], 2)
    timing = common.take_turns(
        lambda: run("ours"), lambda: run("reference"), options.repeats, options.device, warm=False
    )
    facts: dict[str, Any] = dict(compare(lm, prompts, options.dtype, found["ours"], found["reference"]))
    facts["times_faster"] = 1 / timing.ratio
    if not options.no_memory:
        facts["peak_bytes"] = common.peak_of_fresh_process(__file__, options, "ours")
        facts["peak_bytes_reference"] = common.peak_of_fresh_process(__file__, options, "reference")
    common.report("replies", options, timing, TARGET, facts | {name: getattr(options, name) for name in sizes})


if __name__ == "__main__":
    main(sys.argv[1:])
