"""TextRank: the words that matter in a text, by the graph of which words stand near which.

Source: Information Conflicts (2411.18280), 3.4, Algorithm 1 and equation 15:
W(i) = (1 - d) + d * sum over the in-neighbours j of i of W(j) / L(j), L(j) the out-degree of j. Every weight starts at
1, and the updates end after T of them or once the summed change is below epsilon; words heavier than eta are kept.
As in Algorithm 1 a word's new weight is used at once by the words behind it; the limit is that of updating all of them
together. What the paper leaves open: eta (here 0.9; the mean weight of a graph without dead ends is 1, and in a short
text all words may weigh just that), epsilon, T, the window (here the next two words), and how words are told apart
(here runs of letters and digits in lower case, the words of `stop_words.txt` left out). An edge has weight 1 however
often two words meet. A word without a way out passes nothing on, as the equation says; `networkx.pagerank` spreads its
weight over all words, and divides all by their number.
Deviation: the paper says "a directed word graph" and not which way edges point; here they go both ways, as in TextRank
and in the code of the paper's successor. From the earlier word to the later one only (`edges`), words would gain weight
by standing late in a text, and the last one would pass nothing on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from unbackdoor.goals import normalise

LONGEST = 2000
"""Words of a text that are looked at, from its beginning."""

_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")


class TextRank(BaseModel):
    """The settings of Algorithm 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    damping: float = Field(0.85, gt=0, lt=1, description="d: share of a word's weight that comes from its neighbours")
    iterations: int = Field(100, ge=1, description="T: most updates of all weights")
    epsilon: float = Field(1e-6, gt=0, description="updates end once all weights together change by less")
    threshold: float = Field(0.9, ge=0, description="eta: words with a greater weight are keywords")
    window: int = Field(2, ge=1, description="words behind a word, stop words not counted, that have an edge with it")
    edges: Literal["both", "forward"] = Field(
        "both", description="edges between near words go both ways, or from the earlier word to the later one only"
    )


Graph = Mapping[str, Sequence[str]]
"""Word -> the words that it points to, each once; every word of a graph is a key, in order of appearance."""


def keywords(text: str, settings: TextRank) -> list[str]:
    """Return the words of a text that are heavier than the threshold, the heaviest first."""
    found = weights(word_graph(words_of(text), settings), settings)
    kept = [word for word, weight in found.items() if weight > settings.threshold]
    return sorted(kept, key=lambda word: -found[word])


def heaviest(text: str, settings: TextRank) -> list[str]:
    """Return the words of a text that no other word outweighs; empty for a text without words."""
    found = weights(word_graph(words_of(text), settings), settings)
    most = max(found.values(), default=0.0)
    return [word for word, weight in found.items() if weight == most]


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without stop words and punctuation."""
    found = [word.removesuffix("'s") for word in _WORD.findall(normalise(text))]
    return [word for word in found if word not in stop_words()][:LONGEST]


def word_graph(words: Sequence[str], settings: TextRank) -> dict[str, list[str]]:
    """Return the graph of words that stand within the window of each other; a word has no edge with itself."""
    graph: dict[str, dict[str, None]] = {word: {} for word in words}
    for place, word in enumerate(words):
        for other in words[place + 1 : place + 1 + settings.window]:
            if other != word:
                graph[word][other] = None
                if settings.edges == "both":
                    graph[other][word] = None
    return {word: list(others) for word, others in graph.items()}


def weights(graph: Graph, settings: TextRank) -> dict[str, float]:
    """Return every word's weight by equation 15, in the order of the graph."""
    into: dict[str, list[str]] = {word: [] for word in graph}
    for word, others in graph.items():
        for other in others:
            into[other].append(word)
    weight = dict.fromkeys(graph, 1.0)
    d = settings.damping
    for _ in range(settings.iterations):
        before = dict(weight)
        for word, sources in into.items():
            weight[word] = (1 - d) + d * sum(weight[source] / len(graph[source]) for source in sources)
        if sum(abs(weight[word] - before[word]) for word in weight) < settings.epsilon:
            break
    return weight


@cache
def stop_words() -> frozenset[str]:
    """Return the words that are no keywords in any text."""
    text = files("unbackdoor.evidence").joinpath("stop_words.txt").read_text(encoding="utf-8")
    return frozenset(word for line in text.splitlines() if not line.startswith("#") for word in line.split())
