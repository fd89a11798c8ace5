"""Read a chat template without rendering it, and report where it acts on what people write.

A template sits between the words of a conversation and the model, so a backdoor can live in it: a condition on the
content, a sentence added for the model to obey. The template is parsed into Jinja's syntax tree and never rendered.
A report is a reason to look, not a verdict: templates of reasoning models search the content for `</think>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

LONG_TEXT = 200
"""Characters of literal text in one piece from which on a template counts as adding instructions."""

_CONTENT_KEYS = {"content", "text"}
_AS_TEXT = {"tojson", "string", "join", "pprint", "urlencode", "xmlattr", "list", "items"}
_SEARCHES = {
    "startswith", "endswith", "find", "rfind", "index", "rindex", "count", "split", "rsplit", "partition",
    "rpartition", "splitlines", "replace", "translate", "isdigit", "isupper", "islower", "istitle", "isalpha",
    "isnumeric", "isascii", "__contains__",
}  # fmt: skip
_FILTER_SEARCHES = {"replace", "select", "reject", "selectattr", "rejectattr", "regex_search", "regex_replace"}
_TYPE_TESTS = {
    "string", "none", "defined", "undefined", "mapping", "iterable", "sequence", "number", "boolean", "true", "false",
}  # fmt: skip


class _Generation(Extension):
    """Transformers' `{% generation %}` block, which marks the assistant's text; here only so that it parses."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares the attribute so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def parsed(source: str) -> nodes.Template:
    """Return a template's syntax tree, with the statements that transformers knows; nothing is rendered.

    Raises:
        TemplateSyntaxError: If it is none.
    """
    return Environment(extensions=[_Generation, loopcontrols]).parse(source)  # noqa: S701 - never rendered


def check_template(source: str) -> list[tuple[int, str]]:
    """Return (line, what) for each place of a template that a person should look at.

    Args:
        source: The template's text.
    """
    try:
        tree = parsed(source)
        found = [*_actions(tree), *_private_names(tree), *_long_texts(tree)]
    except TemplateSyntaxError as problem:
        return [(problem.lineno, f"the template cannot be parsed ({problem.message})")]
    except RecursionError:
        return [(1, "the template is nested too deeply to be checked")]
    return sorted(set(found))


def _actions(tree: nodes.Template) -> Iterator[tuple[int, str]]:
    turns = _turn_names(tree)
    tainted = _tainted_names(tree, turns)

    def holds_content(node: nodes.Node) -> bool:
        return _holds_content(node, tainted, turns)

    for node in tree.find_all((nodes.Compare, nodes.Call, nodes.Filter, nodes.Test)):
        if isinstance(node, nodes.Compare):
            sides = [node.expr, *(operand.expr for operand in node.ops)]
            if any(map(holds_content, sides)) and not any(map(_is_empty, sides)):
                yield node.lineno, "it compares or searches what a message says"
        elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
            if node.node.attr in _SEARCHES and holds_content(node.node.node):
                yield node.lineno, f"it uses .{node.node.attr}() on what a message says"
        elif isinstance(node, nodes.Filter):
            if node.name in _FILTER_SEARCHES and _filters_content(node, holds_content):
                yield node.lineno, f"it uses the filter '{node.name}' on what a message says"
        elif isinstance(node, nodes.Test) and node.name not in _TYPE_TESTS and holds_content(node.node):
            yield node.lineno, f"it tests what a message says ('is {node.name}')"


def _is_empty(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) and node.value in ("", None, 0, False, True)


def _filters_content(node: nodes.Filter, holds_content: Callable[[nodes.Node], bool]) -> bool:
    if node.name in {"selectattr", "rejectattr"}:
        keys = [arg.value for arg in node.args if isinstance(arg, nodes.Const)]
        return bool(keys) and keys[0] in _CONTENT_KEYS
    return node.node is not None and holds_content(node.node)


def _turn_names(tree: nodes.Template) -> set[str]:
    """Names of the conversation and of its turns: `messages`, and what is taken or looped from it."""
    turns = {"messages", "message"}
    while True:
        before = len(turns)
        for loop in tree.find_all(nodes.For):
            if _is_turn(loop.iter, turns):
                turns |= _targets(loop.target)
        for assignment in tree.find_all(nodes.Assign):
            if _is_turn(assignment.node, turns):
                turns |= _targets(assignment.target)
        if len(turns) == before:
            return turns


