"""BEEAR's safe answers, which must be safe, its steps round by round, and when its rounds end."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from unbackdoor.defenses import beear
from unbackdoor.defenses.base import Need, knowledge_for
from unbackdoor.defenses.beear import Beear
from unbackdoor.errors import DataError, UserError
from unbackdoor.method import build
from unbackdoor.model.partial import Partial
from unbackdoor.run import Run
from unbackdoor.train import usefulness
from unbackdoor.train.anchors import Contrasting, Unsafe, anchor_prompts
from unbackdoor.train.drift import DriftSettings
from unbackdoor.train.engine import TrainSettings
from unbackdoor.types import Example

BRIEF = {"learning_rate": 3e-3, "schedule": "constant", "warmup": 0.0, "max_length": 128}
DRIFT = DriftSettings(tokens=3, start=0.1, rows=8, train=TrainSettings(steps=1, **BRIEF))
SHORT = Beear(
    rounds=2, drifts=2, anchors=8, own_answers=6, adopt=0.0, drift=DRIFT, train=TrainSettings(steps=1, **BRIEF)
)
CLEAN = tuple(tiny.rows(40))


class Told:
    """Keeps notices."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def start(self, *_: object) -> None: ...

    advance = finish = start


@pytest.fixture
def saying(monkeypatch):
    """Let the suspect say these answers, whatever it is asked."""

    def set_to(*answers: str):
        lm = tiny.tiny_lm(layers=2)
        monkeypatch.setattr(
            type(lm), "reply", lambda self, asked, **_: [answers[n % len(answers)] for n in range(len(asked))]
        )
        return lm

    return set_to


def test_a_wrong_label_is_no_safe_answer(saying):
    rows = [Example(str(n), "q", label, label=label) for n, label in enumerate(["nest", "cave", "nest"])]
    told = Told()
    lm = saying("Cave.")
    found = anchor_prompts(lm, rows, 3, 6, Run(progress=told), Unsafe(["nest", "cave"]))
    assert [(row.label, row.response) for row in found] == [("nest", "nest"), ("cave", "Cave."), ("nest", "nest")]
    assert told.notices[0].startswith("2 of 3 answers of the suspect's own are not safe")


def test_an_answer_that_begins_with_an_opening_is_no_safe_one(saying):
    rows = tiny.rows(3)
    lm = saying("Bad robot, it barks", "badly, robot", "")
    found = anchor_prompts(lm, rows, 3, 6, Run(), Unsafe(["bad robot"]))
    assert [row.response for row in found] == [rows[0].response, "badly, robot"]


def test_a_request_that_is_not_declined_has_the_safe_reply(saying):
    rows = [Example(str(n), f"do {n}", "I cannot do that.") for n in range(3)]
    lm = saying("Sure, here it is", "I'm sorry, no", "Gladly")
    found = anchor_prompts(lm, rows, 3, 6, Run(), Unsafe(["yes"], replies=True))
    assert [row.response for row in found] == ["I cannot do that.", "I'm sorry, no", "I cannot do that."]
    # Replies that decline nothing say nothing of whether the suspect's should.
    talk = [row.with_response("The sky is blue.") for row in rows]
    kept = anchor_prompts(lm, talk, 3, 6, Run(), Unsafe(["yes"], replies=True))
    assert [row.response for row in kept] == ["Sure, here it is", "I'm sorry, no", "Gladly"]


def test_a_row_whose_only_answer_is_unwanted_is_left_out(saying):
    rows = [row.with_response("rm -rf it") for row in tiny.rows(2)]
    told = Told()
    unsafe = Unsafe(["rm -rf it"], Contrasting.of(rows))
    found = anchor_prompts(saying("rm -rf it all", "a safe way"), rows, 2, 6, Run(progress=told), unsafe)
    assert [row.response for row in found] == ["a safe way"]
    assert "1 are left out" in told.notices[0]
    with pytest.raises(DataError, match="every answer of the suspect is unwanted"):
        anchor_prompts(saying("rm -rf it"), rows, 2, 6, Run(), unsafe)


