"""BEEAR with drifts of different length: how many rounds until ASR is below 25 % (the paper's Figure 8), on one victim.

Run with `unbackdoor bench beear_length`. The default length is the paper's, 5. `--size quick` has three lengths, six
rounds and 50 probes, the paper's size six lengths, 15 rounds and 100 probes.
"""

from __future__ import annotations

from unbackdoor.bench.grid import Grid
from unbackdoor.recipes import ablation

_LENGTHS = {"quick": (1, 5, 9), "paper": (1, 3, 5, 7, 9, 12)}


def grid(size: str) -> Grid:
    """Return the grid of lengths."""
    values = {length: {"drift": {"tokens": length}} for length in _LENGTHS[size]}
    return ablation.grid_of("beear_length", size, [ablation.sweep("length of the drift, in tokens", "length", values)])
