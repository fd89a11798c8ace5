"""One raw row's fields, read with errors that name file, line and field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unbackdoor.errors import DataError
from unbackdoor.model.quarantine import printable

Row = Mapping[str, object]


@dataclass(frozen=True)
class Where:
    """The place of a row.

    Attributes:
        file: Path or data set, as the person wrote it.
        line: Counted from 1.
        unit: What is counted: "line" of a text file, "row" of a list or a data set.
    """

    file: str
    line: int
    unit: str = "line"

    def __str__(self) -> str:
        """Return "FILE, line N"."""
        return f"{self.file}, {self.unit} {self.line}"

    def error(self, field: str | None, problem: str) -> DataError:
        """Return the error that says what is wrong here; `problem` begins with a verb and ends with the fix."""
        return DataError(f"{self}, field '{field}': {problem}" if field else f"{self}: {problem}")


def names_of(row: Row) -> str:
    """Return the names of a row's fields, safe to show."""
    return printable(", ".join(f"'{name}'" for name in row), 300) or "none"


def text_of(row: Row, field: str, where: Where, *, empty: str = "every row needs one") -> str:
    """Return a field that must hold text.

    Raises:
        DataError: If it is missing, not text, blank, or holds a lone surrogate (which no file can store).
    """
    if field not in row:
        raise where.error(
            field, f"is missing; every row needs the fields of the first row, and this one has {names_of(row)}."
        )
    return checked_text(row[field], field, where, empty=empty)


def checked_text(value: object, field: str, where: Where, *, empty: str) -> str:
    """Return `value` if it is text that is not blank; see `text_of`."""
    text = _storable(value, field, where)
    if not text.strip():
        raise where.error(field, f"is empty; {empty}.")
    return text


def optional_text(row: Row, field: str, where: Where) -> str:
    """Return a field that may be missing, null or blank (then ""), but if there must be text."""
    value = row.get(field)
    text = "" if value is None else _storable(value, field, where)
    return text if text.strip() else ""


def _storable(value: object, field: str, where: Where) -> str:
    if not isinstance(value, str):
        what = "null" if value is None else f"of type {type(value).__name__}"
        raise where.error(field, f"is {what}; write it as text in quotes.")
    try:
        value.encode()
    except UnicodeEncodeError as problem:
        code = f"\\u{ord(value[problem.start]):04x}"
        raise where.error(field, f"holds half a character ({code}, a lone surrogate); remove or mend it.") from problem
    return value
