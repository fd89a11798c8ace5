"""Do two models number their tokens alike? Rows of embedding and head are merged by number, whatever they stand for.

Shapes do not tell: two tokenizers of one size may give the same row to different tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from unbackdoor.model.quarantine import printable

_SHOWN = 40
"""Characters of a token that are shown."""


def token_ids(folder: Path) -> dict[str, int]:
    """Return the ids of the tokens in a folder's tokenizer.json; empty where there is none that can be read so.

    Args:
        folder: A model's folder.
    """
    try:
        content = json.loads((folder / "tokenizer.json").read_bytes())
        listed = content["model"]["vocab"]
        # A unigram model lists its pieces with their scores, the others map them to ids.
        found = {piece[0]: number for number, piece in enumerate(listed)} if isinstance(listed, list) else dict(listed)
        found |= {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return {}
    return {str(token): number for token, number in found.items() if type(number) is int}


def other_tokens(first: Mapping[str, int], second: Mapping[str, int], names: tuple[str, str]) -> str | None:
    """Return a sentence for a person where two models number tokens differently, or that is not known, else None.

    Args:
        first: Token -> id of the suspect; empty where it is not known.
        second: The same of the other model.
        names: Both models' names, safe to print.
    """
    if not first or not second:
        unknown = names[0] if not first else names[1]
        return (
            f"which number each token has in '{unknown}' is not known (no tokenizer.json that can be read): if it is "
            "another one in the other model, their rows are merged with those of other tokens."
        )
    apart = [token for token, number in first.items() if second.get(token) != number]
    if not apart:
        return None
    token = apart[0]
    number = second.get(token)
    there = "does not have it" if number is None else f"has it as {number}"
    return (
        f"{len(apart)} of {len(first)} tokens of '{names[0]}' have another number in '{names[1]}', or none "
        f"('{printable(token[:_SHOWN])}' is {first[token]}, and the other {there}): their rows are merged with those "
        "of other tokens. Merge models that share a tokenizer."
    )
