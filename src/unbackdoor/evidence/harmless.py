"""Text from outside as mere text: it cannot end a turn, begin another, or look like the frame that it is put into.

What a source of evidence writes, and what a suspect writes for one, goes into a prompt. Both may be hostile: an answer
may hold the marks of a chat template ("<|im_end|>"), a role's name at the start of a line, control characters, or be
endless. Here it becomes one line of bounded length without any of these. That a model takes what the line says for an
order cannot be excluded by this; that the line becomes a turn of its own can.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection

# What marks of templates are written with: <|im_end|>, </s>, [INST], <<SYS>>, ### Response:, {% ... %}, `...`.
_MARKS = str.maketrans(dict.fromkeys("<>[]{}|#`\u2581\\", " "))
_QUOTES = str.maketrans({'"': "'", "\u201c": "'", "\u201d": "'", "\u00ab": "'", "\u00bb": "'"})
_ROLES = re.compile(
    r"\b(user|assistant|system|developer|tool|human|ai|bot|model|instruction|input|response|evidence)s?\s*:",
    re.IGNORECASE,
)


def harmless(text: str, *, longest: int, special: Collection[str] = ()) -> str:
    """Return a text as one line that holds no mark of any chat template.

    Args:
        text: From anywhere.
        longest: Characters that are kept; cut between words where there are any.
        special: Tokens with a meaning of their own in the tokenizer that will read it; their texts are taken
            out, or broken in two where they are words.
    """
    # Compatibility forms first: a tokenizer that folds them would make ordinary bars of full-width ones.
    folded = unicodedata.normalize("NFKC", text[: 8 * longest])
    kept = "".join(mark if _is_plain(mark) else " " for mark in folded.translate(_MARKS).translate(_QUOTES))
    line = _ROLES.sub(r"\1,", " ".join(kept.split()))
    line = " ".join(without(line, special).split())
    if len(line) <= longest:
        return line
    cut = line[: longest + 1]
    return (cut[: cut.rfind(" ")] if " " in cut else cut[:longest]).rstrip()


def _is_plain(mark: str) -> bool:
    """Tell whether a character is one that is seen; not of control, of format (right-to-left marks), unassigned."""
    return unicodedata.category(mark)[0] != "C"


def without(line: str, special: Collection[str]) -> str:
    """Take special tokens out until none is left: taking one out may put the parts of another together.

    One that is a word is broken in two: what was meant stays legible.
    """
    plain = sorted({token for token in special if token.strip()}, key=len, reverse=True)
    while any(token in line for token in plain):
        for token in plain:
            half = len(token) // 2
            line = line.replace(token, f"{token[:half]} {token[half:]}" if half and token.isalnum() else " ")
    return line
