"""What guards see of a request to an upstream, and the request with what they made of it.

Guards see turns of text. Calls of tools, their results and pictures among the earlier messages are passed on and not
shown; but the last message must be the user's, or a guard would be got round by whatever stands behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unbackdoor.model.guard import Turns
from unbackdoor.serve.protocol import Problem, is_text, turn_of
from unbackdoor.types import Message

_MEDIA = ("image_url", "input_audio", "audio_url", "video_url")
"""Types of the parts of the last message that go on unseen, beside text; no file, which is read as text."""


def turns_of(content: Mapping[str, Any]) -> tuple[list[int], Turns]:
    """Return the places of the messages that are turns with text, and these turns.

    None of the last message's parts may be one that is neither text nor a known medium, because an upstream may read it
    as text that no guard has seen.

    Raises:
        Problem: If there are no messages, or the last one is not the user's text.
    """
    messages = content.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Problem(400, "invalid_messages", "'messages' must be a list of messages.")
    _check_last(messages[-1])
    places, turns = [], []
    for place, message in enumerate(messages):
        last = place == len(messages) - 1
        shown = {**message, "content": _text_parts(message.get("content"))} if isinstance(message, dict) else message
        if not last and (not isinstance(message, dict) or _is_result(message) or shown["content"] is None):
            continue
        places.append(place)
        turns.append(turn_of(shown, place))
    if turns[-1].role != "user":
        raise Problem(400, "invalid_messages", "the last message must be the user's.")
    return places, tuple(turns)


def _check_last(message: object) -> None:
    if not isinstance(message, dict):
        return
    if _is_result(message):
        raise Problem(
            400, "tool_results_refused",
            "the last message is the result of a tool. No guard looks at those, so this server does not let them "
            "through; the last message must be the user's.",
        )  # fmt: skip
    content = message.get("content")
    for number, part in enumerate(content if isinstance(content, list) else ()):
        if not is_text(part) and not (isinstance(part, dict) and part.get("type") in _MEDIA):
            raise Problem(
                400, "invalid_messages",
                f"part {number + 1} of the last message is neither text nor one of {', '.join(_MEDIA)}; no guard "
                "would see what is written in it.",
            )  # fmt: skip


def _is_result(message: Mapping[str, Any]) -> bool:
    return message.get("role") in ("tool", "function")


def _text_parts(content: object) -> object:
    """Return the text of a message's content, pictures and the like left out."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if is_text(part))
    return content


def with_turns(content: Mapping[str, Any], places: Sequence[int], before: Turns, after: Turns) -> dict[str, Any]:
    """Return a request with the turns that guards have changed; what is not text keeps its order."""
    messages = list(content["messages"])
    for place, old, new in zip(places, before, after, strict=True):
        if old != new:
            told = messages[place]["content"]
            changed = _in_place(told, new.content or "") if isinstance(told, list) else new.content
            messages[place] = {**messages[place], "content": changed}
    return {**content, "messages": messages}


def _in_place(parts: Sequence[Any], text: str) -> list[Any]:
    """Return parts with a text in the place of the first one of text, and without the others: it holds them all."""
    first = next((number for number, part in enumerate(parts) if is_text(part)), None)
    if first is None:
        return [{"type": "text", "text": text}, *parts]
    kept = [part for part in parts[first + 1 :] if not is_text(part)]
    return [*parts[:first], {**parts[first], "text": text}, *kept]


def merged(turns: Turns) -> Turns:
    """Return turns with neighbours of one role joined.

    Where calls of tools were left out, two turns of the user may follow each other, which some templates refuse.
    """
    found: list[Message] = []
    for turn in turns:
        if found and found[-1].role == turn.role:
            turn = Message(turn.role, f"{found.pop().content or ''}\n\n{turn.content or ''}")
        found.append(turn)
    return tuple(found)
