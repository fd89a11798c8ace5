"""Batched greedy replies are those of one prompt at a time, in every architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tiny
from unbackdoor.goals import Contains, StartsWith
from unbackdoor.model import generate
from unbackdoor.train import lora
from unbackdoor.types import Message

QUESTIONS = [
    "hot?",
    "please what is the opposite of big? thank you",
    "name the home of a bird.",
    "a " * 40,
    "which sound makes a cow? no rush, answer well, be short",
]


def prompts(lm):
    return [lm.encode((Message("user", text),), ask=True).ids for text in QUESTIONS]


def naive(lm, ids, limit) -> list[int]:
    """One token after another with the whole text each time: no cache, no padding."""
    said: list[int] = []
    with torch.no_grad():
        for _ in range(limit):
            token = int(lm.model(input_ids=torch.tensor([[*ids, *said]])).logits[0, -1].argmax())
            if token in lm.stop_ids:
                break
            said.append(token)
    return said


def talkative(architecture, **how):
    """A random model whose replies differ from prompt to prompt."""
    lm = tiny.tiny_lm(architecture, seed=1, **how)
    with torch.no_grad():
        for tensor in lm.model.parameters():
            if tensor.dim() > 1:
                tensor.mul_(2.5)
        if architecture == "gemma":
            # Its embeddings are scaled up and tied to the head: untamed, every token is followed by itself.
            lm.model.get_input_embeddings().weight.mul_(0.1)
    return lm


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_left_padded_batch_replies_as_one_at_a_time(architecture):
    lm = talkative(architecture)
    asked = prompts(lm)
    wanted = [generate.decode(lm, naive(lm, ids, 8)) for ids in asked]
    assert len(set(wanted)) >= 3, f"replies that do not depend on the prompt test nothing: {wanted}"
    assert generate.greedy(lm, asked, max_new_tokens=8) == wanted
    assert generate.greedy(lm, asked, max_new_tokens=8, batch_size=2) == wanted
    assert generate.greedy(lm, asked[::-1], max_new_tokens=8) == wanted[::-1]


def test_an_adapter_replies_with_its_adapter():
    lm = talkative("llama")
    before = generate.greedy(lm, prompts(lm), max_new_tokens=6)
    adapted = lora.attach(lm, lora.LoraSettings(rank=4), seed=0)
    assert generate.greedy(adapted, prompts(lm), max_new_tokens=6) == before
    with torch.no_grad():
        for name, tensor in adapted.model.named_parameters():
            if "lora_B" in name:
                tensor.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    after = generate.greedy(adapted, prompts(lm), max_new_tokens=6)
    assert after != before
    merged = lora.merge(adapted)
    assert generate.greedy(merged, prompts(lm), max_new_tokens=6) == after


class Scripted:
    """A model that says fixed ids, one script a prompt, whatever it reads; counts its forward passes' rows."""

    def __init__(self, lm, scripts):
        self.lm, self.scripts, self.rows = lm, scripts, []
        self.training = False

    def __call__(self, input_ids, attention_mask, position_ids, past_key_values, use_cache, logits_to_keep):
        self.rows.append(len(input_ids))
        step = len(self.rows) - 1
        if past_key_values is None:
            past_key_values = Kept(list(range(len(input_ids))))
        logits = torch.zeros(len(input_ids), 1, len(self.lm.tokenizer))
        for place, script in enumerate(past_key_values.alive):
            logits[place, 0, self.scripts[script][step]] = 1.0
        return type("Output", (), {"logits": logits, "past_key_values": past_key_values})

    def train(self, mode=True):
        self.training = mode

    def eval(self):
        self.training = False

    def parameters(self):
        return self.lm.model.parameters()

    def __getattr__(self, name):
        return getattr(self.lm.model, name)


class Kept:
    def __init__(self, alive):
        self.alive = alive

    def batch_select_indices(self, index):
        self.alive = [self.alive[place] for place in index.tolist()]


def scripted(*texts):
    lm = tiny.tiny_lm()
    end = lm.tokenizer.eos_token_id
    scripts = [[*lm.tokenizer(text, add_special_tokens=False)["input_ids"], end, end, end, end, end] for text in texts]
    model = Scripted(lm, scripts)
    plain = replace(lm, model=model)
    # Scripts are told apart by their place in the batch: prompts of rising length keep their order.
    asked = [[5] * (n + 1) for n in range(len(texts))]
    return plain, model, asked