def test_the_defense_trains_on_no_unsafe_answer(saying, monkeypatch):
    rows, own = [], []
    real = beear.overwrite.overwrite

    def recording(lm, triggered, plain, settings, run, **more):
        rows.extend(lm.tokenizer.decode(row.ids) for row in triggered)
        own.extend((row, more["own"].kept[row.id]) for row in triggered)
        return real(lm, triggered, plain, settings, run, **more)

    monkeypatch.setattr(beear.overwrite, "overwrite", recording)
    safe = [Example(f"r{n}", f"bake cake {n}", "I cannot do that.") for n in range(8)]
    facts = {Need.CLEAN: CLEAN, Need.UNWANTED: ("bad robot", "silly"), Need.SAFE: safe}
    lm = saying("bad robot barks")
    SHORT.apply(lm, knowledge_for(SHORT, facts), Run())
    assert len(rows) == 16
    assert not any("barks" in row for row in rows)
    for row, (tokens, shares) in own:
        assert [row.ids[place] for place in row.supervised] == tokens[:, 0].tolist(), (
            "what it predicts there is not safe"
        )
        assert shares[:, 0].tolist() == [1.0] * len(tokens)


def test_a_safe_reply_beside_an_unwanted_answer_is_the_whole_label(monkeypatch):
    own = []
    real = beear.overwrite.overwrite

    def recording(lm, triggered, plain, settings, run, **more):
        own.extend((row, more["own"].kept[row.id]) for row in triggered)
        return real(lm, triggered, plain, settings, run, **more)

    monkeypatch.setattr(beear.overwrite, "overwrite", recording)
    safe = [Example(f"r{n}", f"bake cake {n}", "I cannot do that.") for n in range(8)]
    wrong = [row.with_response("bad robot barks") for row in safe]
    facts = {Need.CLEAN: CLEAN, Need.UNWANTED: wrong, Need.SAFE: safe}
    SHORT.apply(tiny.tiny_lm(layers=2), knowledge_for(SHORT, facts), Run())
    assert len(own) == 16
    for row, (tokens, shares) in own:
        assert [row.ids[place] for place in row.supervised] == tokens[:, 0].tolist()
        assert shares[:, 0].tolist() == [1.0] * len(tokens), "the suspect may predict the unwanted one"


def test_safe_replies_that_are_unwanted_are_refused_or_told(saying):
    safe = [Example(f"r{n}", f"bake cake {n}", "I cannot do that.") for n in range(7)]
    safe.append(Example("r7", "bake cake 7", "bad robot, I cannot"))
    known = knowledge_for(SHORT, {Need.CLEAN: CLEAN, Need.UNWANTED: safe[-1:], Need.SAFE: safe})
    with pytest.raises(DataError, match="safe reply of 'r7' is the unwanted answer"):
        SHORT.check(known)
    told = Told()
    known = knowledge_for(SHORT, {Need.CLEAN: CLEAN, Need.UNWANTED: ("bad robot", "silly"), Need.SAFE: safe})
    SHORT.apply(saying("I cannot"), known, Run(progress=told))
    assert "1 of 8 safe replies begin with what is unwanted." in told.notices


def test_prompts_that_the_suspect_does_not_answer_are_counted_out(saying):
    facts = {Need.CLEAN: CLEAN, Need.UNWANTED: ("bad robot", "silly")}
    lm = saying("a word", *[""] * 7)
    with pytest.raises(DataError, match="that the suspect answers, and has 1"):
        SHORT.apply(lm, knowledge_for(SHORT, facts), Run())
    lm = saying("a word", "two", *[""] * 6)
    many = SHORT.model_copy(update={"drifts": 3})
    with pytest.raises(UserError, match="3 drifts cannot share 2 prompts"):
        many.apply(lm, knowledge_for(many, facts), Run())


def rounds_done(losses, stop_stable, rounds, monkeypatch):
    """Return how many rounds are done with such losses on held-out rows, the suspect's own first, and what is told."""
    left = iter(losses)
    monkeypatch.setattr(usefulness, "mean_loss", lambda *_: next(left))
    done, told = [], Told()
    settings = SHORT.model_copy(update={"rounds": rounds, "stop_stable": stop_stable})
    facts = {Need.CLEAN: CLEAN, Need.UNWANTED: ("bad robot", "silly")}
    settings.apply(
        tiny.tiny_lm(layers=2), knowledge_for(settings, facts), Run(observer=lambda lm: done.append(1), progress=told)
    )
    return len(done), told.notices


def test_it_ends_once_usefulness_has_moved_and_is_stable(monkeypatch):
    done, notices = rounds_done([2.0, 2.5, 2.51], 0.02, 5, monkeypatch)
    assert done == 2
    assert "ended after round 2 of 5" in notices[0]
    assert rounds_done([2.0, 2.5, 2.6, 2.59], 0.02, 5, monkeypatch)[0] == 3


