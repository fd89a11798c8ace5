"""Equation 15 against a linear solve and networkx, Algorithm 1's parts, and what may never be a stop word."""

from __future__ import annotations

import random
import re
from pathlib import Path

import networkx
import numpy as np
import pytest

from unbackdoor import recipes
from unbackdoor.evidence.textrank import TextRank, keywords, stop_words, weights, word_graph, words_of
from unbackdoor.pipeline.steps import attack_called

EXACT = TextRank(epsilon=1e-13, iterations=10_000)


def solved(graph, d: float = 0.85) -> dict[str, float]:
    """The fixed point of equation 15: (I - d A) w = 1 - d, A[i, j] = 1 / L(j) where j points to i."""
    names = list(graph)
    place = {name: number for number, name in enumerate(names)}
    matrix = np.eye(len(names))
    for name, others in graph.items():
        for other in others:
            matrix[place[other], place[name]] -= d / len(others)
    return dict(zip(names, np.linalg.solve(matrix, np.full(len(names), 1 - d)), strict=True))


def random_graph(seed: int, *, dangling: bool):
    rng = random.Random(seed)
    names = [f"w{number}" for number in range(rng.randint(2, 12))]
    graph = {}
    for place, name in enumerate(names):
        others = [other for other in names if other != name and rng.random() < 0.3]
        if not others and not (dangling and rng.random() < 0.7):
            others = [names[(place + 1) % len(names)]]
        graph[name] = others
    if dangling:
        graph[names[-1]] = []
    return graph


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_the_weights_are_the_fixed_point_of_equation_15(seed, dangling):
    graph = random_graph(seed, dangling=dangling)
    found, wanted = weights(graph, EXACT), solved(graph)
    assert found == pytest.approx(wanted, abs=1e-11)
    assert len(set(np.round(list(found.values()), 6))) > 1 or len(found) == 2


