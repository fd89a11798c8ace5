"""The door for data: a spec such as `rows.jsonl[:400]`, `owner/name:train` or `starter:sentiment` becomes examples.

The whole source is read and checked before a slice is taken, so a row has the same id whatever slice it came in.
Nothing is skipped: a file that cannot be read to its end is an error that names the place and the fix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from unbackdoor.data.files import decoded, describe_missing, rows_of_csv, rows_of_json, rows_of_jsonl, write_jsonl
from unbackdoor.data.formats import Parsed, parse_all
from unbackdoor.data.probes import read_probes, write_probes
from unbackdoor.data.rows import Where
from unbackdoor.errors import DataError, UserError, did_you_mean
from unbackdoor.run import Progress, Silent
from unbackdoor.types import Example

__all__ = [
    "STARTER_OPENINGS",
    "STARTER_SETS",
    "Slice",
    "read",
    "read_lines",
    "read_probes",
    "split_spec",
    "write_jsonl",
    "write_probes",
]

STARTER_SETS = ("instructions", "sentiment", "requests")
STARTER_OPENINGS = ("insult_typical", "insult_disjoint", "affirm_typical", "affirm_disjoint")

_SUFFIXES = (".jsonl", ".json", ".csv")
_SLICE = re.compile(r"(?P<place>.+)\[(?P<start>[^\[\]:]*):(?P<stop>[^\[\]:]*)\]$", re.DOTALL)
_BOUND = re.compile(r"(-?\d{1,12})(%?)$")
_DATASET = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?):((?P<config>[\w.-]+):)?(?P<split>[\w.-]+)$")


@dataclass(frozen=True)
class Slice:
    """Which rows of a source: bounds as in a Python slice, each in rows or in per cent.

    Attributes:
        start: First row, with "%" behind it in per cent; "" for the beginning.
        stop: The row after the last; "" for the end.
    """

    start: str = ""
    stop: str = ""

    def __str__(self) -> str:
        """Return it as written, or "" for all rows."""
        return f"[{self.start}:{self.stop}]" if self.start or self.stop else ""

    def bounds(self, count: int) -> range:
        """Return the row numbers that are taken out of `count` rows.

        Per cents are rounded to the nearest row, so that `[:10%]` and `[10%:]` always make up the whole.
        """
        ends = [self._bound(text, count) if text else None for text in (self.start, self.stop)]
        return range(count)[slice(*ends)]

    @staticmethod
    def _bound(text: str, count: int) -> int:
        found = _BOUND.match(text.strip())
        if found is None:
            raise UserError(f"the slice bound '{text}' is not a number; write [:400], [100:200] or [10%:].")
        number = int(found.group(1))
        if not found.group(2):
            return number
        if abs(number) > 100:
            raise UserError(f"the slice bound '{text}' is more than 100 %; write per cents from 0 to 100.")
        # -10 % counts from the end; rounding its complement keeps [:-10%] and [:90%] equal.
        return ((number if number >= 0 else 100 + number) * count + 50) // 100


def read(
    spec: str,
    *,
    prompt_template: str | None = None,
    labels: Sequence[str] | None = None,
    require_response: bool = True,
    rejected: bool = False,
    progress: Progress | None = None,
) -> list[Example]:
    """Read examples from a file, a Hugging Face data set or a bundled set.

    Args:
        spec: A `.jsonl`, `.json` or `.csv` file; `owner/name:split` or `name:config:split` of the Hugging Face hub
            (needs the package datasets); or `starter:instructions`, `starter:sentiment`, `starter:requests`. Any of
            them may end in a slice: `[:400]`, `[100:200]`, `[-50:]`, `[10%:]`.
        prompt_template: Prompt of classification rows, with `{text}` and, optionally, `{labels}`.
        labels: Class names of classification rows, in the order of whole-number labels.
        require_response: Whether an empty or missing answer is an error.
        rejected: Take the rejected answer of preference pairs instead of the chosen one.
        progress: Is told of repeated rows and of a slice that asks for more rows than there are.

    Raises:
        DataError: If the source cannot be read, a row is bad, or no row is left.
        UserError: If the spec is not understood or a package is missing.
    """
    report = progress or Silent()
    place, part = split_spec(spec)
    names = tuple(labels or ())
    part.bounds(1)
    if place.startswith("starter:"):
        rows = _starter_rows(place.removeprefix("starter:"))
    elif place.lower().endswith(_SUFFIXES) or Path(place).exists():
        rows = _file_rows(place)
    else:
        from unbackdoor.data.hub import dataset_rows

        rows, known = dataset_rows(place, *_dataset_parts(place))
        names = names or known
    parsed = parse_all(
        ((where, _other_way_round(row) if rejected else row) for where, row in rows),
        prompt_template=prompt_template,
        labels=names,
        require_response=require_response,
    )
    return _take(parsed, place, part, report)


def _other_way_round(row: object) -> object:
    if isinstance(row, dict) and {"chosen", "rejected"} <= row.keys():
        return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    return row


def read_lines(place: str | Path) -> list[str]:
    """Read a list of texts, one a line; blank lines and lines that begin with "#" are left out.

    Args:
        place: A UTF-8 text file, or `starter:NAME` for a bundled list (`insult_typical`, `affirm_disjoint`, ...).

    Raises:
        DataError: If the file is missing, is not UTF-8 or holds no text.
    """
    name = str(place)
    if name.startswith("starter:"):
        text = _starter_text(name.removeprefix("starter:"), STARTER_OPENINGS, "openings/{}.txt")
    else:
        text = decoded(Path(place))
    lines = [line.strip() for line in text.split("\n")]
    kept = [line for line in lines if line and not line.startswith("#")]
    if not kept:
        raise DataError(f"{name} holds no text; write one opening a line.")
    return kept


def read_openings(place: str, labels: Sequence[str]) -> list[str]:
    """Read unwanted openings, or take the classes of a label task, each of which is unwanted on rows of another.

    Args:
        place: As in `read_lines`, or `labels`.
        labels: The classes of the clean rows.

    Raises:
        DataError: As `read_lines` does, or if the rows have no classes.
    """
    if place != "labels":
        return read_lines(place)
    if len(set(labels)) < 2:
        raise DataError("'labels' takes the classes of the clean rows, but these have none, or one; name a file.")
    return sorted(set(labels))


def holds_rows(place: str) -> bool:
    """Tell whether a source of what is unwanted is rows, each with an answer of its own, by the file's ending."""
    return place != "labels" and split_spec(place)[0].lower().endswith(_SUFFIXES)


