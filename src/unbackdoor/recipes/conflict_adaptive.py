"""An attacker who expects a merge: Table 7 of information conflicts.

He trains a conflict model on clean rows of his own and subtracts what it learned from the victim; the defender does as
always, with rows that the attacker does not have. Run with `unbackdoor bench conflict_adaptive`;
it needs UNBACKDOOR_TEST_DATA (data/sentence_polarity). `--size quick` has bundled rows.
"""

from __future__ import annotations

from unbackdoor.bench.grid import Grid
from unbackdoor.recipes import conflict, settings


def grid(size: str) -> Grid:
    """Return the grid: "paper" for the table, "quick" for a first look."""
    quick = size == "quick"
    entry = conflict.composite_victim("positive")
    entry |= {"probes": 40} if quick else {"defender_data": conflict.polarity(4000, 7600)}
    entry |= {"subtract": {"conflict": settings.INTERNAL["conflict"], "scale": 1.0}}
    made = {**conflict.controls(), "internal": conflict.internal()}
    name = "conflict-adaptive-quick" if quick else "conflict-adaptive"
    return Grid.model_validate(
        {
            **conflict.common(name, "starter:sentiment" if quick else conflict.polarity(0, 4000)),
            "attacks": {"adaptive": entry},
            "defenses": {label: made[label] for label in conflict.MAIN},
        }
    )
