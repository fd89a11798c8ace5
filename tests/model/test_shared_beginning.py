"""Reading what all prompts begin with once gives the replies that whole prompts give, and is less work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny import ARCHITECTURES, rows, tiny_lm
from unbackdoor.model import generate
from unbackdoor.model.lm import LM
from unbackdoor.types import Message

SYSTEM = Message("system", "be kind and be short, my friend, and answer well")


def prompts_of(lm: LM, count: int, *, system: bool = True) -> list[tuple[int, ...]]:
    turns = [((SYSTEM,) if system else ()) + row.prompt for row in rows(count)]
    return [lm.encode(each, ask=True).ids for each in turns]


def tokens_read(lm: LM, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[int]], int]:
    """Return the replies, and how many tokens went through the model for them."""
    read = 0
    forward = lm.model.forward

    def counting(*args: Any, **given: Any) -> Any:
        nonlocal read
        read += given["input_ids"].numel()
        return forward(*args, **given)

    with monkeypatch.context() as patch:
        patch.setattr(lm.model, "forward", counting)
        replies = generate.greedy_ids(lm, prompts, max_new_tokens=6, batch_size=4)
    return replies, read


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replies_are_those_of_whole_prompts(architecture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm(architecture)
    if architecture == "gemma":
        # It scales its embeddings up; untrained and tied, it would only repeat its last token.
        lm.model.get_input_embeddings().weight.data.mul_(0.02)
    prompts = prompts_of(lm, 7)
    found, fewer = tokens_read(lm, prompts, monkeypatch)
    monkeypatch.setattr(generate, "WORTH_SHARING", 10**6)
    wanted, whole = tokens_read(lm, prompts, monkeypatch)
    assert found == wanted
    assert len({tuple(reply) for reply in wanted}) > 1
    # A sliding window would count the padding, so there whole prompts are read.
    assert (fewer < whole) == (architecture != "mistral")


def test_each_reply_is_that_of_the_prompt_alone() -> None:
    lm = tiny_lm()
    prompts = prompts_of(lm, 5)
    together = generate.greedy_ids(lm, prompts, max_new_tokens=6)
    assert together == [generate.greedy_ids(lm, [prompt], max_new_tokens=6)[0] for prompt in prompts]


def test_prompts_of_which_one_is_all_that_the_others_begin_with() -> None:
    lm = tiny_lm()
    long = prompts_of(lm, 1)[0]
    prompts = [long, long[:-3], long]
    together = generate.greedy_ids(lm, prompts, max_new_tokens=4)
    assert together == [generate.greedy_ids(lm, [prompt], max_new_tokens=4)[0] for prompt in prompts]


def test_a_short_beginning_is_not_worth_it() -> None:
    lm = tiny_lm(chat=False)
    with torch.inference_mode():
        assert generate._shared_beginning(lm, [(5, 6, 7), (5, 6, 8)]) == (0, None)
        length, cache = generate._shared_beginning(lm, [(*range(9), 1), (*range(9), 2)])
    assert length == 9
    assert cache.get_seq_length() == 9
