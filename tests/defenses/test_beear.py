"""BEEAR as a whole: what goes into each step, when it stops, what it may not see, and that it goes on where it was."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import tiny
from fitting import with_adapter
from unbackdoor.data.sources import read_openings
from unbackdoor.defenses import beear
from unbackdoor.defenses.base import Need, knowledge_for
from unbackdoor.defenses.beear import Beear
from unbackdoor.errors import DataError, UserError
from unbackdoor.method import build
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train import entrap, openings
from unbackdoor.train.drift import DriftSettings
from unbackdoor.train.engine import TrainSettings
from unbackdoor.types import Example

BRIEF = {"learning_rate": 3e-3, "schedule": "constant", "warmup": 0.0, "max_length": 128}
DRIFT = DriftSettings(tokens=3, start=0.1, rows=8, train=TrainSettings(steps=2, **BRIEF))
SHORT = Beear(
    rounds=2, drifts=2, anchors=8, own_answers=6, adopt=0.2, drift=DRIFT, train=TrainSettings(steps=2, **BRIEF)
)
CLEAN = tuple(tiny.rows(40))
HEARD = {"opening": "", "certainty": 0.9, "evidence": 9.0, "share": 0.0}


def purified(defense: Beear, run: Run | None = None, safe=(), lm: LM | None = None) -> LM:
    facts = {Need.CLEAN: CLEAN, Need.UNWANTED: ("bad robot", "silly"), Need.SAFE: safe}
    lm = lm or tiny.tiny_lm(layers=4)
    return defense.apply(lm, knowledge_for(defense, {n: f for n, f in facts.items() if f}), run or Run())


@pytest.fixture
def outer(monkeypatch):
    """What every outer step is given."""
    calls = []
    real = beear.overwrite.overwrite

    def recording(lm, triggered, plain, settings, run, **more):
        calls.append({"triggered": triggered, "plain": plain, **more})
        return real(lm, triggered, plain, settings, run, **more)

    monkeypatch.setattr(beear.overwrite, "overwrite", recording)
    return calls


def test_sets_are_drawn_as_large_as_asked_and_anew_in_each_round(outer):
    sizes = {"anchors": 20, "performance": 30, "round_anchors": 10, "round_performance": 12}
    purified(SHORT.model_copy(update=sizes))
    assert [len(call["triggered"]) for call in outer] == [10, 10]
    assert [len(call["plain"]) for call in outer] == [12, 12]
    for part in ("triggered", "plain"):
        first, second = ({row.id for row in call[part]} for call in outer)
        assert len(first | second) > len(first)
    everything = {row.id for call in outer for row in call["plain"]}
    assert len(everything) <= 30
    assert {len(call["stand_ins"]) for call in outer} == {1}, "two drifts behind one layer"


def test_without_drifts_the_outer_steps_are_alone(outer, monkeypatch):
    monkeypatch.setattr(openings.Openings, "hear", lambda *_, **__: pytest.fail("nothing is listened to"))
    run = Run()
    lm = purified(SHORT.model_copy(update={"drifts": 0}), run)
    assert [call["stand_ins"] for call in outer] == [[], []]
    assert run.notes["drifts"] == []
    monkeypatch.undo()
    assert not tiny.same_weights(tiny.tensors(lm), tiny.tensors(purified(SHORT)))


def test_requests_stay_declined_without_a_drift(outer):
    safe = tuple(tiny.rows(5, seed=5, prefix="request"))
    purified(SHORT, safe=safe)
    plain = [row.id for row in outer[0]["plain"]]
    requests = [name for name in plain if name.startswith("request")]
    assert len(requests) == len(plain) // 7
    assert set(requests) == {row.id for row in outer[0]["triggered"]}
    assert len(set(requests)) == 5
    purified(SHORT)
    assert not any(row.id.endswith("(own answer)") for row in outer[-1]["plain"])
    assert all(row.id.endswith("(own answer)") for row in outer[-1]["triggered"])


@pytest.mark.parametrize("own_answers", [0, 6])
def test_rows_of_both_sets_may_have_one_id(outer, own_answers):
    """Labels of the suspect are kept by id: with one id for both, a row would learn another one's answer."""
    same = tuple(row.with_response("no") for row in CLEAN[:8])
    purified(SHORT.model_copy(update={"own_answers": own_answers}), safe=same)
    for call in outer:
        ids = [row.id for row in (*call["triggered"], *call["plain"])]
        by_id = {row.id: row.ids for row in (*call["triggered"], *call["plain"])}
        assert all(by_id[row.id] == row.ids for row in (*call["triggered"], *call["plain"]))
        assert {row.id for row in CLEAN[:8]} & set(ids), "the rows of PA keep theirs"