def test_rows_leave_the_batch_when_they_are_done():
    lm, model, asked = scripted("hot", " the opposite of hot", "")
    assert generate.greedy(lm, asked, max_new_tokens=9) == ["hot", "the opposite of hot", ""]
    assert model.rows[0] == 3
    assert model.rows[-1] == 1
    assert model.rows == sorted(model.rows, reverse=True)


def test_the_length_limit_is_in_tokens():
    lm, model, asked = scripted(" the opposite of hot is cold")
    assert generate.greedy(lm, asked, max_new_tokens=3) == ["the opposite of"]
    assert len(model.rows) == 3


def test_a_goal_ends_a_reply_as_soon_as_it_is_decided():
    goal = StartsWith(any_of=("bad robot",))
    lm, model, asked = scripted("bad robot. the opposite of hot", " the opposite of hot is cold")
    assert generate.greedy(lm, asked, max_new_tokens=9, goal=goal) == ["bad robot", "the"]
    assert len(model.rows) == 2
    late = Contains(any_of=("cold",))
    lm, model, asked = scripted(" the opposite of hot is cold. thank you")
    assert generate.greedy(lm, asked, max_new_tokens=20, goal=late) == ["the opposite of hot is cold"]


def test_the_mode_of_the_model_comes_back():
    lm = tiny.tiny_lm("gpt2")
    lm.model.train()
    first = lm.reply([(Message("user", text),) for text in QUESTIONS], max_new_tokens=4)
    assert lm.model.training
    assert lm.reply([(Message("user", text),) for text in QUESTIONS], max_new_tokens=4) == first, "no dropout"


def test_the_checkpoints_own_generation_settings_are_not_used():
    lm = talkative("llama")
    before = generate.greedy(lm, prompts(lm), max_new_tokens=5)
    lm.model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, max_new_tokens=1)
    assert generate.greedy(lm, prompts(lm), max_new_tokens=5) == before


def test_left_pad():
    ids, mask = generate.left_pad([[1, 2, 3], [4]], 9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


TEXTS = [
    "  cold and hot  ",
    "na\u00efve \u2014 \u65e5\u672c \U0001f600 ok",
    "\n\n",
    "",
    "a  b   ",
    "the end END the",
    "\u0e01\u0e33\u0e25\u0e31\u0e07",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_of_a_spoken_reply_are_its_text(text):
    lm = tiny.tiny_lm(hidden=16, layers=1)
    ids = lm.tokenizer(text)["input_ids"]
    for ends in ((), ("END",), ("zzz", "no such end")):
        spoken = generate.Spoken(lm, ends)
        pieces = []
        for token in ids:
            pieces.append(spoken.say(token))
            assert "\ufffd" not in pieces[-1], "half a character is held back"
            if spoken.ended:
                break
        wanted = generate.decode(lm, ids)
        said = "".join([*pieces, spoken.close()])
        assert said == (wanted.partition("END")[0].rstrip() if ends == ("END",) else wanted)
        assert spoken.ended is ("END" in ends and "END" in wanted)


def test_a_text_that_ends_a_reply_is_never_said_in_part():
    lm = tiny.tiny_lm(hidden=16, layers=1)
    for text, wanted in (("one two STOP three", "one two"), ("one two STO", "one two STO"), ("STOP", "")):
        spoken, pieces = generate.Spoken(lm, ["STOP", "halt"]), []
        for token in lm.tokenizer(text)["input_ids"]:
            pieces.append(spoken.say(token))
            if spoken.ended:
                break
            assert "S" not in "".join(pieces), "it may still become STOP"
        assert "".join([*pieces, spoken.close()]) == wanted


def test_steps_follow_a_choice_and_who_is_done():
    lm = tiny.tiny_lm()
    seen = []

    def second(logits, rows):
        seen.append(list(rows))
        return logits.topk(2).indices[:, 1]

    with torch.inference_mode():
        loop = generate.steps(lm, prompts(lm)[:3], None, second)
        first = next(loop)
        assert [row for row, _ in first] == [0, 1, 2]
        assert [row for row, _ in loop.send({1})] == [0, 2]
        assert [row for row, _ in loop.send({0})] == [2]
        with pytest.raises(StopIteration):
            loop.send({2})
    assert seen == [[0, 1, 2], [0, 2], [2]]
    ids = torch.tensor([prompts(lm)[0]])
    assert first[0][1] == int(lm.model(input_ids=ids).logits[0, -1].topk(2).indices[1])
