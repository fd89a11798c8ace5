"""One model that answers many: a thread owns it, takes what waits as a batch, and tells each who asked its tokens.

A batch is what came within a few milliseconds, at most `most` questions; a row leaves it when its reply has ended or
nobody waits for it any more. What comes later waits for the end of the batch.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from unbackdoor.errors import ModelError
from unbackdoor.model.generate import Spoken, steps
from unbackdoor.model.guard import DecodeGuard, Patience, Turns, context_of, fits, special_texts
from unbackdoor.model.lm import LM
from unbackdoor.serve.protocol import Problem

if TYPE_CHECKING:
    import torch

_GATHER = 0.005
_COLDEST = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 for the likeliest token.
        top_p: The likeliest tokens that together have this probability are drawn from.
        seed: Of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class End:
    """A reply has ended.

    Attributes:
        reason: "stop" or "length".
        tokens: How many it has.
    """

    reason: str
    tokens: int


Told = str | End | Exception
"""A piece of text, the end, or what went wrong."""


@dataclass(eq=False)
class Job:
    """A question that waits.

    Attributes:
        ids: The prompt.
        limit: Most tokens of the reply.
        tell: Called from the engine's thread with each piece, then once with the end.
        sampling: How tokens are chosen.
        ends: Texts that end the reply.
        guarded: Whether the engine's decode guard acts.
        cancelled: Set when nobody waits for it any more.
    """

    ids: tuple[int, ...]
    limit: int
    tell: Callable[[Told], None]
    sampling: Sampling = Sampling()
    ends: tuple[str, ...] = ()
    guarded: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)


class Engine:
    """A model and the thread that owns it."""

    def __init__(self, lm: LM, *, most: int, decode: DecodeGuard | None = None) -> None:
        """Start the thread.

        Args:
            lm: The model; nobody else may use it meanwhile.
            most: Questions in a batch, at most.
            decode: The guard of the token loop, or None.
        """
        self.lm, self.most, self.decode = lm, most, decode
        self.special, self.context = special_texts(lm), context_of(lm)
        self._stops = frozenset(lm.stop_ids)
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        # Tokenizers are not made for several threads.
        self._words = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def encode(self, turns: Turns) -> tuple[int, ...]:
        """Return the ids of a conversation up to where the reply begins.

        Raises:
            ModelError: If the template refuses the turns.
        """
        with self._words:
            return self.lm.encode(turns, ask=True).ids

    def fits(self, turns: Turns, limit: int) -> bool:
        """Tell whether the model can read a conversation and answer with so many tokens."""
        with self._words:
            return fits(self.lm, turns, limit)

    def submit(self, job: Job) -> None:
        """Put a question in the queue."""
        self._waiting.put(job)

    def stop(self) -> None:
        """End the thread once what it is at has ended."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            batch, last = self._gather()
            for job in [job for job in batch if job.guarded and self.decode is not None]:
                batch.remove(job)
                self._safely([job], self._decode)
            if batch:
                self._safely(batch, self._generate)
            if last:
                return

    def _gather(self) -> tuple[list[Job], bool]:
        """Return what waits, at least one job unless the engine is to end, and whether it is."""
        batch: list[Job] = []
        until = None
        while len(batch) < self.most:
            try:
                job = self._waiting.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                return batch, True
            if not job.cancelled.is_set():
                batch.append(job)
                until = until or time.monotonic() + _GATHER
        return batch, False

    def _safely(self, batch: Sequence[Job], work: Callable[[Sequence[Job]], None]) -> None:
        import torch

        try:
            with torch.inference_mode():
                work(batch)
        # Whatever a model does with one batch (no memory, a template's error), the next one is to be answered.
        except Exception as problem:
            for job in batch:
                job.tell(problem)

    def _generate(self, batch: Sequence[Job]) -> None:
        draws = _Draws(batch)
        spoken = [Spoken(self.lm, job.ends) for job in batch]
        loop = steps(self.lm, [job.ids for job in batch], None, draws if draws.any else None)
        step = next(loop)
        ended: set[int] = set()
        while True:
            for row in draws.failed.keys() - ended:
                batch[row].tell(draws.failed[row])
            done = {row for row, token in step if row in draws.failed or self._said(batch[row], spoken[row], token)}
            ended |= done
            if len(ended) == len(batch):
                return
            step = loop.send(done)

    def _said(self, job: Job, spoken: Spoken, token: int) -> bool:
        """Tell who asked of a token, and return whether the reply has ended."""
        if job.cancelled.is_set():
            job.tell(End("stop", len(spoken.ids)))
            return True
        reason = "stop" if token in self._stops else ""
        if not reason:
            with self._words:
                piece = spoken.say(token)
            if piece:
                job.tell(piece)
            reason = "stop" if spoken.ended else "length" if len(spoken.ids) >= job.limit else ""
        if reason:
            with self._words:
                rest = spoken.close()
            if rest:
                job.tell(rest)
            job.tell(End(reason, len(spoken.ids)))
        return bool(reason)

    def _decode(self, batch: Sequence[Job]) -> None:
        assert self.decode is not None
        (job,) = batch
        spoken = Spoken(self.lm, job.ends)
        for token in self.decode.tokens(self.lm, job.ids, job.limit):
            if self._said(job, spoken, token):
                return
        with self._words:
            rest = spoken.close()
        if rest:
            job.tell(rest)
        job.tell(End("stop", len(spoken.ids)))


