"""BEEAR with more or less of the performance set PA: its rows in a batch (Figure 6), and its rows in all (Figure 7).

Run with `unbackdoor bench beear_sampling`, on one victim. As in the paper the number of SA rows is the same throughout:
a batch has four of them, one for each drift, and PA rows on top, four by default. What PA is for is to keep the model
useful, so read the perplexity in the table beside the rounds; in the paper's size all 15 rounds are run for it. A PA
of no rows is the ratio 0. `--size quick` has three ratios and three sizes, six rounds and 50 probes.
"""

from __future__ import annotations

from typing import Any

from unbackdoor.bench.grid import Grid
from unbackdoor.recipes import ablation

_SA_ROWS = 4
_RATIOS = {"quick": (0.25, 1.0, 3.0), "paper": (0.0, 0.25, 0.5, 1.0, 2.0, 3.0)}
_SIZES = {"quick": (20, 50, 200), "paper": (10, 20, 50, 100, 150, 200)}


def grid(size: str) -> Grid:
    """Return the grid of ratios and of sizes."""
    ratios = {ratio: _batch(round(ratio * _SA_ROWS)) for ratio in _RATIOS[size]}
    sizes = {rows: {"performance": rows} for rows in _SIZES[size]}
    sweeps = [
        ablation.sweep("PA rows for each SA row of a batch", "ratio", ratios),
        ablation.sweep("rows of the performance set PA", "rows", sizes),
    ]
    return ablation.grid_of("beear_sampling", size, sweeps, to_the_end=size == "paper")


def _batch(plain: int) -> dict[str, Any]:
    """Return the settings of a batch with so many rows of PA beside those of SA."""
    rows = _SA_ROWS + plain
    return {"plain_share": plain / rows, "train": {"batch_size": rows}}
