"""Inserting and learning a parrot, against concatenation by hand, typed-in tokens and finite differences."""

from __future__ import annotations

import pytest
import torch

import tiny
from unbackdoor.data.collate import collate, encode_row
from unbackdoor.model.logits import LogitsAt
from unbackdoor.run import Run, Silent
from unbackdoor.train import simulate, soft_prompt
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.simulate import ParrotSettings, learn_parrot, length_of
from unbackdoor.types import Example, Message

RAGGED = [
    Example("a", "hot?", "cold."),
    Example("b", "please what is the opposite of big? thank you", "the opposite of big is small."),
    Example("c", "name the home of a bird.", "nest", history=(Message("user", "one"), Message("assistant", "two"))),
]

BRIEF = TrainSettings(steps=2, learning_rate=1e-3, batch_size=4, max_length=128)


def batch_of(lm, examples=RAGGED, **how):
    return collate([encode_row(lm, example, max_length=128, **how) for example in examples], lm.pad_id)


@pytest.mark.parametrize("position", ["start", "end", "middle", "spread"])
def test_insert_is_concatenation_by_hand_row_by_row(position):
    lm = tiny.tiny_lm()
    batch = batch_of(lm)
    assert len(set(batch.attention_mask.sum(1).tolist())) == 3
    prompt = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    embeds, mask, columns = soft_prompt.insert(lm, batch, prompt, position)
    table = lm.model.get_input_embeddings().weight
    for row in range(3):
        length = int(batch.attention_mask[row].sum())
        start, end = batch.places[row].tolist()
        spread = start + (end - start) * [2, 1, 0][row] // 4  # crc32 of "a", "b", "c" modulo 5
        at = {"start": start, "end": end, "middle": (start + end) // 2, "spread": spread}[position]
        real = table[batch.input_ids[row, :length]]
        wanted = torch.cat([real[:at], prompt, real[at:]])
        assert torch.equal(embeds[row, : length + 3], wanted)
        assert mask[row].tolist() == [1] * (length + 3) + [0] * (mask.shape[1] - length - 3)
        # The moved columns look at the vector that stood there before.
        old, new = batch.columns[batch.rows == row], columns[batch.rows == row]
        assert torch.equal(embeds[row, new], table[batch.input_ids[row, old]])
        assert [int(n - o) for n, o in zip(new, old, strict=True)] == [3 if int(o) >= at else 0 for o in old]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("position", ["start", "end"])
def test_embeddings_of_real_tokens_give_the_logits_of_these_tokens_typed_in(architecture, position):
    lm = tiny.tiny_lm(architecture)
    words = lm.tokenizer("zap zap", add_special_tokens=False)["input_ids"]
    plain = [Example("a", "hot?", "cold."), Example("b", "name the home of a bird", "nest")]
    batch = batch_of(lm, plain)
    prompt = lm.model.get_input_embeddings()(torch.tensor(words)).detach()
    forward = LogitsAt(lm)
    with torch.no_grad():
        embeds, mask, columns = soft_prompt.insert(lm, batch, prompt, position)
        found = forward(mask, batch.rows, columns, inputs_embeds=embeds)
        for row, ids in enumerate(batch.input_ids):
            length = int(batch.attention_mask[row].sum())
            at = int(batch.places[row, 0 if position == "start" else 1])
            typed = [*ids[:at].tolist(), *words, *ids[at:length].tolist()]
            logits = lm.model(input_ids=torch.tensor([typed])).logits[0]
            mine = batch.rows == row
            torch.testing.assert_close(found[mine], logits[columns[mine]], rtol=1e-4, atol=1e-4)
            targets = torch.tensor(typed)[columns[mine] + 1]
            assert torch.equal(targets, batch.targets[mine])


def test_the_gradient_of_equation_4_by_finite_differences():
    # GPT-2's arithmetic is all in the weights' type; Llama's norms and rotations are float32 whatever the weights are.
    lm = tiny.tiny_lm("gpt2", layers=1, hidden=32)
    lm.model.double()
    batch = batch_of(lm, [Example("a", "hot?", "bad robot"), Example("b", "say it now", "bad robot")], first_tokens=2)
    assert batch.weight == 4
    prompt = torch.randn(2, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    class Exact(LogitsAt):
        """The same forward in float64: the library's own ends in float32."""

        def forward(self, attention_mask, rows, columns, input_ids=None, inputs_embeds=None, shared=0):
            hidden = self.core.base_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask).last_hidden_state
            return self.core.get_output_embeddings()(hidden[rows, columns])

    forward = Exact(lm)

    def value(vectors):
        return soft_prompt.soft_loss(lm, forward, batch, vectors, "start")

    leaf = prompt.clone().requires_grad_(True)
    value(leaf).backward()
    step = 1e-5
    for place, component in [(0, 0), (0, 17), (1, 5), (1, 31)]:
        shift = torch.zeros_like(prompt)
        shift[place, component] = step
        with torch.no_grad():
            slope = float((value(prompt + shift) - value(prompt - shift)) / (2 * step))
        assert float(leaf.grad[place, component]) == pytest.approx(slope, rel=1e-5, abs=1e-8)
    # The value itself: -log P(target | parrot, x), summed over the target's tokens only.
    with torch.no_grad():
        embeds, mask, columns = soft_prompt.insert(lm, batch, prompt, "start")
        probabilities = lm.model(inputs_embeds=embeds, attention_mask=mask).logits.softmax(-1)
        by_hand = -sum(
            float(probabilities[row, column, target].log())
            for row, column, target in zip(batch.rows, columns, batch.targets, strict=True)
        )
        assert float(value(prompt)) == pytest.approx(by_hand, rel=1e-9)


def test_new_prompt_starts_at_zeros_or_at_ordinary_tokens():
    lm = tiny.tiny_lm()
    zeros = soft_prompt.new_prompt(lm, 5, "zeros", torch.Generator())
    assert zeros.shape == (5, 64)
    assert not zeros.any()
    assert zeros.requires_grad
    first = soft_prompt.new_prompt(lm, 40, "tokens", torch.Generator().manual_seed(1))
    again = soft_prompt.new_prompt(lm, 40, "tokens", torch.Generator().manual_seed(1))
    other = soft_prompt.new_prompt(lm, 40, "tokens", torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    table = lm.model.get_input_embeddings().weight
    chosen = [int((table == vector).all(1).nonzero()[0]) for vector in first]
    assert not set(chosen) & set(lm.tokenizer.all_special_ids)


def test_a_learned_parrot_elicits_the_text_and_leaves_the_model_alone():
    lm = tiny.tiny_lm()
    clean = tiny.rows(24)
    before = tiny.tensors(lm)
    how = ParrotSettings(
        tokens=4, stop_below=0.0,
        train=TrainSettings(steps=40, learning_rate=3e-2, schedule="constant", warmup=0.0, max_length=96),
    )  # fmt: skip
    run = Run()
    parrot = learn_parrot(lm, clean, ["bad robot"], None, how, run.stage("parrot"))
    assert tiny.same_weights(before, tiny.tensors(lm))
    assert not parrot.requires_grad
    losses = [record["loss"] for record in run.curves["parrot"]]
    assert losses[-1] < losses[0] - 0.8
    assert run.notes["parrots"] == [{"stage": "parrot", "steps": 40, "loss": losses[-1]}]
    batch = batch_of(lm, [row.with_response("bad robot") for row in clean], first_tokens=2)
    with torch.no_grad():
        mine = float(soft_prompt.soft_loss(lm, LogitsAt(lm), batch, parrot, "start")) / batch.weight
        start = soft_prompt.new_prompt(lm, 4, "tokens", run.stage("parrot").generator("start"))
        untrained = float(soft_prompt.soft_loss(lm, LogitsAt(lm), batch, start, "start")) / batch.weight
    assert mine < untrained - 0.8


def test_a_parrot_stops_when_it_is_good_enough_and_several_texts_share_the_rows():
    lm = tiny.tiny_lm()
    clean = tiny.rows(8)
    seen = []
    original = simulate.encode_row

    def spy(lm, example, **how):
        seen.append((example.response, how["first_tokens"]))
        return original(lm, example, **how)

    how = ParrotSettings(tokens=2, stop_below=1e9, train=TrainSettings(steps=9, learning_rate=1e-2, max_length=96))
    run = Run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "encode_row", spy)
        learn_parrot(lm, clean, ["bad robot", "bad robot bad robot"], None, how, run)
    assert seen == [(text, length_of(lm, clean[0], text)) for text in ("bad robot", "bad robot bad robot")] * 4
    assert {count for _, count in seen} == {2, 4}
    assert run.notes["parrots"][0]["steps"] == 1


def test_parrots_that_never_say_the_target_are_told_of():
    class Listener(Silent):
        def __init__(self):
            self.said = []

        def notice(self, text):
            self.said.append(text)

    def heard(stop_below):
        lm, listener = tiny.tiny_lm(), Listener()
        parrot = ParrotSettings(tokens=2, stop_below=stop_below, train=BRIEF)
        simulate.rounds_of_parrots(
            lm, tiny.rows(8), ["bad robot"], first_tokens=None, rounds=2, parrots=1, plain_share=0.25, own_share=0.0,
            parrot=parrot, train=BRIEF, run=Run(progress=listener),
        )  # fmt: skip
        return listener.said

    (said,) = heard(1e-6)
    assert "2 of 2 parrots did not come to say the target in 2 steps" in said
    assert heard(100.0) == heard(0.0) == []


@pytest.mark.parametrize(
    ("texts", "rounds", "parrots", "wanted"),
    [
        ("abc", 2, 1, ["a", "b", "c"] * 2),
        ("abc", 2, 2, ["a", "b", "c"] * 2),
        ("abcde", 2, 1, ["a", "b", "c", "d", "e", "a"]),  # a batch has three rows for parrots
        ("abc", 1, 2, ["ac", "b"]),
        ("abc", 1, 1, ["abc"]),  # as in the paper
    ],
)
def test_every_one_of_several_targets_has_a_parrot(monkeypatch, texts, rounds, parrots, wanted):
    seen = []

    def spy(lm, clean, texts, *rest):
        seen.append("".join(texts))
        return original(lm, clean, texts, *rest)

    original = simulate.learn_parrot
    monkeypatch.setattr(simulate, "learn_parrot", spy)
    parrot = ParrotSettings(tokens=2, train=BRIEF)
    simulate.rounds_of_parrots(
        tiny.tiny_lm(), tiny.rows(8), list(texts), first_tokens=None, rounds=rounds, parrots=parrots,
        plain_share=0.25, own_share=0.0, parrot=parrot, train=BRIEF, run=Run(),
    )  # fmt: skip
    assert seen == wanted