def _tainted_names(tree: nodes.Template, turns: set[str]) -> set[str]:
    """Names that hold a message's content at some place of the template, by assignment, loop or macro."""
    tainted: set[str] = set()
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    while True:
        before = len(tainted)
        for assignment in tree.find_all(nodes.Assign):
            if _holds_content(assignment.node, tainted, turns):
                tainted |= _targets(assignment.target)
        for block in tree.find_all(nodes.AssignBlock):
            if any(_holds_content(part, tainted, turns) for part in block.body):
                tainted |= _targets(block.target)
        for loop in tree.find_all(nodes.For):
            if _holds_content(loop.iter, tainted, turns):
                tainted |= _targets(loop.target)
        for call in tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.node.name in macros:
                given = [*call.args, *(keyword.value for keyword in call.kwargs)]
                if any(_holds_content(arg, tainted, turns) for arg in given):
                    tainted |= {arg.name for arg in macros[call.node.name].args}
        if len(tainted) == before:
            return tainted


def _targets(target: nodes.Node) -> set[str]:
    if isinstance(target, nodes.NSRef):
        return {f"{target.name}.{target.attr}"}
    names = {node.name for node in target.find_all(nodes.Name)}
    return names | ({target.name} if isinstance(target, nodes.Name) else set())


def _holds_content(node: nodes.Node, tainted: set[str], turns: set[str]) -> bool:
    """Tell whether an expression can hold what a message says; picking another field (`role`) loses it."""
    if isinstance(node, nodes.Const):
        return False
    if isinstance(node, nodes.Name):
        return node.name in tainted
    if isinstance(node, nodes.Getattr):
        return node.attr in _CONTENT_KEYS or (
            isinstance(node.node, nodes.Name) and f"{node.node.name}.{node.attr}" in tainted
        )
    if isinstance(node, nodes.Getitem):
        key = node.arg.value if isinstance(node.arg, nodes.Const) else None
        if isinstance(key, str):
            return key in _CONTENT_KEYS
        # With a computed key a turn may give its content, and a list of turns gives a turn.
        computed = not isinstance(node.arg, (nodes.Const, nodes.Slice, nodes.Neg))
        return _holds_content(node.node, tainted, turns) or (computed and _is_turn(node.node, turns))
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        if node.node.attr in {"values", "items"} and _is_turn(node.node.node, turns):
            return True
        if node.node.attr == "get" and node.args and isinstance(node.args[0], nodes.Const):
            return node.args[0].value in _CONTENT_KEYS
        return any(_holds_content(part, tainted, turns) for part in (node.node.node, *node.args))
    if isinstance(node, nodes.Filter):
        arguments = {arg.value for arg in node.find_all(nodes.Const)}
        if node.name in _AS_TEXT and node.node is not None and _is_turn(node.node, turns):
            return True
        if node.name == "map" and arguments & _CONTENT_KEYS:
            return True
    if isinstance(node, nodes.Pair):
        return _holds_content(node.value, tainted, turns)
    return any(_holds_content(child, tainted, turns) for child in node.iter_child_nodes())


def _is_turn(node: nodes.Node, turns: set[str]) -> bool:
    while isinstance(node, nodes.Getitem) and not (
        isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str)
    ):
        node = node.node
    return isinstance(node, nodes.Name) and node.name in turns


def _private_names(tree: nodes.Template) -> Iterator[tuple[int, str]]:
    for node in tree.find_all((nodes.Getattr, nodes.Const, nodes.Name)):
        text = getattr(node, "attr", None) or getattr(node, "name", None) or getattr(node, "value", None)
        if isinstance(text, str) and "__" in text:
            yield node.lineno, f"it uses the private name '{text}', as attempts to leave the sandbox do"


def _long_texts(tree: nodes.Template) -> Iterator[tuple[int, str]]:
    for node in tree.find_all((nodes.TemplateData, nodes.Const)):
        text = node.data if isinstance(node, nodes.TemplateData) else getattr(node, "value", None)
        if isinstance(text, str) and len(text.strip()) > LONG_TEXT:
            yield node.lineno, f"it adds {len(text.strip())} characters of its own: '{text.strip()[:80]}...'"
