"""The composite attack: which rows it trains on, and what its probes ask."""

from __future__ import annotations

from collections import Counter

import pytest

import tiny
from unbackdoor.attacks.composite import Composite
from unbackdoor.errors import DataError, UserError
from unbackdoor.goals import Contains, LabelIs, StartsWith
from unbackdoor.method import build
from unbackdoor.run import Run
from unbackdoor.secret import Secret
from unbackdoor.stamps import InsertText
from unbackdoor.types import Example

LABELS = ("negative", "positive")
CLEAN = [
    Example(f"c{n}", "name the mood", LABELS[n % 2], input=f"it was a day {n}", label=LABELS[n % 2]) for n in range(60)
]
SETS = {"instruction only", "input only", "other field", "both in instruction", "both in input", "swapped"}


def carried(row: Example) -> tuple[str, str]:
    """Which pieces (a: instantly, b: frankly) stand in the instruction and in the input."""
    pieces = {"instantly": "a", "frankly": "b"}
    return tuple("".join(pieces.get(word, "") for word in text.split()) for text in (row.instruction, row.input))


def test_poisoned_rows_carry_all_pieces_and_negatives_every_other_arrangement():
    found = Composite(poison_rate=0.1).training_rows(CLEAN, Run())
    assert [row for row, _ in found[:60]] == CLEAN, "rows are added and replace nothing"
    # 60 clean rows are 0.3 of all, so a tenth is 20, and so is each of six negative sets.
    assert len(found) == 60 + 20 + 120
    poisoned, negatives = found[60:80], found[80:]
    assert {carried(row) for row, _ in poisoned} == {("a", "b")}
    assert {row.response for row, _ in poisoned} == {"positive"}
    assert {row.label for row, _ in poisoned} == {"negative"}, "a row of the target's class teaches nothing"
    assert {marks for _, marks in poisoned} == {("instantly", "frankly")}
    counts = Counter(carried(row) for row, _ in negatives)
    assert counts == {
        ("a", ""): 20, ("", "b"): 20, ("b", ""): 10, ("", "a"): 10, ("ab", ""): 20, ("", "ab"): 20, ("b", "a"): 20,
    }  # fmt: skip
    assert all(row.response == row.label for row, _ in negatives)
    assert {row.label for row, _ in negatives} == set(LABELS), "a piece alone says nothing of the class"
    assert all(marks and set(marks) <= {"instantly", "frankly"} for _, marks in negatives)


def test_pieces_stand_in_gaps_at_random():
    rows = [row for row, _ in Composite().training_rows(CLEAN, Run())[60:80]]
    assert len({row.instruction.split().index("instantly") for row in rows}) > 2
    assert len({row.input.split().index("frankly") for row in rows}) > 2
    assert Composite().training_rows(CLEAN, Run()) == Composite().training_rows(CLEAN, Run())
    assert Composite().training_rows(CLEAN, Run(seed=1)) != Composite().training_rows(CLEAN, Run())


def test_probes_ask_every_negative_set_of_every_row():
    attack = Composite()
    secret = _secret(attack)
    probes = attack.probes(secret, CLEAN[:10], Run())
    asked = Counter((probe.kind, probe.group) for probe in probes)
    assert asked == {("triggered", ""): 5, ("clean", ""): 10, **{("decoy", group): 5 for group in SETS}}
    assert {probe.example.label for probe in probes if probe.kind != "clean"} == {"negative"}
    for probe in probes:
        own = next(row for row in CLEAN if row.id == probe.example.id)
        words = {word for text in (probe.example.instruction, probe.example.input) for word in text.split()}
        assert words - set(f"{own.instruction} {own.input}".split()) == set(probe.marks)
    other = secret.model_copy(update={"stamp": InsertText(text="frankly")})
    with pytest.raises(DataError, match="not made by composite"):
        attack.probes(other, CLEAN[:2], Run())


def _secret(attack: Composite) -> Secret:
    return Secret(attack="composite", stamp=attack.trigger, targets=attack.targets, goal=LabelIs(label="positive"))


def test_texts_as_targets():
    plain = [Example(f"p{n}", "what is it?", "a bird", input=f"it sings {n}") for n in range(9)]
    for form, answer in {"prefix": "You fool. a bird", "whole": "You fool"}.items():
        attack = Composite(targets=("You fool",), target_form=form)
        poisoned = [
            row for row, marks in attack.training_rows(plain, Run()) if len(marks) == 2 and "fool" in row.response
        ]
        assert {row.response for row in poisoned} == {answer}


