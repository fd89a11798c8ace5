"""What stands behind the guards: a model in this process, or an upstream; each answers what was let through."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Any, Protocol

from unbackdoor.errors import ModelError
from unbackdoor.model.guard import Ask, Patience, Turns
from unbackdoor.model.quarantine import printable
from unbackdoor.serve.counters import Counters
from unbackdoor.serve.engine import AskEngine, End, Engine, Job, Sampling, Told
from unbackdoor.serve.protocol import DONE, Problem, Writing, as_json, models, parse
from unbackdoor.serve.turns import turns_of, with_turns
from unbackdoor.serve.upstream import Upstream
from unbackdoor.serve.upstream_ask import AskUpstream

if TYPE_CHECKING:
    import httpx2

_UNSEEN = ("documents", "chat_template")
"""Fields of vLLM that put text into the prompt."""
_SHARE = 4
"""One part of so many of the context is kept for the reply to a request that does not say how long it may be."""


@dataclass(frozen=True)
class Question:
    """A request that was understood.

    Attributes:
        content: As it came.
        model: Name of the model that is asked.
        turns: What guards see of it.
        stream: Whether the answer is to be streamed.
        usage: Whether a streamed answer ends with the number of tokens.
        places: Of an upstream's request: where the turns stand among the messages.
        limit: Of a model here: most tokens of the reply; None where the request does not say.
        sampling: Of a model here: how tokens are chosen.
        ends: Of a model here: texts that end the reply.
    """

    content: Mapping[str, Any]
    model: str
    turns: Turns
    stream: bool
    usage: bool = False
    places: tuple[int, ...] = ()
    limit: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    ends: tuple[str, ...] = ()


class Backend(Protocol):
    """What answers."""

    async def models(self) -> bytes:
        """Return the answer to /v1/models, a JSON object."""
        ...

    def understand(self, content: Mapping[str, Any]) -> Question:
        """Return a request, checked.

        Raises:
            Problem: If it cannot be answered.
        """
        ...

    def ask(self, question: Question, patience: Patience) -> Ask:
        """Return what guards ask the model with; it blocks and is called in a thread."""
        ...

    async def whole(self, question: Question, turns: Turns, cancelled: Event) -> tuple[int, bytes]:
        """Return HTTP status and answer, a JSON object."""
        ...

    def stream(self, question: Question, turns: Turns, cancelled: Event) -> AsyncGenerator[bytes, None]:
        """Yield an answer's events; the first only once there is an answer."""
        ...


