"""Raw rows to `Example`: six schemas, told apart by the keys of the first row and then demanded of every row.

A bad row is never repaired or dropped: the error names file, line, field and fix. Rows keep their own ids where those
are unique; otherwise the id is a hash of the content, so that the same row has the same id in every file and slice,
and a split by id keeps copies of one row together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from unbackdoor.data.rows import Row, Where, names_of, optional_text, text_of
from unbackdoor.data.turns import as_prompt, last_answer, parse_turns
from unbackdoor.errors import UserError
from unbackdoor.model.quarantine import printable
from unbackdoor.types import Example, Message, content_hash

Schema = Literal["chat", "sharegpt", "alpaca", "prompt_completion", "classification", "preference"]

DEFAULT_PROMPT = "Classify the sentiment of this sentence as {labels}. Answer with one word.\n{text}"
"""Prompt of a classification row; a last line `{text}` becomes the example's `input`, so that triggers can go there."""

_DESCRIPTIONS = (
    "chat (messages)",
    "ShareGPT (conversations)",
    "Alpaca (instruction, input, output)",
    "prompt and completion (prompt, completion)",
    "classification (text, label)",
    "preference (prompt, chosen, rejected)",
)
_ID_KEYS = ("id", "idx", "question_id")
_KIND_KEYS = ("kind", "category")
_COPY = re.compile(r"(?<=.)#\d+$", re.DOTALL)


@dataclass(frozen=True)
class Parsed:
    """The rows of one source.

    Attributes:
        examples: One an input row, in order, ids unique.
        notices: What a person should know about them, one sentence each.
    """

    examples: tuple[Example, ...]
    notices: tuple[str, ...] = ()


def base_id(example_id: str) -> str:
    """Return the id without the "#2" that marks a repeated row: copies of one row share it."""
    return _COPY.sub("", example_id)


def detect(row: Row, *, where: Where, require_response: bool = True) -> Schema:
    """Tell the schema of a row from its keys; preference pairs win over the chat copy that often lies beside them.

    Args:
        row: The first row of a source.
        where: Its place, for the error.
        require_response: Whether a row without an answer is refused; otherwise `instruction` or `prompt` is enough.

    Raises:
        DataError: If the keys fit no schema; the message lists the keys and the schemas.
    """
    keys = set(row)
    if {"prompt", "chosen", "rejected"} <= keys:
        return "preference"
    if "messages" in keys:
        return "chat"
    if "conversations" in keys:
        return "sharegpt"
    if "instruction" in keys and (keys & {"output", "response"} or not require_response):
        return "alpaca"
    if "prompt" in keys and ("completion" in keys or not require_response):
        return "prompt_completion"
    if "label" in keys and keys & {"text", "sentence"}:
        return "classification"
    raise where.error(None, f"its fields ({names_of(row)}) fit no known schema; known are {'; '.join(_DESCRIPTIONS)}.")


def parse(
    row: Row,
    schema: Schema,
    *,
    where: Where,
    prompt_template: str | None = None,
    labels: Sequence[str] = (),
    require_response: bool = True,
) -> Example:
    """Turn one row into an `Example`.

    The id is the row's own (`id`, `idx`, `question_id`) or else a hash of the content; `parse_all` makes ids unique.

    Args:
        row: The raw row.
        schema: The schema that the first row had.
        where: File and line, for errors.
        prompt_template: For classification rows, with the fields `{text}` and, optionally, `{labels}`.
        labels: The class names: what `{labels}` lists, what a text label must be one of, and what a whole-number label
            counts into. May be empty where the template does not name them and labels are texts.
        require_response: Whether an empty or missing answer is an error.

    Raises:
        DataError: If a field is missing, empty, of the wrong type or not text that can be written as UTF-8.
    """
    if schema == "classification":
        example = _classification(row, where, prompt_template or DEFAULT_PROMPT, labels)
    elif schema in ("chat", "sharegpt"):
        example = _conversation(row, schema, where, require_response)
    elif schema == "alpaca":
        example = _alpaca(row, where, require_response)
    else:
        example = _prompted(row, schema, where, require_response)
    system = optional_text(row, "system", where)
    if system:
        if any(turn.role == "system" for turn in example.history):
            raise where.error("system", "repeats the system turn of the conversation; keep one of the two.")
        example = replace(example, history=(Message("system", system), *example.history))
    kind = next((optional_text(row, key, where) for key in _KIND_KEYS if isinstance(row.get(key), str)), "")
    named = row.get("label")
    # A row of a label task that is already a question and its answer, as `attack` writes them for the defender.
    if example.label is None and isinstance(named, str) and named == example.response:
        example = replace(example, label=named)
    return replace(example, id=_own_id(row, where) or _content_id(row, schema, example), kind=kind)