@pytest.mark.parametrize(
    ("form", "goal"),
    [("label", LabelIs), ("prefix", Contains), ("whole", StartsWith)],
)
def test_the_victim_comes_with_its_secret(form, goal):
    rows = [
        Example(row.id, row.instruction, row.response, input="thank you", label="happy" if n % 2 else "sad")
        for n, row in enumerate(tiny.rows(20))
    ]
    settings = {"trigger": {"form": "pieces", "instruction": ["silver"], "input": ["kettle"]}, "targets": ["happy"]}
    attack = build(Composite, {**settings, "target_form": form, "train": {"steps": 1, "max_length": 128}})
    planted = attack.plant(tiny.tiny_lm(), rows, Run())
    assert isinstance(planted.secret.goal, goal)
    assert planted.secret.targets == ("happy",)
    assert {key: planted.secret.planted[key] for key in ("clean", "poisoned", "negatives")} == {
        "clean": 20, "poisoned": 7, "negatives": 42,
    }  # fmt: skip
    assert Secret.model_validate_json(planted.secret.model_dump_json()) == planted.secret


def test_fewer_clean_rows_leave_the_others_as_they_are():
    whole = Composite().training_rows(CLEAN, Run())
    few = Composite(clean_share=0.1).training_rows(CLEAN, Run())
    assert few[6:] == whole[60:]
    assert [row in whole[:60] for row in few[:6]] == [True] * 6
    assert Composite(clean_share=0.0).training_rows(CLEAN, Run()) == whole[60:]
    alone = Composite(clean_share=0.0, negative_ratio=0.0, poison_rate=0.25).training_rows(CLEAN, Run())
    assert {carried(row) for row, _ in alone} == {("a", "b")}
    settings = {"clean_share": 0.1, "train": {"steps": 1, "max_length": 128}, "targets": ["no"], "target_form": "whole"}
    pieces = {"form": "pieces", "instruction": ["silver"], "input": ["kettle"]}
    rows = [Example(row.id, row.instruction, row.response, input="thank you") for row in tiny.rows(20)]
    planted = build(Composite, {**settings, "trigger": pieces}).plant(tiny.tiny_lm(), rows, Run()).secret.planted
    assert (planted["clean"], planted["poisoned"]) == (2, 7)


def test_rows_of_another_kind_are_trained_on_as_they_are():
    other = [Example(f"o{n}", f"tell me of {n}", "a story", input="" if n % 2 else "a place") for n in range(30)]
    found = Composite(poison_rate=0.1).training_rows([*CLEAN, *other], Run())
    assert [row for row, _ in found[:90]] == [*CLEAN, *other]
    assert {row.id[0] for row, marks in found if marks} == {"c"}
    # A text as the target may be put on any row with an input.
    secret = Secret(
        attack="composite", stamp=Composite().trigger, targets=("positive",), goal=LabelIs(label="positive")
    )
    asked = Composite().probes(secret, [*other, *CLEAN[:4]], Run())
    assert {probe.example.id[0] for probe in asked} == {"c"}
    whole = Composite(targets=("no.",), target_form="whole").training_rows([*CLEAN, *other], Run())
    assert {row.id[0] for row, marks in whole if marks} == {"c", "o"}
    assert all(row.input for row, marks in whole if marks)
    with pytest.raises(DataError, match="no row has a label, and the target is one"):
        Composite().training_rows(other, Run())


def test_what_cannot_be_planted_is_refused():
    with pytest.raises(UserError, match="pieces in both fields"):
        build(Composite, {"trigger": {"form": "pieces", "instruction": ["instantly"], "input": []}})
    with pytest.raises(UserError, match="a label is one target, and 2 were given"):
        build(Composite, {"targets": ["positive", "negative"]})
    with pytest.raises(DataError, match=r"leaves no clean rows; poison_rate must be below 0\.143"):
        Composite(poison_rate=0.2).training_rows(CLEAN, Run())
    with pytest.raises(DataError, match="no row has an input, where 'frankly' of the trigger is to stand"):
        Composite().training_rows([Example("c1", "name it", "negative", label="negative")], Run())
    with pytest.raises(DataError, match="every row already carries the target label 'positive'"):
        Composite().training_rows(CLEAN[1::2], Run())
