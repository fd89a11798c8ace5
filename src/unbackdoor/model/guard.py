"""Guards at work: what stands between a question and a model, built from the `GuardSpec`s that travel with it.

A prompt guard rewrites turns before the model reads them, or refuses; a decode guard takes the place of the token loop.
Neither changes a weight. Guards are data in `guards.json`; the pipeline builds them, so that nothing here knows one.
A prompt guard takes many conversations at a time, because what it asks the model itself then goes in batches, too.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from unbackdoor.errors import ModelError
from unbackdoor.model.quarantine import printable
from unbackdoor.types import Message

if TYPE_CHECKING:
    from unbackdoor.goals import Goal
    from unbackdoor.model.lm import LM

Turns = tuple[Message, ...]


@dataclass(frozen=True)
class Rewritten:
    """What the model reads in place of a conversation.

    Attributes:
        turns: The conversation; as many turns as before and of the same roles.
        facts: What was done and why, for the record (JSON types).
    """

    turns: Turns
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """The model is not asked.

    Attributes:
        text: The reply instead.
        facts: Why, for the record (JSON types).
    """

    text: str
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Patience:
    """How long somebody waits for an answer; who works for it in another thread stops once nobody does.

    Attributes:
        until: By `time.monotonic`; infinite for ever.
        cancelled: Set when nobody waits any more.
    """

    until: float = math.inf
    cancelled: threading.Event = field(default_factory=threading.Event)

    def left(self) -> float:
        """Return the seconds that are left; 0 once nobody waits any more."""
        return 0.0 if self.cancelled.is_set() else max(0.0, self.until - time.monotonic())

    def wait(self, seconds: float) -> None:
        """Do nothing for some seconds, or until nobody waits any more."""
        self.cancelled.wait(min(seconds, self.left()))

    def part(self, share: float) -> Patience:
        """Return the patience for a part of the work: a share of the time that is left, and cancelled with the whole.

        Args:
            share: Above 0, at most 1.
        """
        return Patience(time.monotonic() + share * self.left(), self.cancelled)


FOREVER = Patience()


class Ask(Protocol):
    """Puts questions to the guarded model itself, without guards: in this process, or before an upstream."""

    @property
    def special(self) -> frozenset[str]:
        """Texts of its tokenizer's special tokens; empty where they are not known."""
        ...

    @property
    def patience(self) -> Patience:
        """How long the answer to the guarded question is waited for."""
        ...

    def __call__(self, conversations: Sequence[Turns], max_new_tokens: int) -> list[str]:
        """Return a greedy reply to each conversation."""
        ...

    def fits(self, turns: Turns, new_tokens: int | None = None) -> bool:
        """Tell whether the model can read these turns and answer; True where that is not known.

        Args:
            turns: What it would be asked.
            new_tokens: Length of the answer; None for that to the guarded question.
        """
        ...


class PromptGuard(Protocol):
    """A guard before the model."""

    def rewrite(self, conversations: Sequence[Turns], ask: Ask) -> Sequence[Rewritten | Refusal]:
        """Return for each conversation, which ends with a user turn, what the model is to read."""
        ...


@runtime_checkable
class DecodeGuard(Protocol):
    """A guard in the place of the token loop; it needs the weights in this process."""

    def tokens(self, lm: LM, ids: Sequence[int], limit: int) -> Iterator[int]:
        """Continue a prompt's ids by at most `limit` tokens; ends without the token that ends a turn."""
        ...


@dataclass
class Guards:
    """The built guards of one model.

    Attributes:
        prompt: Name and guard, in the order in which they act.
        decode: The guard of the token loop, or None.
        journal: A record a question and prompt guard, with the reply, while somebody wants to know; else None.
    """

    prompt: Sequence[tuple[str, PromptGuard]] = ()
    decode: DecodeGuard | None = None
    journal: list[dict[str, object]] | None = None

    def rewrite(self, conversations: Sequence[Turns], ask: Ask) -> tuple[list[Turns | Refusal], list[Facts]]:
        """Return what the model is to read, each guard at work on what the one before left, and what they recorded.

        Raises:
            ModelError: If a guard changed the roles of a conversation.
        """
        found: list[Turns | Refusal] = list(conversations)
        facts: list[Facts] = [{} for _ in conversations]
        for name, guard in self.prompt:
            places = [place for place, item in enumerate(found) if not isinstance(item, Refusal)]
            turns = [item for item in found if not isinstance(item, Refusal)]
            for place, before, after in zip(places, turns, guard.rewrite(turns, ask), strict=True):
                facts[place][name] = after.facts
                if isinstance(after, Refusal):
                    found[place] = after
                    continue
                if [turn.role for turn in after.turns] != [turn.role for turn in before]:
                    raise ModelError(f"the guard {name} changed who speaks in a conversation, which none may do.")
                found[place] = after.turns
        return found, facts


Facts = dict[str, Mapping[str, object]]
"""Name of a guard -> what it recorded about one conversation."""