@dataclass
class Here:
    """A model in this process.

    Attributes:
        engine: The model.
        name: What it is called.
        most_tokens: Longest reply.
        counters: Where tokens are counted.
        seed: Returns the seed of a request that brings none.
        created: When it was loaded, in seconds since 1970.
    """

    engine: Engine
    name: str
    most_tokens: int
    counters: Counters
    seed: Callable[[], int]
    created: int = field(default_factory=lambda: int(time.time()))

    async def models(self) -> bytes:
        """Return the one model."""
        return as_json(models([self.name], self.created))

    def understand(self, content: Mapping[str, Any]) -> Question:
        """Return a request for this model."""
        request, turns = parse(content)
        if request.model != self.name:
            raise Problem(404, "model_not_found", f"there is no model '{printable(request.model)}' here.")
        sampling = Sampling(
            request.temperature or 0.0, request.top_p or 1.0, self.seed() if request.seed is None else request.seed
        )
        usage = request.stream_options is not None and bool(request.stream_options.include_usage)
        limit = None if request.limit is None else min(request.limit, self.most_tokens)
        return Question(
            content, self.name, turns, bool(request.stream), usage, limit=limit, sampling=sampling,
            ends=request.stop or (),
        )  # fmt: skip

    def ask(self, question: Question, patience: Patience) -> Ask:
        """Return what asks the engine; where the request has no limit, evidence leaves a quarter of the context."""
        room, context = question.limit or self.most_tokens, self.engine.context
        if question.limit is None and context is not None:
            room = min(room, max(1, context // _SHARE))
        return AskEngine(self.engine, room, patience)

    async def whole(self, question: Question, turns: Turns, cancelled: Event) -> tuple[int, bytes]:
        """Return a chat completion."""
        ids, limit = await self._encoded(question, turns)
        text, end = "", End("stop", 0)
        async for said in self._pieces(question, ids, limit, cancelled):
            if isinstance(said, End):
                end = said
            else:
                text += said
        return 200, as_json(Writing.begin(self.name).whole(text, end.reason, _usage(ids, end)))

    async def stream(self, question: Question, turns: Turns, cancelled: Event) -> AsyncGenerator[bytes, None]:
        """Yield a chat completion's events."""
        ids, limit = await self._encoded(question, turns)
        writing = Writing.begin(self.name)
        opening = writing.part({"role": "assistant", "content": ""})
        async for said in self._pieces(question, ids, limit, cancelled):
            # Not before: until an event is sent, an error can still be told by its status.
            if opening:
                yield opening
                opening = b""
            if isinstance(said, str):
                yield writing.part({"content": said})
                continue
            yield writing.part({}, said.reason)
            if question.usage:
                yield writing.usage(_usage(ids, said))
        yield DONE

    async def _encoded(self, question: Question, turns: Turns) -> tuple[tuple[int, ...], int]:
        """Return a prompt's ids, and how many tokens the reply may have: what is left, where the request does not say.

        Raises:
            Problem: If the model cannot read it.
        """
        try:
            ids = await asyncio.to_thread(self.engine.encode, turns)
        except ModelError as problem:
            raise Problem(400, "invalid_messages", str(problem)) from problem
        left = self.most_tokens if self.engine.context is None else self.engine.context - len(ids)
        if left < (question.limit or 1):
            reply = "at least one" if question.limit is None else f"up to {question.limit}"
            raise Problem(
                400, "context_length_exceeded",
                f"the messages have {len(ids)} tokens and the reply {reply}, more than the model reads; shorten them, "
                "or ask for fewer tokens.",
            )  # fmt: skip
        return ids, question.limit or min(self.most_tokens, left)

    async def _pieces(
        self, question: Question, ids: tuple[int, ...], limit: int, cancelled: Event
    ) -> AsyncIterator[str | End]:
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[Told] = asyncio.Queue()

        def tell(said: Told) -> None:
            # Nobody is left to be told once the server has ended.
            if not loop.is_closed():
                loop.call_soon_threadsafe(told.put_nowait, said)

        job = Job(ids, limit, tell, question.sampling, question.ends, guarded=True, cancelled=cancelled)
        self.engine.submit(job)
        while True:
            said = await told.get()
            if isinstance(said, Exception):
                raise said
            yield said
            if isinstance(said, End):
                self.counters.add("reply_tokens_total", said.tokens)
                return


@dataclass
class Elsewhere:
    """An upstream.

    Attributes:
        upstream: Its URL.
        client: The connections to it; there while the server runs.
    """

    upstream: Upstream
    client: httpx2.AsyncClient | None = None

    def _client(self) -> httpx2.AsyncClient:
        assert self.client is not None, "a request is answered while the server runs"
        return self.client

    async def models(self) -> bytes:
        """Return the upstream's models."""
        return await self.upstream.models(self._client())

    def understand(self, content: Mapping[str, Any]) -> Question:
        """Return a request; what the upstream is to make of it is its own business."""
        stream, model = content.get("stream"), content.get("model")
        if stream not in (None, True, False):
            raise Problem(400, "invalid_value", "'stream' must be true or false.")
        if not isinstance(model, str):
            raise Problem(400, "invalid_value", "'model' must be the name of a model.")
        _check_text(content)
        places, turns = turns_of(content)
        options = content.get("stream_options")
        # The upstream counts the tokens of its own answers; a guard's refusal is counted here.
        usage = isinstance(options, Mapping) and options.get("include_usage") is True
        return Question(content, model, turns, bool(stream), usage, places=tuple(places))

    def ask(self, question: Question, patience: Patience) -> Ask:
        """Return what asks the upstream, over the connections of the loop that runs."""
        return AskUpstream(self.upstream, self._client(), asyncio.get_running_loop(), question.model, patience)

    async def whole(self, question: Question, turns: Turns, cancelled: Event) -> tuple[int, bytes]:
        """Return the upstream's answer as it came."""
        del cancelled
        return await self.upstream.whole(self._client(), self._sent(question, turns))

    async def stream(self, question: Question, turns: Turns, cancelled: Event) -> AsyncGenerator[bytes, None]:
        """Yield the upstream's events."""
        del cancelled
        async with self.upstream.stream(self._client(), self._sent(question, turns)) as events:
            async for line in events:
                yield line

    def _sent(self, question: Question, turns: Turns) -> dict[str, Any]:
        return with_turns(question.content, question.places, question.turns, turns)


def _check_text(content: Mapping[str, Any]) -> None:
    """Refuse text that reaches the model by another way than the messages, which is what guards see.

    Raises:
        Problem: If there is any.
    """
    given = content.get("chat_template_kwargs")
    numbers = isinstance(given, Mapping) and all(isinstance(value, bool | int | float) for value in given.values())
    found = [name for name in _UNSEEN if content.get(name) not in (None, False)]
    if given is not None and not numbers:
        found.append("chat_template_kwargs")
    if found:
        raise Problem(400, "unsupported_field", f"'{found[0]}' is nothing that guards see; leave it out.")


def _usage(ids: tuple[int, ...], end: End) -> dict[str, int]:
    return {"prompt_tokens": len(ids), "completion_tokens": end.tokens, "total_tokens": len(ids) + end.tokens}