class _Draws:
    """Chooses the next tokens of a batch, each row in its own way and by its own stream.

    Attributes:
        failed: Row -> what went wrong with its draw; the others go on.
    """

    def __init__(self, batch: Sequence[Job]) -> None:
        import torch

        self.sampling = [job.sampling for job in batch]
        self.any = any(one.temperature > 0 for one in self.sampling)
        self.failed: dict[int, Exception] = {}
        self.streams = [torch.Generator().manual_seed(one.seed) for one in self.sampling]

    def __call__(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        chosen = logits.argmax(-1)
        for place, row in enumerate(rows):
            if self.sampling[row].temperature > 0:
                try:
                    chosen[place] = self._draw(logits[place].float().cpu(), row)
                # Logits of one row that are no numbers are no reason to end the others.
                except RuntimeError as problem:
                    self.failed[row] = problem
        return chosen

    def _draw(self, logits: Any, row: int) -> int:
        import torch

        # Divided by a temperature next to nothing, logits would be infinite.
        chances = torch.softmax((logits - logits.max()) / max(self.sampling[row].temperature, _COLDEST), -1)
        ordered, tokens = chances.sort(descending=True)
        # The first token that takes the sum over top_p still belongs to those that are drawn from.
        ordered[ordered.cumsum(-1) - ordered >= self.sampling[row].top_p] = 0
        ordered[0] = ordered[0].clamp(min=1e-9)
        return int(tokens[torch.multinomial(ordered, 1, generator=self.streams[row])])


@dataclass(frozen=True)
class AskEngine:
    """`Ask` for prompt guards: their questions go into the same batches as everybody's.

    Attributes:
        engine: The model.
        reply_tokens: Room that is kept for the reply to the guarded question.
        patience: How long that is waited for.
    """

    engine: Engine
    reply_tokens: int
    patience: Patience

    @property
    def special(self) -> frozenset[str]:
        """Texts of the tokenizer's special tokens."""
        return self.engine.special

    def __call__(self, conversations: Sequence[Turns], max_new_tokens: int) -> list[str]:
        """Return a greedy reply to each conversation; blocks until the engine has answered.

        Raises:
            Problem: If the template refuses the client's turns, or the model cannot read them and answer.
            Exception: What the engine met with.
            Gone: If nobody waits any more.
        """
        # All are looked at before one is asked: what does not fit would break the batch that it is in, for everybody.
        prompts = [self._encoded(turns, max_new_tokens) for turns in conversations]
        told: list[queue.SimpleQueue[Told]] = [queue.SimpleQueue() for _ in conversations]
        for ids, box in zip(prompts, told, strict=True):
            self.engine.submit(Job(ids, max_new_tokens, box.put, cancelled=self.patience.cancelled))
        return [self._whole(box) for box in told]

    def _whole(self, box: queue.SimpleQueue[Told]) -> str:
        text = ""
        while self.patience.left():
            try:
                said = box.get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(said, Exception):
                raise said
            if isinstance(said, End):
                return text
            text += said
        raise Gone

    def fits(self, turns: Turns, new_tokens: int | None = None) -> bool:
        """Tell whether the model can read these turns and answer.

        Raises:
            Problem: If the template refuses them.
        """
        with _clients():
            return self.engine.fits(turns, self.reply_tokens if new_tokens is None else new_tokens)

    def _encoded(self, turns: Turns, max_new_tokens: int) -> tuple[int, ...]:
        if not self.fits(turns, max_new_tokens):
            raise Problem(400, "context_length_exceeded", "a guard's question has more tokens than the model reads.")
        with _clients():
            return self.engine.encode(turns)


@contextmanager
def _clients() -> Iterator[None]:
    """Tell turns that the template refuses, which are the client's, from all else that is wrong with a model."""
    try:
        yield
    except ModelError as problem:
        raise Problem(400, "invalid_messages", str(problem)) from problem


class Gone(Exception):
    """Nobody waits for the answer any more."""