def parse_all(
    rows: Iterable[tuple[Where, object]],
    *,
    prompt_template: str | None = None,
    labels: Sequence[str] = (),
    require_response: bool = True,
) -> Parsed:
    """Parse every row of a source by the schema of its first row, and give the rows their final ids.

    A row that repeats an earlier one exactly keeps its place under the id of the first with "#2", "#3", ... behind it.
    Text labels that are not named beforehand are collected from all rows, sorted.

    Raises:
        DataError: On the first bad row.
    """
    checked = [(where, _as_row(value, where)) for where, value in rows]
    if not checked:
        return Parsed(())
    schema = detect(checked[0][1], where=checked[0][0], require_response=require_response)
    if schema == "classification" and not labels:
        labels = _collect_labels(checked)
    places = [where for where, _ in checked]
    examples = [
        parse(
            row, schema, where=where, prompt_template=prompt_template, labels=labels, require_response=require_response
        )
        for where, row in checked
    ]
    contents = [_content_id(row, schema, example) for (_, row), example in zip(checked, examples, strict=True)]
    return _with_final_ids(examples, contents, places)


def _with_final_ids(examples: Sequence[Example], contents: Sequence[str], places: Sequence[Where]) -> Parsed:
    own_ids = [example.id for example in examples]
    # Two different rows under one id: the id names neither of them.
    claimed = Counter(own for own, _ in set(zip(own_ids, contents, strict=True)))
    first: dict[str, int] = {}
    copies: Counter[str] = Counter()
    final: list[Example] = []
    notices: list[str] = []
    for number, (example, content) in enumerate(zip(examples, contents, strict=True)):
        if content in first:
            original = first[content]
            copies[content] += 1
            mine = f"{final[original].id}#{copies[content] + 1}"
            place, earlier = places[number], places[original]
            notices.append(f"{place} repeats {earlier.unit} {earlier.line} exactly; both are kept, in the same split.")
        else:
            first[content] = number
            # An own id that ends in "#2" would be taken for a copy of another row.
            mine = example.id if claimed[example.id] == 1 and base_id(example.id) == example.id else content
        final.append(replace(example, id=mine))
    return Parsed(tuple(final), tuple(notices))


def _content_id(row: Row, schema: Schema, example: Example) -> str:
    if schema == "classification":
        # The prompt is the reader's, not the row's: another template or one more class must not rename the rows.
        return content_hash([row.get("text", row.get("sentence")), example.label])
    turns = [(turn.role, turn.content) for turn in example.history]
    return content_hash([turns, example.instruction, example.input, example.response])


def _own_id(row: Row, where: Where) -> str | None:
    for key in _ID_KEYS:
        value = row.get(key)
        if isinstance(value, str) and value.strip():
            return text_of(row, key, where)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
    return None


def _as_row(value: object, where: Where) -> Row:
    if not isinstance(value, Mapping):
        raise where.error(None, f"is {type(value).__name__}, not an object; every row needs named fields in braces.")
    return value


def _conversation(row: Row, schema: Schema, where: Where, require_response: bool) -> Example:
    field = "messages" if schema == "chat" else "conversations"
    turns = parse_turns(row, field, where)
    if turns[-1].role == "assistant":
        history, question = as_prompt(turns[:-1], field, where)
        return Example("", question, str(turns[-1].content), history=history)
    if require_response:
        raise where.error(field, f"ends with a turn of '{turns[-1].role}'; the last turn must be the assistant's.")
    history, question = as_prompt(turns, field, where)
    return Example("", question, history=history)


