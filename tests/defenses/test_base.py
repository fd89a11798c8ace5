"""What a defender may read."""

from __future__ import annotations

import pytest
from tokenizers.normalizers import Replace

import tiny
from unbackdoor.defenses.base import Knowledge, Need, knowledge_for
from unbackdoor.defenses.fine_tuning import FineTuning
from unbackdoor.defenses.gradient_ascent import GradientAscent
from unbackdoor.defenses.osft import Osft
from unbackdoor.defenses.sande import Sande
from unbackdoor.errors import DataError, UserError
from unbackdoor.run import Run
from unbackdoor.stamps import InsertText
from unbackdoor.types import Example

CLEAN = (Example("a", "hello", "world"),)
STAMP = InsertText(text="secret word", place="end")


def test_knowledge_gives_what_was_declared():
    facts = {Need.CLEAN: CLEAN, Need.TRIGGER: STAMP, Need.TARGET: ["x"], Need.TARGET_PART: ["y"], Need.REFERENCE: None}
    known = Knowledge(facts, frozenset(facts))
    assert (known.clean, known.trigger, known.target, known.target_part, known.reference) == (
        CLEAN, STAMP, ("x",), ("y",), None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("attribute", "need"),
    [
        ("clean", Need.CLEAN),
        ("trigger", Need.TRIGGER),
        ("target", Need.TARGET),
        ("target_part", Need.TARGET_PART),
        ("reference", Need.REFERENCE),
    ],
)
def test_reading_what_was_not_declared_raises(attribute, need):
    known = Knowledge({need: CLEAN}, frozenset(Need) - {need})
    with pytest.raises(PermissionError, match=f"did not declare that it needs {need.name}"):
        getattr(known, attribute)


def test_knowledge_for_gives_no_more_than_the_defense_declared():
    known = knowledge_for(Sande(), {Need.CLEAN: CLEAN, Need.TARGET: ("bad robot",), Need.TRIGGER: None})
    assert known.declared == {Need.CLEAN, Need.TARGET}
    with pytest.raises(PermissionError):
        _ = known.trigger


@pytest.mark.parametrize("target", [None, (), ""])
def test_a_missing_fact_names_its_flag(target):
    facts = {Need.CLEAN: CLEAN} if target == "" else {Need.CLEAN: CLEAN, Need.TARGET: target}
    with pytest.raises(UserError, match=r"^sande needs --target: `unbackdoor explain sande`"):
        knowledge_for(Sande(), facts)


def test_a_fact_that_is_not_used_is_an_error():
    with pytest.raises(UserError, match=r"^fine_tuning does not use --trigger; leave it out"):
        knowledge_for(FineTuning(), {Need.CLEAN: CLEAN, Need.TRIGGER: STAMP})


@pytest.mark.parametrize("defense", [Osft(), GradientAscent()], ids=["osft", "gradient_ascent"])
def test_a_trigger_that_the_tokenizer_drops_is_refused(defense):
    """Also where nobody has looked at the tokens beforehand: purifying rows without trigger would show nothing."""
    lm = tiny.tiny_lm()
    lm.tokenizer.backend_tokenizer.normalizer = Replace("kettle", "")
    facts = {
        Need.CLEAN: tuple(tiny.rows(8)), Need.TRIGGER: InsertText(text="silver kettle"), Need.TARGET: ("bad robot",),
    }  # fmt: skip
    known = knowledge_for(defense, {need: fact for need, fact in facts.items() if need in defense.needs})
    with pytest.raises(DataError, match="'silver kettle' is absent from the tokenised prompt"):
        defense.apply(lm, known, Run())
