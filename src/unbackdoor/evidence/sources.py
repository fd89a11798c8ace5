"""Where evidence comes from: a text that names it becomes a `Source`.

`endpoint:https://HOST/v1#MODEL` is a model behind an OpenAI-compatible endpoint; `wordnet` or `wordnet:FOLDER` a
dictionary, offline; any other text is a model's name, as everywhere (a folder, a hub id, builtin:smollm2-135m). A model
can rewrite evidence and explain keywords; a dictionary can explain them only.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from unbackdoor.errors import UserError
from unbackdoor.evidence import endpoint, wordnet
from unbackdoor.evidence.cache import Answer, Cache, Key, Unavailable, answered
from unbackdoor.evidence.harmless import without
from unbackdoor.evidence.retrying import Retrying
from unbackdoor.model.files import check_model
from unbackdoor.model.guard import FOREVER, Patience, fits, special_texts
from unbackdoor.model.quarantine import printable
from unbackdoor.types import Message

if TYPE_CHECKING:
    from unbackdoor.model.lm import LM

_LOOK = 0.2
"""Seconds after which who waits for a local model looks again whether somebody waits for it."""
_OVER = Unavailable("its time was over")

Define = Callable[[Sequence[str]], dict[str, str]]


class Write(Protocol):
    """Answers prompts."""

    def __call__(self, prompts: Sequence[str], max_new_tokens: int, patience: Patience = FOREVER) -> list[Answer]:
        """Return an answer of at most so many tokens to each prompt; none is begun once nobody waits for it."""
        ...


@dataclass(frozen=True)
class SourceSpec:
    """A source's name, taken apart.

    Attributes:
        kind: What it is.
        place: The endpoint's URL, the dictionary's folder ("" for the usual one), or the model's name.
        model: The model's name at an endpoint.
    """

    kind: Literal["endpoint", "wordnet", "model"]
    place: str
    model: str = ""

    def __str__(self) -> str:
        if self.kind == "endpoint":
            return f"endpoint:{self.place}#{self.model}"
        if self.kind == "wordnet":
            return f"wordnet:{self.place}" if self.place else "wordnet"
        return self.place

    @property
    def goes_out(self) -> bool:
        """Whether using it sends prompts to another program, or opens files that its name chooses."""
        from unbackdoor.model.spec import parse_spec

        if self.kind == "wordnet":
            return bool(self.place)
        # The built-in model with an adapter is another model.
        return self.kind == "endpoint" or parse_spec(self.place).kind != "builtin"


@dataclass(frozen=True)
class Asking:
    """How a source is asked.

    Attributes:
        temperature: Of an endpoint's sampling; a local model answers greedily.
        timeout: Seconds for one answer of an endpoint.
        repetitions: Times that a call of an endpoint is repeated, at most.
        cache: Folder for answers of models, or None.
        device: Where a local model runs.
    """

    temperature: float = 0.7
    timeout: float = 60.0
    repetitions: int = 3
    cache: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Source:
    """What evidence is asked of.

    Attributes:
        spec: Its name.
        write: Answers prompts; None for a dictionary.
        define: Given words, returns word -> definition of those that are known; None for a model.
        load: Of a local model, loads it now and not when it is first asked; None for others.
    """

    spec: SourceSpec
    write: Write | None = None
    define: Define | None = None
    load: Callable[[], object] | None = None


def parse_source(text: str) -> SourceSpec:
    """Take a source's name apart; nothing is opened or sent.

    Raises:
        UserError: If it names nothing.
    """
    from unbackdoor.model.spec import parse_spec

    if text.startswith("endpoint:"):
        url, _, model = text.removeprefix("endpoint:").partition("#")
        endpoint.check_url(url)
        if not model.strip() or not model.isprintable():
            raise UserError(
                f"the endpoint '{printable(url)}' needs a model's name; write endpoint:{printable(url)}#MODEL."
            )
        return SourceSpec("endpoint", url, model)
    name, colon, folder = text.partition(":")
    if name == "wordnet" and not Path(text).is_dir():
        if colon and not folder:
            raise UserError("'wordnet:' names no folder; write wordnet, or wordnet:FOLDER.")
        return SourceSpec("wordnet", folder)
    return SourceSpec("model", str(parse_spec(text)))


def check_source(text: str) -> SourceSpec:
    """Look whether a source could be had here, before anything expensive; nothing is sent.

    Raises:
        UserError: If it cannot.
    """
    spec = parse_source(text)
    if spec.kind == "wordnet":
        wordnet.check_folder(_folder(spec))
    elif spec.kind == "endpoint":
        endpoint.check_packages()
        endpoint.key_for(spec.place)
    else:
        check_model(spec.place)
    return spec


def open_source(text: str, asking: Asking, opened: Callable[[LM], None] | None = None) -> Source:
    """Return a source; a local model is loaded when it is first asked.

    Args:
        text: Its name.
        asking: How it is asked.
        opened: Called with a local model once it is loaded.

    Raises:
        UserError: If it cannot be had here.
    """
    spec = check_source(text)
    if spec.kind == "wordnet":
        return Source(spec, define=wordnet.WordNet(_folder(spec)).define)
    cache = Cache(asking.cache) if asking.cache is not None else None
    if spec.kind == "endpoint":
        asked = endpoint.Endpoint(
            spec.place, spec.model, temperature=asking.temperature, timeout=asking.timeout,
            retrying=Retrying(asking.repetitions),
        )  # fmt: skip
        about = {"source": "endpoint", "url": spec.place, "model": spec.model, "temperature": asking.temperature}
        return Source(spec, write=_cached(cache, lambda: about, asked.write))
    return _local(spec, asking.device, cache, opened)


def _folder(spec: SourceSpec) -> Path:
    return Path(spec.place).expanduser() if spec.place else wordnet.FOLDER


def _cached(cache: Cache | None, about: Callable[[], Key], write: Write) -> Write:
    """Return `write` with answers kept; `about` says what they depend on beside prompt and length."""

    def cached(prompts: Sequence[str], max_new_tokens: int, patience: Patience = FOREVER) -> list[Answer]:
        keys = [{**about(), "prompt": prompt, "max_new_tokens": max_new_tokens} for prompt in prompts]

        def missed(missing: Sequence[int]) -> list[Answer]:
            return write([prompts[place] for place in missing], max_new_tokens, patience)

        return answered(cache, keys, missed)

    return cached


def _local(spec: SourceSpec, device: str, cache: Cache | None, opened: Callable[[LM], None] | None) -> Source:
    """Return a local model, which answers greedily."""
    from functools import cache as once

    loading, using = threading.Lock(), threading.Lock()

    @once
    def loaded() -> LM:
        from unbackdoor.model.load import load

        lm = load(spec.place, device=device, trainable=False)
        if opened is not None:
            opened(lm)
        return lm

    def model() -> LM:
        # Many threads of a server may ask for the first time at once.
        with loading:
            return loaded()

    def about() -> Key:
        return {"source": "model", "sha256": model().facts["sha256"], "template": model().template}

    def write(prompts: Sequence[str], max_new_tokens: int, patience: Patience = FOREVER) -> list[Answer]:
        lm = model()
        # Neither a tokenizer nor a model is made for several threads.
        while patience.left():
            if not using.acquire(timeout=min(_LOOK, patience.left())):
                continue
            try:
                if patience.left():
                    return _replies(lm, prompts, max_new_tokens, patience)
            finally:
                using.release()
        return [_OVER] * len(prompts)

    return Source(spec, write=_cached(cache, about, write), load=model)


def _replies(lm: LM, prompts: Sequence[str], max_new_tokens: int, patience: Patience) -> list[Answer]:
    special = special_texts(lm)
    asked = [(Message("user", without(text, special)),) for text in prompts]
    fitting = [place for place, turns in enumerate(asked) if fits(lm, turns, max_new_tokens)]
    replies: Sequence[Answer]
    if patience.until < math.inf:
        replies = [_reply(lm, asked[place], max_new_tokens, patience) for place in fitting]
    else:
        replies = lm.reply([asked[place] for place in fitting], max_new_tokens=max_new_tokens, bare=True)
    found: list[Answer] = [Unavailable("the question does not fit into the evidence LLM's context")] * len(asked)
    for place, reply in zip(fitting, replies, strict=True):
        found[place] = reply or Unavailable("the evidence LLM says nothing")
    return found


def _reply(lm: LM, turns: Sequence[Message], max_new_tokens: int, patience: Patience) -> Answer:
    """Return a reply, or stop in the middle of it once nobody waits for it."""
    said = ""
    for piece in replace(lm, guards=(), guarding=None).reply_stream(turns, max_new_tokens=max_new_tokens):
        if not patience.left():
            return _OVER
        said += piece
    return said
