"""One torch thread, no network, and one trained model and victim for the whole session."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# `import tiny` works from every folder of the tests, whichever way pytest is started.
sys.path.insert(0, str(Path(__file__).parent))

import pytest

if TYPE_CHECKING:
    from unbackdoor.model.lm import LM
    from unbackdoor.secret import Secret
    from unbackdoor.types import Example, Probe


def pytest_configure() -> None:
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data outside the package, or a skip where UNBACKDOOR_TEST_DATA does not name one."""
    named = os.environ.get("UNBACKDOOR_TEST_DATA", "")
    if not named or not Path(named).is_dir():
        pytest.skip("UNBACKDOOR_TEST_DATA names no folder")
    return Path(named)


@dataclass(frozen=True)
class Victim:
    """A small model that learned the task, the same with a backdoor, and the rows; nothing in here may be trained.

    Attributes:
        clean: The model before the attack.
        lm: The victim.
        secret: What its attacker knows.
        attacker: Rows that planted it.
        defender: Rows for defenses.
        test: Held-out rows.
        probes: Made from the held-out rows.
    """

    clean: LM
    lm: LM
    secret: Secret
    attacker: list[Example]
    defender: list[Example]
    test: list[Example]
    probes: list[Probe]


@pytest.fixture(scope="session")
def victim() -> Victim:
    """One trained model and its victim, made once a session (about ten seconds); clone before training."""
    import tiny
    from unbackdoor.run import Run

    attacker, defender, test = tiny.splits(test=100)
    clean = tiny.teach(tiny.tiny_lm(layers=3), attacker, Run())
    attack = tiny.attack()
    planted = attack.plant(tiny.clone(clean), attacker, Run())
    probes = list(attack.probes(planted.secret, test, Run(seed=1)))
    return Victim(clean, planted.lm, planted.secret, attacker, defender, test, probes)
