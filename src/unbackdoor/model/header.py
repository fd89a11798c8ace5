"""Read the header of a safetensors file by hand, and refuse one that does not add up.

A safetensors file is eight bytes of header length, a JSON header and the tensors' bytes. Everything that a hostile
file can lie about stands in the header, so it is checked before any library maps the file: length, JSON, dtypes,
shapes, offsets that overlap, leave holes or leave the file. No weights are read and nothing here imports torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit (safetensors, "Format")."""

_MAX_DIMENSIONS = 64

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


class HeaderError(ValueError):
    """The file is not a sound safetensors file; the message says why, escaping nothing."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header describes it.

    Attributes:
        dtype: The format's name ("F32", "BF16", ...).
        shape: Its dimensions.
        start: First byte, counted from the end of the header.
        end: One past the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors that a safetensors file declares, every claim checked.

    Args:
        path: A regular file.

    Raises:
        HeaderError: If the file is not a sound safetensors file.
        OSError: If it cannot be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as handle:
        prefix = handle.read(8)
        if len(prefix) < 8:
            raise HeaderError(f"the file has {size} bytes, too few for a header")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise HeaderError(f"the header claims {length} bytes; the format allows {MAX_HEADER_BYTES}")
        if length > size - 8:
            raise HeaderError(f"the header claims {length} bytes, but only {size - 8} follow")
        raw = handle.read(length)
    if not raw.startswith(b"{"):
        raise HeaderError("the header is not a JSON object")
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except HeaderError:
        raise
    except (ValueError, RecursionError) as problem:
        raise HeaderError(f"the header is not valid JSON ({problem})") from problem
    _check_metadata(header.pop("__metadata__", {}))
    entries = {name: _entry(name, value) for name, value in header.items()}
    _check_layout(entries, size - 8 - length)
    return entries


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise HeaderError("the header names a tensor or field twice")
    return found


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("__metadata__ is not a map from text to text")


def _entry(name: str, value: object) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"tensor '{name}' does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise HeaderError(f"tensor '{name}' has the unknown dtype {dtype!r}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise HeaderError(f"tensor '{name}' has a shape that is not a short list of whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"tensor '{name}' has data_offsets that are not a range")
    bits, held = math.prod(shape) * _BITS[dtype], offsets[1] - offsets[0]
    if bits != 8 * held:
        raise HeaderError(f"tensor '{name}' needs {bits // 8} bytes for its shape and dtype, its offsets hold {held}")
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _are_counts(value: object) -> bool:
    # bool is an int in Python; `true` as a dimension is not one.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(entries: dict[str, TensorEntry], data_bytes: int) -> None:
    """The tensors must fill the data without overlap or hole."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.end > data_bytes:
            raise HeaderError(f"tensor '{name}' ends at byte {entry.end}, the file's data at {data_bytes}")
        if entry.start < position:
            raise HeaderError(f"tensor '{name}' overlaps the one before it")
        if entry.start > position:
            raise HeaderError(f"there is a hole of {entry.start - position} bytes before tensor '{name}'")
        position = entry.end
    if position != data_bytes:
        raise HeaderError(f"{data_bytes - position} bytes at the end belong to no tensor")
