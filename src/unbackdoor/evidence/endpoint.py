"""An evidence LLM behind any endpoint that speaks OpenAI's chat completions.

The key is read from the environment when it is needed and is kept in no file, message or result:
`UNBACKDOOR_EVIDENCE_KEY`, or `OPENAI_API_KEY` where the endpoint is OpenAI's own. Redirections are not followed, an
answer has a limit in time and size as a whole, and what comes back is checked: a server may be down, slow, broken or
hostile. What it says is text and nothing else (harmless.py).
"""

from __future__ import annotations

import json
import os
import re
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from unbackdoor.errors import UserError
from unbackdoor.evidence.cache import Answer, Unavailable
from unbackdoor.evidence.refused import refused_field, without_refused
from unbackdoor.evidence.retrying import Failed, Retrying
from unbackdoor.evidence.threads import in_time, side_by_side
from unbackdoor.model.guard import FOREVER, Patience
from unbackdoor.model.quarantine import printable

if TYPE_CHECKING:
    import httpx2
    import openai

KEY = "UNBACKDOOR_EVIDENCE_KEY"
OPENAI_KEY, OPENAI_HOST = "OPENAI_API_KEY", "api.openai.com"
LONGEST_BYTES = 1_000_000
"""An answer with more bytes is not read to its end."""
AT_ONCE = 8
"""Questions that are asked at the same time."""

_FIRST_OPENAI = 3
"""The first version of the package openai that goes through httpx2."""
_SLOW = 0.5
"""Share of the time for one answer: an endpoint that is silent for so long counts as down, also where the time was cut.

In a server it always is: evidence has half of what is left of a request."""
_LATE = 1.0
"""Seconds after which a call is left alone that did not end by itself when its time was over."""
_BUSY = 429
_AGAIN = frozenset({408, 409, 425, _BUSY})
_BAD = 400
_SAID, _NAME = 120, 60
_USER = re.compile(r"^(\w+://)?.*@", re.DOTALL)
"""What may hold a password."""
_TOO_LONG, _PACKED = "too long", "packed, which was not asked for"


