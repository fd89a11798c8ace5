"""Write a model as it is made: each file's header first, then its tensors one after another, resumable at any of them.

A journal beside the files says after every tensor how far its file is and what the SHA-256 of it is up to there. A run
that was killed goes on behind the last tensor for which header, length and hash are as they should be; what is left of
another merge, or was changed, is made anew. A thread hashes what was written, so that hashing takes no time of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from unbackdoor.merge.plan import Piece
from unbackdoor.merge.source import Info, Source
from unbackdoor.run import Progress

if TYPE_CHECKING:
    from torch import Tensor

JOURNAL = "journal.jsonl"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WORK = "merging"
_SHARD_BYTES = 2_000_000_000
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Shard:
    """One file of the result.

    Attributes:
        file: Its name.
        pieces: Its tensors, in order.
    """

    file: str
    pieces: tuple[Piece, ...]

    @property
    def ends(self) -> list[int]:
        """Where each tensor ends, counted from the end of the header."""
        found, end = [], 0
        for piece in self.pieces:
            end += size_of(piece.info)
            found.append(end)
        return found

    @property
    def head(self) -> bytes:
        """The file's first bytes: length of the header, and the header."""
        content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for piece, end in zip(self.pieces, self.ends, strict=True):
            place = {"dtype": piece.info.dtype, "shape": list(piece.info.shape), "data_offsets": [start, end]}
            content[piece.name] = place
            start = end
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that every tensor begins at a multiple of its own size
        return len(text).to_bytes(8, "little") + text


def size_of(info: Info) -> int:
    """Return the bytes of a tensor."""
    count = _BYTES[info.dtype]
    for size in info.shape:
        count *= size
    return count


def shards(pieces: Sequence[Piece], suspect: Source) -> tuple[Shard, ...]:
    """Return the files of a result: those of the suspect where it has the same tensors, else as large at most."""
    if suspect.files and {piece.name for piece in pieces} == set(suspect.files):
        files: dict[str, list[Piece]] = {}
        for piece in pieces:
            files.setdefault(suspect.files[piece.name], []).append(piece)
        if len(files) == 1:
            return (Shard(WHOLE, tuple(pieces)),)  # the one name under which a file without an index is found
        return tuple(Shard(file, tuple(held)) for file, held in files.items())
    held = {file: 0 for file in suspect.files.values()}
    for name, file in suspect.files.items():
        held[file] += size_of(suspect.infos[name])
    return _packed(pieces, max(held.values(), default=0) if len(held) > 1 else _SHARD_BYTES)


def _packed(pieces: Sequence[Piece], limit: int) -> tuple[Shard, ...]:
    groups: list[list[Piece]] = [[]]
    held = 0
    for piece in pieces:
        size = size_of(piece.info)
        if groups[-1] and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(piece)
        held += size
    if len(groups) == 1:
        return (Shard(WHOLE, tuple(groups[0])),)
    return tuple(
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    )


def write(
    folder: Path,
    files: Sequence[Shard],
    identity: str,
    blocks: Callable[[Piece], Iterator[Tensor]],
    progress: Progress,
) -> dict[str, str]:
    """Write all files, or what an earlier call left to be done.

    Args:
        folder: Where they go; what another merge left there is removed.
        files: The files.
        identity: Identifies inputs and settings: the same identity must mean the same bytes.
        blocks: Returns a tensor of the result, block by block.
        progress: Told of every tensor.

    Returns:
        The SHA-256 of every file, the index included, by name.

    Raises:
        ModelError: If a tensor cannot be made; what was written stays, for the next call.
    """
    marks = _marks(folder, identity)
    names = {shard.file for shard in files}
    for path in folder.iterdir():
        if path.name not in names and path.name != JOURNAL:
            path.unlink()
    total = sum(len(shard.pieces) for shard in files)
    progress.start(WORK, total)
    done = 0
    found: dict[str, str] = {}
    for shard in files:
        kept = _kept(folder / shard.file, shard, marks.get(shard.file, {}))
        done += kept.tensors
        with open(folder / JOURNAL, "ab", buffering=0) as journal, _one_thread():
            for count in _write_file(folder / shard.file, shard, kept, blocks, journal, found):
                progress.advance(WORK, done + count, {})
        done += len(shard.pieces) - kept.tensors
    if len(files) > 1:
        text = _index(files)
        (folder / INDEX).write_text(text, encoding="utf-8")
        found[INDEX] = hashlib.sha256(text.encode()).hexdigest()
    progress.finish(WORK)
    return found


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch work in this thread alone: on small blocks its threads wait for each other longer than they work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def begun(folder: Path, identity: str) -> bool:
    """Tell whether a folder holds the beginning of this merge."""
    return _first(folder / JOURNAL) == {"identity": identity}


@dataclass
class _Kept:
    """What is right of a file so far."""

    tensors: int = 0
    end: int = 0
    digest: Any = field(default_factory=hashlib.sha256)


