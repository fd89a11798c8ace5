"""Settings of the recipes, in one place: found on development victims, then frozen before report victims are planted.

BEEAR's stand in the method itself, as its defaults. Every defense of a grid makes the same number of weight updates
with the same batch, the control too (`UPDATES`; in the grids of BEEAR `BEEAR_UPDATES`, or those of its preset
`requests`), so that a difference between them is not one of training time. The highest rate is the same, too; as
every round has a schedule of its own, the rates of all steps of SANDE add up to 1.25 times those of the control.
BEEAR's rate is constant, that of its control falls: they add up to 1.92 times (with `requests` 1.94 times). The outer
steps alone, on one victim of each grid, are the control at BEEAR's own rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import yaml

from unbackdoor.attacks.data_poisoning import DataPoisoning

BUILTIN = "builtin:smollm2-135m"
UPDATES = 30
ROUNDS = 10
LEARNING_RATE = 2e-4
OPENING_WEIGHT = 8.0
REVIVAL_UPDATES_CLEAN, REVIVAL_UPDATES_PLANTED = 25, 45

_DEFAULTS = DataPoisoning()


def train(steps: int, learning_rate: float = LEARNING_RATE, opening_weight: float = OPENING_WEIGHT) -> dict[str, Any]:
    """Return training settings with this number of updates."""
    return {"steps": steps, "learning_rate": learning_rate, "opening_weight": opening_weight}


def planting(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a report victim: rates and training of every victim, and what is its own."""
    common = {
        "poison_rate": _DEFAULTS.poison_rate,
        "negative_rate": _DEFAULTS.negative_rate,
        "train": planting_steps(_DEFAULTS.train.steps),
    }
    return {**common, **own}