class Endpoint:
    """A model behind a URL."""

    def __init__(self, url: str, model: str, *, temperature: float, timeout: float, retrying: Retrying) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
            url: Base URL, such as https://api.openai.com/v1.
            model: Name of the model there.
            temperature: Of sampling.
            timeout: Seconds for one answer as a whole.
            retrying: How calls are repeated.

        Raises:
            UserError: If the extra is not installed, or the key cannot be sent there.
        """
        check_packages()
        import httpx2
        from openai import OpenAI

        self.model, self.temperature, self.timeout, self.retrying = model, temperature, timeout, retrying
        key = key_for(url)
        # Connections are kept for later questions, as long as this object is there.
        client = httpx2.Client(transport=_bounded(), timeout=timeout, follow_redirects=False)
        weakref.finalize(self, client.close)
        # The client insists on some key; servers of one's own often want none.
        self._client = OpenAI(api_key=key or "none", base_url=url, max_retries=0, http_client=client)
        self._refused: frozenset[str] = frozenset()

    def write(self, prompts: Sequence[str], max_new_tokens: int, patience: Patience = FOREVER) -> list[Answer]:
        """Return what the model answers to each prompt, or why there is no answer while somebody waits for it."""
        if len(prompts) == 1:
            return [self._write(prompts[0], max_new_tokens, patience)]
        return side_by_side(lambda prompt, mine: self._write(prompt, max_new_tokens, mine), prompts, AT_ONCE, patience)

    def _write(self, prompt: str, max_new_tokens: int, patience: Patience) -> Answer:
        try:
            return self.retrying.call(lambda: self._ask(prompt, max_new_tokens, patience), patience)
        except Failed as problem:
            return Unavailable(str(problem))

    def _ask(self, prompt: str, max_new_tokens: int, patience: Patience) -> str:
        """Ask once; also an endpoint that never ends an answer's head cannot hold whoever asks.

        Raises:
            Failed: If there is no answer.
        """
        seconds = min(self.timeout, patience.left())
        try:
            return in_time(lambda: self._call(prompt, max_new_tokens, seconds), seconds + _LATE)
        except TimeoutError as problem:
            slow = seconds >= _SLOW * self.timeout
            raise Failed("the endpoint did not answer in time", again=True, slow=slow) from problem

    def _call(self, prompt: str, max_new_tokens: int, seconds: float) -> str:
        """Return the endpoint's answer.

        Raises:
            TimeoutError: If it did not come in time.
            Failed: If there is none.
        """
        import openai

        refused = self._refused
        fields = without_refused({"max_tokens": max_new_tokens, "temperature": self.temperature}, refused)
        try:
            found = self._client.chat.completions.with_raw_response.create(
                model=self.model, messages=[{"role": "user", "content": prompt}], extra_body=fields, timeout=seconds
            )
        except openai.APITimeoutError as problem:
            raise TimeoutError from problem
        except openai.APIConnectionError as problem:
            if (what := str(problem.__cause__)) in {_TOO_LONG, _PACKED}:
                raise Failed(f"the endpoint's answer is {what}", again=False) from problem
            raise Failed("the endpoint cannot be reached", again=True) from problem
        except openai.APIStatusError as problem:
            code = problem.status_code
            if code == _BAD and (field := refused_field(problem.code, problem.param)) and field not in refused:
                self._refused = refused | {field}
                return self._call(prompt, max_new_tokens, seconds)
            again = code in _AGAIN or code >= 500
            wait = retry_after(problem.response.headers.get("retry-after"), time.time())
            reason = f"the endpoint answers with HTTP {code}{_hint(problem)}"
            raise Failed(reason, again=again, wait=wait, busy=code == _BUSY) from problem
        if found.http_response.status_code != 200:
            raise Failed(f"the endpoint answers with HTTP {found.http_response.status_code}", again=False)
        return text_of(found.http_response.content)


def check_packages() -> None:
    """Look whether the extra is installed.

    Raises:
        UserError: If it is not, or is too old.
    """
    from importlib.metadata import version
    from importlib.util import find_spec

    missing = [name for name in ("openai", "httpx2") if find_spec(name) is None]
    if missing:
        raise UserError(f"an endpoint needs the package {missing[0]}; pip install 'unbackdoor[endpoint]'.")
    if int(version("openai").split(".")[0]) < _FIRST_OPENAI:
        raise UserError(
            f"an endpoint needs the package openai {_FIRST_OPENAI}.0 or later, and {version('openai')} is installed; "
            "pip install --upgrade 'unbackdoor[endpoint]'."
        )


def text_of(body: bytes) -> str:
    """Return the text of a chat completion.

    Raises:
        Failed: If the body is none, or its text is empty.
    """
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as problem:
        raise Failed("the endpoint's answer is no chat completion", again=False) from problem
    if not isinstance(text, str) or not text.strip():
        raise Failed("the endpoint's answer holds no text", again=False)
    return text


def retry_after(header: str | None, now: float) -> float | None:
    """Return the seconds that a Retry-After header asks for, a number or a date; None for none or one not understood.

    Args:
        header: Its value.
        now: Seconds since 1970.
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - now
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if seconds == seconds else None


def key_for(url: str) -> str | None:
    """Return the key that may be sent to a URL, from the environment, or None.

    Raises:
        UserError: If it would be sent unencrypted to another machine, or is none.
    """
    key = key_to(url, KEY)
    return key_to(url, OPENAI_KEY) if key is None and urlsplit(url).hostname == OPENAI_HOST else key


def key_to(url: str, variable: str) -> str | None:
    """Return the key in an environment variable, which may be sent to a URL, or None.

    Raises:
        UserError: If it would be sent unencrypted to another machine, or is none.
    """
    key, parts = key_in(variable), urlsplit(url)
    if key is not None and parts.scheme == "http" and not _is_here(parts.hostname or ""):
        raise UserError(
            f"the key in {variable} would be sent unencrypted to '{printable(parts.hostname or '')}'; use an https:// "
            f"URL, or unset {variable}."
        )
    return key


