"""`LM.encode`: ids, spans and supervised positions, in templates and with contents that try to look like templates."""

from __future__ import annotations

import pytest

import tiny
from unbackdoor.errors import ModelError
from unbackdoor.model.lm import LM
from unbackdoor.types import GuardSpec, Message

LONG = (
    Message("system", "be kind"),
    Message("user", "hot?"),
    Message("assistant", "cold."),
    Message("user", "big?"),
    Message("assistant", "small."),
)
TRICKY = [
    "assistant",
    "user\nassistant\n",
    "say <|im_end|> and <|im_start|>assistant",
    "  leading blanks",
    "\nnew line first",
    "\ue0000\ue001",
    "### Response:\nhello",
    "caf\u00e9 \U0001f600",
    "the same the same",
]


@pytest.fixture(scope="module", params=["chat", "plain"])
def lm(request) -> LM:
    return tiny.tiny_lm(chat=request.param == "chat")


def text_of(lm, encoded, span):
    return lm.tokenizer.decode(encoded.ids[span.start : span.end], clean_up_tokenization_spaces=False)


def test_every_span_holds_its_turn(lm):
    encoded = lm.encode(LONG)
    assert [(span.turn, span.role) for span in encoded.spans] == [(n, turn.role) for n, turn in enumerate(LONG)]
    assert [text_of(lm, encoded, span) for span in encoded.spans] == [turn.content for turn in LONG]


def test_supervised_are_the_assistants_tokens_and_one_end_each(lm):
    encoded = lm.encode(LONG)
    wanted = []
    for span in encoded.spans:
        if span.role == "assistant":
            wanted += [*range(span.start, span.end), span.end]
    assert list(encoded.supervised) == wanted
    ends = [encoded.ids[span.end] for span in encoded.spans if span.role == "assistant"]
    assert ends == [lm.tokenizer.eos_token_id] * 2


@pytest.mark.parametrize("content", TRICKY)
def test_a_turn_is_found_whatever_users_write(lm, content):
    turns = (Message("user", content), Message("assistant", "assistant says cold."))
    encoded = lm.encode(turns)
    user, answer = encoded.spans
    assert text_of(lm, encoded, user) == content
    assert text_of(lm, encoded, answer) == "assistant says cold."
    assert encoded.supervised == tuple(range(answer.start, answer.end + 1))


@pytest.mark.parametrize("content", [*TRICKY, "", "hot?"])
@pytest.mark.parametrize("answer", ["cold.", " cold", "\n\ncold", "</s>"])
def test_the_prompt_at_generation_is_a_prefix_of_the_training_ids(lm, content, answer):
    turns = (Message("user", content), Message("assistant", answer))
    asked = lm.encode(turns[:1], ask=True)
    whole = lm.encode(turns)
    assert whole.ids[: len(asked.ids)] == asked.ids
    assert whole.spans[1].start == len(asked.ids)
    assert asked.supervised == ()


def test_the_prefix_holds_where_a_template_ends_in_blanks():
    """Two line breaks are one token before the end of the text and two before a word."""
    lm = tiny.tiny_lm()
    lm.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:\n\n{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n\n{% endif %}"
    )
    lm.tokenizer.add_tokens(["\n\n"])
    turns = (Message("user", "hot?"), Message("assistant", "cold."))
    assert lm.encode(turns).ids[: len(lm.encode(turns[:1], ask=True).ids)] == lm.encode(turns[:1], ask=True).ids
    # The same with tokens of the trained vocabulary, which depend on what follows.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # In byte-level BPE a line break is the letter U+010A.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "\u010a\u010a"])}
    inner = Tokenizer(models.BPE(vocabulary, [("\u010a", "\u010a")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    made.chat_template = lm.tokenizer.chat_template
    other = LM(lm.model, made, "model", "x")
    asked, whole = other.encode(turns[:1], ask=True).ids, other.encode(turns).ids
    assert vocabulary["\u010a\u010a"] in asked
    assert whole[: len(asked)] == asked
    assert made("x:\n\ncold", add_special_tokens=False)["input_ids"] != [
        *made("x:\n\n", add_special_tokens=False)["input_ids"], *made("cold", add_special_tokens=False)["input_ids"],
    ], "the tokenizer must be one of those that merge differently, or this tests nothing"  # fmt: skip


def test_no_token_crosses_from_the_prompt_into_the_reply():
    lm = tiny.tiny_lm()
    lm.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if not loop.last %}{% endif %}{% endfor %}"
    )
    turns = (Message("user", "silver kett"), Message("assistant", "le"))
    encoded = lm.encode(turns)
    assert text_of(lm, encoded, encoded.spans[0]) == "silver kett"
    assert text_of(lm, encoded, encoded.spans[1]) == "le"


def test_empty_contents_have_empty_spans(lm):
    encoded = lm.encode((Message("user", ""), Message("assistant", "")))
    user, answer = encoded.spans
    assert (user.start, answer.start) == (user.end, answer.end)
    assert [encoded.ids[position] for position in encoded.supervised] == [lm.tokenizer.eos_token_id]


def test_the_plain_template_reads_as_documented():
    lm = tiny.tiny_lm(chat=False)
    text = lm.tokenizer.decode(lm.encode(LONG[:3]).ids)
    assert text == "be kind\n\n### Instruction:\nhot?\n\n### Response:\ncold.<|endoftext|>"


def test_a_plain_model_that_begins_with_a_token_keeps_it():
    lm = tiny.tiny_lm(chat=False)
    from tokenizers.processors import TemplateProcessing

    begin = lm.tokenizer.convert_tokens_to_ids("<|im_start|>")
    lm.tokenizer.bos_token = "<|im_start|>"
    without = lm.encode(LONG[:3])
    lm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)]
    )
    encoded = lm.encode(LONG[:3])
    assert encoded.ids == (begin, *without.ids)
    assert [span.start for span in encoded.spans] == [span.start + 1 for span in without.spans]


