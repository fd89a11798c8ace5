"""Work in threads that nobody has to wait for: not who asked for it, and not the end of the process.

A call to another machine cannot be broken off from outside. The threads of `ThreadPoolExecutor` are joined when a
process ends, so that ^C would last as long as the slowest call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from threading import TIMEOUT_MAX, Lock, Thread
from typing import TypeVar

from unbackdoor.model.guard import Patience

T = TypeVar("T")
R = TypeVar("R")

_LOOK = 0.2
"""Seconds after which somebody looks again whether an answer is still waited for."""


def begun(work: Callable[[], R], name: str = "evidence") -> Future[R]:
    """Begin some work in a thread of its own, which has a name."""
    found: Future[R] = Future()
    found.set_running_or_notify_cancel()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as problem:
            found.set_exception(problem)

    Thread(target=run, name=name, daemon=True).start()
    return found


def in_time(work: Callable[[], R], seconds: float) -> R:
    """Return what some work returns.

    Args:
        work: Done in a thread of its own; it goes on where its time is over.
        seconds: How long it is waited for.

    Raises:
        TimeoutError: If that is over.
    """
    return begun(work).result(min(seconds, TIMEOUT_MAX))


def side_by_side(work: Callable[[T, Patience], R], items: Sequence[T], most: int, patience: Patience) -> list[R]:
    """Return what some work makes of each item, in their order.

    Args:
        work: Given an item, and the patience that is left; it ends soon once there is none.
        items: What it is done for.
        most: Items at the same time, at most.
        patience: How long somebody waits. Whoever is interrupted while it waits here has none left.
    """
    mine = Patience(patience.until)
    rest, lock = iter(range(len(items))), Lock()
    found: dict[int, R] = {}

    def places() -> Iterator[int]:
        while True:
            with lock:
                place = next(rest, None)
            if place is None:
                return
            yield place

    def some() -> None:
        for place in places():
            found[place] = work(items[place], mine)

    working = [begun(some) for _ in range(min(most, len(items)))]
    try:
        while wait(working, _LOOK).not_done:
            if not patience.left():
                mine.cancelled.set()
        for worker in working:
            worker.result()
    finally:
        mine.cancelled.set()
    return [found[place] for place in range(len(items))]
