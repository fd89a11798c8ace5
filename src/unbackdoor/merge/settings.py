"""A merge as data: which models, which of their layers, and parameters that may change with depth and tensor name.

Everything that a merge can be is a `Merge`: two models with a t, or what a YAML file in mergekit's schema says. This
module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from unbackdoor.errors import UserError

Method = Literal[
    "linear", "slerp", "ties", "task_arithmetic", "dare_linear", "dare_ties", "passthrough"
]  # fmt: skip
METHODS: tuple[Method, ...] = get_args(Method)
NEEDS_BASE = frozenset({"ties", "task_arithmetic", "dare_linear", "dare_ties"})
"""Methods that work on differences to a base."""


class Filtered(BaseModel):
    """A value for tensors whose name holds a text; without one, or with `*`, for all.

    Attributes:
        filter: The text.
        value: A number, or numbers that are interpolated over depth.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    filter: str | None = Field(None, description="part of the tensors' names; null or * for all others")
    value: float | tuple[float, ...] = Field(description="a number, or numbers over depth")


def _not_empty(given: Any) -> Any:
    if given == ():
        raise ValueError("is an empty list; write one number at least")
    if isinstance(given, Filtered):
        _not_empty(given.value)
    return given


Schedule = Annotated[float | Filtered | tuple[float, ...] | tuple[Filtered, ...], AfterValidator(_not_empty)]
"""A number; numbers that are interpolated from the first layer to the last; or such for parts of the names, of which
the first that fits counts."""


def value_at(schedule: Schedule, name: str, depth: float) -> float | None:
    """Return what a schedule says for a tensor; None where no filter fits.

    Args:
        schedule: The schedule.
        name: The tensor's name in the result, or in the one model that the schedule is for.
        depth: Its layer's place from 0 (first) to 1 (last); what stands outside the layers is at 0, as in mergekit.
    """
    if isinstance(schedule, Filtered):
        schedule = (schedule,)
    if not isinstance(schedule, tuple):
        return float(schedule)
    for item in schedule:
        if not isinstance(item, Filtered):
            return _between([float(number) for number in schedule if not isinstance(number, Filtered)], depth)
        if item.filter in (None, "*") or str(item.filter) in name:
            return value_at(item.value, name, depth)
    return None


def _between(numbers: Sequence[float], depth: float) -> float:
    place = depth * (len(numbers) - 1)
    below = min(int(place), len(numbers) - 1)
    above = min(below + 1, len(numbers) - 1)
    part = place - below
    return (1.0 - part) * numbers[below] + part * numbers[above]


def numbers_in(schedule: Schedule) -> list[float]:
    """Return every number of a schedule."""
    if isinstance(schedule, Filtered):
        return numbers_in(schedule.value)
    if isinstance(schedule, tuple):
        return [number for item in schedule for number in numbers_in(item)]
    return [float(schedule)]


Parameters = Mapping[str, Schedule]


@dataclass(frozen=True)
class Input:
    """One model of a slice.

    Attributes:
        model: Its spec.
        layers: Its layers [first, last); None for all.
        parameters: Settings for it alone: weight, density, scale.
    """

    model: str
    layers: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """A row of layers of the result.

    Attributes:
        inputs: The models that it is made of.
        parameters: Settings for it.
        base: A base of its own.
    """

    inputs: tuple[Input, ...]
    parameters: Parameters = field(default_factory=dict)
    base: str | None = None


@dataclass(frozen=True)
class Merge:
    """A merge.

    Attributes:
        method: How.
        slices: The result's layers, in order; one slice for a merge of whole models.
        suspect: Spec of the model that the result is like: its dtype, configuration and tokenizer.
        base: Spec of the base of the differences.
        parameters: Settings for all: t, weight, density, lambda, threshold, scale; a Boolean is 0 or 1.
        dtype: Type of the result ("F32", "BF16", "F16"), or None for that of the suspect, tensor by tensor.
        tokenizer: Spec of the model whose tokenizer the result has, or None for the suspect.
        seed: For DARE.
    """

    method: Method
    slices: tuple[Slice, ...]
    suspect: str
    base: str | None = None
    parameters: Parameters = field(default_factory=dict)
    dtype: str | None = None
    tokenizer: str | None = None
    seed: int = 0

    @property
    def models(self) -> tuple[str, ...]:
        """Specs of all models, the suspect first, each once."""
        named = [self.suspect, *(one.model for part in self.slices for one in part.inputs)]
        bases = [self.base, *(part.base for part in self.slices), self.tokenizer]
        return tuple(dict.fromkeys([*named, *(spec for spec in bases if spec is not None)]))


def check_ranges(parameters: Parameters, place: str) -> None:
    """Refuse parameters that no tensor could be merged with.

    Args:
        parameters: Name -> schedule.
        place: Where they stand, for the message.

    Raises:
        UserError: With the first that does not fit.
    """
    for name, schedule in parameters.items():
        for number in numbers_in(schedule):
            if not math.isfinite(number):
                raise UserError(f"{place}{name} = {number} is no finite number; write another.")
            low, high = _RANGES.get(name, (-math.inf, math.inf))
            if not low <= number <= high:
                raise UserError(f"{place}{name} = {number:g} is outside [{low:g}, {high:g}]; write a number in there.")


_RANGES: dict[str, tuple[float, float]] = {
    "t": (0.0, 1.0), "density": (0.0, 1.0), "threshold": (0.0, 1.0), "normalize": (0.0, 1.0)
}  # fmt: skip
