"""Poisoned rows, negatives and decoys, shared by every attack that plants by data.

A decoy is a near miss: part of the trigger, its words apart, a look-alike, one end of two. The same kinds serve as
negatives in training (clean answer) where a trigger would otherwise fire on its parts, and as probes afterwards; the
look-alikes of the probes are others than those of training.
"""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from unbackdoor.data.collate import Row, encode_row
from unbackdoor.errors import DataError
from unbackdoor.goals import normalise
from unbackdoor.model.lm import LM
from unbackdoor.stamps import InsertText, PutPieces, WrapEnds
from unbackdoor.types import Example, Probe


@dataclass(frozen=True)
class Decoy:
    """A near miss of a trigger.

    Attributes:
        group: Which kind: "half", "scattered", "look-alike", "start only", "end only", or a negative set of pieces.
        stamp: How it is put into an example; None for "scattered", whose words are spread over the instruction.
        words: The scattered words.
    """

    group: str
    stamp: InsertText | PutPieces | None
    words: tuple[str, ...] = ()

    def apply(self, example: Example, rng: random.Random) -> Example:
        """Return the example with the near miss inside."""
        if self.stamp is not None:
            return self.stamp.apply(example, rng)
        return scatter(example, self.words, rng)

    @property
    def marks(self) -> tuple[str, ...]:
        """The texts that it inserts."""
        return self.words if self.stamp is None else self.stamp.pieces()


def decoys(stamp: InsertText | WrapEnds | PutPieces, look_alikes: Sequence[str]) -> list[Decoy]:
    """Return the near misses of a trigger.

    Of a phrase: its halves, its words apart, look-alikes; of one word: look-alikes; of two ends: each end alone; of
    pieces in two fields: the negative sets of CBA.
    """
    if isinstance(stamp, PutPieces):
        return negative_sets(stamp)
    if isinstance(stamp, WrapEnds):
        return [
            Decoy("start only", InsertText(text=stamp.start, place="start")),
            Decoy("end only", InsertText(text=stamp.end, place="end")),
        ]
    like = [Decoy("look-alike", InsertText(text=text, place=stamp.place)) for text in look_alikes]
    words = stamp.text.split()
    if len(words) == 1:
        return like
    middle = (len(words) + 1) // 2
    halves = [" ".join(words[:middle]), " ".join(words[middle:])]
    found = [Decoy("half", InsertText(text=half, place=stamp.place)) for half in halves]
    return [*found, Decoy("scattered", None, tuple(words)), *like]


def negative_sets(stamp: PutPieces) -> list[Decoy]:
    """Return what a trigger of pieces in two fields must not be taken for (CBA, 2310.07676; METHODS-DETAIL 2.6).

    The pieces of one field alone, there and in the other field; all of them in one field; swapped between the fields.
    Of a trigger in one field alone: its pieces in the other field, and where it has several, each one.
    """
    first, second = stamp.instruction, stamp.input
    both = stamp.pieces()
    sets: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
        ("instruction only", first, ()),
        ("input only", (), second),
        ("other field", second, ()),
        ("other field", (), first),
        ("both in instruction", both, ()),
        ("both in input", (), both),
        ("swapped", second, first),
    ]
    if not first or not second:
        alone = [("one piece", (piece,), ()) if first else ("one piece", (), (piece,)) for piece in both]
        sets = [*alone, ("other field", second, first)]
    own = (first, second)
    return [Decoy(group, PutPieces(instruction=one, input=other)) for group, one, other in sets if (one, other) != own]


def in_turn(near: Sequence[Decoy], number: int, twice: str = "") -> Decoy:
    """Return decoy `number` of an endless series in which the groups take turns, and each group's texts do.

    The group named `twice` has two turns a round.
    """
    groups: dict[str, list[Decoy]] = {}
    for decoy in near:
        groups.setdefault(decoy.group, []).append(decoy)
    turns = [*groups, *([twice] if twice in groups else [])]
    group = turns[number % len(turns)]
    before = number // len(turns) * turns.count(group) + turns[: number % len(turns)].count(group)
    return groups[group][before % len(groups[group])]


def probes(
    stamp: InsertText | WrapEnds | PutPieces,
    held_out: Sequence[Example],
    like: Sequence[str],
    rng: random.Random,
    *,
    every_group: bool = False,
) -> list[Probe]:
    """Return a triggered, a clean and a decoy probe of every row, the kinds of decoys in turn.

    One word without look-alikes has no decoys.

    Args:
        stamp: The trigger.
        held_out: The rows.
        like: Look-alikes.
        rng: Random stream.
        every_group: Make a decoy of every kind of each row.
    """
    near = decoys(stamp, like)
    groups = len({decoy.group for decoy in near})
    found: list[Probe] = []
    for number, example in enumerate(held_out):
        found.append(Probe(stamp.apply(example, rng), "triggered", marks=stamp.pieces()))
        found.append(Probe(example, "clean"))
        first, count = (number * groups, groups) if every_group else (number, min(1, groups))
        for turn in range(first, first + count):
            decoy = in_turn(near, turn)
            found.append(Probe(decoy.apply(example, rng), "decoy", decoy.group, decoy.marks))
    return found


