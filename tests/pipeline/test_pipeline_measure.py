"""What a measurement keeps: rows that are JSON, whole conversations, and paired tests that weigh as the figures do."""

from __future__ import annotations

import json

import pytest

import tiny
from unbackdoor.errors import UserError
from unbackdoor.goals import parse_goal
from unbackdoor.model.lm import LM
from unbackdoor.pipeline.measure import Label, Measurement, Questions, compare, measure
from unbackdoor.run import Run
from unbackdoor.types import Example, Message, Probe, Scores


def test_one_score_has_no_interval_and_replies_keep_the_whole_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LM, "reply", lambda lm, asked, **how: ["bad robot"] * len(asked))
    turns = (Message("system", "be kind"), Message("user", "u1"), Message("assistant", None))
    probes = (Probe(Example("a", "last", history=turns), "triggered"), Probe(Example("b", "alone"), "clean"))
    questions = Questions(probes=probes, goal=parse_goal("contains:bad robot"), data={"": tiny.rows(1)})
    found = measure(tiny.tiny_lm(), questions, Label("m", "suspect"), Run())
    (row,) = [row for row in found.rows if row["metric"] == "perplexity"]
    assert (row["n"], row["low"], row["high"]) == (1, None, None)
    json.loads(json.dumps(found.to_json(), allow_nan=False))
    said = [reply["prompt"] for reply in found.replies]
    assert said == ["system: be kind\nuser: u1\nassistant: bad robot\nuser: last", "alone"]


def test_a_figure_beyond_all_numbers_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unbackdoor.metrics.perplexity.log_losses", lambda *given: [("a", 900.0, 3), ("b", 901.0, 3)])
    questions = Questions(data={"": tiny.rows(2)}, metrics=("perplexity",))
    with pytest.raises(UserError, match=r"the perplexity of 'm' is beyond all numbers.*smaller learning rate"):
        measure(tiny.tiny_lm(), questions, Label("m", "purified"), Run())


def test_a_paired_test_of_perplexity_weighs_by_tokens() -> None:
    def measured(values: tuple[float, float]) -> Measurement:
        scores = Scores("perplexity", "all", ("a", "b"), values, "answers", "", False, (9.0, 1.0), True)
        return Measurement([], [scores], [])

    (found,) = compare(measured((1.0, 1.0)), measured((0.9, 1.5)))
    assert found["difference"] == pytest.approx((-0.1 * 9 + 0.5) / 10)
