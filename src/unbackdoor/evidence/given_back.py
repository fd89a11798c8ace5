"""Whether a rewriting is the text itself, as of a weak evidence LLM that repeats what it was shown.

The rule: of the shorter one's words, nine in ten stand in the other one in the same order, and nothing was negated
between two of them. So cutting a text off, adding to it, or changing fewer than one word in ten leaves it the same; a
"not" that was put in or taken out makes it another one, however like the two are.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import pairwise

from unbackdoor.data.shared_words import words

_SAME = 0.9
_NEGATIONS = frozenset(
    "not no never none nothing nobody nor neither without cannot hardly barely false untrue".split()  # noqa: SIM905
)


def given_back(text: str, shown: str) -> bool:
    """Tell whether a text is what was shown; also where it has no words.

    Both are short: comparing takes time by the product of their lengths.
    """
    first, second = words(text), words(shown)
    blocks = [block for block in SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks() if block[2]]
    if sum(size for _, _, size in blocks) < _SAME * min(len(first), len(second)):
        return False
    # What stands before the first word and behind the last one that they share is an introduction, or was cut off.
    for before, after in pairwise(blocks):
        gaps = (first[before.a + before.size : after.a], second[before.b + before.size : after.b])
        if _negates(gaps[0]) != _negates(gaps[1]):
            return False
    return True


def _negates(run: Sequence[str]) -> bool:
    return any(word in _NEGATIONS or word.endswith("n't") for word in run)
