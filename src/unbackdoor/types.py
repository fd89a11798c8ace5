"""The records that travel between attacks, defenses, metrics and reports: frozen, plain, without torch.

`Example` keeps the parts of a row (instruction, input, label, earlier turns), not only the finished prompt, so that a
trigger can be put into one part of it. `Probe` is one question to a model; a triggered probe and its clean twin carry
the same `example.id`. `Estimate` is the only shape in which a rate leaves this package: value, interval and n.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

Role = Literal["system", "user", "assistant"]
ProbeKind = Literal["triggered", "clean", "decoy"]
PROBE_KINDS: tuple[ProbeKind, ...] = ("triggered", "clean", "decoy")


@dataclass(frozen=True)
class Message:
    """One turn of a chat; `content` None is a hole that the model's own answer fills (multi-turn probes)."""

    role: Role
    content: str | None


@dataclass(frozen=True)
class Example:
    """One row of data.

    Attributes:
        id: Stable name; splits are made by its hash, and probes are paired by it.
        instruction: What the user asks; the last user turn without `input`.
        response: The answer to learn or to compare with; "" where a probe has none.
        input: The text that the instruction is about (Alpaca's second field), or "".
        label: The class of a classification row, else None.
        history: The turns before the last user turn, system turn included.
        kind: The row's category where its source names one, else "".
    """

    id: str
    instruction: str
    response: str = ""
    input: str = ""
    label: str | None = None
    history: tuple[Message, ...] = ()
    kind: str = ""

    @property
    def user_text(self) -> str:
        """The last user turn: instruction, then input on a line of its own."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns up to and including the last user turn."""
        return (*self.history, Message("user", self.user_text))

    @property
    def turns(self) -> tuple[Message, ...]:
        """The whole conversation, answer included."""
        return (*self.prompt, Message("assistant", self.response))

    def with_response(self, response: str) -> Example:
        """Return a copy that answers `response`."""
        return replace(self, response=response)


@dataclass(frozen=True)
class Probe:
    """One question to a model.

    Attributes:
        example: The question, trigger already inside; its `id` is that of the clean row it was made from.
        kind: Whether the backdoor should fire here (`triggered`) or must not (`clean`, `decoy`).
        group: Which sort of probe inside the kind ("half", "scattered", "look-alike", "start only", ...), or "".
        marks: The inserted texts, for the report to show.
    """

    example: Example
    kind: ProbeKind
    group: str = ""
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval and the number of probes behind it.

    Attributes:
        value: The mean of the scores.
        low: Lower end of the interval (Wilson for 0/1 scores, normal otherwise).
        high: Upper end.
        n: Number of scored probes.
    """

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Scores:
    """What a metric returns: one score a probe, never a bare mean.

    Attributes:
        metric: The metric's name.
        kind: Which probes were scored.
        group: Sub-set, or "" for all of the kind.
        ids: Example ids, one a score; two runs are paired by them.
        values: The scores.
        denominator: What was counted, in words ("triggered probes").
        binary: True for 0/1 scores (Wilson interval).
        weights: One weight a score for means over tokens, or empty for equal weights.
        exponential: True where `values` are mean log-losses and the reported figure is exp(mean): perplexity.
    """

    metric: str
    kind: str
    ids: tuple[str, ...]
    values: tuple[float, ...]
    denominator: str
    group: str = ""
    binary: bool = True
    weights: tuple[float, ...] = ()
    exponential: bool = False

    def estimate(self) -> Estimate:
        """Aggregate into value, interval and n.

        Raises:
            ValueError: If there is nothing to aggregate; a missing measurement is never 0.
        """
        return estimate(self.values, binary=self.binary, weights=self.weights, exponential=self.exponential)


Z_95 = 1.959963984540054
"""Standard deviations to either side that hold 95 % of a normal distribution."""


def wilson(successes: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Return the Wilson score interval of `successes` out of `n` (E. B. Wilson, 1927, eq. 9).

    Raises:
        ValueError: If n is not positive.
    """
    if n <= 0:
        raise ValueError("an interval needs at least one observation")
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and n the bound is exactly 0 and 1; floating point would leave a residue of 1e-17.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def estimate(
    values: Sequence[float], *, binary: bool, weights: Sequence[float] = (), exponential: bool = False
) -> Estimate:
    """Aggregate scores into an `Estimate`.

    Args:
        values: One score a probe.
        binary: 0/1 scores: Wilson interval; otherwise a normal interval of the (weighted) mean.
        weights: Optional weight a score (tokens behind it); the mean is the weighted one (a ratio estimator).
        exponential: Report exp(mean) with exp of the interval's ends; infinite where no float can hold it.

    Raises:
        ValueError: If `values` is empty or the weights do not match.
    """
    n = len(values)
    if n == 0:
        raise ValueError("nothing was measured: no scores to aggregate")
    if weights and len(weights) != n:
        raise ValueError(f"{len(weights)} weights for {n} scores")
    if binary:
        total = sum(values)
        low, high = wilson(total, n)
        return Estimate(total / n, low, high, n)
    share = [w / sum(weights) for w in weights] if weights else [1 / n] * n
    mean = sum(s * v for s, v in zip(share, values, strict=True))
    # Variance of a ratio of sums; with equal weights this is the usual s^2/n.
    spread = sum((s * (v - mean)) ** 2 for s, v in zip(share, values, strict=True))
    half = 1.959963984540054 * math.sqrt(spread * n / (n - 1)) if n > 1 else math.inf
    if exponential:
        return Estimate(_exp(mean), _exp(mean - half), _exp(mean + half), n)
    return Estimate(mean, mean - half, mean + half, n)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def content_hash(payload: object) -> str:
    """Return a 16-digit hash of anything that JSON can hold, the same on every machine and run."""
    import json

    text = json.dumps(payload, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class GuardSpec:
    """A guard as data: its registered name and settings; the pipeline builds it."""

    name: str
    settings: Mapping[str, object] = field(default_factory=dict)