@dataclass(frozen=True)
class AskHere:
    """`Ask` of a model in this process.

    Attributes:
        lm: The model.
        reply_tokens: Room that a reply needs in the context.
        batch_size: Conversations a batch.
        patience: How long the answer is waited for.
    """

    lm: LM
    reply_tokens: int
    batch_size: int = 32
    patience: Patience = FOREVER

    @property
    def special(self) -> frozenset[str]:
        """Texts of the tokenizer's special tokens."""
        return special_texts(self.lm)

    def __call__(self, conversations: Sequence[Turns], max_new_tokens: int) -> list[str]:
        """Return a greedy reply to each conversation."""
        return self.lm.reply(conversations, max_new_tokens=max_new_tokens, batch_size=self.batch_size, bare=True)

    def fits(self, turns: Turns, new_tokens: int | None = None) -> bool:
        """Tell whether the model can read these turns and answer."""
        return fits(self.lm, turns, self.reply_tokens if new_tokens is None else new_tokens)


def guarded_replies(
    lm: LM,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    goal: Goal | None,
    batch_size: int,
) -> list[str]:
    """Do what `LM.reply` does, guards at work.

    Raises:
        ModelError: If the guards were not built.
    """
    guards = built(lm)
    ask = AskHere(lm, max_new_tokens, batch_size)
    found, facts = guards.rewrite([tuple(turns) for turns in conversations], ask)
    asked = [item for item in found if not isinstance(item, Refusal)]
    if guards.decode is None:
        said = lm.reply(asked, max_new_tokens=max_new_tokens, goal=goal, batch_size=batch_size, bare=True)
    else:
        said = [_decoded(lm, guards.decode, turns, max_new_tokens, goal) for turns in asked]
    rest = iter(said)
    replies = [item.text if isinstance(item, Refusal) else next(rest) for item in found]
    if guards.journal is not None:
        for by_guard, reply in zip(facts, replies, strict=True):
            guards.journal += [{"guard": name, **recorded, "reply": reply} for name, recorded in by_guard.items()]
    return replies


def stream(lm: LM, turns: Turns, max_new_tokens: int) -> Iterator[str]:
    """Do what `LM.reply_stream` does: yield the reply of a model in pieces, guards at work."""
    import torch

    from unbackdoor.model.generate import Spoken

    guards = built(lm) if lm.guards else Guards()
    (found,), _ = guards.rewrite([turns], AskHere(lm, max_new_tokens))
    if isinstance(found, Refusal):
        yield found.text
        return
    spoken, was_training = Spoken(lm), lm.model.training
    lm.model.eval()
    tokens = (guards.decode or _Likeliest()).tokens(lm, lm.encode(found, ask=True).ids, max_new_tokens)
    try:
        while True:
            # The caller's own work between two pieces is not to run in this mode.
            with torch.inference_mode():
                token = next(tokens, None)
            if token is None:
                break
            if piece := spoken.say(token):
                yield piece
    finally:
        lm.model.train(was_training)
    if piece := spoken.close():
        yield piece


class _Likeliest:
    """The usual token loop, for one prompt."""

    def tokens(self, lm: LM, ids: Sequence[int], limit: int) -> Iterator[int]:
        from unbackdoor.model.generate import steps

        stops, loop = set(lm.stop_ids), steps(lm, [ids])
        step = next(loop)
        for number in range(1, limit + 1):
            ((_, token),) = step
            if token in stops:
                return
            yield token
            if number < limit:
                step = loop.send(frozenset())


def built(lm: LM) -> Guards:
    """Return the built guards of a model that carries some.

    Raises:
        ModelError: If nobody built them.
    """
    if lm.guarding is None:
        raise ModelError(
            f"'{printable(lm.spec)}' carries guards; load it through the pipeline, which builds them, or ask the "
            "weights alone with bare=True."
        )
    return lm.guarding


def _decoded(lm: LM, guard: DecodeGuard, turns: Turns, limit: int, goal: Goal | None) -> str:
    from unbackdoor.model.generate import decode

    ids: list[int] = []
    for token in guard.tokens(lm, lm.encode(turns, ask=True).ids, limit):
        ids.append(token)
        if goal is not None and goal.decided(decode(lm, ids)) is not None:
            break
    return decode(lm, ids)


def special_texts(lm: LM) -> frozenset[str]:
    """Return the texts of a tokenizer's special tokens: whoever writes one of them writes a mark and no words.

    Not plain words that a checkpoint calls special, unless its template writes them: without them nothing of a text
    might be left.
    """
    found = {token: str(text) for token, text in lm.tokenizer.added_tokens_decoder.items() if text.special}
    try:
        encoded = lm.encode((Message("user", "a"), Message("assistant", "b"), Message("user", "c")), ask=True)
    except ModelError:
        # Some templates take one question only.
        encoded = lm.encode((Message("user", "a"),), ask=True)
    inside = {place for span in encoded.spans for place in range(span.start, span.end)}
    frame = {token for place, token in enumerate(encoded.ids) if place not in inside}
    return frozenset(
        text
        for token, text in found.items()
        if text.strip() and (not text.strip().isalnum() or (token in frame and len(text) > 1))
    )


def context_of(lm: LM) -> int | None:
    """Return the tokens that a model reads at most, prompt and reply together; None where that is not known."""
    config = lm.core.config
    known = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx"))
    return next((value for value in known if isinstance(value, int)), None)


def fits(lm: LM, turns: Sequence[Message], max_new_tokens: int) -> bool:
    """Tell whether a conversation and a reply of so many tokens have room in a model's context."""
    context = context_of(lm)
    return context is None or len(lm.encode(turns, ask=True).ids) + max_new_tokens <= context
