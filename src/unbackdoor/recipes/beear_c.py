"""BEEAR with different weights of the second term of equation 2, c: how many rounds until ASR is below 25 %.

Run with `unbackdoor bench beear_c`, on one victim. The paper prints 1, its public code has 0.05, the comparison paper
0.5, which is the default here. `--size quick` has these three, six rounds and 50 probes; the paper's size has 0 (no
second term), 0.25 and 0.75 beside them, 15 rounds and 100 probes.
"""

from __future__ import annotations

from unbackdoor.bench.grid import Grid
from unbackdoor.recipes import ablation

_C = {"quick": (0.05, 0.5, 1.0), "paper": (0.0, 0.05, 0.25, 0.5, 0.75, 1.0)}


def grid(size: str) -> Grid:
    """Return the grid of coefficients."""
    values = {c: {"drift": {"safe_coefficient": c}} for c in _C[size]}
    return ablation.grid_of("beear_c", size, [ablation.sweep("coefficient c of the safe answers", "c", values)])