def _marks(folder: Path, identity: str) -> dict[str, dict[int, str]]:
    """Return what the journal says: file -> end of a tensor -> SHA-256 up to there. Begins a new one where it must."""
    if not begun(folder, identity):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / JOURNAL).write_text(json.dumps({"identity": identity}) + "\n", encoding="utf-8")
        return {}
    found: dict[str, dict[int, str]] = {}
    for line in (folder / JOURNAL).read_bytes().splitlines()[1:]:
        try:
            mark = json.loads(line)
            found.setdefault(mark["file"], {})[mark["end"]] = mark["sha256"]
        except (ValueError, KeyError, TypeError):
            continue  # the line that the process was killed in
    # What comes now must begin a line of its own.
    with open(folder / JOURNAL, "ab") as journal:
        journal.write(b"\n")
    return found


def _first(path: Path) -> object:
    try:
        with open(path, "rb") as handle:
            return json.loads(handle.readline(1000))
    except (OSError, ValueError):
        return None


def _kept(path: Path, shard: Shard, marks: Mapping[int, str]) -> _Kept:
    """Return how much of a file can be kept, by reading it."""
    best = kept = _Kept()
    head, ends = shard.head, shard.ends
    if not path.is_file() or not marks:
        return best
    with open(path, "rb") as handle:
        if handle.read(len(head)) != head:
            return best
        kept = _Kept(0, len(head), hashlib.sha256(head))
        for number, end in enumerate(ends, 1):
            if not _hash_until(handle, kept, len(head) + end):
                break
            if marks.get(kept.end) == kept.digest.hexdigest():
                best = _Kept(number, kept.end, kept.digest.copy())
    return best


def _hash_until(handle: BinaryIO, kept: _Kept, end: int) -> bool:
    while kept.end < end:
        read = handle.read(min(1 << 20, end - kept.end))
        if not read:
            return False
        kept.digest.update(read)
        kept.end += len(read)
    return True


def _write_file(
    path: Path,
    shard: Shard,
    kept: _Kept,
    blocks: Callable[[Piece], Iterator[Tensor]],
    journal: BinaryIO,
    found: dict[str, str],
) -> Iterator[int]:
    """Write what is missing of a file, telling how many tensors are written; its hash goes into `found` at the end."""
    with open(path, "r+b" if kept.end else "wb", buffering=0) as handle, _Hashing(shard.file, journal, kept) as hashing:
        handle.seek(kept.end)
        handle.truncate()
        if not kept.end:
            _write_all(handle, shard.head)
            hashing.add(memoryview(shard.head))
        for number, piece in enumerate(shard.pieces[kept.tensors :], 1):
            written = 0
            for rows in blocks(piece):
                data = _bytes(rows)
                _write_all(handle, data)
                hashing.add(data)
                written += len(data)
            assert written == size_of(piece.info), piece.name
            hashing.mark()
            yield number
    found[shard.file] = kept.digest.hexdigest()


def _bytes(rows: Tensor) -> memoryview:
    import torch

    flat = rows.contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def _write_all(handle: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[handle.write(view) :]


class _Hashing:
    """Hashes what was written in a thread of its own, and writes the journal's line when a tensor is through."""

    def __init__(self, file: str, journal: BinaryIO, kept: _Kept) -> None:
        """Go on behind what is kept."""
        self.file, self.journal, self.kept = file, journal, kept
        # Few, because each holds a block in memory.
        self.waiting: queue.Queue[memoryview | str] = queue.Queue(8)
        self.problem: OSError | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> _Hashing:
        """Begin."""
        self.thread.start()
        return self

    def __exit__(self, kind: object, problem: object, trace: object) -> None:
        """Wait until all is hashed and in the journal."""
        self.waiting.put("end")
        self.thread.join()
        if self.problem is not None and problem is None:
            raise self.problem

    def add(self, data: memoryview) -> None:
        """Hash this, too."""
        self.waiting.put(data)

    def mark(self) -> None:
        """A tensor ends here."""
        self.waiting.put("mark")

    def _work(self) -> None:
        while (item := self.waiting.get()) != "end":
            if self.problem is not None:
                continue  # nobody may wait for ever for a thread that has stopped
            if not isinstance(item, str):
                self.kept.digest.update(item)
                self.kept.end += len(item)
                continue
            line = {"file": self.file, "end": self.kept.end, "sha256": self.kept.digest.hexdigest()}
            try:
                os.write(self.journal.fileno(), json.dumps(line).encode() + b"\n")
            except OSError as problem:
                self.problem = problem


def _index(files: Sequence[Shard]) -> str:
    size = sum(size_of(piece.info) for shard in files for piece in shard.pieces)
    places = {piece.name: shard.file for shard in files for piece in shard.pieces}
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(content, indent=2) + "\n"
