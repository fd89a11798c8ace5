"""One tensor of the result, in blocks of rows: float32 arithmetic, rounded once to the type of the result.

No tensor is ever held whole: what depends on all entries of one (the angle of SLERP, the cut of TIES) is found by going
through its blocks before. A tensor that only one model has a share in is copied, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from unbackdoor.errors import ModelError
from unbackdoor.merge import dare, linear, passthrough, slerp, task_arithmetic, ties
from unbackdoor.merge.plan import Part, Piece
from unbackdoor.merge.source import torch_types
from unbackdoor.model.quarantine import printable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 1 << 17
"""Entries of a block, about; small enough to stay in a processor's cache, and to be had without new pages."""


def blocks(piece: Piece) -> Iterator[Tensor]:
    """Return a tensor of the result, block by block of its rows.

    Args:
        piece: What it is made of.

    Returns:
        Tensors of the result's dtype, whose rows together are the result's.

    Raises:
        ModelError: If a value is not finite, in an input or in the result.
    """
    dtype = torch_types()[piece.info.dtype]
    if (alone := sole(piece)) is not None:
        for first, last in _ranges(piece):
            rows = alone.source.take(alone.name, first, last)
            yield _rounded(rows, dtype, piece, first) if rows.is_floating_point() else rows
        return
    for first, rows in _mixed(piece):
        yield _rounded(rows, dtype, piece, first)


def sole(piece: Piece) -> Part | None:
    """Return the only part that has a share in a tensor, and all of it; None where there is arithmetic to do."""
    parts = piece.parts
    if piece.method in {"copy", "passthrough"}:
        return parts[0] if parts[0].weight == 1.0 or piece.method == "copy" else None
    if piece.method == "slerp":
        return {0.0: parts[0], 1.0: parts[1]}.get(piece.t)
    shared = [part for part in parts if part.weight != 0.0]
    if piece.base is not None and (not shared or piece.scale == 0.0):
        return piece.base
    if len(shared) != 1 or not (piece.normalize or shared[0].weight == 1.0):
        return None
    return shared[0] if piece.base is None or (piece.scale == 1.0 and shared[0].density >= 1.0) else None


def _ranges(piece: Piece) -> Iterator[tuple[int, int]]:
    rows = piece.info.rows
    step = max(1, BLOCK * rows // max(1, math.prod(piece.info.shape)))
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


def _mixed(piece: Piece) -> Iterator[tuple[int, Tensor]]:
    """Return blocks with the number of their first row, float32."""
    if piece.base is not None:
        yield from _with_base(piece, piece.base)
        return
    shares = None
    if piece.method == "slerp":
        one, two = piece.parts
        pairs = ((_rows(one, first, last), _rows(two, first, last)) for first, last in _ranges(piece))
        shares = slerp.shares(piece.t, slerp.cosine(pairs), threshold=piece.threshold)
    for first, last in _ranges(piece):
        rows = [_rows(part, first, last) for part in piece.parts]
        if piece.method == "passthrough":
            yield first, passthrough.passthrough(rows[0], piece.parts[0].weight)
        else:
            weights = shares or [part.weight for part in piece.parts]
            yield first, linear.linear(rows, weights, normalize=piece.normalize)


def _with_base(piece: Piece, base: Part) -> Iterator[tuple[int, Tensor]]:
    weights, densities = [part.weight for part in piece.parts], [part.density for part in piece.parts]
    scale, normalize = piece.scale, piece.normalize
    draws = [dare.stream(piece.seed, piece.name, number) for number in range(len(weights))]
    cuts = [_cut(piece, base, part) for part in piece.parts] if piece.method == "ties" else []
    for first, last in _ranges(piece):
        origin, rows = _rows(base, first, last), [_rows(part, first, last) for part in piece.parts]
        if piece.method == "task_arithmetic":
            yield first, task_arithmetic.task_arithmetic(origin, rows, weights, scale=scale, normalize=normalize)
        elif piece.method == "ties":
            deltas = [row.sub_(origin) for row in rows]
            kept = [delta if cut is None else cut.apply(delta) for delta, cut in zip(deltas, cuts, strict=True)]
            yield first, ties.merge_agreeing(origin, kept, weights, scale=scale, normalize=normalize)
        else:
            yield first, dare.dare(
                origin, rows, weights, densities, draws,
                scale=scale, normalize=normalize, agreeing=piece.method == "dare_ties",
            )  # fmt: skip


def _cut(piece: Piece, base: Part, part: Part) -> ties.Cut | None:
    """Return where the difference of a part is trimmed, None where all of it is kept."""

    def differences() -> Iterator[Tensor]:
        for first, last in _ranges(piece):
            yield _rows(part, first, last).sub_(_rows(base, first, last))

    return None if part.density >= 1.0 else ties.cut(differences, part.density, math.prod(piece.info.shape))


def _rows(part: Part, first: int, last: int) -> Tensor:
    return part.source.take(part.name, first, last).float()


def _rounded(rows: Tensor, dtype: torch.dtype, piece: Piece, first: int) -> Tensor:
    """Return the rows in the type of the result.

    Raises:
        ModelError: Naming the model whose values are not finite, or the result's type where it is too small.
    """
    import torch

    found = rows.to(dtype)
    # The sum meets every entry, and overflows only where something is wrong, or very large. float16 has no room.
    small = found if dtype == torch.float16 else rows
    if bool(small.sum(dtype=torch.float32).isfinite()) or bool(found.isfinite().all()):
        return found
    last = first + (len(rows) if rows.shape else 1)
    for part in (*piece.parts, *([piece.base] if piece.base is not None else [])):
        if not bool(_rows(part, first, last).isfinite().all()):
            raise ModelError(
                f"'{part.source.shown}': the tensor {printable(part.name)} holds values that are not finite; get the "
                "model from its publisher again."
            )
    raise ModelError(
        f"the tensor {printable(piece.name)} of the result has values that {piece.info.dtype} cannot hold; ask for the "
        "dtype bfloat16 or float32 in a YAML file, or merge with smaller weights."
    )
