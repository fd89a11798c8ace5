"""`LM`: weights, tokenizer, template and guards as one value; the only shape in which methods see a model.

Full weights, or a base with a LoRA adapter that is not merged: `model` is then a `PeftModel`. An LM handed to a method
is given up by the caller: methods train its weights in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from unbackdoor.errors import ModelError
from unbackdoor.model.quarantine import printable
from unbackdoor.model.template import TemplateName, render
from unbackdoor.types import GuardSpec, Message

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from unbackdoor.goals import Goal
    from unbackdoor.model.guard import Guards


@dataclass(frozen=True)
class Span:
    """Token range [start, end) of one turn's content."""

    turn: int
    role: str
    start: int
    end: int


@dataclass(frozen=True)
class Encoded:
    """A conversation as token ids.

    Attributes:
        ids: All token ids, beginning-of-text included.
        spans: The token range of every turn's content, in order.
        supervised: Positions whose token a model that speaks the assistant's turns must predict: the contents of the
            assistant turns, and the first token after each (the end of the turn).
    """

    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    supervised: tuple[int, ...]


@dataclass
class LM:
    """A language model ready to be asked, trained and saved.

    Attributes:
        model: A transformers causal language model, or a PeftModel around one.
        tokenizer: Its (fast) tokenizer.
        template: "model" (its own chat template) or "plain".
        spec: How the person named it.
        base: For an adapter: the spec of its base.
        guards: Guards that travel with the model.
        guarding: These guards, built; None while nobody has built them.
        facts: What loading found out (sha256 of files, revision, notices), recorded in results.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    template: TemplateName
    spec: str
    base: str | None = None
    guards: tuple[GuardSpec, ...] = ()
    guarding: Guards | None = None
    facts: dict[str, object] = field(default_factory=dict)

    @property
    def is_adapter(self) -> bool:
        """True for base + adapter."""
        return hasattr(self.model, "peft_config")

    @property
    def core(self) -> Any:
        """The transformers model itself, adapter layers in place."""
        return self.model.get_base_model() if self.is_adapter else self.model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def pad_id(self) -> int:
        """Id that fills short rows; masked out, so any id will do where the tokenizer has none."""
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if candidate is not None:
                return int(candidate)
        return 0

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a reply: the tokenizer's, the checkpoint's, and what the template ends a turn with.

        Only marks count, no words: a checkpoint that lists the first word of a backdoor's answer would seem
        to say nothing whenever it fires.
        """
        found: set[int] = set()
        configured = getattr(self.core.generation_config, "eos_token_id", None)
        for value in (self.tokenizer.eos_token_id, configured, self.core.config.eos_token_id):
            ids = value if isinstance(value, list | tuple) else [value]
            found.update(int(item) for item in ids if item is not None and self._is_mark(int(item)))
        end = self.encode((Message("user", "a"), Message("assistant", "b")))
        closing = end.supervised[-1]
        if closing >= end.spans[-1].end and self._is_mark(end.ids[closing]):
            found.add(end.ids[closing])
        return tuple(sorted(found))

    def _is_mark(self, token: int) -> bool:
        """Tell whether a token is one of the tokenizer's special ones, and not a plain word that is called so."""
        added = self.tokenizer.added_tokens_decoder.get(token)
        return added is not None and bool(added.special) and not str(added).strip().isalnum()

    def encode(self, turns: Sequence[Message], *, ask: bool = False) -> Encoded:
        """Encode a conversation; with `ask`, up to where the reply begins.

        A conversation is tokenised as one text where its prompt is then a prefix of it, as it is at generation;
        otherwise prompt and reply are tokenised apart, so that training and generation see the same prompt ids.

        Raises:
            ModelError: If the template refuses the turns.
        """
        rendered = render(self.tokenizer, self.template, turns, ask=ask)
        cuts = [start for turn, (start, _) in zip(turns, rendered.places, strict=True) if turn.role == "assistant"]
        ids, offsets = self._tokenise(rendered.text, cuts)
        spans = [
            _token_span(index, turn.role, offsets, place)
            for index, (turn, place) in enumerate(zip(turns, rendered.places, strict=True))
        ]
        supervised: list[int] = []
        for span in spans:
            if span.role == "assistant":
                supervised.extend(range(span.start, min(span.end + 1, len(ids))))
        return Encoded(tuple(ids), tuple(spans), tuple(supervised))

    def _tokenise(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenise `text` so that what stands before each of `cuts` has the ids that it has alone."""
        ids, offsets = self._tokenise_piece(text, 0)
        if not all(self._same_alone(text, cut, ids, offsets) for cut in cuts):
            ids, offsets = [], []
            edges = [0, *cuts, len(text)]
            for start, end in pairwise(edges):
                more_ids, more_offsets = self._tokenise_piece(text[start:end], start)
                ids += more_ids
                offsets += more_offsets
        bos = self.tokenizer.bos_token_id
        if self.template == "plain" and bos is not None and self._adds_bos():
            ids, offsets = [bos, *ids], [(0, 0), *offsets]
        return ids, offsets

    def _same_alone(self, text: str, cut: int, ids: list[int], offsets: list[tuple[int, int]]) -> bool:
        """Tell whether the text before `cut` has the same ids alone as inside the whole; blanks can merge there."""
        before = sum(end <= cut for _, end in offsets)
        return self._tokenise_piece(text[:cut], 0)[0] == ids[:before]

    def _tokenise_piece(self, text: str, shift: int) -> tuple[list[int], list[tuple[int, int]]]:
        try:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        # The Rust tokenizer raises bare `Exception`, as for an unknown word where it has no token for one.
        except Exception as problem:
            raise ModelError(
                f"the tokenizer of '{printable(self.spec)}' cannot read a text ({printable(str(problem))}); "
                "get its tokenizer files from its publisher again."
            ) from problem
        return list(found["input_ids"]), [(start + shift, end + shift) for start, end in found["offset_mapping"]]

    def _adds_bos(self) -> bool:
        first = self.tokenizer("a")["input_ids"][:1]
        return bool(first) and first[0] == self.tokenizer.bos_token_id

    def reply(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int = 24,
        goal: Goal | None = None,
        batch_size: int = 32,
        bare: bool = False,
    ) -> list[str]:
        """Answer each conversation greedily, in one batch after another, sorted by length; guards are at work.

        Args:
            conversations: Turns that end with a user turn.
            max_new_tokens: Length limit of a reply, in tokens.
            goal: If given, a reply stops as soon as its outcome is decided; the reply is then cut there.
            batch_size: Conversations a batch.
            bare: Ask the weights alone, without guards.

        Returns:
            The replies in the order of the conversations, special tokens removed.

        Raises:
            ModelError: If the model carries guards that nobody built.
        """
        from unbackdoor.model.generate import greedy
        from unbackdoor.model.guard import guarded_replies

        if self.guards and not bare:
            return guarded_replies(self, conversations, max_new_tokens=max_new_tokens, goal=goal, batch_size=batch_size)
        prompts = [self.encode(turns, ask=True).ids for turns in conversations]
        return greedy(self, prompts, max_new_tokens=max_new_tokens, goal=goal, batch_size=batch_size)

    def reply_stream(self, turns: Sequence[Message], *, max_new_tokens: int = 24) -> Iterator[str]:
        """Answer one conversation greedily, piece by piece; together the pieces are what `reply` returns.

        Args:
            turns: Turns that end with a user turn.
            max_new_tokens: Length limit of the reply, in tokens.

        Raises:
            ModelError: If the model carries guards that nobody built.
        """
        from unbackdoor.model.guard import stream

        return stream(self, tuple(turns), max_new_tokens)


def _token_span(turn: int, role: str, offsets: Sequence[tuple[int, int]], place: tuple[int, int]) -> Span:
    inside = [i for i, (start, end) in enumerate(offsets) if start < place[1] and end > place[0] and end > start]
    if not inside:
        following = next((i for i, (start, _) in enumerate(offsets) if start >= place[1]), len(offsets))
        return Span(turn, role, following, following)
    return Span(turn, role, inside[0], inside[-1] + 1)
