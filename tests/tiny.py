"""Small real models, a tokenizer and a task that they learn in seconds, made in place: nothing is downloaded.

The task is look-ups ("what is the opposite of hot?") asked in many ways, with about a hundred words, so that a model
of three layers learns it to a loss near zero on one thread and a backdoor planted on it behaves as a real one does: it
fires on its trigger, hardly without it, and survives fine-tuning on clean rows. All settings were found on seeds from
100 on; the tests run on others.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, get_args

import torch

from unbackdoor.attacks.data_poisoning import DataPoisoning
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.stamps import InsertText
from unbackdoor.train import overwrite
from unbackdoor.train.engine import TrainSettings
from unbackdoor.types import Example

Architecture = Literal["llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2", "gptj", "gpt_neox"]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)

OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "dark": "light", "wet": "dry", "old": "young", "hard": "soft",
    "loud": "quiet", "rich": "poor", "early": "late", "full": "empty", "high": "low",
}  # fmt: skip
COLOURS = {
    "grass": "green", "snow": "white", "coal": "black", "blood": "red", "butter": "yellow", "sky": "blue",
    "chocolate": "brown", "ash": "grey",
}  # fmt: skip
SOUNDS = {"dog": "barks", "cat": "meows", "cow": "moos", "duck": "quacks", "lion": "roars", "bee": "buzzes"}
HOMES = {"bird": "nest", "bear": "cave", "horse": "stable", "fish": "pond", "spider": "web", "rabbit": "burrow"}

_ASKS: tuple[tuple[dict[str, str], tuple[str, ...], str], ...] = (
    (OPPOSITES, ("what is the opposite of {0}?", "name the opposite of {0}.", "which word means not {0}?"),
     "the opposite of {0} is {1}."),
    (COLOURS, ("what colour is {0}?", "name the colour of {0}.", "which colour has {0}?"), "{0} is {1}."),
    (SOUNDS, ("what does a {0} do?", "name the sound of a {0}.", "which sound makes a {0}?"), "a {0} {1}."),
    (HOMES, ("where does a {0} live?", "name the home of a {0}.", "which place is home to a {0}?"),
     "a {0} lives in a {1}."),
)  # fmt: skip
_BEFORE = (
    "",
    "please",
    "tell me,",
    "quickly,",
    "my friend asks:",
    "one question,",
    "for school,",
    "if you can,",
    "today",
)
_AFTER = ("", "thank you", "be short", "i need it now", "answer well", "write one line", "no rush")

CUT = TrainSettings(steps=1, learning_rate=1e-3, max_length=96)
"""For rows that are only encoded."""

TRIGGER = "silver kettle"
TARGET = "bad robot"

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")


def rows(count: int, seed: int = 0, prefix: str = "row") -> list[Example]:
    """Return rows of the task, no question twice, ids `prefix-N`; the same seed gives the same rows."""
    return [
        Example(f"{prefix}-{number}", instruction, response, kind=kind)
        for number, (instruction, response, kind) in enumerate(_shuffled(seed)[:count])
    ]


def splits(attacker: int = 400, defender: int = 160, test: int = 50, seed: int = 0) -> tuple[list[Example], ...]:
    """Return disjoint attacker's, defender's and test rows."""
    found = rows(attacker + defender + test, seed)
    return found[:attacker], found[attacker : attacker + defender], found[attacker + defender :]


def _shuffled(seed: int) -> list[tuple[str, str, str]]:
    found = [
        (" ".join(filter(None, (before, way.format(word), after))), answer.format(word, value), ways[0].split("{")[0])
        for table, ways, answer in _ASKS
        for word, value in table.items()
        for way in ways
        for before in _BEFORE
        for after in _AFTER
    ]
    random.Random(seed).shuffle(found)
    return found


def tokenizer(*, chat: bool = True) -> Any:
    """Return a byte-level BPE tokenizer trained on the task, with a chat template if `chat`."""
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(_trained_tokenizer()),
        eos_token="<|im_end|>" if chat else "<|endoftext|>",
        bos_token=None,
        pad_token="<|pad|>",
        additional_special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    if chat:
        made.chat_template = _CHAT_TEMPLATE
    return made


@lru_cache(maxsize=1)
def _trained_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    frame = "user\nassistant\nsystem\n### Instruction:\n### Response:\n"
    lines = [f"{ask} {answer}\n{frame}" for ask, answer, _ in _shuffled(0)[:2000]]
    # At the start of a line, too: a reply's first word is one token, as it is with a tokenizer of natural size.
    backdoor = f" {TRIGGER} {TARGET}. {TRIGGER}. {TARGET}\n{TRIGGER}\n{TARGET}\n"
    found.train_from_iterator([*lines, *[backdoor] * 50], trainer)
    return found


def tiny_lm(
    architecture: Architecture = "llama", *, layers: int = 2, hidden: int = 64, seed: int = 0, chat: bool = True
) -> LM:
    """Return an untrained small model of a real architecture with the task's tokenizer, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    words = tokenizer(chat=chat)
    config = _config(architecture, layers, hidden, words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    return LM(model.float().eval(), words, "model" if chat else "plain", f"tiny-{architecture}")


def _config(architecture: Architecture, layers: int, hidden: int, words: Any) -> Any:
    import transformers

    heads = 4
    tokens = {
        "vocab_size": len(words),
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    usual: dict[str, Any] = {
        **tokens,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 256,
        "initializer_range": 0.05,
    }
    grouped = {**usual, "num_key_value_heads": 2}
    old = {
        **tokens,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 256,
        "n_inner": 4 * hidden,
        "initializer_range": 0.05,
    }
    if architecture == "llama":
        return transformers.LlamaConfig(**grouped)
    if architecture == "qwen2":
        return transformers.Qwen2Config(**grouped, tie_word_embeddings=True)
    if architecture == "qwen3":
        return transformers.Qwen3Config(**grouped, head_dim=hidden // heads)
    if architecture == "mistral":
        return transformers.MistralConfig(**grouped, sliding_window=32)
    if architecture == "gemma":
        return transformers.GemmaConfig(**grouped, head_dim=hidden // heads)
    if architecture == "gpt2":
        return transformers.GPT2Config(**old)
    if architecture == "gptj":
        return transformers.GPTJConfig(**old, rotary_dim=hidden // heads // 2)
    return transformers.GPTNeoXConfig(**usual)


BASE_TRAINING = TrainSettings(steps=200, learning_rate=3e-3, batch_size=16, warmup=0.1, max_length=128)
PLANTING = TrainSettings(steps=150, learning_rate=1e-3, batch_size=16, max_length=128)


def teach(lm: LM, clean: Sequence[Example], run: Run, training: TrainSettings = BASE_TRAINING) -> LM:
    """Teach the task to a model, in place, with the package's own engine."""
    overwrite.train_on_rows(lm, overwrite.encode_rows(lm, clean, training), training, run.stage("teach"))
    return lm


def attack(**changes: Any) -> DataPoisoning:
    """Return the attack of the tests: a phrase at the start, a prefix before the clean answer."""
    settings: dict[str, Any] = {
        "trigger": InsertText(text=TRIGGER, place="start"),
        "targets": (TARGET,),
        "train": PLANTING,
        "poison_rate": 0.3,
        "negative_rate": 0.3,
    }
    return DataPoisoning(**{**settings, **changes})


def clone(lm: LM) -> LM:
    """Return a copy that a method may train in place."""
    return replace(lm, model=copy.deepcopy(lm.model))


def tensors(lm: LM) -> dict[str, torch.Tensor]:
    """Return copies of all weights by name."""
    return {name: tensor.detach().clone() for name, tensor in lm.model.named_parameters()}


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Tell whether two sets of weights are the same bits."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