def key_in(variable: str) -> str | None:
    """Return the key that an environment variable holds, without blanks at its ends, or None.

    Raises:
        UserError: If it holds what can be in no header; the message does not show it.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{variable} holds no key: only letters, digits and signs of ASCII can be sent; copy it again.")
    return key or None


def _is_here(host: str) -> bool:
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        found = ip_address(host)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def same_place(first: str, second: str) -> bool:
    """Tell whether two URLs lead to one place; all names of this machine are one, and a usual port may be left out."""
    place = _place_of(first)
    return place is not None and place == _place_of(second)


def _place_of(url: str) -> tuple[str, int, str] | None:
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".")
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        return None
    address = _address(host)
    # The address that means all of a machine's leads to this one.
    here = _is_here(host) or (address is not None and address.is_unspecified)
    return ("localhost" if here else host), port, parts.path.rstrip("/")


def _hint(problem: openai.APIStatusError) -> str:
    code = problem.status_code
    if code in {401, 403}:
        return f" (is {KEY} set to its key?)"
    if code == 404:
        return " (is the model's name right?)"
    # Its own names for what is wrong, not its sentence: that may hold the prompt.
    told = [printable(word, _NAME) for word in (problem.code, problem.param) if isinstance(word, str) and word]
    return f" ({', '.join(told)})" if told else ""


def _bounded() -> httpx2.BaseTransport:
    """Return a transport whose answers have a limit in time and size as a whole; the usual limits are for one read.

    The limit in time is the request's own for one read.
    """
    import httpx2

    class Bounded(httpx2.SyncByteStream):
        def __init__(self, stream: Any, until: float, request: httpx2.Request) -> None:
            self.stream, self.until, self.request = stream, until, request

        def __iter__(self) -> Iterator[bytes]:
            read = 0
            for part in self.stream:
                read += len(part)
                if read > LONGEST_BYTES:
                    raise httpx2.ReadError(_TOO_LONG, request=self.request)
                if time.monotonic() > self.until:
                    raise httpx2.ReadTimeout("too slow", request=self.request)
                yield part

        def close(self) -> None:
            self.stream.close()

    class Transport(httpx2.BaseTransport):
        def __init__(self) -> None:
            self.inner = httpx2.HTTPTransport()

        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            until = time.monotonic() + request.extensions["timeout"]["read"]
            # The client adds what OPENAI_ORG_ID and the like say; that is nobody else's business.
            if request.url.host != OPENAI_HOST:
                for name in ("openai-organization", "openai-project"):
                    request.headers.pop(name, None)
            # Unpacked, a small answer can be endless.
            request.headers["accept-encoding"] = "identity"
            response = self.inner.handle_request(request)
            if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
                response.close()
                raise httpx2.ReadError(_PACKED, request=request)
            stream = Bounded(response.stream, until, request)
            return httpx2.Response(
                response.status_code, headers=response.headers, stream=stream, extensions=response.extensions
            )

        def close(self) -> None:
            self.inner.close()

    return Transport()


def check_url(url: str, *, example: str = "endpoint:https://HOST/v1#MODEL", key: str = KEY) -> None:
    """Look whether a base URL can be used.

    Args:
        url: As the person wrote it.
        example: How it should be written.
        key: Environment variable that holds its key.

    Raises:
        UserError: If it is none, or holds a password; the message does not show that.
    """
    shown = printable(_USER.sub(r"\1", url)[:_SAID])
    try:
        parts = urlsplit(url)
        good = parts.scheme in {"http", "https"} and (parts.port is None or parts.port > 0) and url.isprintable()
        good = good and _is_host(parts.hostname or "", url, literal="[" in parts.netloc)
    except ValueError:
        good = False
    if not good or any(mark.isspace() for mark in url):
        raise UserError(f"'{shown}' is no URL of an endpoint; write {example}.")
    if parts.username is not None or parts.password is not None or parts.query:
        raise UserError(f"the endpoint's URL holds a password or a query; put the key into {key} instead.")


def _is_host(host: str, url: str, *, literal: bool) -> bool:
    """Tell whether a URL's host is one that can be looked up.

    Args:
        host: Its name or address.
        url: All of it.
        literal: Whether it stands in brackets.

    Raises:
        ValueError: If it is not.
    """
    if literal:
        ip_address(host.partition("%")[0])
    # Labels are not empty, and have 63 characters at most.
    host.encode("idna")
    with suppress(ImportError):
        import httpx2

        # Where the client is installed it has the last word; it knows a newer standard of names than Python does.
        try:
            httpx2.URL(url)
        except httpx2.InvalidURL:
            return False
    return bool(host)