def split_spec(spec: str) -> tuple[str, Slice]:
    """Split a spec into the source and the slice; a file whose own name ends in brackets is taken as it is.

    Raises:
        UserError: If the spec is empty or ends in brackets without a colon.
    """
    if not spec.strip():
        raise UserError("the data source is empty; name a .jsonl, .json or .csv file, a data set, or starter:NAME.")
    if not spec.endswith("]") or Path(spec).exists():
        return spec, Slice()
    found = _SLICE.match(spec)
    if found is None:
        raise UserError(f"the slice in '{spec}' is not understood; write [:400], [100:200] or [10%:].")
    return found["place"], Slice(found["start"].strip(), found["stop"].strip())


def _take(parsed: Parsed, place: str, part: Slice, report: Progress) -> list[Example]:
    count = len(parsed.examples)
    if not count:
        raise DataError(f"{place} holds no rows; write at least one row, as JSON one a line or as CSV under a header.")
    chosen = [parsed.examples[number] for number in part.bounds(count)]
    if not chosen:
        raise DataError(f"the slice {part} of {place} holds none of its {count} rows; choose bounds below {count}.")
    for notice in parsed.notices[:3]:
        report.notice(notice)
    if len(parsed.notices) > 3:
        report.notice(f"{place} has {len(parsed.notices) - 3} more repeated rows.")
    if part.stop.isdecimal() and int(part.stop) > count:
        report.notice(f"{place} has {count} rows, so {part} gives {len(chosen)}.")
    return chosen


def _file_rows(place: str) -> Iterator[tuple[Where, object]]:
    path = Path(place)
    readers = {".jsonl": rows_of_jsonl, ".json": rows_of_json, ".csv": rows_of_csv}
    suffix = path.suffix.lower()
    # What is there but neither file nor folder is a pipe, such as bash makes of <(...).
    if path.exists() and not path.is_dir() and suffix not in readers:
        raise DataError(f"{place}: files of type '{suffix}' are not read; convert it to {', '.join(readers)}.")
    text = decoded(path)
    if not text.strip():
        raise DataError(f"{place} is empty; it needs at least one row.")
    return readers[suffix](text, place)


def _starter_rows(name: str) -> Iterator[tuple[Where, object]]:
    return rows_of_jsonl(_starter_text(name, STARTER_SETS, "{}.jsonl"), f"starter:{name}")


def _starter_text(name: str, known: Sequence[str], path: str) -> str:
    if name not in known:
        raise UserError(
            f"there is no bundled set 'starter:{name}'.{did_you_mean(name, list(known))} Bundled: {', '.join(known)}."
        )
    found = resources.files("unbackdoor.data.starter").joinpath(*path.format(name).split("/"))
    return found.read_text(encoding="utf-8")


def _dataset_parts(place: str) -> tuple[str, str | None, str]:
    found = _DATASET.match(place)
    if found is None:
        raise DataError(
            f"{describe_missing(Path(place))} A Hugging Face data set is written owner/name:split or name:config:split."
        )
    return found["name"], found["config"], found["split"]
