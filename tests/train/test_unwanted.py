"""How near words are to the openings: the formula in float64 on whole passes, and who comes first."""

from __future__ import annotations

import pytest
import torch

import tiny
from unbackdoor.train import unwanted
from unbackdoor.train.unwanted import likenesses

OPENINGS = ["bad robot", "silly duck"]
TEXTS = ["bad duck", "the word", "yes"]


def by_hand(lm, texts, openings, rows, layer):
    """Each text alone, no padding."""
    ordinary = [" ".join(row.response.split()[: unwanted.WORDS]) for row in rows]

    def read(text):
        found = []
        for row in rows[: unwanted.READ_ON]:
            encoded = lm.encode(row.with_response(text).turns)
            answer = encoded.spans[-1]
            with torch.no_grad():
                output = lm.core(input_ids=torch.tensor([encoded.ids]), output_hidden_states=True)
            found.append(output.hidden_states[layer + 1][0, answer.start : answer.end].double().mean(0))
        return torch.stack(found).mean(0)

    near, far, mine = (torch.stack([read(text) for text in part]) for part in (openings, ordinary, texts))
    known = torch.cat([near, far])

    def unit(states):
        states = (states - known.mean(0)) / (known.std(0, correction=0) + 1e-3)
        return states / states.norm(dim=-1, keepdim=True)

    sides = [unit(side).mean(0) for side in (near, far)]
    return unit(mine) @ (sides[0] / sides[0].norm() - sides[1] / sides[1].norm())


def test_it_is_the_formula(monkeypatch):
    monkeypatch.setattr(unwanted, "_AT_ONCE", 3)
    lm = tiny.tiny_lm(layers=3)
    lm.model.eval()
    rows = tiny.rows(9)
    found = likenesses(lm, TEXTS, OPENINGS, rows)
    assert found == pytest.approx(by_hand(lm, TEXTS, OPENINGS, rows, 1).tolist(), abs=1e-4)
    assert likenesses(lm, [], OPENINGS, rows) == []


def test_of_a_whole_answer_the_beginning_is_read():
    """A defender may know unwanted answers that are longer than the model's context."""
    lm = tiny.tiny_lm(layers=3)
    lm.model.eval()
    rows = tiny.rows(9)
    whole = ["bad robot " * 20 + ending for ending in ("duck", "duck " * 500)]
    short, long = (likenesses(lm, TEXTS, ["silly duck", answer], rows) for answer in whole)
    assert long == pytest.approx(short)
    assert short != pytest.approx(likenesses(lm, TEXTS, ["silly duck", "bad robot"], rows))


def test_openings_are_nearest_to_themselves():
    lm = tiny.tiny_lm(layers=3)
    lm.model.eval()
    rows = tiny.rows(9)
    ordinary = [" ".join(row.response.split()[: unwanted.WORDS]) for row in rows]
    found = likenesses(lm, [*OPENINGS, *ordinary], OPENINGS, rows)
    assert min(found[:2]) > max(found[2:])