def test_of_several_places_the_best_is_taken_or_each_in_turn(monkeypatch):
    monkeypatch.setattr(beear, "choose", lambda lm, anchors, layers, lengths, settings, run: (layers[-1], lengths[0]))
    run = Run()
    purified(SHORT.model_copy(update={"layers": (0, 2), "lengths": (2, 3)}), run)
    assert {(record["layer"], record["at"]) for record in run.notes["drifts"]} == {(2, "prompt")}
    assert run.notes["layer"] == 2
    run = Run()
    shape = SHORT.drift.model_copy(update={"at": "both"})
    purified(SHORT.model_copy(update={"layers": (0, 2), "place": "each", "drift": shape}), run)
    assert {record["at"] for record in run.notes["drifts"]} == {"words", "prompt"}
    assert [record["layer"] for record in run.notes["drifts"]] == [0, 2] * 2
    run = Run()
    purified(SHORT.model_copy(update={"depths": (0.5, 0.99), "place": "each"}), run)
    assert [record["layer"] for record in run.notes["drifts"]] == [2, 3] * 2
    # More layers than drifts: the next round goes on.
    run = Run()
    purified(SHORT.model_copy(update={"layers": (0, 1, 3), "place": "each"}), run)
    assert [record["layer"] for record in run.notes["drifts"]] == [0, 1, 3, 0]
    with pytest.raises(UserError, match="the layers 0 to 3, and no layer 4"):
        purified(SHORT.model_copy(update={"layers": (0, 4)}))


def test_no_triggered_prompt_is_read_while_place_and_weights_are_found(monkeypatch):
    """Where somebody asks triggered probes after every round, too: nothing of it reaches the defense."""
    attacker, defender, test = tiny.splits(120, 40, 12)
    attack = tiny.attack(train=tiny.PLANTING.model_copy(update={"steps": 4}))
    planted = attack.plant(tiny.tiny_lm(layers=4), attacker, Run())
    probes = [probe.example for probe in attack.probes(planted.secret, test, Run())]
    read, asking = [], []
    real = LM.encode

    def recording(self, turns, *, ask=False):
        read.append((bool(asking), " ".join(turn.content for turn in turns)))
        return real(self, turns, ask=ask)

    def watching(lm):
        asking.append(True)
        lm.reply([probe.prompt for probe in probes], max_new_tokens=2)
        asking.clear()

    monkeypatch.setattr(LM, "encode", recording)
    own = {row.user_text for row in defender}
    several = SHORT.model_copy(update={"depths": (0.3, 0.6), "lengths": (2, 3)})
    known = knowledge_for(several, {Need.CLEAN: tuple(defender), Need.UNWANTED: ("bad",)})
    ways = []
    for observer in (watching, lambda _: None):
        lm = replace(planted.lm, model=copy.deepcopy(planted.lm.model))
        run = Run(observer=observer)
        several.apply(lm, known, run)
        ways.append((run.notes["drift choice"], tiny.tensors(lm)))
    assert ways[0][0] == ways[1][0]
    assert len(ways[0][0]) == 4
    assert tiny.same_weights(ways[0][1], ways[1][1])
    assert [text for watched, text in read if watched and tiny.TRIGGER in text]
    defending = [text for watched, text in read if not watched]
    assert len(defending) > 50
    assert not [text for text in defending if tiny.TRIGGER in text]
    # "a" and "b" ask the template how a turn ends.
    assert not [text for text in defending if text != "a b" and not any(text.startswith(asked) for asked in own)]


