"""How long is left: predicted seconds of every part of a run, corrected by what the finished parts really took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from unbackdoor.run import Progress


@dataclass(frozen=True)
class Expected:
    """One part of a run.

    Attributes:
        key: Its name.
        seconds: Predicted time; only the proportions between the parts matter once one is finished.
        steps: Training steps in it; 0 where it does not train.
        after: How many of the seconds come after the training (measuring).
    """

    key: str
    seconds: float
    steps: int = 0
    after: float = 0.0


@dataclass
class Clock:
    """A `Progress` that adds `seconds_left` to the values that are shown; the state of one run.

    Attributes:
        inner: Who is told.
        parts: What is still to be done, in order.
        now: Seconds on a clock that only goes forward; for tests.
    """

    inner: Progress
    parts: Sequence[Expected]
    now: Callable[[], float] = time.perf_counter
    _current: int = -1
    _started: float = 0.0
    _steps: int = 0
    _stage: tuple[int, int] = (0, 0)
    _trained: float = 0.0
    _loading: float | None = None
    _measured: dict[str, float] = field(default_factory=dict)

    def begin(self, key: str) -> None:
        """The part `key` begins; the one before has ended."""
        self.end()
        self._current = next(number for number, part in enumerate(self.parts) if part.key == key)
        self._started, self._steps, self._stage, self._trained, self._loading = self.now(), 0, (0, 0), 0.0, None

    def end(self) -> None:
        """The present part has ended."""
        if 0 <= self._current < len(self.parts):
            self._measured[self.parts[self._current].key] = self.now() - self._started

    def seconds_left(self) -> float:
        """Return the estimate of all that is still to be done."""
        finished = [part for part in self.parts[: max(self._current, 0)] if part.key in self._measured]
        predicted = sum(part.seconds for part in finished)
        ratio = sum(self._measured[part.key] for part in finished) / predicted if predicted > 0 else 1.0
        if self._current < 0:
            return sum(part.seconds for part in self.parts)
        part = self.parts[self._current]
        elapsed = self.now() - self._started
        share = min(1.0, (self._steps + self._stage[0]) / part.steps) if part.steps else 0.0
        left = max(0.0, part.seconds * ratio - elapsed)
        if share >= 0.05:
            # What came before the first step (loading, converting a model) is done once and says nothing of a step.
            elapsed -= self._loading or 0.0
            training = self._trained or elapsed / share
            if not finished and part.seconds > part.after:
                ratio = training / (part.seconds - part.after)
            left = max(0.0, training + ratio * part.after - elapsed)
        return left + ratio * sum(other.seconds for other in self.parts[self._current + 1 :])

    def start(self, name: str, total: int) -> None:
        """Pass on."""
        self._stage = (0, total)
        if self._loading is None:
            self._loading = self.now() - self._started
        self.inner.start(name, total)

    def advance(self, name: str, done: int, values: Mapping[str, float]) -> None:
        """Pass on with the time that is left."""
        self._stage = (done, self._stage[1])
        self.inner.advance(name, done, {**values, "seconds_left": self.seconds_left()})

    def finish(self, name: str) -> None:
        """Pass on; a stage that stopped early counts in full."""
        self._steps, self._stage = self._steps + self._stage[1], (0, 0)
        part = self.parts[self._current] if self._current >= 0 else None
        if part is not None and part.steps and self._trained == 0.0 and self._steps >= part.steps:
            self._trained = self.now() - self._started - (self._loading or 0.0)
        self.inner.finish(name)

    def notice(self, text: str) -> None:
        """Pass on."""
        self.inner.notice(text)


def in_words(seconds: float) -> str:
    """Return a time as people say it: "less than a minute", "about 7 minutes", "about 2.5 hours"."""
    if seconds < 45:
        return "less than a minute"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"about {max(1, minutes)} minute{'s' if minutes > 1 else ''}"
    return f"about {seconds / 3600:.1f} hours"
