"""OpenAI's chat completions as far as they are spoken here: reading a request, writing an answer.

Fields that would change the answer and cannot be done are refused, never ignored; so are unknown ones. A field that is
null says nothing, whatever its name.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from unbackdoor.method import explain_validation
from unbackdoor.types import Message

_ROLES: Mapping[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_NO_EFFECT = frozenset({
    "user", "metadata", "store", "safety_identifier", "service_tier", "prompt_cache_key", "parallel_tool_calls",
})  # fmt: skip
"""Fields that say nothing about the answer, or nothing where there are no tools."""
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logprobs": (False,), "tools": ([],),
    "response_format": ({"type": "text"},), "tool_choice": ("none", "auto"),
    "logit_bias": ({},), "modalities": (["text"],),
}  # fmt: skip
"""Fields that are understood with these values only."""


class Problem(Exception):
    """A request that cannot be answered; becomes OpenAI's error object.

    Attributes:
        status: HTTP status.
        code: Short name of the error.
        kind: Its type; None for what the status says.
        param: Name of the field that is wrong, or None.
    """

    def __init__(
        self, status: int, code: str, message: str, *, kind: str | None = None, param: str | None = None
    ) -> None:
        """Refuse a request with a sentence."""
        super().__init__(message)
        self.status, self.code, self.kind, self.param = status, code, kind, param

    def content(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = self.kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _texts(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Request(BaseModel):
    """A request that a model in this process can answer."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    messages: list[Any] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[tuple[str, ...] | None, BeforeValidator(_texts)] = Field(None, max_length=4)
    stream: bool | None = None
    stream_options: _Options | None = None

    @property
    def limit(self) -> int | None:
        """Tokens that the reply may have; None where the request does not say."""
        return self.max_completion_tokens or self.max_tokens


def read_json(body: bytes) -> dict[str, Any]:
    """Return a request's JSON object.

    Raises:
        Problem: If it is none.
    """
    try:
        content = json.loads(body)
        # Half a surrogate pair is JSON and no text: no tokenizer reads it, and it cannot be sent on. NaN is no JSON.
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as problem:
        raise Problem(400, "invalid_json", "the body is not JSON in UTF-8.") from problem
    if not isinstance(content, dict):
        raise Problem(400, "invalid_json", "the body is not a JSON object.")
    return content


def parse(content: Mapping[str, Any]) -> tuple[Request, tuple[Message, ...]]:
    """Return a request, and its turns.

    Raises:
        Problem: If a field is wrong, or asks for what cannot be done here.
    """
    kept = {}
    for name, value in content.items():
        if value is None or name in _NO_EFFECT or value in _NEUTRAL.get(name, ()):
            continue
        if name in _NEUTRAL:
            raise Problem(400, "unsupported_value", f"'{name}' can only be {_NEUTRAL[name][0]!r} here.")
        kept[name] = value
    try:
        request = Request.model_validate(kept)
    except ValidationError as problem:
        raise Problem(400, "invalid_value", f"{explain_validation(problem)[:500]}.") from problem
    turns = tuple(turn_of(message, number) for number, message in enumerate(request.messages))
    if turns[-1].role != "user":
        raise Problem(400, "invalid_messages", "the last message must be the user's.")
    return request, turns


def turn_of(message: object, number: int) -> Message:
    """Return a message as a turn; its parts of text are joined.

    Raises:
        Problem: If it is none of a system, user or assistant with text.
    """
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(message, Mapping) or not isinstance(role, str) or role not in _ROLES:
        raise Problem(400, "invalid_messages", f"message {number + 1} has no role among {', '.join(_ROLES)}.")
    content = message.get("content")
    if isinstance(content, list) and all(is_text(part) for part in content):
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Problem(400, "invalid_messages", f"message {number + 1} has no text as its content.")
    return Message(_ROLES[role], content)


def is_text(part: object) -> bool:
    """Tell whether a part of a message's content is text."""
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


@dataclass(frozen=True)
class Writing:
    """Writes the answer to one request.

    Attributes:
        model: Name of the model in it.
        id: Name of the answer.
        created: Seconds since 1970.
    """

    model: str
    id: str
    created: int

    @classmethod
    def begin(cls, model: str) -> Writing:
        """Return the writer of a new answer."""
        return cls(model, f"chatcmpl-{uuid.uuid4().hex}", int(time.time()))

    def whole(self, text: str, reason: str, usage: Mapping[str, int]) -> dict[str, Any]:
        """Return a chat completion."""
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": dict(usage)}

    def part(self, delta: Mapping[str, str], reason: str | None = None) -> bytes:
        """Return one event of a streamed answer."""
        choice = {"index": 0, "delta": dict(delta), "finish_reason": reason}
        return event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def usage(self, usage: Mapping[str, int]) -> bytes:
        """Return the event that says how many tokens there were."""
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": dict(usage)})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


JSON = "application/json"
"""The type of all answers that are not streamed."""
DONE = b"data: [DONE]\n\n"
"""The last event of an answer that is whole."""


def as_json(content: Mapping[str, Any]) -> bytes:
    """Return an answer's body."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def event(content: Mapping[str, Any]) -> bytes:
    """Return a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def models(names: Sequence[str], created: int) -> dict[str, Any]:
    """Return the answer of /v1/models."""
    found = [{"id": name, "object": "model", "created": created, "owned_by": "unbackdoor"} for name in names]
    return {"object": "list", "data": found}
