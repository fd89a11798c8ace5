"""The endpoints: chat completions behind guards, models, health, metrics; key, limits, and clients that leave."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from unbackdoor.errors import UserError
from unbackdoor.model.guard import Facts, Guards, Patience, Refusal, Turns
from unbackdoor.model.quarantine import printable
from unbackdoor.serve.backends import Backend, Elsewhere, Question
from unbackdoor.serve.counters import TYPE, Counters
from unbackdoor.serve.engine import Gone
from unbackdoor.serve.protocol import DONE, Problem, Writing, event, read_json
from unbackdoor.serve.upstream import Broken

GUARD_HEADER = "x-unbackdoor-guard"
"""Says in each answer what the guards did: `evidence=keywords`."""
_OPEN = frozenset({"/health", "/metrics"})

_READING = 5.0
"""Seconds that a client has to read what is left, after the time for the answer is over."""
_ENDING = 2.0
"""Seconds that guards have to stop at the server's end, where nobody waits for them any more."""
_LOG = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Service:
    """A server's parts.

    Attributes:
        backend: What answers.
        guards: What stands before it.
        key: The key that clients must have, or None.
        most_bytes: Longest body of a request.
        timeout: Seconds for one request as a whole.
        most_waiting: Chats that are being answered at the same time, at most.
        counters: Its counts.
    """

    backend: Backend
    guards: Guards
    key: str | None
    most_bytes: int
    timeout: float
    most_waiting: int
    counters: Counters
    _chats: int = 0
    _working: set[Future[Any]] = field(default_factory=set)

    def app(self) -> Starlette:
        """Return the application."""
        routes = [
            Route("/health", self._counted(self._health)), Route("/metrics", self._counted(self._metrics)),
            Route("/v1/models", self._counted(self._models)),
            Route("/v1/chat/completions", self._counted(self._chat), methods=["POST"]),
        ]  # fmt: skip
        return Starlette(routes=routes, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        del app
        try:
            if isinstance(self.backend, Elsewhere):
                async with self.backend.upstream.client() as client:
                    self.backend.client = client
                    yield
            else:
                yield
        finally:
            await asyncio.to_thread(wait, set(self._working), _ENDING)

    def in_thread(self, work: Callable[[], T]) -> Future[T]:
        """Begin some work in a thread of its own, one a chat; the end of the process does not wait for it."""
        found: Future[T] = Future()
        found.set_running_or_notify_cancel()

        def run() -> None:
            try:
                found.set_result(work())
            except BaseException as problem:
                found.set_exception(problem)

        Thread(target=run, name="guard", daemon=True).start()
        self._working.add(found)
        found.add_done_callback(self._working.discard)
        return found

    def _counted(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint that checks the key, turns problems into answers, and is counted."""

        async def counted(request: Request) -> Response:
            # Not of the request's URL: that is made of the Host header, which the client writes.
            path = request.scope["path"]
            try:
                if path not in _OPEN:
                    self._check_key(request)
                response = await answer(request)
            except Problem as problem:
                headers = {"retry-after": "1"} if problem.status in {429, 503} else None
                response = JSONResponse(problem.content(), problem.status, headers)
            except (ClientDisconnect, Gone):
                response = Response(status_code=499)  # nobody reads it
            # One request that meets with a defect of ours is no reason to end the server.
            except Exception:
                _LOG.exception("a request could not be answered")
                response = JSONResponse(Problem(500, "internal_error", "this cannot be answered.").content(), 500)
            self.counters.add("requests_total", labels={"path": path, "status": str(response.status_code)})
            return response

        return counted

    def _check_key(self, request: Request) -> None:
        if self.key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self.key.encode()):
            raise Problem(401, "invalid_api_key", "the API key is missing or wrong.")

    async def _health(self, request: Request) -> Response:
        del request
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        del request
        return PlainTextResponse(self.counters.text(), media_type=TYPE)

    async def _models(self, request: Request) -> Response:
        del request
        return JSONResponse(await self.backend.models())

    async def _chat(self, request: Request) -> Response:
        until, started = asyncio.get_running_loop().time() + self.timeout, time.perf_counter()
        try:
            async with asyncio.timeout_at(until):
                question = self.backend.understand(read_json(await self._body(request)))
        except TimeoutError as problem:
            raise Problem(408, "too_slow", "the body did not arrive in time.") from problem
        if self._chats >= self.most_waiting:
            raise Problem(503, "overloaded", "too many chats are waiting; try again later.")
        chat = _Chat(self, question, until, started)
        chat.begin()
        try:
            response = await chat.answer(request)
        except BaseException:
            chat.end()
            raise
        if not isinstance(response, _Streaming):
            chat.end()
        return response

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        announced = request.headers.get("content-length", "0")
        too_large = Problem(413, "too_large", f"the body is longer than {self.most_bytes} bytes.")
        if not announced.isdecimal() or len(announced) > 12 or int(announced) > self.most_bytes:
            raise too_large
        async for part in request.stream():
            body += part
            if len(body) > self.most_bytes:
                raise too_large
        return bytes(body)


@dataclass
class _Chat:
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
        self.service._chats += 1
        self.service.counters.add("in_flight")

    def end(self) -> None:
        """Stop all work for it, and count it out, whatever came of it; its place is free once its guards have ended."""
        self.cancelled.set()
        self.service.counters.took(time.perf_counter() - self.started)
        if self.working is None or self.working.done():
            self._free()
            return
        loop = asyncio.get_running_loop()

        def ended(_: object) -> None:
            # The server may have ended before.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._free)

        self.working.add_done_callback(ended)

    def _free(self) -> None:
        self.service._chats -= 1
        self.service.counters.add("in_flight", -1)

    async def answer(self, request: Request) -> Response:
        """Return the answer; of a streamed one, once it has begun."""
        try:
            async with asyncio.timeout_at(self.until):
                found, facts = await self._unless_gone(request, self._guarded())
                headers = self._told(facts)
                if isinstance(found, Refusal):
                    return self._refused(found, headers)
                if self.question.stream:
                    events = self.service.backend.stream(self.question, found, self.cancelled)
                    first = await self._unless_gone(request, anext(events))
                    return _Streaming(self, first, events, headers)
                whole = self.service.backend.whole(self.question, found, self.cancelled)
                status, content = await self._unless_gone(request, whole)
                return JSONResponse(content, status, headers)
        except TimeoutError as problem:
            raise Problem(504, "too_slow", f"there was no answer within {self.service.timeout:g} s.") from problem

    async def _guarded(self) -> tuple[Turns | Refusal, Facts]:
        """Let the guards work, in a thread: they wait for the model, and for what they ask elsewhere."""
        guards, turns = self.service.guards, self.question.turns
        if not guards.prompt:
            return turns, {}
        left = self.until - asyncio.get_running_loop().time()
        ask = self.service.backend.ask(self.question, Patience(time.monotonic() + left, self.cancelled))
        self.working = self.service.in_thread(lambda: guards.rewrite([turns], ask))
        try:
            (found,), (facts,) = await asyncio.wrap_future(self.working)
        except UserError as problem:
            # Such as an evidence LLM that cannot be loaded: for whoever runs the server, not for its clients.
            _LOG.error("a guard cannot work: %s", printable(str(problem), 500))
            raise Problem(503, "guard_failed", "the guard of this server cannot work now.") from problem
        return found, facts

    def _told(self, facts: Facts) -> dict[str, str]:
        """Count what the guards did, and return the headers that say so."""
        words = []
        for name, recorded in facts.items():
            what = "refused" if recorded.get("refused") else str(recorded.get("branch", "acted"))
            self.service.counters.add("guard_total", labels={"guard": name, "did": what})
            words.append(f"{name}={what}")
        return {GUARD_HEADER: ", ".join(words), "cache-control": "no-store"} if words else {"cache-control": "no-store"}

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


class _Streaming(StreamingResponse):
    """A streamed answer that counts its chat out at its end, also where the client left or reads too slowly."""

    def __init__(
        self, chat: _Chat, first: bytes, events: AsyncGenerator[bytes, None], headers: Mapping[str, str]
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


def _broken(problem: Problem) -> bytes:
    """Return the event of an error; blank lines first, because what was sent last may lack its own."""
    return b"\n\n" + event(problem.content())


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