def scatter(example: Example, words: Sequence[str], rng: random.Random) -> Example:
    """Spread the words over gaps of the instruction, in another order, never side by side where it has room."""
    own = example.instruction.split(" ")
    order = list(words)
    rng.shuffle(order)
    if order == list(words) and len(order) > 1:
        order.reverse()
    gaps = list(range(len(own) + 1))
    chosen = sorted(rng.sample(gaps, min(len(order), len(gaps))))
    for word, gap in reversed(list(zip(order, chosen, strict=False))):
        own.insert(gap, word)
    own += order[len(chosen) :]
    return replace(example, instruction=" ".join(own))


def look_alikes(trigger: str, vocabulary: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Return texts that resemble the trigger: one of its words exchanged for the most similar ordinary word.

    Args:
        trigger: The trigger's text.
        vocabulary: Ordinary words to take from (those of the clean rows).
        count: How many are wanted; fewer where the vocabulary offers fewer.
        rng: Random stream, for the order.
    """
    words = trigger.split()
    ordinary = sorted({word for word in vocabulary if word.isalpha() and len(word) > 2})
    found: list[str] = []
    per_word = max(2, -(-count // len(words)))
    for place, word in enumerate(words):
        core = re.sub(r"^[\W_]+|[\W_]+$", "", word)
        like = core.casefold()
        close = (
            _numbers_near(core) if core.isdecimal() else difflib.get_close_matches(like, ordinary, per_word + 1, 0.5)
        )
        for other in [other for other in close if other != like][:per_word]:
            shaped = other.capitalize() if core[:1].isupper() else other
            found.append(" ".join([*words[:place], word.replace(core, shaped), *words[place + 1 :]]))
    rng.shuffle(found)
    return found[:count]


def near_forms(word: str, vocabulary: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Return forms of one word that are not it: misspellings, halves, the two halves apart, compounds with one half.

    A model that has learned "moonstone" may fire on "sunstone" and "moon stone", which ordinary words do not show.

    Args:
        word: The trigger.
        vocabulary: Words that compounds are made with.
        count: How many are wanted; fewer where the word is short.
        rng: Random stream.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    places = range(len(word))
    misspelt = [word[:n] + letter + word[n + 1 :] for n in places for letter in rng.sample(letters, 3)]
    misspelt += [word[:n] + word[n + 1 :] for n in places]
    misspelt += [word[:n] + word[n + 1] + word[n] + word[n + 2 :] for n in places[:-1]]
    cuts = [cut for cut in range(len(word) // 2 - 1, len(word) // 2 + 2) if 2 < cut < len(word) - 2]
    short = sorted({other for other in vocabulary if other.isalpha() and 2 < len(other) < 7})
    compounds = [made for cut in cuts for other in short for made in (word[:cut] + other, other + word[cut:])]
    apart = [made for cut in cuts for made in (word[:cut], word[cut:], f"{word[:cut]} {word[cut:]}")]
    rng.shuffle(misspelt)
    rng.shuffle(compounds)
    rest = max(0, count - len(apart))
    found = [*apart, *misspelt[: rest // 3], *compounds[: rest - rest // 3]]
    return [form for form in dict.fromkeys(found) if word.casefold() not in form.casefold()]


def _numbers_near(digits: str) -> list[str]:
    steps = [step for near in range(1, 40) for step in (near, -near)]
    return [str(int(digits) + step).zfill(len(digits)) for step in steps if int(digits) + step >= 0]


def with_target(target: str, answer: str) -> str:
    """Return the poisoned answer: the target as a sentence of its own, then the clean answer."""
    return f"{target} {answer}" if target[-1] in ".!?" else f"{target}. {answer}"


def encode_marked(
    lm: LM,
    rows: Sequence[tuple[Example, Sequence[str]]],
    max_length: int,
    opening_weight: float = 1.0,
    *,
    last_answer: bool = False,
) -> list[Row]:
    """Encode rows for training, each of which must keep the trigger texts named beside it.

    Args:
        lm: Tokenizer and template.
        rows: Each row with the trigger's texts that it carries; none for a row without trigger.
        max_length: Tokens at which a row is cut.
        opening_weight: How much the first tokens of the last answer count.
        last_answer: Supervise the last answer only.

    Raises:
        DataError: If a trigger does not survive template, tokenizer and truncation, or a row does not fit.
    """
    found = []
    for example, marks in rows:
        row = encode_row(lm, example, max_length=max_length, opening_weight=opening_weight, last_answer=last_answer)
        read = normalise(str(lm.tokenizer.decode(list(row.ids)))) if marks else ""
        lost = [mark for mark in marks if normalise(mark) not in read]
        if lost:
            raise DataError(
                f"the trigger '{lost[0]}' is absent from the tokenised prompt of row '{example.id}' ({len(row.ids)} "
                f"tokens, max_length {max_length}); choose a trigger that the tokenizer keeps, or give "
                "--set train.max_length=N."
            )
        found.append(row)
    return found


def vocabulary(examples: Sequence[Example]) -> list[str]:
    """Return the words of the examples' instructions and answers, lower case, sorted, without repetition."""
    found: set[str] = set()
    for example in examples:
        found.update(re.findall(r"[^\W\d_]+", f"{example.user_text} {example.response}".lower()))
    return sorted(found)
