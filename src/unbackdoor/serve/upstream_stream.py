"""A streamed answer of an upstream, passed on byte for byte; and whether it is whole.

It is whole after `data: [DONE]`. Some servers, such as `transformers serve`, never send that: theirs is whole where the
body ends as HTTP wants it to and every choice in it has said why it ended. The mark is added then, because clients wait
for it. Any other end is told as an error and leaves the mark out, so that nobody takes half an answer for a whole one.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from unbackdoor.serve.protocol import DONE, Problem, event

if TYPE_CHECKING:
    import httpx2

LONGEST_LINE = 1_000_000
_DATA, _MARK = b"data:", b"[DONE]"


class Broken(Exception):
    """A streamed answer is not whole; the client was told."""


async def passed_on(response: httpx2.Response) -> AsyncIterator[bytes]:
    """Yield an answer's lines as they come; at the end the mark of a whole answer, or an error.

    Raises:
        Broken: After the error.
    """
    import httpx2

    choices = _Choices()
    try:
        async for line in _lines(response):
            yield line
            data = _data(line)
            if data == _MARK:
                yield b"\n"
                return
            choices.see(_json(data))
        if choices.ended():
            yield b"\n" + DONE
            return
        broken = "the upstream ended its answer before it was whole."
    except httpx2.TimeoutException:
        broken = "the upstream fell silent in the middle of its answer."
    except (httpx2.HTTPError, Problem):
        broken = "the upstream broke off in the middle of its answer."
    # A blank line first: what was said last may lack the one that ends it.
    yield b"\n\n" + event(Problem(502, "upstream_broken", broken).content())
    raise Broken


@dataclass
class _Choices:
    """The choices of an answer, and which of them have ended.

    Attributes:
        said: Index of a choice -> whether it has said why it ended.
        failed: Whether the upstream has told of an error.
    """

    said: dict[str, bool] = field(default_factory=dict)
    failed: bool = False

    def see(self, content: Any) -> None:
        """Look at an event."""
        if not isinstance(content, dict):
            return
        self.failed = self.failed or bool(content.get("error"))
        choices = content.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                index = str(choice.get("index"))
                self.said[index] = self.said.get(index, False) or choice.get("finish_reason") is not None

    def ended(self) -> bool:
        """Tell whether every choice has ended."""
        return bool(self.said) and all(self.said.values()) and not self.failed


async def _lines(response: httpx2.Response) -> AsyncIterator[bytes]:
    """Yield whole lines of bytes, their ends kept.

    Raises:
        Problem: If one is endless, or was broken off.
    """
    rest = b""
    async for part in response.aiter_raw():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line + b"\n"
        if len(rest) > LONGEST_LINE:
            raise Problem(502, "upstream_broken", "the upstream's answer has an endless line.")
    if not rest.strip():
        return
    # A line that was broken off is half an event, which no client can read; the last one may just lack its end.
    if _data(rest) != _MARK and _json(_data(rest)) is None:
        raise Problem(502, "upstream_broken", "the upstream's answer ends in the middle of a line.")
    yield rest + b"\n"


def _data(line: bytes) -> bytes:
    """Return what a line says; b"" for one that is no data."""
    return line[len(_DATA) :].strip() if line.startswith(_DATA) else b""


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