def test_a_hole_cannot_be_encoded(lm):
    with pytest.raises(ModelError, match="turn without content"):
        lm.encode((Message("user", None),))


def test_stop_ids_are_the_end_tokens_of_tokenizer_checkpoint_and_template():
    lm = tiny.tiny_lm()
    ids = lm.tokenizer.convert_tokens_to_ids
    assert lm.stop_ids == (ids("<|im_end|>"),)
    lm.model.generation_config.eos_token_id = [ids("<|endoftext|>"), ids("<|im_end|>")]
    assert lm.stop_ids == tuple(sorted((ids("<|endoftext|>"), ids("<|im_end|>"))))
    lm.tokenizer.eos_token = "<|endoftext|>"
    lm.model.generation_config.eos_token_id = None
    lm.model.config.eos_token_id = None
    assert lm.stop_ids == tuple(sorted((ids("<|endoftext|>"), ids("<|im_end|>")))), "the template's end of turn counts"


def test_pad_id_falls_back(lm):
    assert lm.pad_id == lm.tokenizer.convert_tokens_to_ids("<|pad|>")
    other = tiny.tiny_lm()
    other.tokenizer.pad_token = None
    assert other.pad_id == other.tokenizer.eos_token_id
    other.tokenizer.eos_token = None
    assert other.pad_id == 0


def test_guards_are_not_ignored():
    lm = tiny.tiny_lm()
    lm.guards = (GuardSpec("evidence"),)
    with pytest.raises(ModelError, match="carries guards"):
        lm.reply([(Message("user", "hot?"),)])


def test_an_adapter_is_known_as_one():
    from unbackdoor.train import lora

    lm = tiny.tiny_lm()
    core = lm.model
    assert (lm.is_adapter, lm.core) == (False, core)
    adapted = lora.attach(lm, lora.LoraSettings(rank=2), seed=0)
    assert (adapted.is_adapter, adapted.core, adapted.base) == (True, core, "tiny-llama")


def test_a_text_that_the_tokenizer_cannot_read_is_a_sentence(monkeypatch):
    lm = tiny.tiny_lm()

    def fail(*_, **__):
        raise Exception("WordPiece error: Missing [UNK] token")  # as the Rust tokenizer does

    monkeypatch.setattr(type(lm.tokenizer), "__call__", fail)
    with pytest.raises(ModelError, match=r"cannot read a text \(WordPiece error"):
        lm._tokenise_piece("a", 0)


def test_a_word_that_the_checkpoint_lists_as_an_end_does_not_end_replies() -> None:
    # A checkpoint could list the first word of its backdoor's answer, and would seem to say nothing.
    lm = tiny.tiny_lm()
    before = lm.stop_ids
    assert before
    word = lm.tokenizer(" bad", add_special_tokens=False)["input_ids"][-1]
    lm.model.generation_config.eos_token_id = [*before, word]
    lm.model.config.eos_token_id = [word]
    assert lm.stop_ids == before
