"""The other program: a server with OpenAI's chat completions, such as vLLM, that guards stand before.

A request goes on as it came, with the messages that prompt guards left; the answer comes back byte for byte, once it is
known to be a JSON object. What an upstream can do wrong becomes an error in OpenAI's form.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from unbackdoor.model.quarantine import printable
from unbackdoor.serve.access import UPSTREAM_KEY
from unbackdoor.serve.protocol import Problem
from unbackdoor.serve.upstream_stream import passed_on

if TYPE_CHECKING:
    import httpx2

LONGEST_ANSWER = 16_000_000
_CONNECT = 10.0
_NOT_THIS = frozenset({400, 413, 422})
"""Statuses that refuse what is asked: another question may be answered."""
_LONGEST_NAME = 100


class Refused(Problem):
    """The upstream does not take this request: it is too long, or not as the upstream wants it."""


class Upstream:
    """An upstream's URL and how it is asked."""

    def __init__(self, url: str, timeout: float, key: str | None = None) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
            url: Base URL, such as http://127.0.0.1:8000/v1.
            timeout: Seconds of silence that are waited for.
            key: What it asks for, or None.
        """
        self.url, self.timeout, self._key = url.rstrip("/"), timeout, key
        self.refused: set[tuple[str, str]] = set()
        """Models, and the fields of a guard's own questions that they do not take."""

    def _options(self) -> dict[str, Any]:
        import httpx2

        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        timeout = httpx2.Timeout(self.timeout, connect=min(_CONNECT, self.timeout))
        return {"headers": {**headers, "accept-encoding": "identity"}, "timeout": timeout, "follow_redirects": False}

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx2.AsyncClient]:
        """Return a client with as many connections as are needed, closed at the end."""
        import httpx2

        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=20)
        # A transport of its own: otherwise a proxy that the environment names would read key and prompts.
        transport = httpx2.AsyncHTTPTransport(limits=limits)
        async with httpx2.AsyncClient(transport=transport, **self._options()) as client:
            yield client

    async def models(self, client: httpx2.AsyncClient) -> bytes:
        """Return the upstream's own answer to /v1/models.

        Raises:
            Problem: If there is none.
        """
        with _problems():
            status, body = await _bounded(client, "GET", f"{self.url}/models", None)
        _check(status, body)
        return body

    async def whole(self, client: httpx2.AsyncClient, content: Mapping[str, Any]) -> tuple[int, bytes]:
        """Return status and answer of a chat that is not streamed.

        Raises:
            Refused: If the upstream does not take this request.
            Problem: If there is none that can be passed on.
        """
        with _problems():
            status, body = await _bounded(client, "POST", f"{self.url}/chat/completions", content)
        _check(status, body)
        return status, body

    @asynccontextmanager
    async def stream(
        self, client: httpx2.AsyncClient, content: Mapping[str, Any]
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Open a streamed chat; nothing is yielded unless the upstream has begun to answer.

        Raises:
            Refused: If the upstream does not take this request.
            Problem: If it refuses something else, or cannot be reached.
        """
        with _problems():
            request = client.build_request("POST", f"{self.url}/chat/completions", json=dict(content))
            response = await client.send(request, stream=True)
        try:
            if response.status_code != 200 or "text/event-stream" not in response.headers.get("content-type", ""):
                with _problems():
                    body = await _read(response)
                _check(response.status_code, body)
                raise Problem(502, "upstream_broken", "the upstream does not stream its answer.")
            yield passed_on(response)
        finally:
            await response.aclose()


async def _bounded(
    client: httpx2.AsyncClient, method: str, url: str, content: Mapping[str, Any] | None
) -> tuple[int, bytes]:
    request = client.build_request(method, url, json=None if content is None else dict(content))
    response = await client.send(request, stream=True)
    try:
        return response.status_code, await _read(response)
    finally:
        await response.aclose()


async def _read(response: httpx2.Response) -> bytes:
    body = bytearray()
    async for part in response.aiter_raw():
        body += part
        if len(body) > LONGEST_ANSWER:
            raise Problem(502, "upstream_broken", "the upstream's answer is too long.")
    return bytes(body)


def _check(status: int, body: bytes) -> None:
    """Look whether an answer is a JSON object, which is passed on as it came.

    Raises:
        Refused: If the upstream does not take this request.
        Problem: If it is none, or the upstream failed, or refuses something else.
    """
    if status in {401, 403}:
        raise Problem(502, "upstream_refuses", f"the upstream refuses this server; is {UPSTREAM_KEY} set to its key?")
    if status == 429:
        raise Problem(429, "rate_limit_exceeded", "the upstream is asked too often; try again later.")
    if status >= 500 or 300 <= status < 400:
        raise Problem(502, "upstream_failed", f"the upstream answers with HTTP {status}.")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    if status >= 400:
        raise _refusal(status, content)
    if not isinstance(content, dict):
        raise Problem(502, "upstream_broken", "the upstream's answer is not a JSON object.")


def _refusal(status: int, content: Any) -> Problem:
    """Return an upstream's own refusal of a request, in any of the forms that servers give it.

    Those are OpenAI's `{"error": {"message", "type", "param", "code"}}`, the same without `error` around it, and
    FastAPI's `{"detail": ...}`, a sentence or a list with a `msg` for each field.
    """
    outer = content if isinstance(content, dict) else {}
    told = outer.get("error") or outer
    told = told if isinstance(told, dict) else {"message": told}
    words = told.get("message") or told.get("detail")
    if isinstance(words, list):
        words = "; ".join(str(each["msg"]) for each in words if isinstance(each, dict) and "msg" in each)
    words = words if isinstance(words, str) and words else f"the upstream answers with HTTP {status}."
    code, kind, param = (_name(told.get(field)) for field in ("code", "type", "param"))
    made = Refused if status in _NOT_THIS else Problem
    return made(status, code or "upstream_refuses", printable(words, 500), kind=kind, param=param)


def _name(value: object) -> str | None:
    """Return a short name as it came; None for anything else."""
    good = isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME and value.isprintable()
    return str(value) if good else None


@contextmanager
def _problems() -> Iterator[None]:
    """Turn what a connection can meet with into what a client is told."""
    import httpx2

    try:
        yield
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as problem:
        raise Problem(502, "upstream_down", "the upstream cannot be reached.") from problem
    except httpx2.TimeoutException as problem:
        raise Problem(504, "upstream_slow", "the upstream did not answer in time.") from problem
    except httpx2.HTTPError as problem:
        raise Problem(502, "upstream_broken", "the upstream broke off the connection.") from problem
