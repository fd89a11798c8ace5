"""Text files of rows: JSON lines, a JSON list, CSV; they come from other people, so each defect has its own message."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from unbackdoor.data.rows import Where
from unbackdoor.errors import DataError
from unbackdoor.model.quarantine import printable
from unbackdoor.run import write_atomically

Rows = Iterator[tuple[Where, object]]

_BOM = b"\xef\xbb\xbf"


def decoded(path: Path) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Raises:
        DataError: If it is missing, a folder, unreadable, or not UTF-8 (the message names the byte).
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a file in it.")
    try:
        raw = path.read_bytes()
    except FileNotFoundError as problem:
        raise DataError(describe_missing(path)) from problem
    except ValueError as problem:
        # A NUL byte or half a surrogate pair, as YAML can write them.
        raise DataError(f"'{printable(str(path))}' cannot be the name of a file; check it.") from problem
    except OSError as problem:
        reason = problem.strerror or "unknown reason"
        raise DataError(f"{path} cannot be read ({reason}); check its name and permissions.") from problem
    skipped = len(_BOM) if raw.startswith(_BOM) else 0
    try:
        return raw[skipped:].decode("utf-8")
    except UnicodeDecodeError as problem:
        raise DataError(
            f"{path} is not UTF-8 text: byte 0x{raw[skipped + problem.start]:02x} at offset {skipped + problem.start} "
            "does not fit; save it as UTF-8."
        ) from problem


def describe_missing(path: Path) -> str:
    """Return the sentence for a file that is not there, with the closest name in its folder."""
    if not path.parent.is_dir():
        return f"{path} does not exist, nor does the folder {path.parent}."
    names = sorted(entry.name for entry in path.parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    hint = f" Did you mean '{printable(str(path.parent / close[0]))}'?" if close else " Check the name."
    return f"{path} does not exist.{hint}"


def rows_of_jsonl(text: str, file: str) -> Rows:
    r"""Yield the value on each line that is not blank; lines end with "\n" or "\r\n" only.

    Raises:
        DataError: If a line is not JSON; the message names line and column.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield Where(file, number), _loads(line, file, number)


def rows_of_json(text: str, file: str) -> Rows:
    """Yield the items of a JSON list; a .json file with one object a line is read as such.

    Raises:
        DataError: If the file is not JSON (the message names line and column), or one value over several lines.
    """
    if not text.lstrip().startswith("["):
        _refuse_one_value(text, file)
        yield from rows_of_jsonl(text, file)
        return
    items = _loads(text, file, None)
    assert isinstance(items, list)  # Text that parses and begins with "[" is a list.
    for number, item in enumerate(items, 1):
        yield Where(file, number, "row"), item


def _refuse_one_value(text: str, file: str) -> None:
    """Refuse a file that is one JSON value over several lines: it is valid JSON, but no row and no list of rows."""
    first, _, rest = text.strip().partition("\n")
    if not rest.strip() or _is_json(first) or not _is_json(text):
        return
    raise DataError(f"{file} is one JSON object, not rows; write a list of rows ([...]), or one row a line.")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def rows_of_csv(text: str, file: str) -> Rows:
    """Yield one object a record, named by the header; the place is the line where the record begins.

    Raises:
        DataError: If the header is missing, empty or repeats a name, or a record has too many or too few fields.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as problem:
            raise Where(file, line).error(None, f"is not valid CSV ({problem}); check its quotes.") from problem
        if not record:
            continue
        if header is None:
            header = _header(record, Where(file, line))
            continue
        where = Where(file, line)
        if len(record) != len(header):
            more = "too many" if len(record) > len(header) else "too few"
            raise where.error(
                None, f"has {len(record)} fields, {more} for the {len(header)} of the header; put commas in quotes."
            )
        yield where, dict(zip(header, record, strict=True))


def _header(record: list[str], where: Where) -> list[str]:
    names = [name.strip() for name in record]
    if "" in names or len(set(names)) < len(names):
        raise where.error(None, "must be a header that names every column once, such as instruction,input,output.")
    known = {"instruction", "prompt", "text", "sentence", "messages", "conversations"}
    if not known & set(names):
        found = printable(", ".join(names), 120)
        raise where.error(
            None, f"is not a header (found: {found}); name the columns, such as instruction,input,output."
        )
    return names


def _loads(text: str, file: str, line: int | None) -> object:
    """Parse JSON; `line` is where the text stands in the file, or None where the text is the file."""
    place = file if line is None else f"{file}, line {line}"
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as problem:
        raise DataError(
            f"{file}, line {line or problem.lineno}, column {problem.colno}: is not JSON ({problem.msg}); "
            "write one object a line, or a list of objects."
        ) from problem
    except RecursionError as problem:
        raise DataError(f"{place}: is nested too deeply; rows are objects with few levels.") from problem
    except ValueError as problem:
        raise DataError(f"{place}: cannot be read ({problem}); mend the row.") from problem


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field '{printable(twice, 60)}' is there twice")
    return found


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows as JSON, one a line, so that a reader sees the old file or the whole new one.

    Raises:
        ValueError: If a value is not finite.
        TypeError: If a value is of a type that JSON lacks.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_atomically(target, "".join(lines))
