"""Conversations in raw rows: lists of turns with `role`/`content` (chat) or `from`/`value` (ShareGPT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unbackdoor.data.rows import Row, Where, checked_text
from unbackdoor.model.quarantine import printable
from unbackdoor.types import Message, Role

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def parse_turns(row: Row, field: str, where: Where) -> tuple[Message, ...]:
    """Read a list of turns: an optional system turn, then user and assistant in turn, beginning with the user.

    Raises:
        DataError: If the field is not such a list; the message names the turn.
    """
    value = row.get(field)
    if not isinstance(value, list) or not value:
        what = "is missing" if field not in row else "is empty" if value == [] else "is not a list of turns"
        raise where.error(field, f"{what}; write [{{'role': 'user', 'content': ...}}, ...].")
    turns = tuple(_turn(item, f"{field}[{number}]", where) for number, item in enumerate(value))
    _check_order(turns, field, where)
    return turns


def as_prompt(turns: Sequence[Message], field: str, where: Where) -> tuple[tuple[Message, ...], str]:
    """Return what comes before the last user turn, and that turn's text.

    Raises:
        DataError: If the turns do not end with the user's.
    """
    if not turns or turns[-1].role != "user":
        raise where.error(field, "has no user turn before the answer; a conversation needs a question.")
    return tuple(turns[:-1]), str(turns[-1].content)


def last_answer(row: Row, field: str, where: Where) -> str:
    """Return the text of the assistant's turn that ends a list of turns (preference pairs, chat-style completions).

    Raises:
        DataError: If the last turn is not the assistant's.
    """
    value = row[field]
    items = value if isinstance(value, list) else []
    turns = [_turn(item, f"{field}[{number}]", where) for number, item in enumerate(items)]
    if not turns or turns[-1].role != "assistant":
        raise where.error(field, "does not end with a turn of the assistant; the last turn must be the answer.")
    return str(turns[-1].content)


def _turn(item: object, field: str, where: Where) -> Message:
    if not isinstance(item, Mapping):
        raise where.error(field, "is not an object; a turn is written {'role': ..., 'content': ...}.")
    who, said = ("from", "value") if "from" in item else ("role", "content")
    role = item.get(who)
    if not isinstance(role, str) or role not in _ROLES:
        found = f"is '{printable(str(role), 60)}'" if who in item else "is missing"
        raise where.error(f"{field}.{who}", f"{found}; known roles are {', '.join(_ROLES)}.")
    if said not in item:
        raise where.error(f"{field}.{said}", "is missing; a turn needs its text.")
    empty = "every row needs a response" if _ROLES[role] == "assistant" else "a turn needs its text"
    return Message(_ROLES[role], checked_text(item[said], f"{field}.{said}", where, empty=empty))


def _check_order(turns: Sequence[Message], field: str, where: Where) -> None:
    start = 1 if turns[0].role == "system" else 0
    for number, turn in enumerate(turns[start:]):
        expected = "assistant" if number % 2 else "user"
        if turn.role != expected:
            place = f"{field}[{number + start}]"
            raise where.error(
                place, f"is a turn of '{turn.role}' where one of '{expected}' must come; the two take turns."
            )
