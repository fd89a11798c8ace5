"""Ask again what failed for the moment: exponential backoff with jitter, bounded, and no asking of what is down.

The wait before the n-th repetition is drawn from [0, base * 2^n], at most `longest` seconds; what a server asks for
(Retry-After) is waited for instead where that is no longer. After an answer could not be had with all repetitions, the
source is left alone for a while: a thousand prompts do not each wait for a machine that is switched off. So it is after
one call that it left without an answer for long, where nobody has the time to ask again. What is merely busy (HTTP 429)
is not left alone, unless it asks for longer than we wait: meanwhile other questions would get no evidence.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from unbackdoor.model.guard import FOREVER, Patience

T = TypeVar("T")


class Failed(Exception):
    """A call brought no answer.

    Attributes:
        again: Whether it may be repeated.
        wait: Seconds that the other side asks to wait for, or None.
        slow: Whether it was waited for so long that whoever asks next would wait in vain, too.
        busy: Whether the other side answers, and has no time for this call: of others it says nothing.
    """

    def __init__(
        self, reason: str, *, again: bool, wait: float | None = None, slow: bool = False, busy: bool = False
    ) -> None:
        """Fail with a reason in a few words."""
        super().__init__(reason)
        self.again, self.wait, self.slow, self.busy = again, wait, slow, busy


@dataclass
class Retrying:
    """How often and when calls are repeated; shared by the threads that ask one source.

    Attributes:
        repetitions: Calls after the first, at most.
        base: Seconds; longest wait before the first repetition.
        longest: Seconds; no wait is longer, and where more are asked for, none is made.
        rest: Seconds for which the source is left alone after it failed with all repetitions.
        sleep: Waits, no longer than somebody has patience; for tests.
        clock: Seconds from anywhere; for tests.
    """

    repetitions: int = 3
    base: float = 0.5
    longest: float = 60.0
    rest: float = 30.0
    sleep: Callable[[Patience, float], None] = Patience.wait
    clock: Callable[[], float] = time.monotonic
    _down: tuple[float, str] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def call(self, work: Callable[[], T], patience: Patience = FOREVER) -> T:
        """Return what `work` returns, repeating it while it fails for the moment.

        Args:
            work: One call; it ends by itself when the patience does.
            patience: How long the answer is waited for.

        Raises:
            Failed: If it failed for good, or with all repetitions, or nobody waits any more.
        """
        self._refuse_resting()
        failed: Failed | None = None
        for number in range(self.repetitions + 1):
            if not patience.left():
                if failed is not None and failed.slow:
                    self._let_rest(failed)
                raise Failed("its time was over", again=False)
            try:
                return work()
            except Failed as problem:
                if not problem.again:
                    raise
                failed, wait, over = problem, self.wait(number, problem.wait), not patience.left()
                # One call whose time was short, or whom nobody waits for, says nothing about the source.
                if over and not problem.slow and (number == 0 or patience.cancelled.is_set()):
                    raise
                last = over or number == self.repetitions
                if wait is None or last or wait >= patience.left():
                    if wait is None or problem.slow or (last and not problem.busy):
                        self._let_rest(problem)
                    raise
                self.sleep(patience, wait)
        raise AssertionError("the last call returns or raises")

    def wait(self, number: int, asked: float | None) -> float | None:
        """Return the seconds to wait before repetition `number` (from 0); None where more are asked for than we wait.

        Args:
            number: Repetitions so far.
            asked: Seconds that the other side asks for, or None.
        """
        if asked is not None:
            return asked if 0 <= asked <= self.longest else None
        return random.uniform(0, min(self.longest, self.base * 2.0**number))

    def _let_rest(self, problem: Failed) -> None:
        with self._lock:
            self._down = (self.clock() + self.rest, str(problem))

    def _refuse_resting(self) -> None:
        with self._lock:
            if self._down is not None and self.clock() < self._down[0]:
                raise Failed(f"it is left alone for a while, because {self._down[1]}", again=False)
            self._down = None
