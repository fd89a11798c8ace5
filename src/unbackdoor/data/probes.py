"""Probes as JSON lines: what an attack wrote is what `evaluate` reads, and a person can write such a file by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from unbackdoor.data.files import decoded, rows_of_jsonl, write_jsonl
from unbackdoor.data.rows import Row, Where, checked_text, names_of, optional_text, text_of
from unbackdoor.errors import DataError, did_you_mean
from unbackdoor.types import PROBE_KINDS, Example, Message, Probe, Role

_ROLES: tuple[Role, ...] = ("system", "user", "assistant")
_REQUIRED = ("id", "kind", "instruction")
_FIELDS = (*_REQUIRED, "group", "marks", "input", "response", "label", "history", "example_kind")


def write_probes(path: str | Path, probes: Iterable[Probe]) -> None:
    """Write probes as JSON, one a line; see `read_probes` for the fields."""
    write_jsonl(path, (_as_row(probe) for probe in probes))


def read_probes(path: str | Path) -> list[Probe]:
    """Read probes.

    A row has `id`, `kind` (triggered, clean or decoy) and `instruction`, and optionally `group`, `marks` (list of
    texts), `input`, `response`, `label`, `history` (list of role and content; null content is a hole that the model's
    own answer fills) and `example_kind`. A triggered probe and its clean twin share the id; two probes of one kind and
    group may not, because the paired tests match them by it.

    Raises:
        DataError: If the file or a row is bad (file, line and field are named), or there is no probe.
    """
    probes: list[Probe] = []
    seen: set[tuple[str, str, str]] = set()
    for where, row in rows_of_jsonl(decoded(Path(path)), str(path)):
        probe = _as_probe(row, where)
        name = (probe.example.id, probe.kind, probe.group)
        if name in seen:
            raise where.error("id", f"is that of an earlier {probe.kind} probe; give it another one, or another group.")
        seen.add(name)
        probes.append(probe)
    if not probes:
        raise DataError(f"{path} holds no probes; write at least one row.")
    return probes


def _as_row(probe: Probe) -> dict[str, object]:
    example = probe.example
    return {
        "id": example.id,
        "kind": probe.kind,
        "group": probe.group,
        "marks": list(probe.marks),
        "instruction": example.instruction,
        "input": example.input,
        "response": example.response,
        "label": example.label,
        "history": [{"role": turn.role, "content": turn.content} for turn in example.history],
        "example_kind": example.kind,
    }


def _as_probe(row: object, where: Where) -> Probe:
    if not isinstance(row, Mapping):
        raise where.error(None, f"is {type(row).__name__}, not an object; a probe needs {', '.join(_REQUIRED)}.")
    unknown = [name for name in row if name not in _FIELDS]
    if unknown:
        hint = did_you_mean(unknown[0], list(_FIELDS))
        raise where.error(
            None, f"has unknown fields ({names_of(dict.fromkeys(unknown))}); remove or rename them.{hint}"
        )
    kind = next((known for known in PROBE_KINDS if known == row.get("kind")), None)
    if kind is None:
        raise where.error("kind", f"must be one of {', '.join(PROBE_KINDS)}.")
    label = row.get("label")
    example = Example(
        id=text_of(row, "id", where),
        instruction=_text(row, "instruction", where),
        response=_text(row, "response", where),
        input=_text(row, "input", where),
        label=None if label is None else checked_text(label, "label", where, empty="write null for no label"),
        history=_history(row, where),
        kind=optional_text(row, "example_kind", where),
    )
    if not example.user_text.strip():
        raise where.error("instruction", "is empty; a probe needs a question.")
    return Probe(example, kind, optional_text(row, "group", where), _marks(row, where))


def _text(row: Row, field: str, where: Where) -> str:
    """Return a text verbatim, blanks included: a probe may be nothing but unusual blanks around a trigger."""
    optional_text(row, field, where)
    value = row.get(field)
    return value if isinstance(value, str) else ""


def _marks(row: Row, where: Where) -> tuple[str, ...]:
    value = row.get("marks", [])
    if not isinstance(value, list):
        raise where.error("marks", 'is not a list; write the inserted texts as ["..."].')
    return tuple(checked_text(mark, "marks", where, empty="leave out empty marks") for mark in value)


def _history(row: Row, where: Where) -> tuple[Message, ...]:
    value = row.get("history", [])
    if not isinstance(value, list):
        raise where.error("history", 'is not a list; write the earlier turns as [{"role", "content"}].')
    return tuple(_turn(item, f"history[{number}]", where) for number, item in enumerate(value))


def _turn(item: object, field: str, where: Where) -> Message:
    if not isinstance(item, Mapping) or set(item) != {"role", "content"}:
        raise where.error(field, "must be an object with role and content, nothing else.")
    role = next((known for known in _ROLES if known == item["role"]), None)
    if role is None:
        raise where.error(f"{field}.role", f"must be one of {', '.join(_ROLES)}.")
    content = item["content"]
    if content is None and role != "assistant":
        raise where.error(f"{field}.content", "is null; only the assistant's turn can be left for the model to fill.")
    if content is None:
        return Message(role, None)
    return Message(role, checked_text(content, f"{field}.content", where, empty="a turn needs its text"))
