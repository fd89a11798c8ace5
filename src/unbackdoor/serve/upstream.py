"""The other program: a server with OpenAI's chat completions, such as vLLM, that guards stand before.

A request goes on as it came, with the messages that prompt guards left; the answer comes back byte for byte. A streamed
answer that the upstream breaks off ends with an error and without the mark that says that it is whole, so that nobody
takes half an answer for one.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unbackdoor.model.guard import Patience, Turns
from unbackdoor.model.quarantine import printable
from unbackdoor.serve.engine import Gone
from unbackdoor.serve.protocol import DONE, Problem, event, is_text, turn_of

if TYPE_CHECKING:
    import httpx2

KEY = "UNBACKDOOR_UPSTREAM_KEY"
LONGEST_ANSWER = 16_000_000
LONGEST_LINE = 1_000_000
_MEDIA = ("image_url", "input_audio", "audio_url", "video_url", "file")
"""Types of the parts of a message that go on unseen, beside text."""
_CONNECT = 10.0
_LOOK = 0.1
"""Seconds after which a guard's thread looks whether anybody waits for it still."""


class Upstream:
    """An upstream's URL and how it is asked."""

    def __init__(self, url: str, timeout: float) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
            url: Base URL, such as http://127.0.0.1:8000/v1.
            timeout: Seconds of silence that are waited for.
        """
        self.url, self.timeout = url.rstrip("/"), timeout

    def _options(self) -> dict[str, Any]:
        import httpx2

        key = os.environ.get(KEY)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        timeout = httpx2.Timeout(self.timeout, connect=min(_CONNECT, self.timeout))
        return {"headers": {**headers, "accept-encoding": "identity"}, "timeout": timeout, "follow_redirects": False}

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx2.AsyncClient]:
        """Return a client with as many connections as are needed, closed at the end."""
        import httpx2

        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=20)
        async with httpx2.AsyncClient(limits=limits, **self._options()) as client:
            yield client

    async def models(self, client: httpx2.AsyncClient) -> dict[str, Any]:
        """Return the upstream's own answer to /v1/models.

        Raises:
            Problem: If there is none.
        """
        with _problems():
            status, body = await _bounded(client, "GET", f"{self.url}/models", None)
        return _json(status, body)

    async def whole(self, client: httpx2.AsyncClient, content: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return status and answer of a chat that is not streamed.

        Raises:
            Problem: If there is none that can be passed on.
        """
        with _problems():
            status, body = await _bounded(client, "POST", f"{self.url}/chat/completions", content)
        return status, _json(status, body)

    @asynccontextmanager
    async def stream(
        self, client: httpx2.AsyncClient, content: Mapping[str, Any]
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Open a streamed chat; nothing is yielded unless the upstream has begun to answer.

        Raises:
            Problem: If it refuses, or cannot be reached.
        """
        with _problems():
            request = client.build_request("POST", f"{self.url}/chat/completions", json=dict(content))
            response = await client.send(request, stream=True)
        try:
            if response.status_code != 200 or "text/event-stream" not in response.headers.get("content-type", ""):
                with _problems():
                    body = await _read(response)
                _json(response.status_code, body)
                raise Problem(502, "upstream_broken", "the upstream does not stream its answer.")
            yield self._events(response)
        finally:
            await response.aclose()

    async def _events(self, response: httpx2.Response) -> AsyncIterator[bytes]:
        """Yield the answer's lines as they come; at the end the mark of a whole answer, or an error."""
        import httpx2

        try:
            async for line in _lines(response):
                yield line
                if line.strip() == DONE.strip():
                    yield b"\n"
                    return
            broken = "the upstream ended its answer before it was whole."
        except httpx2.TimeoutException:
            broken = "the upstream fell silent in the middle of its answer."
        except (httpx2.HTTPError, Problem):
            broken = "the upstream broke off in the middle of its answer."
        # A blank line first: what was said last may lack the one that ends it.
        yield b"\n\n" + event(Problem(502, "upstream_broken", broken).content())
        raise Broken


class Broken(Exception):
    """A streamed answer is not whole; the client was told."""


async def _lines(response: httpx2.Response) -> AsyncIterator[bytes]:
    """Yield whole lines of bytes, their ends kept.

    Raises:
        Problem: If one is endless.
    """
    rest = b""
    async for part in response.aiter_raw():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line + b"\n"
        if len(rest) > LONGEST_LINE:
            raise Problem(502, "upstream_broken", "the upstream's answer has an endless line.")
    # A line that was broken off is half an event, which no client can read.
    if rest.strip() == DONE.strip():
        yield rest + b"\n"


@dataclass(frozen=True)
class AskUpstream:
    """`Ask` for prompt guards: their questions go to the upstream, as the same model.

    Attributes:
        upstream: Who is asked.
        client: The connections to it.
        loop: The event loop that they belong to.
        model: Name of the model, as the client gave it.
        patience: How long an answer is waited for.
    """

    upstream: Upstream
    client: httpx2.AsyncClient
    loop: asyncio.AbstractEventLoop
    model: str
    patience: Patience
    special: frozenset[str] = frozenset()

    def __call__(self, conversations: Sequence[Turns], max_new_tokens: int) -> list[str]:
        """Return a greedy reply to each conversation; blocks, so it is called in another thread than the loop's.

        Raises:
            Problem: If the upstream does not answer.
            Gone: If nobody waits any more.
        """
        return [self._said(turns, max_new_tokens) for turns in conversations]

    def _said(self, turns: Turns, max_new_tokens: int) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        asked = {"model": self.model, "messages": messages, "max_tokens": max_new_tokens}
        content = {**asked, "temperature": 0, "stream": False}
        if not self.patience.left():
            raise Gone
        whole = asyncio.run_coroutine_threadsafe(self.upstream.whole(self.client, content), self.loop)
        while self.patience.left():
            if wait([whole], timeout=_LOOK).done:
                return _text_of(whole.result()[1])
        # Wherever it is, it ends here: an upstream that sends a byte now and then would hold it for ever.
        whole.cancel()
        raise Gone

    def fits(self, turns: Turns, new_tokens: int | None = None) -> bool:
        """Return True: only the upstream knows."""
        del turns, new_tokens
        return True


def _text_of(content: Mapping[str, Any]) -> str:
    try:
        text = content["choices"][0]["message"]["content"]
    except (LookupError, TypeError) as problem:
        raise Problem(502, "upstream_broken", "the upstream's answer is no chat completion.") from problem
    return text.strip() if isinstance(text, str) else ""


def turns_of(content: Mapping[str, Any]) -> tuple[list[int], Turns]:
    """Return the places of the messages that are turns with text, and these turns.

    Calls of tools and their results are passed on and not shown to guards; but the last message must be the user's, or
    a guard would be got round by whatever stands behind it, and none of its parts may be one that is neither text nor a
    known medium, because an upstream may read it as text that no guard has seen.

    Raises:
        Problem: If there are no messages, or the last one is not the user's text.
    """
    messages = content.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Problem(400, "invalid_messages", "'messages' must be a list of messages.")
    places, turns = [], []
    for place, message in enumerate(messages):
        last = place == len(messages) - 1
        shown = {**message, "content": _text_parts(message.get("content"))} if isinstance(message, dict) else message
        if not last and (not isinstance(message, dict) or message.get("role") == "tool" or shown["content"] is None):
            continue
        places.append(place)
        turns.append(turn_of(shown, place))
    if turns[-1].role != "user":
        raise Problem(400, "invalid_messages", "the last message must be the user's.")
    content = messages[-1]["content"]
    parts: list[Any] = content if isinstance(content, list) else []
    for number, part in enumerate(parts):
        if not is_text(part) and not (isinstance(part, dict) and part.get("type") in _MEDIA):
            raise Problem(
                400, "invalid_messages",
                f"part {number + 1} of the last message is neither text nor one of {', '.join(_MEDIA)}.",
            )  # fmt: skip
    return places, tuple(turns)


def _text_parts(content: object) -> object:
    """Return the text of a message's content, pictures and the like left out."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if is_text(part))
    return content


def with_turns(content: Mapping[str, Any], places: Sequence[int], before: Turns, after: Turns) -> dict[str, Any]:
    """Return a request with the turns that guards have changed; what is not text stays where it was."""
    messages = list(content["messages"])
    for place, old, new in zip(places, before, after, strict=True):
        if old == new:
            continue
        told = messages[place]["content"]
        rest = [part for part in told if not is_text(part)] if isinstance(told, list) else []
        changed = [{"type": "text", "text": new.content}, *rest] if rest else new.content
        messages[place] = {**messages[place], "content": changed}
    return {**content, "messages": messages}


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


def _json(status: int, body: bytes) -> dict[str, Any]:
    """Return an answer's JSON object; a refusal of the request comes back as the upstream's own.

    Raises:
        Problem: If it is none, or the upstream failed.
    """
    if status in {401, 403}:
        raise Problem(502, "upstream_refuses", f"the upstream refuses this server; is {KEY} set to its key?")
    if status == 429:
        raise Problem(429, "rate_limit_exceeded", "the upstream is asked too often; try again later.")
    if status >= 500 or 300 <= status < 400:
        raise Problem(502, "upstream_failed", f"the upstream answers with HTTP {status}.")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise Problem(502, "upstream_broken", "the upstream's answer is not a JSON object.")
    if status >= 400:
        told = content.get("error")
        message = told.get("message") if isinstance(told, dict) else None
        words = str(message or f"the upstream answers with HTTP {status}.")
        raise Problem(status, "upstream_refuses", printable(words, 500))
    return content


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
