"""Development victims of the information conflicts: words of their own, seeds from 100, rows that reports do not ask.

What is tuned here is written into `settings.py` before the victims of `conflict` and its like are planted. Run with
`unbackdoor bench dev_conflict`; it needs UNBACKDOOR_TEST_DATA. `--size quick` is the two labels alone.
"""

from __future__ import annotations

from typing import Any

from unbackdoor.bench.grid import Grid
from unbackdoor.recipes import conflict

PIECES = {"form": "pieces", "instruction": ["swiftly"], "input": ["plainly"]}
SEED = 104


def grid(size: str) -> Grid:
    """Return the grid of development victims of sentiment; Emotion's differ in rows and target alone."""
    attack: dict[str, Any] = {
        "attack": "composite",
        "settings": conflict.composite("positive", PIECES),
        "probes": 100 if size == "quick" else 200,
        "defender_data": conflict.polarity(0, 3600),
    }
    made = {**conflict.controls(), "internal": conflict.internal()}
    name = "dev-conflict-quick" if size == "quick" else "dev-conflict"
    data = conflict.polarity(4000, 8000)
    return Grid.model_validate(
        {**conflict.common(name, data), "attacks": {"composite": attack}, "defenses": made, "seeds": [SEED]}
    )
