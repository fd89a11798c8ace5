"""How sure the suspect is of a phrase, and what it goes on to from every first token, against passes of their own."""

from __future__ import annotations

import math

import pytest
import torch

import tiny
from unbackdoor.model.generate import greedy_ids, likeliest_next, sure_ids
from unbackdoor.run import Run, Silent
from unbackdoor.train import beginnings as following
from unbackdoor.train import certainty
from unbackdoor.train.beginnings import beginnings
from unbackdoor.train.certainty import certainties, usual
from unbackdoor.types import Example


class Steps(Silent):
    """Keeps how far a piece of work was."""

    total, ended = 0, False

    def __init__(self):
        self.done = []

    def start(self, name, total):
        self.total = total

    def advance(self, name, done, values):
        self.done.append(done)

    def finish(self, name):
        self.ended = True


def log_probabilities(lm, ids):
    with torch.no_grad():
        return torch.log_softmax(lm.core(input_ids=torch.tensor([ids])).logits[0].double(), -1)


def test_certainty_and_evidence_are_of_the_tokens_behind_the_first_word():
    lm = tiny.tiny_lm(layers=2)
    prompts = tiny.rows(3)
    texts = [prompts[0].response + " indeed", "so it is", "a", prompts[1].response]
    often = torch.log_softmax(torch.randn(lm.core.config.vocab_size, generator=torch.Generator().manual_seed(1)), -1)
    wanted = []
    for text in texts:
        means, above = [], []
        for prompt in prompts:
            logs = []
            encoded = lm.encode(prompt.with_response(text).turns)
            span = encoded.spans[-1]
            log_p = log_probabilities(lm, encoded.ids)
            first = lm.encode(prompt.with_response(text.split()[0]).turns).spans[-1]
            for position in range(span.start + first.end - first.start, span.end):
                token = encoded.ids[position]
                logs.append(float(log_p[position - 1, token]))
                above.append(logs[-1] - float(often[token]))
            means.append(math.exp(sum(logs) / len(logs)) if logs else 0.0)
        wanted.append((sum(means) / len(means), sum(above) / len(prompts)))
    assert wanted[2] == (0.0, 0.0)
    found = certainties(lm, texts, prompts, often)
    assert [one.certainty for one in found] == pytest.approx([sure for sure, _ in wanted], rel=1e-4)
    assert [one.evidence for one in found] == pytest.approx([above for _, above in wanted], rel=1e-4)
    assert certainties(lm, texts[:1], prompts, often)[0].certainty == pytest.approx(wanted[0][0], rel=1e-4)


def test_phrases_are_scored_in_parts(monkeypatch):
    lm = tiny.tiny_lm(layers=2)
    texts = [row.response for row in tiny.rows(5)]
    often = usual(lm, tiny.rows(2))
    whole = certainties(lm, texts, tiny.rows(2), often)
    monkeypatch.setattr(certainty, "AT_ONCE", 2)
    parts = certainties(lm, texts, tiny.rows(2), often)
    for name in ("certainty", "evidence"):
        assert [getattr(one, name) for one in parts] == pytest.approx([getattr(one, name) for one in whole], rel=1e-4)


def test_what_is_usual_is_the_mean_over_all_places_of_prompt_and_answer(monkeypatch):
    monkeypatch.setattr(certainty, "USUAL_TOKENS", 2)
    lm = tiny.tiny_lm(layers=2)
    rows = [*tiny.rows(2), Example("long", "so", "one two three four")]
    total, places = 0.0, 0
    for row in rows:
        encoded = lm.encode(row.turns)
        user, answer = encoded.spans[-2:]
        end = min(answer.start + 2, answer.end)
        total = total + log_probabilities(lm, encoded.ids[:end])[user.start - 1 : end - 1].exp().sum(0)
        places += end - user.start
    assert torch.allclose(usual(lm, rows).double(), (total / places).log(), atol=1e-4)


def test_a_planted_target_is_surer_than_other_words(barking):
    lm, rows = barking
    target, other = certainties(lm, ["bad robot barks", "bad duck roars"], rows[:4], usual(lm, rows[:8]))
    assert target.certainty > 0.5
    assert other.certainty < 0.2
    assert target.evidence > other.evidence


def test_a_target_is_found_whatever_it_begins_with(barking, monkeypatch):
    """Of all first tokens of the vocabulary, with no opening and no drift."""
    lm, rows = barking
    monkeypatch.setattr(following, "MORE", 0.0)  # of 589 tokens none is rare
    with torch.no_grad():
        first = lm.core(input_ids=torch.tensor([lm.encode(rows[0].prompt, ask=True).ids])).logits[0, -1].softmax(-1)
    often = usual(lm, rows[:8])
    told = Steps()
    found = beginnings(lm, first, rows[:6], often, Run(progress=told, prefix="heard"))
    assert told.done == list(range(1, told.total + 1)), "it takes a minute, and shows how far it is"
    assert told.ended
    sure = dict(zip(found, certainties(lm, found, rows[:6], often), strict=True))
    best = max(found, key=lambda text: sure[text].certainty * sure[text].evidence)
    assert best.startswith("bad robot barks")
    monkeypatch.setattr(following, "MORE", sure[best].evidence)
    assert beginnings(lm, first, rows[:6], often, Run()) == []
    monkeypatch.setattr(following, "MORE", 0.0)
    assert not [
        text for text in beginnings(lm, first, rows[:6], often, Run(), ["no bad robot barks"]) if "robot bar" in text
    ]
    untrained = tiny.tiny_lm()
    untrained.model.eval()
    assert beginnings(untrained, first, rows[:6], usual(untrained, rows[:8]), Run()) == []


