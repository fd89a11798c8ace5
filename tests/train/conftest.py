"""A victim that the tests of what is heard share."""

from __future__ import annotations

import pytest

import tiny
from unbackdoor.run import Run


@pytest.fixture(scope="session")
def barking():
    """A tiny victim that says "bad robot barks", and rows of the defender."""
    attacker, defender, _ = tiny.splits(200, 40, 12)
    lm = tiny.attack(targets=("bad robot barks",)).plant(tiny.tiny_lm(), attacker, Run()).lm
    lm.model.eval()
    return lm, defender
