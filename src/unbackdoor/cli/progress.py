"""Progress on stderr: bars with rate and time left on a terminal, plain lines elsewhere, nothing with --quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TextIO

from unbackdoor.model.quarantine import printable_lines
from unbackdoor.run import Progress, Silent

if TYPE_CHECKING:
    from rich.progress import TaskID

EVERY_SECONDS = 5.0
"""Plain lines of one piece of work come no faster than this."""


class Lines:
    """Plain lines, for files and pipes."""

    def __init__(self, stream: TextIO, now: Callable[[], float] = time.monotonic) -> None:
        """Write to `stream`; `now` gives seconds."""
        self.stream, self.now = stream, now
        self.begun: dict[str, tuple[float, int]] = {}
        self.reached: dict[str, int] = {}
        self.origin: dict[str, int] = {}
        self.last = -EVERY_SECONDS

    def start(self, name: str, total: int) -> None:
        """Begin; a piece of work that is short says nothing."""
        self.begun[name] = (self.now(), total)
        self.origin.pop(name, None)

    def advance(self, name: str, done: int, values: Mapping[str, float]) -> None:
        """Print a line, unless one was printed a moment ago."""
        moment = self.now()
        self.reached[name] = done
        # What a resumed piece of work had done before says nothing about its speed now.
        origin = self.origin.setdefault(name, done - 1)
        started, total = self.begun.get(name, (moment, 0))
        if moment - self.last < EVERY_SECONDS or moment - started < EVERY_SECONDS:
            return
        self.last = moment
        rate = (done - origin) / (moment - started)
        left = (total - done) / rate if rate > 0 else 0.0
        shown = f"{name}: {done}/{total}, {_rate(rate)}, {_clock(left)} left"
        self._say(shown + _values(values))

    def finish(self, name: str) -> None:
        """End; what took long says so."""
        started, total = self.begun.pop(name, (self.now(), 0))
        taken, done = self.now() - started, self.reached.pop(name, 0)
        if taken >= EVERY_SECONDS:
            self._say(f"{name}: {'done' if done >= total else 'ended'}, {done} of {total} in {_clock(taken)}")

    def notice(self, text: str) -> None:
        """Print a sentence."""
        self._say(text)

    def close(self) -> None:
        """Nothing is open."""

    def _say(self, text: str) -> None:
        self.stream.write(f"{printable_lines(text)}\n")
        self.stream.flush()


class Bars:
    """Bars, for a terminal."""

    def __init__(self, stream: TextIO) -> None:
        """Draw on `stream`."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=Console(file=stream),
            transient=True,
        )
        self.tasks: dict[str, tuple[TaskID, float]] = {}
        self.origin: dict[str, int] = {}

    def start(self, name: str, total: int) -> None:
        """Draw a bar; the live display begins with the first one."""
        from rich.markup import escape

        self.bars.start()
        self.tasks[name] = (self.bars.add_task(escape(name), total=total, rate="", values=""), time.monotonic())

    def advance(self, name: str, done: int, values: Mapping[str, float]) -> None:
        """Move the bar."""
        if name not in self.tasks:
            return
        task, started = self.tasks[name]
        if name not in self.origin:
            self.origin[name] = done - 1
            self.bars.reset(task, completed=done - 1)
        seconds = time.monotonic() - started
        rate = _rate((done - self.origin[name]) / seconds) if seconds > 0 else ""
        self.bars.update(task, completed=done, rate=rate, values=_values(values).removeprefix(", "))

    def finish(self, name: str) -> None:
        """Take the bar away."""
        if name in self.tasks:
            self.bars.remove_task(self.tasks.pop(name)[0])
            self.origin.pop(name, None)

    def notice(self, text: str) -> None:
        """Print a sentence above the bars."""
        self.bars.console.print(printable_lines(text), markup=False, highlight=False)

    def close(self) -> None:
        """Give the terminal back."""
        self.bars.stop()


class Nothing(Silent):
    """Shows nothing."""

    def close(self) -> None:
        """Nothing is open."""


Shown = Lines | Bars | Nothing


def progress(*, quiet: bool, stream: TextIO | None = None) -> Shown:
    """Return the display that fits: none, bars on a terminal, lines elsewhere."""
    out = stream or sys.stderr
    shown: Shown = Nothing() if quiet else Bars(out) if out.isatty() else Lines(out)
    checked: Progress = shown
    del checked  # mypy: all three are a Progress
    return shown


def _rate(per_second: float) -> str:
    return f"{per_second:.1f}/s" if per_second >= 1 else f"{1 / per_second:.1f} s each" if per_second > 0 else ""


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _values(values: Mapping[str, float]) -> str:
    loss = f", loss {values['loss']:.3g}" if "loss" in values else ""
    return loss + (f", {_clock(values['seconds_left'])} left in all" if "seconds_left" in values else "")
