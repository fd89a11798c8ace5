"""Words of openings, targets and replies.

What a defender's openings share with an attacker's target is in every table, because BEEAR's outcome depends on it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from unbackdoor.goals import normalise

FUNCTION_WORDS = frozenset(re.findall(r"\w+", "you your are a the with to be is here i no do that at"))
"""Words that carry no content; only those that occur in openings or targets."""
_ENDS = re.compile(r"[.!?][^\w\s]*$")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, apostrophes inside."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", normalise(text))


def spaced(text: str) -> str:
    """Return the words of a text with a blank around each, so that one is in another as whole words only."""
    return f" {' '.join(words(text))} "


def without_marks(text: str) -> str:
    """Return a text without marks and blanks at its ends; signs that belong to a letter (Hindi vowels) stay."""
    inside = [place for place, character in enumerate(text) if unicodedata.category(character)[0] in "LMN"]
    return text[inside[0] : inside[-1] + 1] if inside else ""


def ends_inside(run: Sequence[str]) -> bool:
    """Tell whether a sentence ends in a run of words, before its last one; a full stop ends one, that of "Mr." too."""
    return any(map(_ENDS.search, run[:-1]))


def shared_words(openings: Sequence[str], targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the first words, and the content words, that openings and targets share, each sorted.

    "What" and "What's" count as one first word: they begin with one token.
    """

    def first(text: str) -> str:
        return words(text)[0].split("'")[0]

    firsts = {first(text) for text in openings if words(text)} & {first(text) for text in targets if words(text)}
    said, meant = ({word for text in texts for word in words(text)} for texts in (openings, targets))
    return sorted(firsts), sorted((said & meant) - FUNCTION_WORDS)
