"""YAML that people write: plain values only, no key twice, and one kind of error for whatever is wrong with it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"


class YamlMistake(Exception):
    """A text that is no YAML, or YAML with a value that cannot be made.

    Attributes:
        what: What is wrong, without a full stop.
        line: Where, counted from 1; None where it cannot be told.
    """

    def __init__(self, what: str, line: int | None) -> None:
        """Keep what is wrong and where."""
        super().__init__(what)
        self.what = what
        self.line = line


def load_yaml(text: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        YamlMistake: If it is not YAML, a key is there twice, or a value is not what it looks like (`2026-13-45`).
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader that refuses double keys
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        what = " ".join(str(getattr(problem, "problem", None) or problem).split())
        raise YamlMistake(what, mark.line + 1 if mark is not None else None) from problem
    except RecursionError as problem:
        raise YamlMistake("it is nested too deeply", None) from problem


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a mapping with the same key twice, where PyYAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping after looking for double keys."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.MarkedYAMLError(problem="a key must be one text or number", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key}' is there twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Build a value; PyYAML lets the errors of `int`, `float` and `date` through as they are."""
        del deep
        try:
            # At once and not later: only so is a list noticed that holds itself (`&a [*a]`).
            return super().construct_object(node, deep=True)
        except (ValueError, TypeError, LookupError, AttributeError) as problem:
            value = f"'{node.value[:60]}'" if isinstance(node.value, str) else "this"
            what = f"{value} is no {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark) from problem