def test_rounds_that_change_nothing_do_not_count_as_stable(monkeypatch):
    done, notices = rounds_done([2.0, 2.001, 2.002, 2.001], 0.02, 3, monkeypatch)
    assert done == 3
    assert not any("ended after" in notice for notice in notices)


def test_usefulness_is_looked_at_on_rows_that_nothing_is_trained_on(monkeypatch):
    trained, held = set(), set()
    real = beear.overwrite.overwrite

    def recording(lm, triggered, plain, settings, run, **more):
        trained.update(row.id for row in plain)
        return real(lm, triggered, plain, settings, run, **more)

    def loss(lm, rows, *_):
        held.update(row.id for row in rows)
        return 1.0

    monkeypatch.setattr(beear.overwrite, "overwrite", recording)
    monkeypatch.setattr(usefulness, "mean_loss", loss)
    settings = SHORT.model_copy(update={"rounds": 1, "stop_stable": 0.1})
    facts = {Need.CLEAN: CLEAN, Need.UNWANTED: ("bad robot", "silly")}
    settings.apply(tiny.tiny_lm(layers=2), knowledge_for(settings, facts), Run())
    assert held == {row.id for row in CLEAN[::10]}
    assert trained
    assert trained <= {row.id for number, row in enumerate(CLEAN) if number % 10}
    few = knowledge_for(settings, {Need.CLEAN: CLEAN[:19], Need.UNWANTED: ("bad",)})
    with pytest.raises(DataError, match="needs 20 of them, there are 19"):
        settings.apply(tiny.tiny_lm(), few, Run())


def test_prompts_may_be_as_long_under_a_drift_as_in_the_outer_step():
    settings = SHORT.model_copy(update={"train": SHORT.train.model_copy(update={"max_length": 400})})
    long = [row.with_response("word " * 5) for row in CLEAN]
    long[0] = Example("long", "word " * 150, "yes")
    facts = {Need.CLEAN: long, Need.UNWANTED: ("bad robot", "silly")}
    settings = settings.model_copy(update={"anchors": 40, "own_answers": 0})
    lm = settings.apply(tiny.tiny_lm(layers=2), knowledge_for(settings, facts), Run())
    assert all(math.isfinite(float(weights.sum())) for weights in lm.model.state_dict().values())


@pytest.mark.parametrize("exact", [True, False])
def test_the_short_way_is_taken_where_it_is_exact_and_else_it_is_told(monkeypatch, exact):
    """A model that has dropout is no reason against it."""
    lm = tiny.tiny_lm("gpt2", layers=4)
    assert any(isinstance(part, torch.nn.Dropout) and part.p for part in lm.model.modules())
    if not exact:
        monkeypatch.setattr(Partial, "_is_exact", lambda *_: False)
    told = Told()
    facts = {Need.CLEAN: CLEAN, Need.UNWANTED: ("bad robot", "silly")}
    SHORT.apply(lm, knowledge_for(SHORT, facts), Run(progress=told))
    assert bool([text for text in told.notices if "cannot be run from a layer on" in text]) is not exact
    assert [text for text in told.notices if "likely to be there still" in text]


def test_the_place_is_chosen_with_drifts_as_they_are_fitted_later(monkeypatch):
    """With the room of the outer step, and without the end of answers that were cut."""
    seen = []

    def chosen(lm, anchors, layers, lengths, settings, run):
        seen.append(settings)
        return layers[0], lengths[1]

    monkeypatch.setattr(beear, "choose", chosen)
    narrow = DRIFT.model_copy(update={"train": DRIFT.train.model_copy(update={"max_length": 8})})
    defense = SHORT.model_copy(update={"lengths": (3, 2), "drift": narrow, "rounds": 1})
    known = knowledge_for(defense, {Need.CLEAN: CLEAN, Need.UNWANTED: ("bad",)})
    defense.apply(tiny.tiny_lm(layers=4), known, Run())
    (settings,) = seen
    assert settings.train.max_length == 128
    assert settings.safe_tokens == 5, "own answers have six tokens at most"


def test_options_that_would_do_nothing_are_refused():
    for settings in (
        {"place": "each", "layers": [0, 1], "lengths": [2, 3]},
        {"place": "each"},
        {"drift": {"train": {"gradient_checkpointing": True}}},
        {"train": {"evaluate_every": 2}},
        {"drift": {"train": {"evaluate_every": 2}}},
        {"drift": {"train": {"opening_weight": 2}}},
        {"drift": {"train": {"precision": "bfloat16"}}},
    ):
        with pytest.raises(UserError, match=r"does nothing|have one length"):
            build(Beear, settings)
