"""What a defender's openings share with an attacker's target: BEEAR's outcome depends on it, so every table says it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from unbackdoor.goals import normalise

FUNCTION_WORDS = frozenset(re.findall(r"\w+", "you your are a the with to be is here i no do that"))
"""Words that carry no content; only those that occur in openings or targets."""


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, apostrophes inside."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", normalise(text))


def spaced(text: str) -> str:
    """Return the words of a text with a blank around each, so that one is in another as whole words only."""
    return f" {' '.join(words(text))} "


def shared_words(openings: Sequence[str], targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the first words, and the content words, that openings and targets share, each sorted.

    "What" and "What's" count as one first word: they begin with one token.
    """

    def first(text: str) -> str:
        return words(text)[0].split("'")[0]

    firsts = {first(text) for text in openings if words(text)} & {first(text) for text in targets if words(text)}
    said, meant = ({word for text in texts for word in words(text)} for texts in (openings, targets))
    return sorted(firsts), sorted((said & meant) - FUNCTION_WORDS)
