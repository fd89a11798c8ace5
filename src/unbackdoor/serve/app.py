"""The endpoints: chat completions behind guards, models, health, metrics; the key, and the limits."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, wait
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from unbackdoor.evidence.threads import begun
from unbackdoor.model.guard import Guards
from unbackdoor.serve.backends import Backend, Elsewhere
from unbackdoor.serve.chat import Chat, Streaming
from unbackdoor.serve.counters import TYPE, Counters
from unbackdoor.serve.engine import Gone
from unbackdoor.serve.protocol import JSON, Problem, read_json

_OPEN = frozenset({"/health", "/metrics"})
_SCHEME = "bearer "

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
        most_waiting: Chats that are being answered at the same time, at most; and as many bodies that arrive.
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
    _reading: int = 0
    _working: set[Future[Any]] = field(default_factory=set)

    def app(self) -> Starlette:
        """Return the application."""
        routes = [
            Route("/health", self._counted(self._health)), Route("/metrics", self._counted(self._metrics)),
            Route("/v1/models", self._counted(self._models)),
            Route("/v1/chat/completions", self._counted(self._chat), methods=["POST"]),
        ]  # fmt: skip
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: self._not_here})

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
        found = begun(work, "guard")
        self._working.add(found)
        found.add_done_callback(self._working.discard)
        return found

    def count(self, chats: int) -> None:
        """Count chats in, or out where negative."""
        self._chats += chats
        self.counters.add("in_flight", chats)

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

    async def _not_here(self, request: Request, problem: Exception) -> Response:
        """Answer for a path or a method that is not there."""
        del request
        assert isinstance(problem, HTTPException)
        status = problem.status_code
        self.counters.add("requests_total", labels={"path": "other", "status": str(status)})
        return JSONResponse(Problem(status, "not_found", f"{problem.detail}.").content(), status, problem.headers)

    def _check_key(self, request: Request) -> None:
        if self.key is None:
            return
        given = request.headers.get("authorization", "")
        # The name of the scheme has no case.
        given = given[len(_SCHEME) :].lstrip() if given[: len(_SCHEME)].lower() == _SCHEME else given
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
        try:
            async with asyncio.timeout(self.timeout):
                return Response(await self.backend.models(), media_type=JSON)
        except TimeoutError as problem:
            raise Problem(504, "too_slow", "the list of models did not come in time.") from problem

    async def _chat(self, request: Request) -> Response:
        until, started = asyncio.get_running_loop().time() + self.timeout, time.perf_counter()
        try:
            async with asyncio.timeout_at(until):
                question = self.backend.understand(read_json(await self._body(request)))
        except TimeoutError as problem:
            raise Problem(408, "too_slow", "the body did not arrive in time.") from problem
        self._check_room(self._chats)
        chat = Chat(self, question, until, started)
        chat.begin()
        try:
            response = await chat.answer(request)
        except BaseException:
            chat.end()
            raise
        if not isinstance(response, Streaming):
            chat.end()
        return response

    def _check_room(self, taken: int) -> None:
        if taken >= self.most_waiting:
            raise Problem(503, "overloaded", "too many chats are waiting; try again later.")

    async def _body(self, request: Request) -> bytes:
        self._check_room(self._reading)
        self._reading += 1
        try:
            return await self._read(request)
        finally:
            self._reading -= 1

    async def _read(self, request: Request) -> bytes:
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
