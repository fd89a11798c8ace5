"""What a run would take, for `--dry-run`: parts, seconds, memory and disk, from names, settings and file headers.

Nothing is loaded or written. The machine's speed is measured by one small product of matrices in numpy; the estimates
are meant to tell minutes from hours, not to be right to the second.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unbackdoor.pipeline.preflight import parameters_of
from unbackdoor.types import Example

TEMPLATE_TOKENS = 24
"""Tokens that a chat template adds to a row, about."""

_EFFICIENCY = 0.8
"""Share of the speed of one large product of matrices that training of a small model reaches."""

_ONE_TOKEN = 6.0
"""A token of a reply costs as much as this many of a prompt: each goes through the model in a batch of its own."""


@dataclass(frozen=True)
class Part:
    """One piece of work and its estimated seconds (None where the model's size is not known)."""

    name: str
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """A run before it is run.

    Attributes:
        parts: In order.
        memory_bytes: Peak, or None where the model's size is not known.
        disk_bytes: Peak, or None.
        notices: What the person should know.
        figures: What will be measured: "asr.triggered", "leak.decoy", "perplexity" and so on.
    """

    parts: tuple[Part, ...]
    memory_bytes: int | None
    disk_bytes: int | None
    notices: tuple[str, ...] = ()
    figures: frozenset[str] = frozenset()

    @property
    def seconds(self) -> float | None:
        """All parts together."""
        known = [part.seconds for part in self.parts if part.seconds is not None]
        return sum(known) if known and len(known) == len(self.parts) else None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        parts = [{"name": part.name, "seconds": part.seconds} for part in self.parts]
        whole = {"seconds": self.seconds, "memory_bytes": self.memory_bytes, "disk_bytes": self.disk_bytes}
        return {"dry_run": True, "parts": parts, **whole, "notices": list(self.notices)}


@dataclass(frozen=True)
class Estimator:
    """Turns work into seconds.

    Attributes:
        parameters: Weights of the model, or None.
        speed: Floating-point operations a second.
    """

    parameters: int | None
    speed: float

    def train(self, rows: int, tokens: float) -> float | None:
        """Forward and backward pass of this many rows of this mean length."""
        return None if self.parameters is None else 6 * self.parameters * rows * tokens / self.speed

    def read(self, rows: int, tokens: float) -> float | None:
        """Forward pass."""
        return None if self.parameters is None else 2 * self.parameters * rows * tokens / self.speed

    def reply(self, prompts: int, tokens: float, new_tokens: int) -> float | None:
        """Greedy replies."""
        return self.read(prompts, tokens + _ONE_TOKEN * new_tokens)


def estimator(model: str) -> Estimator:
    """Return the estimator for a model on this machine."""
    return Estimator(parameters_of(model), _EFFICIENCY * _matrix_speed())


def _matrix_speed() -> float:
    size = 512
    matrix = np.ones((size, size), np.float32)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


FULL, PROGRAM = 7, 600_000_000
"""Memory of training all weights, in sizes of the float32 weights (they, gradients, two moments, activations, the model
before), and of the program, bytes: together the peak of 4.4 GB that was measured with the built-in model."""

UNTIL_GOOD = 0.4
"""Share of its steps that a parrot takes which stops once it is good enough, about."""


def trainings(settings: Mapping[str, Any], factor: int = 1, place: str = "") -> Iterator[tuple[str, int]]:
    """Yield (name, rows that go through training) of every trained part of a method's settings."""
    rounds = factor * int(settings.get("rounds", 1))
    for key, value in settings.items():
        if not isinstance(value, Mapping):
            continue
        name = f"{place} {key}".strip()
        if {"steps", "learning_rate", "batch_size"} <= set(value):
            yield name, rounds * value["steps"] * value["batch_size"] * value.get("accumulation", 1)
        else:
            many = int(settings.get(f"{key}s", 1)) if isinstance(settings.get(f"{key}s"), int) else 1
            share = UNTIL_GOOD if value.get("stop_below") else 1.0
            yield from ((part, round(share * rows)) for part, rows in trainings(value, rounds * many, name))


def with_texts(settings: Mapping[str, Any], texts: int) -> Mapping[str, Any]:
    """Return the settings with as many parrots as a round has: in several rounds, one at least for every target."""
    if "parrots" not in settings or settings.get("rounds", 1) == 1:
        return settings
    return {**settings, "parrots": max(settings["parrots"], texts)}


def mean_tokens(rows: Sequence[Example]) -> float:
    """Return the mean length of rows in tokens, four characters a token."""
    lengths = [len(row.user_text) + len(row.response) for row in rows]
    return TEMPLATE_TOKENS + (sum(lengths) / len(lengths) / 4 if lengths else 0)


def training_parts(about: Estimator, settings: Mapping[str, Any], tokens: float) -> list[Part]:
    """Return the parts in which a method trains."""
    trained = dict(trainings(settings))
    parts = [Part(f"training ({name})", about.train(rows, tokens)) for name, rows in trained.items()]
    if settings.get("own_share"):
        parts.insert(0, Part("own labels", about.read(trained["train"], tokens)))
    if settings.get("own_answers"):
        parts.insert(0, Part("own answers", about.reply(settings["anchors"], tokens, settings["own_answers"])))
    return parts


def measuring_part(
    about: Estimator, name: str, probes: int, rows: int, tokens: float, new_tokens: int, *, kl: bool = False
) -> Part:
    """Return the part in which one model is measured."""
    replies, reading = about.reply(probes, tokens, new_tokens), about.read(rows * (3 if kl else 1), tokens)
    return Part(name, None if replies is None or reading is None else replies + reading)


def make_plan(
    about: Estimator,
    parts: Sequence[Part],
    *,
    trained: str,
    notices: Sequence[str] = (),
    models: int = 1,
    kept: int = 0,
) -> Plan:
    """Return the plan with memory and disk.

    Args:
        about: The model's size.
        parts: What is done.
        trained: "full", "lora", "adapter" or "nothing": what is trained.
        notices: What the person should know.
        models: Models in memory at once where nothing is trained.
        kept: Models that lie on the disk while the last one is trained.
    """
    from unbackdoor.pipeline.common import DISK_FACTOR

    if about.parameters is None:
        notices = (*notices, "the model is not on this machine, so its size, and with it time and memory, are unknown.")
        return Plan(tuple(parts), None, None, tuple(notices))
    weights = 4 * about.parameters
    memory = {"full": FULL * weights, "nothing": (models + 0.5) * weights}.get(trained, 2.5 * weights)
    disk = weights * (DISK_FACTOR.get(trained, 0.0) + kept)
    return Plan(tuple(parts), int(memory) + PROGRAM, int(disk) + 50_000_000, tuple(notices))