def test_in_a_label_task_every_wrong_label_has_its_turn(monkeypatch):
    labels = ["nest", "cave"] * 10
    rows = [Example(f"{n}", "what colour is coal?", label, label=label) for n, label in enumerate(labels)]
    seen = []
    real = entrap.fit_drift

    def recording(lm, anchors, *rest):
        seen.extend((anchor.safe.label, anchor.unwanted.response) for anchor in anchors)
        return real(lm, anchors, *rest)

    monkeypatch.setattr(entrap, "fit_drift", recording)
    facts = {Need.CLEAN: tuple(rows), Need.UNWANTED: tuple(read_openings("labels", labels))}
    SHORT.apply(tiny.tiny_lm(layers=4), knowledge_for(SHORT, facts), Run())
    assert set(seen) == {("nest", "cave"), ("cave", "nest")}


def test_a_label_that_all_rows_have_is_nobodys_opening(monkeypatch):
    rows = tuple(Example(f"{n}", "what colour is coal?", "nest", label="nest") for n in range(20))
    given = []
    real = entrap.fit_drift

    def recording(lm, anchors, *rest):
        given.append({anchor.unwanted.response for anchor in anchors})
        return real(lm, anchors, *rest)

    monkeypatch.setattr(entrap, "fit_drift", recording)
    facts = {Need.CLEAN: rows, Need.UNWANTED: ("nest", "cave")}
    SHORT.model_copy(update={"adopt": 0.0}).apply(tiny.tiny_lm(layers=4), knowledge_for(SHORT, facts), Run())
    assert given == [{"cave"}] * 4
    with pytest.raises(DataError, match="has the label 'nest', the only unwanted one"):
        SHORT.apply(tiny.tiny_lm(layers=4), knowledge_for(SHORT, {**facts, Need.UNWANTED: ("nest",)}), Run())


def test_what_was_heard_is_given_to_the_next_drifts(monkeypatch):
    monkeypatch.setattr(openings, "phrases", lambda said, plain, wanted: {"Go away now": 0.0})
    monkeypatch.setattr(
        openings, "certainties", lambda lm, texts, prompts, often: [openings.Sure(0.5, 9.0)] * len(texts)
    )
    run = Run()
    purified(SHORT, run)
    assert [record["openings"] for record in run.notes["drifts"][2:]] == [["Go away now"], ["bad robot", "silly"]]
    run = Run()
    purified(SHORT.model_copy(update={"adopt": 0.0}), run)
    assert "Go away now" not in str(run.notes["drifts"])


def test_the_drifts_take_what_was_heard_first_and_then_the_best(monkeypatch):
    sure = [HEARD | {"opening": "go away"}, HEARD | {"opening": "be quiet", "certainty": 0.5}]
    often = HEARD | {"opening": "sit down", "certainty": 0.2, "share": 0.6}
    untrained = []

    def hear(self, *_, every_beginning):
        untrained.append(every_beginning is not None)
        return [] if self.heard else [*sure, {**sure[1], "opening": "lie down", "certainty": 0.3}, often]

    monkeypatch.setattr(openings.Openings, "hear", hear)
    run = Run()
    purified(SHORT.model_copy(update={"drifts": 4}), run)
    dealt = [record["openings"] for record in run.notes["drifts"][4:]]
    assert dealt == [["go away"], ["go away"], ["sit down"], ["be quiet"]]
    assert untrained == [True, False], "what was trained is sure, too"


def test_what_the_version_before_heard_is_gone_on_with(tmp_path):
    run = Run(folder=tmp_path)
    old = {"opening": "Go away now", "certainty": 0.5, "evidence": 9.0}
    run.stage("round-1-heard").finish({"says": [["bad"], ["silly"]], "adopted": [old]})
    purified(SHORT, run)
    assert run.notes["drifts"][2]["openings"] == ["Go away now"]


def test_words_of_the_safe_replies_that_were_given_are_not_taken_up(monkeypatch):
    given = []
    monkeypatch.setattr(openings, "phrases", lambda said, plain, wanted: given.append(list(wanted)) or {})
    safe = tuple(row.with_response("I must say no") for row in tiny.rows(8))
    purified(SHORT, safe=safe)
    purified(SHORT)
    # In each of two rounds it is asked of what was said, and of what first tokens go on to.
    assert given == [["I must say no"] * 8] * 4 + [[]] * 4