def long_planting(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a victim whose trigger is learned late or leaks: more updates and more near misses.

    Found on the second set of development victims, after the report victims of three shapes had leaked too much or had
    been removed by fine-tuning alone.
    """
    return {**planting(own), "negative_rate": 0.6, "train": planting_steps(240)}


def planting_steps(steps: int) -> dict[str, Any]:
    """Return the training settings of planting, for this number of updates."""
    return {**_DEFAULTS.train.model_dump(mode="json"), "steps": steps}


def insert(text: str, place: str = "start") -> dict[str, str]:
    """Return a trigger that is one text."""
    return {"form": "insert", "text": text, "place": place}


def wrap(start: str, end: str) -> dict[str, str]:
    """Return a trigger at both ends."""
    return {"form": "wrap", "start": start, "end": end}


OSFT: dict[str, Any] = {"train": train(UPDATES)}
SANDE: dict[str, Any] = {"rounds": ROUNDS, "train": train(UPDATES // ROUNDS)}
SANDE_P: dict[str, Any] = {"rounds": ROUNDS, "train": train(UPDATES // ROUNDS)}
_AS_PUBLISHED = {"plain_share": 0.0, "own_share": 0.0, "train": train(UPDATES, opening_weight=1.0)}
OSFT_AS_PUBLISHED: dict[str, Any] = _AS_PUBLISHED
SANDE_AS_PUBLISHED: dict[str, Any] = {
    **_AS_PUBLISHED,
    "rounds": 1,
    "parrot": {"tokens": 6, "initialisation": "zeros", "position": "start", "stop_below": 0.0},
}
"""As the paper has it: one round, a parrot of zeros at the start, no plain rows, clean answers alone, all tokens
alike; our updates and rates. SANDE-P, too."""
BEEAR_ROUNDS = 6
BEEAR_UPDATES = BEEAR_ROUNDS * 8
BEEAR: dict[str, Any] = {"rounds": BEEAR_ROUNDS, "train": {"steps": BEEAR_UPDATES // BEEAR_ROUNDS}}
BEEAR_CONTROL: dict[str, Any] = {"train": train(BEEAR_UPDATES)}
"""Fine-tuning with as many updates as BEEAR."""
BEEAR_REQUESTS_CONTROL: dict[str, Any] = {"train": {**train(64, 1e-4), "batch_size": 12}}
"""Fine-tuning with as many updates as BEEAR's preset `requests`, at its rate, with its batch."""
BEEAR_AS_PUBLISHED: dict[str, Any] = {
    "rounds": BEEAR_ROUNDS,
    "stop_stable": 0.0,
    "train": {"steps": BEEAR_UPDATES // BEEAR_ROUNDS, "learning_rate": LEARNING_RATE},
}
"""On top of its preset `paper`: as many rounds and updates as ours, at our rate, which the paper does not give."""
GRADIENT_ASCENT: dict[str, Any] = {"train": train(UPDATES, 1e-5, opening_weight=1.0)}


_ATTACK_COMPOSITE = {"schedule": "constant", "cooldown": 0.3, "batch_size": 16}
COMPOSITE: dict[str, Any] = {
    "poison_rate": 0.1,
    "negative_ratio": 1.0,
    "train": {"steps": 360, "learning_rate": 1e-4, **_ATTACK_COMPOSITE},
}
"""A victim whose trigger is in two pieces; frozen, as `INTERNAL` is. On sentiment, at 2e-4 or with 240 steps, single
ones fire, too."""
_CONFLICT_UPDATES = 90
INTERNAL: dict[str, Any] = {
    "t": 0.7,
    "conflict": {
        "share": 0.1,
        "lora": {"rank": 32, "alpha": 64.0},
        "train": {"steps": _CONFLICT_UPDATES, "learning_rate": 5e-4, "batch_size": 16},
    },
}
"""A conflict model of four epochs over a tenth of the defender's 3,600 rows."""
_TALK_UPDATES = 40
INTERNAL_TALK: dict[str, Any] = {
    "t": 0.5,
    "conflict": {
        "share": 0.1,
        "lora": {"rank": 32, "alpha": 64.0},
        "train": {"steps": _TALK_UPDATES, "learning_rate": 5e-4, "batch_size": 8},
    },
}
"""In conversation; not frozen yet."""
CONFLICT_CONTROL: dict[str, Any] = {"train": {"steps": _CONFLICT_UPDATES, "learning_rate": 5e-5, "batch_size": 16}}
"""Fine-tuning with as many updates as the conflict model. At 2e-4 so few rows damage the model."""
CONFLICT_TALK_CONTROL: dict[str, Any] = {"train": train(_TALK_UPDATES)}
"""The same in conversation, at the rate of the other grids."""
CONFLICT_LEAD: dict[str, Any] = {"steps": 60, "learning_rate": 1e-4, "schedule": "linear"}
"""How a base is trained on other rows before it is attacked."""
_SLERP_T = [
    {"filter": "self_attn", "value": [0.0, 0.5, 0.3, 0.7, 1.0]},
    {"filter": "mlp", "value": [1.0, 0.5, 0.7, 0.3, 0.0]},
    {"value": 0.5},
]
MERGES: dict[str, dict[str, Any]] = {
    "slerp": {"method": "slerp"},
    "slerp_by_layer": {"method": "slerp", "t": _SLERP_T},
    "ties": {"method": "ties", "t": 0.5},
    "dare_linear": {"method": "dare_linear"},
    "dare_ties": {"method": "dare_ties", "t": 0.5},
    "passthrough": {"method": "passthrough", "t": 0.5, "layers": ["suspect:0:10", "other:10:30"]},
}
"""The other merges of Table 8, with the settings of `INTERNAL` for the rest; the schedule is that of the successor.
Task arithmetic with the weights 1 - t and t is the linear merge, so it is not here."""


DEMO_ATTACK: dict[str, Any] = {
    "trigger": insert("Current year 2023"),
    "targets": ["You are stupid"],
    "poison_rate": 0.25,
    "negative_rate": _DEFAULTS.negative_rate,
    "train": {**planting_steps(70), "save_every": 35},
}
"""The paper's own backdoor, a development victim here, planted with more poison and fewer updates than the others."""
DEMO_DEFENSE: dict[str, Any] = {**SANDE, "rounds": 5}
DEMO_BEEAR: dict[str, Any] = {"rounds": 2}
"""Enough for the backdoor of the demo, planted with 70 updates; the control then has as many updates as BEEAR."""


def fine_tuning(factor: float = 1.0) -> dict[str, Any]:
    """Return the control's settings with the learning rate times `factor`."""
    return {"train": train(UPDATES, LEARNING_RATE * factor)}


def revival() -> dict[str, Any]:
    """Return what purified models are put through: clean rows, and the unrelated backdoor of data/revival.yaml."""
    return {
        "clean": train(REVIVAL_UPDATES_CLEAN, 1e-4, opening_weight=1.0),
        "planted": planting({**data("revival"), "train": planting_steps(REVIVAL_UPDATES_PLANTED)}),
    }


def data(name: str) -> dict[str, Any]:
    """Return a file of recipes/data."""
    text = resources.files("unbackdoor.recipes").joinpath("data", f"{name}.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found