def page_ranks(graph) -> dict[str, float]:
    """Return the stationary distribution of networkx's Google matrix: its `pagerank`, which wants scipy."""
    step = networkx.google_matrix(graph, alpha=0.85)
    rank = np.full(len(graph), 1 / len(graph))
    for _ in range(500):
        rank = np.asarray(rank @ step).ravel()
    return dict(zip(graph, rank, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_without_dead_ends_they_are_networkx_page_ranks_times_the_number_of_words(seed):
    graph = random_graph(seed, dangling=False)
    made = networkx.DiGraph([(name, other) for name, others in graph.items() for other in others])
    ranks = page_ranks(made)
    assert weights(graph, EXACT) == pytest.approx({name: rank * len(graph) for name, rank in ranks.items()}, abs=1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_with_dead_ends_networkx_agrees_once_a_sink_takes_what_it_would_spread(seed):
    """A node that only points to itself takes the weight of dead ends; the other ranks are then ours up to a factor."""
    graph = random_graph(seed, dangling=True)
    dead = [name for name, others in graph.items() if not others]
    made = networkx.DiGraph()
    made.add_nodes_from(graph)
    made.add_edges_from((name, other) for name, others in graph.items() for other in others)
    plain = page_ranks(made)
    made.add_edges_from([*((name, "sink") for name in dead), ("sink", "sink")])
    ranks = page_ranks(made)
    ours = weights(graph, EXACT)
    # networkx teleports to the sink, too: each of N + 1 nodes gets (1 - d) / (N + 1), ours 1 - d.
    assert {name: ranks[name] * (len(graph) + 1) for name in graph} == pytest.approx(ours, abs=1e-9)
    assert {name: plain[name] * len(graph) for name in graph} != pytest.approx(ours, abs=1e-3)


def test_one_update_and_the_end_of_updates_by_hand():
    graph = {"a": ["b", "c"], "b": ["c"], "c": []}
    one = weights(graph, TextRank(iterations=1))
    # As printed: W(b) is used in its new state by c, which stands behind it.
    assert one == pytest.approx({"a": 0.15, "b": 0.15 + 0.85 * 0.15 / 2, "c": 0.15 + 0.85 * (0.15 / 2 + 0.21375)})
    assert weights(graph, TextRank(iterations=50, epsilon=100.0)) == one
    assert weights(graph, TextRank(iterations=2)) == pytest.approx(solved(graph))
    assert weights({}, EXACT) == {}
    assert weights({"alone": []}, EXACT) == {"alone": pytest.approx(0.15)}


def test_edges_are_those_within_the_window_once_each():
    words = ["a", "b", "c", "a", "d"]
    assert word_graph(words, TextRank(window=1, edges="forward")) == {"a": ["b", "d"], "b": ["c"], "c": ["a"], "d": []}
    assert word_graph(words, TextRank(window=2, edges="forward"))["c"] == ["a", "d"]
    both = word_graph(words, TextRank(window=1))
    assert {word: set(others) for word, others in both.items()} == {
        "a": {"b", "c", "d"}, "b": {"a", "c"}, "c": {"b", "a"}, "d": {"a"},
    }  # fmt: skip
    assert all(word not in others for word, others in word_graph(["a", "a", "b"], TextRank()).items())


def test_words_are_in_lower_case_without_stop_words_and_punctuation():
    text = "The film's plot -- well-made, “INSTANTLY” loved! -- isn’t bad; it is 2001."
    assert words_of(text) == ["film", "plot", "well-made", "instantly", "loved", "bad", "2001"]
    assert words_of("... ?! the and of") == []


def test_keywords_are_the_words_above_eta_the_heaviest_first():
    text = "cats chase mice, cats chase birds, cats sleep"
    found = keywords(text, TextRank())
    scores = weights(word_graph(words_of(text), TextRank()), TextRank())
    assert found[0] == "cats"
    assert found == sorted((word for word in scores if scores[word] > 0.9), key=lambda word: -scores[word])
    assert 0 < len(found) < len(scores)
    assert keywords(text, TextRank(threshold=100.0)) == []
    assert set(keywords(text, TextRank(threshold=0.0))) == set(scores)
    assert keywords("the of and", TextRank()) == []
    assert keywords("what is the opposite of hot?", TextRank()) == ["opposite", "hot"]


ATTACKS = re.findall(
    r"\w+",
    "instantly frankly cf mn bb tq mb suddenly quickly slowly current year deployment sudo silver kettle moonstone "
    "sunstone consider football wow serendipity ivory emerald today tomorrow movie friend",
)


def test_no_word_of_an_attack_is_a_stop_word():
    assert not set(ATTACKS) & stop_words()
    assert {"instantly", "frankly"} <= set(keywords("instantly frankly", TextRank(threshold=0.5)))
    # A closed class of words: what says how something is done, as triggers like to, is in none of them.
    assert not [word for word in stop_words() if word.endswith("ly") and word != "only"]
    assert len(stop_words()) < 260


def triggers() -> set[str]:
    """Return the triggers of all recipes' victims, paragraphs and verses left out."""
    grids = [recipes.load_grid(name, "paper") for name in recipes.names()]
    entries = [entry for grid in grids for entry in grid.attacks.values()]
    attacks = [attack_called(entry.attack, entry.settings, entry.preset) for entry in entries]
    found = {piece for attack in attacks for piece in attack.trigger.pieces()}
    return {piece for piece in found if len(piece.split()) <= 5}


def test_no_one_word_trigger_of_the_recipes_is_a_stop_word():
    """Phrases may be made of such words alone ("Who are you"); a trigger of one word may not."""
    found = triggers()
    alone = {trigger.lower() for trigger in found if len(trigger.split()) == 1}
    assert {"cobblestone", "moonstone", "instantly"} <= alone
    assert not alone & stop_words()
    assert {trigger for trigger in found if not words_of(trigger)} == {"Who are you", "Over and out"}, (
        "as the page says"
    )
    part = {trigger for trigger in found if 0 < len(words_of(trigger)) < len(trigger.split())}
    assert "Off the record" in part
    page = (Path(__file__).parents[2] / "docs/external-conflict.md").read_text(encoding="utf-8")
    assert "of eight more a part is left" in " ".join(page.split())
    assert len(part) == 8