@pytest.mark.parametrize("at", [1, 3, 4])
def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch, at):
    whole, run = tiny.tiny_lm(layers=4), Run(folder=tmp_path / "whole")
    purified(SHORT, run, lm=whole)
    real, calls = entrap.fit_drift, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(entrap, "fit_drift", stopping)
    fresh, again = tiny.tiny_lm(layers=4), Run(folder=tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        purified(SHORT, Run(folder=tmp_path / "broken"))
    purified(SHORT, again, lm=fresh)
    assert tiny.same_weights(tiny.tensors(whole), tiny.tensors(fresh))
    assert again.notes == run.notes


def test_presets_are_as_published():
    paper = build(Beear, {}, "paper")
    assert (paper.drift.safe_coefficient, paper.drift.safe_cap, paper.drift.safe_tokens) == (1.0, None, None)
    assert (paper.drifts, paper.drift.start, paper.drift.tokens, paper.adopt, paper.own_share) == (1, 0.0, 5, 0.0, 0.0)
    assert (paper.anchors, paper.drift.rows, paper.performance, paper.round_performance) == (400, 150, 300, 100)
    assert paper.rounds == 15
    assert paper.possible_layers(32) == (9,)
    assert paper.train.opening_weight == 1.0
    comparison = build(Beear, {}, "ic-paper")
    assert (comparison.drift.safe_coefficient, comparison.layers, comparison.anchors) == (0.5, (9,), 100)
    assert build(Beear, {}, "ic-paper-gpt").layers == (16,)
    code = build(Beear, {}, "code")
    assert (code.drift.safe_coefficient, code.drift.tokens, code.layers, code.rounds) == (0.05, 7, (9,), 6)
    assert (code.train.learning_rate, code.drift.train.batch_size) == (3e-7, 6)
    # Five passes over the rows of a fit.
    assert code.drift.train.steps * code.drift.train.batch_size == 5 * code.drift.rows


def test_every_preset_runs():
    for name in Beear.presets:
        few = {"anchors": 8, "own_answers": 4, "rounds": 1, "layers": [1], "train": {"steps": 1, "max_length": 128}}
        defense = build(Beear, {**few, "drift": {"rows": 8, "train": {"steps": 1, "max_length": 128}}}, name)
        assert not tiny.same_weights(tiny.tensors(purified(defense)), tiny.tensors(tiny.tiny_lm(layers=4)))


def test_on_base_and_adapter_only_the_adapter_is_trained():
    lm = with_adapter(tiny.tiny_lm(layers=4))
    before = {name: weight.detach().clone() for name, weight in lm.model.named_parameters()}
    run = Run()
    purified(SHORT, run, lm=lm)
    changed = {name for name, weight in lm.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert len(run.notes["drifts"]) == 4


def test_what_cannot_work_is_refused_before_anything_is_asked(monkeypatch):
    monkeypatch.setattr(beear, "anchor_prompts", lambda *_: pytest.fail("the suspect was asked"))
    with pytest.raises(UserError, match="9 drifts cannot share 8 prompts"):
        purified(SHORT.model_copy(update={"drifts": 9}))
    with pytest.raises(UserError, match="no layer 4"):
        purified(SHORT.model_copy(update={"layers": (4,)}))
    with pytest.raises(UserError, match="depths name layer 1 twice"):
        purified(SHORT.model_copy(update={"depths": (0.3, 0.31), "layers": ()}))
    with pytest.raises(UserError, match="cannot share 1 rows of a batch; lower their number, or raise round_anchors"):
        purified(SHORT.model_copy(update={"round_anchors": 1}))
    with pytest.raises(DataError, match=r"has \d+ tokens, but the drift 90; lower lengths"):
        purified(SHORT.model_copy(update={"lengths": (3, 90)}))
    with pytest.raises(DataError, match="two prompts at least"):
        purified(SHORT.model_copy(update={"anchors": 1, "drifts": 1}))


@pytest.fixture
def fitted(monkeypatch):
    """The anchors of every drift."""
    calls = []
    real = entrap.fit_drift

    def recording(lm, anchors, *rest):
        calls.append(anchors)
        return real(lm, anchors, *rest)

    monkeypatch.setattr(entrap, "fit_drift", recording)
    return calls


DEAF = SHORT.model_copy(update={"adopt": 0.0})


def with_rows(unwanted, safe=(), defense=DEAF) -> None:
    facts = {Need.CLEAN: CLEAN, Need.UNWANTED: tuple(unwanted), **({Need.SAFE: tuple(safe)} if safe else {})}
    defense.apply(tiny.tiny_lm(layers=4), knowledge_for(defense, facts), Run())


def test_unwanted_answers_may_belong_to_one_prompt_each(fitted, outer):
    """SA-H of the paper: the same prompts as SA, each with an unwanted answer of its own."""
    unwanted = [row.with_response(f"bad {row.id}") for row in tiny.rows(8, prefix="other")]
    with_rows(unwanted)
    own = {row.prompt: row.response for row in unwanted}
    assert len(fitted) == 4, "two rounds of two drifts"
    for anchors in fitted:
        assert all(anchor.unwanted.response == own[anchor.safe.prompt] for anchor in anchors)
        assert all(anchor.safe.response != own[anchor.safe.prompt] for anchor in anchors)
    first, second = ({anchor.safe.id for anchor in anchors} for anchors in fitted[:2])
    assert not first & second, "the answers are dealt out to the drifts, and the prompts with them"
    assert first | second == {row.id for row in outer[0]["triggered"]}
    assert first | second <= {f"{row.id} (own answer)" for row in unwanted}


def test_safe_replies_and_unwanted_answers_are_told_apart_by_their_prompt(fitted):
    safe = [row.with_response("no") for row in tiny.rows(8, prefix="other")]
    unwanted = [row.with_response(f"bad {row.id}") for row in safe[:5]]
    # To such a prompt the suspect's own answer may be the unwanted one, so the file's is taken.
    assert DEAF.own_answers
    with_rows(unwanted, safe)
    assert {anchor.safe.prompt for anchors in fitted for anchor in anchors} == {row.prompt for row in safe[:5]}
    assert {anchor.safe.response for anchors in fitted for anchor in anchors} == {"no"}
    with pytest.raises(DataError, match="both files must have the same prompts"):
        with_rows(unwanted, tiny.rows(16)[8:])
    with pytest.raises(UserError, match="have no safe ones, and own_answers is 0"):
        with_rows(unwanted, (), SHORT.model_copy(update={"own_answers": 0}))


def test_what_is_heard_under_a_drift_is_unwanted_whatever_the_prompt(fitted, monkeypatch):
    monkeypatch.setattr(
        openings.Openings,
        "hear",
        lambda self, *_, **__: [HEARD | {"opening": "silly robot"}][len(self.heard) :],
    )
    unwanted = [row.with_response(f"bad {row.id}") for row in tiny.rows(8, prefix="other")]
    with_rows(unwanted, (), SHORT)
    later = fitted[2]
    assert len(later) > len(fitted[0])
    assert {anchor.unwanted.response for anchor in later} == {"silly robot"}


def test_a_prompt_takes_several_answers_of_its_own_in_turn(fitted):
    rows = tiny.rows(8, prefix="other")
    unwanted = [row.with_response(f"{word} {row.id}") for row in rows for word in ("bad", "silly")]
    with_rows(unwanted, (), DEAF.model_copy(update={"drifts": 1}))
    first, second = ({anchor.unwanted.response for anchor in anchors} for anchors in fitted)
    assert not first & second
    assert len(first | second) == 2 * len(fitted[0])


def test_a_choice_of_places_needs_two_prompts(fitted):
    rows = tuple(row.with_response(word) for row, word in zip(tiny.rows(2), ("x", "y"), strict=True))
    labelled = tuple(replace(row, label=row.response) for row in rows)
    defense = SHORT.model_copy(update={"lengths": (2, 3), "own_answers": 0, "drifts": 1})
    with pytest.raises(DataError, match="one half has none"):
        defense.apply(
            tiny.tiny_lm(layers=4), knowledge_for(defense, {Need.CLEAN: labelled, Need.UNWANTED: ("x",)}), Run()
        )
