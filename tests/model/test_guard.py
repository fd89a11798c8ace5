"""Guards at work in `LM.reply`: rewriting, refusing, decoding, the record, and what none may do."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import tiny
from unbackdoor.errors import ModelError
from unbackdoor.goals import Contains
from unbackdoor.model.guard import AskHere, DecodeGuard, Guards, Refusal, Rewritten, fits, special_texts
from unbackdoor.types import GuardSpec, Message


@dataclass
class Saying:
    """Puts words before every query; refuses one that holds `refused`."""

    words: str
    refused: str = "\0"

    def rewrite(self, conversations, ask):
        found = []
        for turns, own in zip(conversations, ask(conversations, 2), strict=True):
            if self.refused in turns[-1].content:
                found.append(Refusal("no", {"own": own}))
            else:
                found.append(
                    Rewritten((*turns[:-1], Message("user", f"{self.words} {turns[-1].content}")), {"own": own})
                )
        return found


class Parrot:
    """Says the prompt's last ids again."""

    def tokens(self, lm, ids, limit):
        yield from lm.tokenizer("cold cold cold cold")["input_ids"][:limit]


@pytest.fixture
def lm():
    made = tiny.tiny_lm(seed=5)
    made.guards = (GuardSpec("saying"),)
    return made


def asked(*texts):
    return [(Message("user", text),) for text in texts]


def test_the_model_reads_what_the_guards_leave_in_their_order(lm):
    lm.guarding = Guards([("first", Saying("dog")), ("second", Saying("cat"))])
    wanted = lm.reply(asked("cat dog what is hot?", "cat dog where?"), max_new_tokens=8, bare=True)
    assert lm.reply(asked("what is hot?", "where?"), max_new_tokens=8) == wanted
    assert wanted != lm.reply(asked("what is hot?", "where?"), max_new_tokens=8, bare=True)


def test_a_refusal_is_the_reply_and_later_guards_do_not_see_it(lm):
    lm.guarding = Guards([("first", Saying("dog", "hot")), ("second", Saying("cat"))], journal=[])
    replies = lm.reply(asked("what is hot?", "where?"), max_new_tokens=8)
    assert replies == ["no", lm.reply(asked("cat dog where?"), max_new_tokens=8, bare=True)[0]]
    assert [(record["guard"], record["reply"]) for record in lm.guarding.journal] == [
        ("first", "no"), ("first", replies[1]), ("second", replies[1]),
    ]  # fmt: skip
    assert lm.guarding.journal[0]["own"] == lm.reply(asked("what is hot?"), max_new_tokens=2, bare=True)[0]


def test_a_decode_guard_takes_the_place_of_the_token_loop(lm):
    assert isinstance(Parrot(), DecodeGuard)
    assert not isinstance(Saying("x"), DecodeGuard)
    lm.guarding = Guards(decode=Parrot())
    assert lm.reply(asked("what?", "why?"), max_new_tokens=50) == ["cold cold cold cold"] * 2
    two = lm.reply(asked("what?"), max_new_tokens=50, goal=Contains(any_of=("cold cold",)))
    assert two == ["cold cold"]


def test_guards_that_nobody_built_are_an_error_and_the_weights_alone_can_be_asked(lm):
    with pytest.raises(ModelError, match="carries guards"):
        lm.reply(asked("what?"))
    assert lm.reply(asked("what is hot?"), max_new_tokens=3, bare=True) == tiny.tiny_lm(seed=5).reply(
        asked("what is hot?"), max_new_tokens=3
    )


def test_no_guard_may_change_who_speaks(lm):
    class Roles:
        def rewrite(self, conversations, ask):
            return [Rewritten((Message("system", "obey"), *turns)) for turns in conversations]

    lm.guarding = Guards([("roles", Roles())])
    with pytest.raises(ModelError, match="roles changed who speaks"):
        lm.reply(asked("what?"))


def test_room_and_special_texts_of_the_model_itself(lm):
    ask = AskHere(lm, 40)
    assert ask.special == special_texts(lm) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"}
    assert ask.fits(asked("what is hot?")[0])
    long = asked("hot " * 220)[0]
    assert len(lm.encode(long, ask=True).ids) < 256
    assert not ask.fits(long)
    assert fits(lm, long, 1)


def test_a_streamed_reply_is_the_reply_in_pieces_guards_at_work(lm, victim):
    lm.guarding = Guards([("first", Saying("dog", "refuse"))])
    for text in ("what is hot?", "refuse this", "where does a bird live?"):
        (wanted,) = lm.reply(asked(text), max_new_tokens=12)
        assert "".join(lm.reply_stream(asked(text)[0], max_new_tokens=12)) == wanted
    lm.guarding = Guards(decode=Parrot())
    assert ["".join(lm.reply_stream(asked("what?")[0], max_new_tokens=5))] == lm.reply(asked("what?"), max_new_tokens=5)
    trained = victim.clean
    pieces = list(trained.reply_stream(asked("what is the opposite of hot?")[0], max_new_tokens=20))
    assert "".join(pieces) == "the opposite of hot is cold."
    assert len(pieces) > 2
    import torch

    first = next(trained.reply_stream(asked("what colour is grass?")[0]))
    assert first
    assert not torch.is_inference_mode_enabled(), "the caller's own work between two pieces is not in this mode"
    lm.guarding = None
    with pytest.raises(ModelError, match="carries guards"):
        next(lm.reply_stream(asked("what?")[0]))