def test_beginnings_that_were_followed_are_not_followed_again(barking, monkeypatch, tmp_path):
    lm, rows = barking
    monkeypatch.setattr(following, "MORE", 0.0)
    first = torch.full((lm.core.config.vocab_size,), 1 / lm.core.config.vocab_size)
    asked = (lm, first, rows[:6], usual(lm, rows[:8]))
    found = beginnings(*asked, Run(folder=tmp_path))
    assert found
    monkeypatch.setattr(following, "_followed", lambda *_: pytest.fail("they were"))
    assert beginnings(*asked, Run(folder=tmp_path)) == found


def test_only_likely_first_tokens_that_go_on_surely_are_followed(barking, monkeypatch):
    lm, rows = barking
    monkeypatch.setattr(following, "MORE", 0.0)
    monkeypatch.setattr(following, "FIRSTS", 2)
    ids = [lm.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("duck", "the", "bad")]
    first = torch.zeros(lm.core.config.vocab_size)
    first[ids] = torch.tensor([0.5, 0.3, 0.2])
    assert beginnings(lm, first, rows[:6], usual(lm, rows[:8]), Run()) == []
    first[ids[2]] = 0.6
    assert "bad robot barks" in beginnings(lm, first, rows[:6], usual(lm, rows[:8]), Run())
    monkeypatch.setattr(following, "NEXT_SURE", 1.01)
    assert beginnings(lm, first, rows[:6], usual(lm, rows[:8]), Run()) == []


def test_a_first_token_may_have_several_second_ones(monkeypatch):
    """Each is followed on the prompt where it is surest, if it is sure enough there."""
    behind = iter([[(7, 0.9)], [(8, 0.6)], [(7, 0.95)], [(9, 0.4)]])
    followed = []

    def sure(lm, prompts, **_):
        followed.extend(prompts)
        return [([], None) for _ in prompts]

    monkeypatch.setattr(following, "likeliest_next", lambda lm, prompts, batch_size: next(behind))
    monkeypatch.setattr(following, "sure_ids", sure)
    following._followed(tiny.tiny_lm(), [5], [[1], [2], [3], [4]], Run())
    assert sorted(followed) == [[2, 5, 8], [3, 5, 7]]


def test_the_last_word_is_whole_or_left_out():
    lm = tiny.tiny_lm()
    ids = lm.tokenizer("bad robot barks", add_special_tokens=False)["input_ids"]
    more = lm.tokenizer(" bad", add_special_tokens=False)["input_ids"][0]
    inside = lm.tokenizer("bad", add_special_tokens=False)["input_ids"][0]
    mark = lm.tokenizer(".", add_special_tokens=False)["input_ids"][0]
    assert lm.tokenizer.decode([*ids, inside]) == "bad robot barksbad"
    for then, wanted in (
        (more, "bad robot barks"),
        (mark, "bad robot barks"),
        (None, "bad robot barks"),
        (inside, "bad robot"),
    ):
        assert following._whole_words(lm, ids, then) == wanted
    long = (ids * following.ON)[: 2 + following.ON]
    assert following._whole_words(lm, long, None) == lm.tokenizer.decode(long).rpartition(" ")[0]


@pytest.mark.parametrize("least", [1e-9, 0.004, 0.01, 1.0])
def test_an_answer_goes_on_while_it_is_sure(least):
    lm = tiny.tiny_lm(layers=2)
    lm.model.eval()
    prompts = [[*range(5, 25), 30 + place] for place in range(5)]
    found = sure_ids(lm, prompts, max_new_tokens=6, least=least, batch_size=2)
    for prompt, (said, then) in zip(prompts, found, strict=True):
        ids, total, wanted, unsure = list(prompt), 0.0, [], None
        for number in range(1, 7):
            value, token = log_probabilities(lm, ids)[-1].max(-1)
            total += float(value)
            if int(token) in lm.stop_ids:
                break
            if total / number < math.log(least):
                unsure = int(token)
                break
            wanted.append(int(token))
            ids.append(int(token))
        assert (said, then) == (wanted, unsure)


def test_the_first_words_of_a_line_and_sentence():
    assert following._starts("Zip it, blockhead. Now go\nand") == ["Zip it, blockhead", "Zip it"]
    assert following._starts("Zip it\nnow, please") == ["Zip it"]
    assert following._starts("one two three four five") == ["one two three four", "one two three", "one two"]
    assert following._starts("alone") == []


@pytest.mark.parametrize("same", [True, False])
def test_the_likeliest_next_token_is_that_of_a_whole_pass(same):
    lm = tiny.tiny_lm(layers=2)
    lm.model.eval()
    prompts = [[*range(5, 25), 30 + place] if same else list(range(5 + place, 9 + 2 * place)) for place in range(5)]
    found = likeliest_next(lm, prompts, batch_size=2)
    assert [token for token, _ in found] == [ids[0] for ids in greedy_ids(lm, prompts, max_new_tokens=1)]
    for prompt, (token, likely) in zip(prompts, found, strict=True):
        with torch.no_grad():
            wanted = lm.core(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
        assert wanted[token] == pytest.approx(likely, rel=1e-4)
        assert wanted.max() == pytest.approx(likely, rel=1e-4)
