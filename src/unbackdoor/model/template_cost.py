"""Find chat templates that are made to take for ever, and stop one that does.

A template is a program from the checkpoint that runs for every prompt. Two loops over a hundred thousand numbers, one
inside the other, are fifty characters and hours of work. What can be told from the text is reported before anything is
rendered; what cannot (a macro that calls itself twice) is counted while it is rendered. Memory is not counted: a text
that doubles itself some forty times still fills it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import TemplateSyntaxError, nodes

from unbackdoor.model.template_check import parsed

MOST_REPEATS = 1000
"""Largest number in a `range`, a product or a width; known templates count turns, tools or a few blanks."""

MOST_STEPS = 1_000_000
"""Lines of compiled template code in one rendering; a conversation of a hundred turns needs some thousands."""

_WIDTHS = {"center", "indent", "ljust", "rjust", "zfill", "batch", "slice", "wordwrap", "truncate"}


class TemplateTooLong(RuntimeError):
    """A rendering took more steps than any honest template needs."""


def check_cost(source: str) -> list[tuple[int, str]]:
    """Return (line, what) for each place of a template that is made to take very long or to fill the memory.

    Args:
        source: The template's text; one that cannot be parsed has no such place, as it cannot be rendered either.
    """
    try:
        return sorted({*_loops(parsed(source)), *_products(parsed(source))})
    except (TemplateSyntaxError, RecursionError):
        return []


def _loops(tree: nodes.Template) -> Iterator[tuple[int, str]]:
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in {"range", "lipsum"}:
            numbers = list(_numbers([*call.args, *(keyword.value for keyword in call.kwargs)]))
            if max(numbers, default=0) > MOST_REPEATS:
                yield call.lineno, f"it counts to {max(numbers)}"
    for loop in tree.find_all(nodes.For):
        inner = [part for body in (loop.body, loop.else_) for node in body for part in _with_all(node)]
        if _is_range(loop.iter) and any(isinstance(part, nodes.For) and _is_range(part.iter) for part in inner):
            yield loop.lineno, "it counts inside of counting (a range in a range)"


def _with_all(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    yield from node.find_all(nodes.Node)


def _is_range(node: nodes.Node) -> bool:
    """Tell whether it is a `range` of written numbers; one of the number of turns is counted while rendering."""
    for call in _with_all(node):
        if isinstance(call, nodes.Call) and isinstance(call.node, nodes.Name) and call.node.name == "range":
            return not any(isinstance(part, nodes.Name) for arg in call.args for part in _with_all(arg))
    return False


def _products(tree: nodes.Template) -> Iterator[tuple[int, str]]:
    for power in tree.find_all(nodes.Pow):
        yield power.lineno, "it raises to a power"
    for node in tree.find_all((nodes.Mul, nodes.Filter, nodes.Call)):
        given: list[nodes.Node] = []
        if isinstance(node, nodes.Mul):
            given = [node.left, node.right]
        elif isinstance(node, nodes.Filter) and node.name in _WIDTHS:
            given = [*node.args, *(keyword.value for keyword in node.kwargs)]
        elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr in _WIDTHS:
            given = [*node.args]
        largest = max(_numbers(given), default=0)
        if largest > MOST_REPEATS:
            yield node.lineno, f"it repeats or widens a text {largest} times"


def _numbers(given: Sequence[nodes.Node]) -> Iterator[int]:
    """The whole numbers that are written in some expressions; a sum or product of numbers counts as its parts."""
    for expression in given:
        for node in _with_all(expression):
            if isinstance(node, nodes.Const) and type(node.value) is int:
                yield node.value


@contextmanager
def bounded_steps(most: int = MOST_STEPS) -> Iterator[None]:
    """Stop what is rendered inside the block after `most` lines of template code.

    Only code that Jinja compiled is counted, so that the libraries around it cost next to nothing. A debugger or a
    coverage tool that traces the process goes on seeing everything else.

    Raises:
        TemplateTooLong: From the template's own code, where it takes more steps.
    """
    left, earlier = most, sys.gettrace()

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left < 0:
                raise TemplateTooLong(f"it takes more than {most:,} steps for one conversation")
        return count

    def enter(frame: FrameType, event: Any, argument: object) -> Any:
        if frame.f_code.co_filename == "<template>":
            return count
        return None if earlier is None else earlier(frame, event, argument)

    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(earlier)
