"""Backoff: bounded waits with jitter, what a server asks for, and rest for what is down."""

from __future__ import annotations

import time

import pytest

from unbackdoor.evidence.retrying import Failed, Retrying
from unbackdoor.model.guard import Patience


class Clock:
    def __init__(self):
        self.now, self.slept = 0.0, []

    def sleep(self, patience, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def __call__(self):
        return self.now


def retrying(clock, **more):
    return Retrying(sleep=clock.sleep, clock=clock, **more)


def failing(times, problem, answer="yes"):
    left = [times]

    def work():
        if left[0]:
            left[0] -= 1
            raise problem
        return answer

    return work


def test_what_fails_for_the_moment_is_repeated_and_what_fails_for_good_is_not():
    clock = Clock()
    assert retrying(clock).call(failing(3, Failed("busy", again=True))) == "yes"
    assert len(clock.slept) == 3
    with pytest.raises(Failed, match="no such model"):
        retrying(clock).call(failing(1, Failed("no such model", again=False)))
    assert len(clock.slept) == 3


def test_waits_grow_are_jittered_and_bounded():
    once = Retrying(base=0.5, longest=4.0)
    for number in range(12):
        waits = [once.wait(number, None) for _ in range(200)]
        limit = min(4.0, 0.5 * 2**number)
        assert 0 <= min(waits) < 0.2 * limit
        assert 0.8 * limit < max(waits) <= limit
        assert len(set(waits)) > 100
    assert once.wait(60, None) <= 4.0


def test_what_the_server_asks_for_is_waited_for_unless_it_is_too_long():
    clock = Clock()
    assert retrying(clock).call(failing(2, Failed("429", again=True, wait=7.0))) == "yes"
    assert clock.slept == [7.0, 7.0]
    with pytest.raises(Failed, match="429"):
        retrying(clock, longest=20.0).call(failing(1, Failed("429", again=True, wait=3600.0)))
    assert clock.slept == [7.0, 7.0]


def test_what_is_down_is_left_alone_for_a_while_and_asked_again_then():
    clock, calls = Clock(), []

    def down():
        calls.append(clock.now)
        raise Failed("no route", again=True)

    once = retrying(clock, repetitions=2, rest=30.0)
    with pytest.raises(Failed, match="no route"):
        once.call(down)
    assert len(calls) == 3
    with pytest.raises(Failed, match=r"left alone.*no route"):
        once.call(down)
    assert len(calls) == 3
    clock.now += 31
    assert once.call(lambda: "up") == "up"
    assert once.call(lambda: "still up") == "still up"


def test_what_is_busy_is_not_left_alone():
    once = retrying(Clock(), repetitions=1)
    for _ in range(2):
        with pytest.raises(Failed, match=r"^429$"):
            once.call(failing(9, Failed("429", again=True, busy=True)))
    assert once.call(lambda: "yes") == "yes", "others ask at once"
    with pytest.raises(Failed, match=r"^429$"):
        once.call(failing(1, Failed("429", again=True, wait=3600.0, busy=True)))
    with pytest.raises(Failed, match=r"left alone.*429"):
        once.call(lambda: "it said when")


def test_a_wait_longer_than_anybodys_patience_is_not_begun():
    clock = Clock()
    once = retrying(clock)
    with pytest.raises(Failed, match=r"^503$"):
        once.call(failing(1, Failed("503", again=True, wait=50.0)), Patience(time.monotonic() + 40))
    assert not clock.slept
    assert once.call(lambda: "yes") == "yes"


def test_a_question_whose_time_is_over_is_not_asked_and_says_nothing_about_the_source():
    clock, busy = Clock(), Failed("busy", again=True)
    once, over = retrying(clock), Patience()
    over.cancelled.set()
    with pytest.raises(Failed, match="its time was over"):
        once.call(lambda: "never asked", over)

    leaving = Patience()

    def work():
        leaving.cancelled.set()
        raise busy

    with pytest.raises(Failed, match="busy"):
        once.call(work, leaving)
    assert not clock.slept
    assert once.call(lambda: "yes") == "yes", "others ask at once"


def test_what_was_silent_for_long_is_left_alone_whoever_waited_for_it():
    """Once a request is over nobody can repeat its call; the next one would wait for the same silence."""
    clock, calls = Clock(), []

    def left_meanwhile(patience, slow):
        def work():
            calls.append(1)
            patience.cancelled.set()
            raise Failed("silent", again=True, slow=slow)

        return work

    for slow in (False, True):
        once, patience = retrying(clock), Patience()
        with pytest.raises(Failed, match="silent"):
            once.call(left_meanwhile(patience, slow), patience)
        if slow:
            with pytest.raises(Failed, match=r"left alone.*silent"):
                once.call(lambda: "never asked")
        else:
            assert once.call(lambda: "yes") == "yes"
    assert calls == [1, 1]


def test_what_was_silent_is_left_alone_also_where_the_time_ends_before_the_repetition():
    clock, patience = Clock(), Patience()
    once = Retrying(sleep=lambda *_: patience.cancelled.set(), clock=clock)
    with pytest.raises(Failed, match="its time was over"):
        once.call(failing(1, Failed("silent", again=True, slow=True)), patience)
    with pytest.raises(Failed, match=r"left alone.*silent"):
        once.call(lambda: "never asked")


def test_a_part_of_the_patience_ends_earlier_and_with_the_whole():
    whole = Patience(time.monotonic() + 100)
    part = whole.part(0.5)
    assert 49 < part.left() <= 50
    assert Patience().part(0.5).left() == float("inf")
    whole.cancelled.set()
    assert part.left() == 0
    assert whole.part(0.5).left() == 0
