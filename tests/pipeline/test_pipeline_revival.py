"""Revival: training on, and whether the unrelated backdoor was planted at all."""

from __future__ import annotations

import pytest

import tiny
from unbackdoor.model.lm import LM
from unbackdoor.pipeline.steps import Revival, revive
from unbackdoor.run import Run

UNRELATED = {
    "trigger": {"form": "insert", "text": "blue hat", "place": "end"},
    "targets": ["nice day"],
    "train": {"steps": 1, "learning_rate": 1e-3, "batch_size": 4},
}


def test_a_planted_revival_notes_how_often_its_own_backdoor_fires(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def reply(lm, conversations, **how):
        asked.extend(turns[-1].content for turns in conversations)
        return ["nice day. and so on" if number < 2 else "no" for number in range(len(conversations))]

    monkeypatch.setattr(LM, "reply", reply)
    run, held_out = Run(seed=4), tiny.rows(5, seed=9)
    lm = tiny.tiny_lm()
    before = tiny.tensors(lm)
    found = revive(lm, "revived_planted", Revival.model_validate(_settings()), tiny.rows(20, seed=8), held_out, run)
    assert not tiny.same_weights(before, tiny.tensors(found))
    assert run.notes["unrelated backdoor"] == {"fired": 2, "asked": 5}
    assert [text.endswith("blue hat") for text in asked] == [True] * 5
    assert [row.user_text in text for row, text in zip(held_out, asked, strict=True)] == [True] * 5


def test_a_revival_on_clean_rows_asks_nothing() -> None:
    run = Run(seed=4)
    revive(tiny.tiny_lm(), "revived_clean", Revival.model_validate(_settings()), tiny.rows(8, seed=8), (), run)
    assert run.notes == {}
    assert len(run.curves["revived_clean"]) == 1


def _settings() -> dict[str, object]:
    return {"clean": {"steps": 1, "learning_rate": 1e-3, "batch_size": 4}, "planted": UNRELATED}
