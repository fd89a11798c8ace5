"""One JSON object of a run folder together with its place, so that an error names file, place and field.

A run folder may be old, edited by hand or cut off; a report refuses what it does not understand instead of printing
a gap as if it were a measurement.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from unbackdoor.errors import DataError
from unbackdoor.report.escape import shown_line

_ROUNDING = 1e-9
_LARGEST = 2**64  # no count or seed is larger, and a number without end would not fit into a float


@dataclass(frozen=True)
class Record:
    """A JSON object and its place.

    Attributes:
        place: File and position, as an error shows them.
        data: The object.
    """

    place: str
    data: Mapping[str, object]

    def wrong(self, key: str, wanted: str) -> DataError:
        """Return the error for a field that does not hold what is `wanted`."""
        found = shown_line(repr(self.data[key]), 60) if key in self.data else "nothing"
        return DataError(f"{self.place}: field '{key}' must be {wanted}, but holds {found}; run the command again.")

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text; `default` stands in where the field is absent or null."""
        value = self.data.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "text")
        return value

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        """Return a text that is one of `allowed`."""
        value = self.text(key)
        if value not in allowed:
            raise self.wrong(key, f"one of {', '.join(allowed)}")
        return value

    def number(self, key: str, *, infinite: bool = False) -> float:
        """Return a number that is not NaN, nor infinite unless allowed."""
        value = self.data.get(key)
        number = as_float(value)
        if math.isnan(number):
            raise self.wrong(key, "a number")
        if math.isinf(number) and not infinite:
            raise self.wrong(key, "a finite number")
        return number

    def share(self, key: str) -> float:
        """Return a number from 0 to 1; what rounding adds at the ends does not count."""
        number = self.number(key, infinite=True)
        if not -_ROUNDING <= number <= 1 + _ROUNDING:
            raise self.wrong(key, "a share from 0 to 1")
        return number

    def number_or_none(self, key: str) -> float | None:
        """Return a number, infinity included, or None where there is none."""
        return None if self.data.get(key) is None else self.number(key, infinite=True)

    def whole(self, key: str) -> int:
        """Return a whole number."""
        value = self.data.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _LARGEST:
            raise self.wrong(key, "a whole number")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts, empty where the field is absent."""
        return tuple(self._item_text(key, item) for item in self.items(key))

    def _item_text(self, key: str, item: object) -> str:
        if not isinstance(item, str):
            raise self.wrong(key, "a list of texts")
        return item

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return a list of finite numbers."""
        holder = [Record(f"{self.place}, {key}[{at}]", {"value": item}) for at, item in enumerate(self.items(key))]
        return tuple(item.number("value") for item in holder)

    def items(self, key: str) -> list[object]:
        """Return a list of anything, empty where the field is absent."""
        value = self.data.get(key, [])
        if not isinstance(value, list):
            raise self.wrong(key, "a list")
        return value

    def records(self, key: str) -> list[Record]:
        """Return a list of objects, each with its place."""
        return [as_record(item, f"{self.place}, {key}[{at}]") for at, item in enumerate(self.items(key))]

    def mapping(self, key: str) -> Mapping[str, object]:
        """Return an object, empty where the field is absent."""
        value = self.data.get(key) or {}
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return value


def as_float(value: object) -> float:
    """Return a number as a float; NaN for what is none, or too large to be one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def read_json(path: Path) -> object:
    """Return what a JSON file holds.

    Raises:
        DataError: If it is not JSON in UTF-8.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{path} is not valid JSON ({problem}); run the command again to write it anew.") from problem


def as_record(value: object, place: str) -> Record:
    """Return `value` as a record.

    Raises:
        DataError: If it is not a JSON object.
    """
    if not isinstance(value, dict):
        raise DataError(f"{place} must be a JSON object, but is {shown_line(repr(value), 60)}; run the command again.")
    return Record(place, value)
