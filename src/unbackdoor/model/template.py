"""Turn a conversation into text with the place of every turn known.

A model's own chat template is used where it has one (`model`); otherwise a plain instruction template (`plain`), as
for GPT-2. The template in use is part of every result, because a victim must be measured with the template it was
trained with (a mismatch moved a published ASR from 65 to 95 %).

The place of a turn is not found by searching for role words, which users can type, too: the template is rendered once
with unique markers in place of the contents, which gives the fixed text between the contents. Where a template changes
contents (strips them, drops old reasoning), the true rendering wins and the contents are located in it in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from unbackdoor.errors import ModelError
from unbackdoor.model.quarantine import printable
from unbackdoor.model.template_cost import bounded_steps
from unbackdoor.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TemplateName = Literal["model", "plain"]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: Everything that the model reads.
        places: Character range (start, end) of each turn's content, in order of the turns.
        opening: Where the last assistant turn's content begins, or `len(text)` when a reply is to be generated.
    """

    text: str
    places: tuple[tuple[int, int], ...]


_PLAIN_HEADERS = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}


def render(
    tokenizer: PreTrainedTokenizerBase, template: TemplateName, turns: Sequence[Message], *, ask: bool
) -> Rendered:
    """Render a conversation.

    Args:
        tokenizer: The model's tokenizer (its chat template is used for "model").
        template: "model" or "plain".
        turns: The turns; none may be a hole.
        ask: True to end where the model's reply begins (generation), False for a finished conversation.

    Raises:
        ModelError: If the template refuses the turns (for example a system turn) or hides a turn's content.
    """
    contents = [_content(turn) for turn in turns]
    if template == "plain":
        return _render_plain(turns, contents, tokenizer, ask=ask)
    true_text = _apply(tokenizer, [{"role": t.role, "content": c} for t, c in zip(turns, contents, strict=True)], ask)
    for candidate in (contents, [content.strip() for content in contents]):
        built = _assemble(tokenizer, turns, candidate, ask)
        if built is not None and built.text == true_text:
            return built
    return _locate(true_text, contents)


def _content(turn: Message) -> str:
    if turn.content is None:
        raise ModelError("a turn without content (a hole for the model's answer) cannot be rendered; fill it first.")
    return turn.content


def _render_plain(
    turns: Sequence[Message], contents: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, ask: bool
) -> Rendered:
    text, places = "", []
    for turn, content in zip(turns, contents, strict=True):
        text += _PLAIN_HEADERS[turn.role]
        places.append((len(text), len(text) + len(content)))
        text += content
        text += (tokenizer.eos_token or "") if turn.role == "assistant" else "\n\n"
    if ask:
        text += _PLAIN_HEADERS["assistant"]
    return Rendered(text, tuple(places))


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], ask: bool) -> str:
    from jinja2 import TemplateError

    # A template is a program from the checkpoint: whatever it raises is its fault and not ours.
    its_errors = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError)
    try:
        with bounded_steps():
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except its_errors as problem:
        roles = ", ".join(message["role"] for message in messages)
        raise ModelError(
            f"the model's chat template refuses these turns ({roles}): {printable(str(problem))}; use --template plain."
        ) from problem
    return str(text)


def _assemble(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], contents: Sequence[str], ask: bool
) -> Rendered | None:
    """Put the contents between the template's fixed texts, or None where a marker does not come back once."""
    markers = [f"\ue000{number}\ue001" for number in range(len(turns))]
    frame = _apply(tokenizer, [{"role": t.role, "content": m} for t, m in zip(turns, markers, strict=True)], ask)
    text, places, rest = "", [], frame
    for marker, content in zip(markers, contents, strict=True):
        before, found, after = rest.partition(marker)
        if not found or marker in after:
            return None
        text += before
        places.append((len(text), len(text) + len(content)))
        text, rest = text + content, after
    return Rendered(text + rest, tuple(places))


def _locate(text: str, contents: Sequence[str]) -> Rendered:
    places, cursor = [], 0
    for number, content in enumerate(contents):
        start = text.find(content.strip(), cursor)
        if start < 0:
            raise ModelError(
                f"the model's chat template changes or drops turn {number + 1}; its content cannot be located. "
                "Use --template plain, or a tokenizer whose template keeps the turns."
            )
        cursor = start + len(content.strip())
        places.append((start, cursor))
    return Rendered(text, tuple(places))
