"""Fields of a chat request that some models do not take: newer ones of OpenAI refuse the usual ones by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping

_FIELDS = frozenset({"max_tokens", "temperature"})
"""Fields that some models refuse; asked without them, they answer."""
_NOT_TAKEN = frozenset({"unsupported_parameter", "unsupported_value"})
"""What OpenAI calls that. A prompt that is too long may be refused in the name of `max_tokens`, too, by other codes."""


def refused_field(code: object, param: object) -> str | None:
    """Return the field that a model says it does not take, one of "max_tokens" and "temperature", or None.

    Args:
        code: The error's `code`, as it came.
        param: Its `param`.
    """
    if isinstance(code, str) and isinstance(param, str) and code in _NOT_TAKEN and param in _FIELDS:
        return param
    return None


def without_refused(fields: Mapping[str, object], refused: Collection[str]) -> dict[str, object]:
    """Return a request's fields as a model takes them that refuses some: newer ones of OpenAI do.

    Args:
        fields: "max_tokens" and "temperature".
        refused: Those that it has refused; the length is then called otherwise, the temperature is the model's own.
    """
    names = {"max_tokens": "max_completion_tokens", "temperature": None}
    given = {names[name] if name in refused else name: value for name, value in fields.items()}
    return {name: value for name, value in given.items() if name is not None}
