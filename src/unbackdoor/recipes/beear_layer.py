"""BEEAR at different layers: how many rounds until ASR is below 25 % (the paper's Figure 5), on one victim.

Run with `unbackdoor bench beear_layer`. Layers are counted from 0 and the built-in model has 30; the default one is 9
(0.3 of them; the paper's 9 of 32 would be layer 8, where its own settings stand in `beear`). `--size quick` has six
layers, six rounds and 50 probes, the paper's size every third layer, 15 rounds and 100 probes.
"""

from __future__ import annotations

from unbackdoor.bench.grid import Grid
from unbackdoor.recipes import ablation

_LAYERS = {"quick": (1, 5, 9, 13, 19, 27), "paper": tuple(range(0, 30, 3))}


def grid(size: str) -> Grid:
    """Return the grid of layers."""
    layers = ablation.sweep(
        "decoder layer of the drift", "layer", {layer: {"layers": [layer]} for layer in _LAYERS[size]}
    )
    return ablation.grid_of("beear_layer", size, [layers])
