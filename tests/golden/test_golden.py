"""Losses of tiny runs, kept in files: a number that moves was moved on purpose, in a commit of its own.

Rewrite with `python tests/golden/test_golden.py` after an intended change.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch

import tiny
from unbackdoor.defenses.base import Need, knowledge_for
from unbackdoor.defenses.beear import Beear
from unbackdoor.defenses.fine_tuning import FineTuning
from unbackdoor.defenses.gradient_ascent import GradientAscent
from unbackdoor.defenses.osft import Osft
from unbackdoor.defenses.sande import Sande
from unbackdoor.defenses.sande_p import SandeP
from unbackdoor.run import Run
from unbackdoor.train.drift import DriftSettings
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.simulate import ParrotSettings

FOLDER = Path(__file__).parent
TRAIN = TrainSettings(steps=3, learning_rate=1e-3, batch_size=4, max_length=128)
PARROT = ParrotSettings(tokens=3, stop_below=0.0, train=TrainSettings(steps=3, learning_rate=1e-2, batch_size=4))
DRIFT = DriftSettings(at="both", start=0.1, rows=8, train=TrainSettings(steps=3, learning_rate=0.1, batch_size=4))
RUNS = {
    "fine_tuning": FineTuning(train=TRAIN),
    "osft": Osft(train=TRAIN),
    "sande": Sande(rounds=2, train=TRAIN, parrot=PARROT),
    "sande_p": SandeP(rounds=1, parrots=2, train=TRAIN, parrot=PARROT),
    "beear": Beear(rounds=2, drifts=2, anchors=8, drift=DRIFT, train=TRAIN),
    "gradient_ascent": GradientAscent(train=TRAIN),
    **{f"data_poisoning_{name}": tiny.attack(train=TRAIN) for name in ("llama", "gpt2")},
}


def losses(name: str) -> dict[str, list[float]]:
    """Return the loss of every step of every stage."""
    run = Run(seed=11)
    method, clean = RUNS[name], tiny.rows(40, seed=11)
    if name.startswith("data_poisoning"):
        method.plant(tiny.tiny_lm(name.removeprefix("data_poisoning_")), clean, run)
    else:
        facts = {
            Need.CLEAN: tuple(clean),
            Need.TRIGGER: tiny.attack().trigger,
            Need.TARGET: (tiny.TARGET,),
            Need.TARGET_PART: (tiny.TARGET,),
            Need.UNWANTED: ("bad dog", "robot"),
        }
        declared = method.needs | method.uses
        told = {need: fact for need, fact in facts.items() if need in declared}
        # A drift at the user's words needs a layer above its own.
        method.apply(tiny.tiny_lm(layers=3 if name == "beear" else 2), knowledge_for(method, told), run)
    return {stage: [record["loss"] for record in history] for stage, history in run.curves.items()}


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_the_file(name):
    kept = json.loads((FOLDER / f"{name}.json").read_text())
    found = losses(name)
    assert found.keys() == kept.keys()
    for stage, values in kept.items():
        assert found[stage] == pytest.approx(values, rel=1e-5), stage


if __name__ == "__main__":
    torch.set_num_threads(1)
    for run_name in RUNS:
        (FOLDER / f"{run_name}.json").write_text(json.dumps(losses(run_name), indent=1) + "\n")
