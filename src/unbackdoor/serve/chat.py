"""One chat from its question to the last byte of its answer: guards, model, clients that leave."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from unbackdoor.errors import UserError
from unbackdoor.model.guard import Facts, Patience, Refusal, Turns
from unbackdoor.model.quarantine import printable
from unbackdoor.serve.backends import Question
from unbackdoor.serve.engine import Gone
from unbackdoor.serve.no_room import NoRoom
from unbackdoor.serve.protocol import DONE, JSON, Problem, Writing, event
from unbackdoor.serve.upstream import Refused
from unbackdoor.serve.upstream_stream import Broken

if TYPE_CHECKING:
    from unbackdoor.serve.app import Service

GUARD_HEADER = "x-unbackdoor-guard"
"""Says in each answer what the guards did: `evidence=keywords`."""

_READING = 5.0
"""Seconds that a client has to read what is left, after the time for the answer is over."""
_LOG = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Chat:
    """One chat from its question to the last byte of its answer.

    Attributes:
        service: The server.
        question: What is asked.
        until: When it has to be answered, by the event loop's clock.
        started: When it came, by `time.perf_counter`.
        cancelled: Set when nobody waits for the answer any more: guards and model stop working for it.
        working: The guards at work in their thread, once they are.
    """

    service: Service
    question: Question
    until: float
    started: float
    cancelled: Event = field(default_factory=Event)
    working: Future[Any] | None = None

    def begin(self) -> None:
        """Count it in."""
        self.service.count(1)

    def end(self) -> None:
        """Stop all work for it, and count it out, whatever came of it; its place is free once its guards have ended."""
        self.cancelled.set()
        self.service.counters.took(time.perf_counter() - self.started)
        if self.working is None or self.working.done():
            self.service.count(-1)
            return
        loop = asyncio.get_running_loop()

        def ended(_: object) -> None:
            # The server may have ended before.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self.service.count, -1)

        self.working.add_done_callback(ended)

    async def answer(self, request: Request) -> Response:
        """Return the answer; of a streamed one, once it has begun."""
        try:
            async with asyncio.timeout_at(self.until):
                return await self._answered(request)
        except TimeoutError as problem:
            raise Problem(504, "too_slow", f"there was no answer within {self.service.timeout:g} s.") from problem

    async def _answered(self, request: Request) -> Response:
        """Let the guards work, and ask.

        Where the upstream refuses what they made of the request, which may be too long with evidence in it, each guard
        says what is to be done without room for that: ask as it came, or refuse.
        """
        found, facts = await self._unless_gone(request, self._guarded())
        try:
            try:
                return await self._said(request, found, facts)
            except Refused:
                if found == self.question.turns:
                    raise
                before = found
                found, facts = await self._unless_gone(request, self._guarded(room=False))
                if found == before:
                    raise
                return await self._said(request, found, facts)
        finally:
            for name, what in _did(facts):
                self.service.counters.add("guard_total", labels={"guard": name, "did": what})

    async def _said(self, request: Request, found: Turns | Refusal, facts: Facts) -> Response:
        told = ", ".join(f"{name}={what}" for name, what in _did(facts))
        headers = {GUARD_HEADER: told, "cache-control": "no-store"} if told else {"cache-control": "no-store"}
        if isinstance(found, Refusal):
            return self._refused(found, headers)
        if self.question.stream:
            events = self.service.backend.stream(self.question, found, self.cancelled)
            first = await self._unless_gone(request, anext(events))
            return Streaming(self, first, events, headers)
        whole = self.service.backend.whole(self.question, found, self.cancelled)
        status, content = await self._unless_gone(request, whole)
        return Response(content, status, headers, JSON)

    async def _guarded(self, *, room: bool = True) -> tuple[Turns | Refusal, Facts]:
        """Let the guards work, in a thread: they wait for the model, and for what they ask elsewhere.

        Args:
            room: Whether what they add has room in the request.
        """
        guards, turns = self.service.guards, self.question.turns
        if not guards.prompt:
            return turns, {}
        left = self.until - asyncio.get_running_loop().time()
        asked = self.service.backend.ask(self.question, Patience(time.monotonic() + left, self.cancelled))
        ask = asked if room else NoRoom(asked)
        self.working = self.service.in_thread(lambda: guards.rewrite([turns], ask))
        try:
            (found,), (facts,) = await asyncio.wrap_future(self.working)
        except UserError as problem:
            # Such as an evidence LLM that cannot be loaded: for whoever runs the server, not for its clients.
            _LOG.error("a guard cannot work: %s", printable(str(problem), 500))
            raise Problem(503, "guard_failed", "the guard of this server cannot work now.") from problem
        return found, facts

    def _refused(self, refusal: Refusal, headers: Mapping[str, str]) -> Response:
        writing = Writing.begin(self.question.model)
        nothing = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        if not self.question.stream:
            return JSONResponse(writing.whole(refusal.text, "stop", nothing), 200, dict(headers))
        parts = [writing.part({"role": "assistant", "content": refusal.text}), writing.part({}, "stop")]
        parts += [writing.usage(nothing)] if self.question.usage else []
        return Response(b"".join([*parts, DONE]), 200, dict(headers), "text/event-stream")

    async def streamed(self, first: bytes, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """Yield the events; where they stop before the end, an error in place of the mark that all is said."""
        reason = "the client left"
        clock = asyncio.get_running_loop()
        try:
            yield first
            with suppress(StopAsyncIteration):
                while True:
                    yield await asyncio.wait_for(anext(events), self.until - clock.time())
            reason = ""
        except TimeoutError:
            reason = "too slow"
            yield _broken(Problem(504, "too_slow", "the time for this answer is over."))
        except Broken:
            reason = "the upstream broke off"
        # The status is sent already: the error can only be said here.
        except Exception:
            _LOG.exception("a streamed answer could not go on")
            reason = "error"
            yield _broken(Problem(500, "internal_error", "the model could not go on with this answer."))
        finally:
            if reason:
                self.service.counters.add("streams_broken_total", labels={"reason": reason})

    async def _unless_gone(self, request: Request, work: Awaitable[T]) -> T:
        """Return what `work` returns, unless the client leaves before that.

        Raises:
            Gone: If it does.
        """
        task = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(_left(request))
        try:
            done, _ = await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if task not in done:
                raise Gone
            return task.result()
        finally:
            if not task.done():
                self.cancelled.set()
            for each in (task, leaving):
                each.cancel()
                with suppress(BaseException):
                    await each


class Streaming(StreamingResponse):
    """A streamed answer that counts its chat out at its end, also where the client left or reads too slowly."""

    def __init__(
        self, chat: Chat, first: bytes, events: AsyncGenerator[bytes, None], headers: Mapping[str, str]
    ) -> None:
        self.chat, self.events, self.parts = chat, events, chat.streamed(first, events)
        super().__init__(self.parts, 200, headers, "text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        try:
            async with asyncio.timeout_at(self.chat.until + _READING):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            pass  # not whole, so the connection is closed
        finally:
            self.chat.end()
            for iterator in (self.parts, self.events):
                await iterator.aclose()


def _did(facts: Facts) -> list[tuple[str, str]]:
    """Return the guards that acted, each with what it did."""
    return [
        (name, "refused" if recorded.get("refused") else str(recorded.get("branch", "acted")))
        for name, recorded in facts.items()
    ]


def _broken(problem: Problem) -> bytes:
    """Return the event of an error; blank lines first, because what was sent last may lack its own."""
    return b"\n\n" + event(problem.content())


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