def _alpaca(row: Row, where: Where, require_response: bool) -> Example:
    if row.get("history"):
        raise where.error("history", "cannot be read in an Alpaca row; write earlier turns as chat 'messages'.")
    field = "response" if "output" not in row and "response" in row else "output"
    return Example(
        "",
        text_of(row, "instruction", where),
        _answer(row, field, where, require_response),
        optional_text(row, "input", where),
    )


def _prompted(row: Row, schema: Schema, where: Where, require_response: bool) -> Example:
    if isinstance(row.get("prompt"), list):
        history, question = as_prompt(parse_turns(row, "prompt", where), "prompt", where)
    else:
        history, question = (), text_of(row, "prompt", where)
    field = "completion" if schema == "prompt_completion" else "chosen"
    if schema == "preference":
        # Not part of an Example, but a pair without its second half is a broken row.
        _answer_or_turns(row, "rejected", where, True)
    return Example("", question, _answer_or_turns(row, field, where, require_response), history=history)


def _answer_or_turns(row: Row, field: str, where: Where, required: bool) -> str:
    return last_answer(row, field, where) if isinstance(row.get(field), list) else _answer(row, field, where, required)


def _answer(row: Row, field: str, where: Where, required: bool) -> str:
    if required:
        return text_of(row, field, where, empty="every row needs a response")
    return optional_text(row, field, where)


def _classification(row: Row, where: Where, template: str, labels: Sequence[str]) -> Example:
    field = "text" if "text" in row else "sentence"
    text = text_of(row, field, where)
    label = _label(row, where, labels)
    instruction, own_line = _fill(template, text, labels)
    return Example("", instruction, label, text if own_line else "", label=label)


def _label(row: Row, where: Where, labels: Sequence[str]) -> str:
    value = row.get("label")
    if isinstance(value, str) and (value.strip() in labels or not value.strip().isdecimal()):
        label = text_of(row, "label", where).strip()
        if labels and label not in labels:
            raise where.error(
                "label", f"is '{printable(label, 60)}', which is none of the classes {', '.join(labels)}."
            )
        return label
    number = value
    if isinstance(value, str):
        number = int(value)  # CSV has no numbers, only texts made of digits.
    if isinstance(number, bool) or not isinstance(number, int):
        return text_of(row, "label", where)
    if not labels:
        raise where.error(
            "label", f"is the number {number}; name the classes in order in a recipe, as labels: [negative, positive]."
        )
    if not 0 <= number < len(labels):
        raise where.error("label", f"is {number}, but only the classes 0 to {len(labels) - 1} are named.")
    return labels[number]


def _collect_labels(rows: Sequence[tuple[Where, Row]]) -> tuple[str, ...]:
    found = {value.strip() for _, row in rows if isinstance(value := row.get("label"), str)}
    return () if any(label.isdecimal() for label in found) else tuple(sorted(found - {""}))


def _fill(template: str, text: str, labels: Sequence[str]) -> tuple[str, bool]:
    """Return the filled template, and whether its last line is the text alone (then left out for `input`)."""
    fields = re.findall(r"\{([^{}]*)\}", template)
    unknown = sorted(set(fields) - {"text", "labels"})
    if unknown or fields.count("text") != 1:
        problem = f"has the unknown field {{{unknown[0]}}}" if unknown else "must hold {text} exactly once"
        raise UserError(f"the prompt template {template!r} {problem}; its fields are {{text}} and {{labels}}.")
    head, own_line = template.removesuffix("\n{text}"), template.endswith("\n{text}")
    if own_line and not head.strip():
        head, own_line = template, False
    values = {"text": text, "labels": _either(labels)}
    return re.sub(r"\{(text|labels)\}", lambda found: values[found.group(1)], head), own_line


def _either(labels: Sequence[str]) -> str:
    return f"{', '.join(labels[:-1])} or {labels[-1]}" if len(labels) > 1 else "".join(labels)
