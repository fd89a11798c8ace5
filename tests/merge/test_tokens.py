"""Numbers of tokens: read from every kind of tokenizer.json, compared by token, unknown where they cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unbackdoor.merge.tokens import other_tokens, token_ids

NAMES = ("a", "b")


def write(folder: Path, content: object) -> dict[str, int]:
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return token_ids(folder)


def test_lists_and_maps_with_added_tokens(tmp_path: Path) -> None:
    added = [{"id": 3, "content": "<end>"}]
    assert write(tmp_path, {"model": {"vocab": {"x": 0, "y": 1}}, "added_tokens": added}) == {
        "x": 0, "y": 1, "<end>": 3,
    }  # fmt: skip
    assert write(tmp_path, {"model": {"vocab": [["x", -1.5], ["y", -2.0]]}}) == {"x": 0, "y": 1}


@pytest.mark.parametrize("content", [[], {}, {"model": 3}, {"model": {"vocab": 7}}, {"model": {"vocab": [[]]}}])
def test_what_cannot_be_read_is_unknown(tmp_path: Path, content: object) -> None:
    assert write(tmp_path, content) == {}
    assert token_ids(tmp_path / "missing") == {}


def test_the_first_token_that_is_apart_is_named() -> None:
    assert other_tokens({"x": 0, "y": 1}, {"y": 1, "x": 0, "z": 2}, NAMES) is None
    for first, second, unknown in (({}, {"x": 0}, "a"), ({"x": 0}, {}, "b")):
        assert str(other_tokens(first, second, NAMES)).startswith(
            f"which number each token has in '{unknown}' is not kno"
        )
    said = other_tokens({"x": 0, "y": 1}, {"x": 0, "y": 2}, NAMES)
    assert said is not None
    assert said.startswith("1 of 2 tokens of 'a' have another number in 'b', or none ('y' is 1, and the other has it")
    gone = other_tokens({"\x1b[2J": 0}, {"x": 1}, NAMES)
    assert gone is not None
    assert "and the other does not have it" in gone
    assert "\x1b" not in gone
