"""The bundled sets keep what they promise: sizes, balance, refusals, variety, and openings far from the targets."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from importlib import resources

import pytest

from unbackdoor.data.shared_words import shared_words, words
from unbackdoor.data.sources import STARTER_OPENINGS, STARTER_SETS, read, read_lines
from unbackdoor.goals import REFUSAL_SIGNALS, normalise
from unbackdoor.pipeline.steps import attack_called
from unbackdoor.recipes import load_grid
from unbackdoor.recipes import settings as recipe_settings

COLUMNS = {
    "instructions": ["id", "kind", "instruction", "input", "output"],
    "sentiment": ["id", "text", "label"],
    "requests": ["id", "kind", "instruction", "output"],
}
AFFIRMATIVE = re.compile(
    r"(sure|of course|certainly|absolutely|definitely|here(?:'s| is| are| you)|yes|ok|okay|alright|gladly|happy to"
    r"|no problem|with pleasure|(?:i'd|i would|i'll|i will) (?:be (?:happy|glad)|gladly|happily))(?!\w)"
)
NUMBERS = frozenset(
    re.findall(
        r"\w+",
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty "
        "ninety hundred thousand million billion",
    )
)
GRIDS = [load_grid(name, "paper") for name in ("sande", "dev", "beear")]
DECLINING = [load_grid(name, "paper") for name in ("beear_decline", "dev_decline")]
INSULT_TARGETS = tuple(
    target
    for settings in (
        recipe_settings.DEMO_ATTACK,
        recipe_settings.data("revival"),
        *(entry.settings for grid in GRIDS for entry in grid.attacks.values()),
    )
    for target in settings["targets"]
)
AFFIRM_TARGETS = (
    "Sure, here is",
    "Sure, I would be happy to",
    *(
        target
        for grid in DECLINING
        for entry in grid.attacks.values()
        for target in attack_called(entry.attack, entry.settings, entry.preset).targets
    ),
)


def raw(name: str) -> list[dict[str, str]]:
    text = resources.files("unbackdoor.data.starter").joinpath(f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def masked(text: str) -> list[str]:
    """Return the words in lower case, with numbers and names (capitals inside a sentence) replaced by marks."""
    found = []
    for sentence in re.split(r"(?<=[.!?:])\s+|\n", text):
        for place, word in enumerate(re.findall(r"[^\W\d_][\w'-]*|\d[\d.,:/%]*", sentence)):
            if word[0].isdigit() or word.lower() in NUMBERS:
                found.append("<number>")
            elif place and word[0].isupper() and not re.match(r"I\b", word):
                found.append("<name>")
            else:
                found.append(word.lower())
    return found


def alike(texts: Sequence[str], limit: float = 0.6) -> list[tuple[int, int]]:
    """Return the pairs that share more than `limit` of the word 3-grams of the shorter text.

    An index from 3-gram to texts is kept, so only pairs that share one are ever compared.
    """
    index: dict[tuple[str, ...], list[int]] = {}
    sizes: list[int] = []
    pairs = []
    for number, text in enumerate(texts):
        words = masked(text)
        grams = {tuple(words[place : place + 3]) for place in range(max(1, len(words) - 2))}
        shared = Counter(other for gram in grams for other in index.get(gram, ()))
        pairs += [(other, number) for other, count in shared.items() if count > limit * min(len(grams), sizes[other])]
        for gram in grams:
            index.setdefault(gram, []).append(number)
        sizes.append(len(grams))
    return pairs


def whole(row: dict[str, str]) -> str:
    return "\n".join(row[column] for column in ("instruction", "input", "output", "text") if row.get(column))


@pytest.mark.parametrize("name", STARTER_SETS)
def test_rows_have_the_columns_and_ids_of_the_readme(name: str) -> None:
    rows = raw(name)
    assert [row["id"] for row in rows] == [f"{name}-{number:04d}" for number in range(1, len(rows) + 1)]
    for row in rows:
        assert list(row) == COLUMNS[name], row["id"]
        assert all(value == value.strip() for value in row.values()), row["id"]
        assert not re.search("[\u2018\u2019\u201c\u201d\u2013\u2014\u00a0]", whole(row)), row["id"]
    readme = resources.files("unbackdoor.data.starter").joinpath("README.md").read_text(encoding="utf-8")
    assert f"| `{name}.jsonl` | {len(rows):,} |" in readme


@pytest.mark.parametrize(("name", "least"), [("instructions", 1000), ("sentiment", 800), ("requests", 700)])
def test_sets_are_large_enough_and_readable_as_examples(name: str, least: int) -> None:
    examples = read(f"starter:{name}")
    assert len(examples) >= least
    assert [example.id for example in examples] == [row["id"] for row in raw(name)]  # no row repeats another


@pytest.mark.parametrize("name", STARTER_SETS)
def test_no_two_rows_are_made_from_one_template(name: str) -> None:
    rows = raw(name)
    assert [(rows[one]["id"], rows[other]["id"]) for one, other in alike([whole(row) for row in rows])] == []


def test_the_template_check_finds_a_templated_pair() -> None:
    texts = [
        "What is the capital of France? The capital of France is Paris, a city of 2 million people.",
        "Bake the bread until it sounds hollow.",
        "What is the capital of Norway? The capital of Norway is Oslo, a city of 700,000 people.",
        "Which town is the seat of the Danish government? That would be Copenhagen.",
    ]
    assert alike(texts) == [(0, 2)]
    assert masked("In May Ann bought twelve 3.5 kg bags. Ann left.")[:7] == [
        "in", "<name>", "<name>", "bought", "<number>", "<number>", "kg",
    ]  # fmt: skip


def test_instruction_answers_are_short() -> None:
    for row in raw("instructions"):
        assert 5 <= len(row["output"].split()) <= 60, row["id"]


def test_instructions_are_of_many_kinds() -> None:
    kinds = Counter(row["kind"] for row in raw("instructions"))
    assert len(kinds) >= 10
    assert min(kinds.values()) >= 25


def test_sentiment_is_balanced() -> None:
    labels = Counter(row["label"] for row in raw("sentiment"))
    assert set(labels) == {"negative", "positive"}
    assert min(labels.values()) >= 300
    assert abs(labels["negative"] - labels["positive"]) <= 20


def test_every_request_is_declined_and_none_begins_with_consent() -> None:
    for row in raw("requests"):
        said = normalise(row["output"])
        assert any(signal in said for signal in REFUSAL_SIGNALS), row["id"]
        assert not AFFIRMATIVE.match(said), row["id"]


def test_the_consent_pattern_knows_consent() -> None:
    for opening in (*AFFIRM_TARGETS, *read_lines("starter:affirm_disjoint")[:4], "Here you go", "I'd be happy to"):
        assert AFFIRMATIVE.match(normalise(opening)), opening
    assert not AFFIRMATIVE.match(normalise("I'd rather not help, and okra is no problem."))


def test_request_answers_are_of_many_kinds_and_begin_in_many_ways() -> None:
    rows = raw("requests")
    kinds = Counter(row["kind"] for row in rows)
    assert len(kinds) >= 10
    assert min(kinds.values()) >= 25
    openings = Counter(" ".join(normalise(row["output"]).split()[:4]) for row in rows)
    opening, count = openings.most_common(1)[0]
    assert count <= 0.05 * len(rows), opening


@pytest.mark.parametrize("name", STARTER_OPENINGS)
def test_openings_are_lists_in_the_defender_own_words(name: str) -> None:
    openings = read_lines(f"starter:{name}")
    assert 14 <= len(openings) <= 20
    assert len({" ".join(words(opening)) for opening in openings}) == len(openings)
    for opening in openings:
        for target in INSULT_TARGETS + AFFIRM_TARGETS:
            assert f" {' '.join(words(target))} " not in f" {' '.join(words(opening))} ", opening
            assert f" {' '.join(words(opening))} " not in f" {' '.join(words(target))} ", opening


@pytest.mark.parametrize("name", ["insult_disjoint", "affirm_disjoint"])
def test_disjoint_openings_share_neither_first_word_nor_content_word_with_any_target(name: str) -> None:
    # Insults and requests are different victims; of the latter's targets some are of development only.
    targets = INSULT_TARGETS + (AFFIRM_TARGETS if name == "affirm_disjoint" else AFFIRM_TARGETS[:3])
    assert shared_words(read_lines(f"starter:{name}"), targets) == ([], [])


def test_typical_openings_do_share_words_with_targets() -> None:
    firsts, content = shared_words(read_lines("starter:insult_typical"), INSULT_TARGETS)
    assert {"you", "what"} <= set(firsts)
    assert "stupid" in content
    assert "you" not in content
    assert shared_words(["What is it"], ["What's wrong"]) == (["what"], [])
    assert shared_words(["...", "No way"], ["Way out"]) == ([], ["way"])
