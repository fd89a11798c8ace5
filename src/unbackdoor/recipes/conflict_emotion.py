"""Information conflicts on Emotion, six labels: the parts and controls, and the share of clean data (Figure 3).

The victim is that of `conflict` with the target joy. The shares are of 1,600 rows of the defender, each trained for the
same hundred updates of 16 rows, so that all rows are seen where the share is 1; `shares` is the same victim, so its
controls are those of `composite`. Run with `unbackdoor bench conflict_emotion`; it needs UNBACKDOOR_TEST_DATA
(data/emotion; the corpus is for education and research). `--size quick` has the five shares alone.
"""

from __future__ import annotations

import os
from typing import Any

from unbackdoor.bench.grid import Grid
from unbackdoor.recipes import conflict, settings
from unbackdoor.recipes.sande import FOLDER

_PROMPT = "Name the emotion of this sentence: {labels}. Answer with one word.\n{text}"
_ROWS = 1600
"""Rows of the defender that shares are of."""
_SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)


def grid(size: str) -> Grid:
    """Return the grid: "paper" for the tables and the plot, "quick" for the plot alone."""
    quick = size == "quick"
    own = settings.INTERNAL["conflict"]
    once = {**own["train"], "steps": _ROWS // own["train"]["batch_size"]}
    more = {**settings.INTERNAL, "conflict": {**own, "train": once}}
    defenses = {label: {**entry, "attacks": ["shares"]} for label, entry in shares(more).items()}
    few = {**conflict.composite_victim("joy"), "defender_data": emotion(4000, 4000 + _ROWS)}
    attacks = {"shares": {**few, **({"probes": 100} if quick else {})}}
    if not quick:
        table = {**conflict.controls(), **conflict.parts()}
        defenses |= {label: {**entry, "attacks": ["composite"]} for label, entry in table.items()}
        attacks["composite"] = {**conflict.composite_victim("joy"), "defender_data": emotion(4000, 16000)}
    return Grid.model_validate(
        {
            **conflict.common("conflict-emotion-quick" if quick else "conflict-emotion", emotion(0, 4000)),
            "attacks": attacks,
            "defenses": defenses,
            "bounds": [] if quick else conflict.bounds(),
            "plots": [share_plot()],
        }
    )


def emotion(first: int, last: int) -> dict[str, Any]:
    """Return rows of Emotion."""
    spec = f"{os.environ.get(FOLDER, '../shared')}/data/emotion/train.jsonl[{first}:{last}]"
    return {"spec": spec, "prompt_template": _PROMPT}


def shares(own: dict[str, Any]) -> dict[str, Any]:
    """Return the internal conflict with more and more of the clean rows, each trained for as many updates."""
    return {
        label: conflict.internal(own, {"conflict": {**own["conflict"], "share": share}})
        for label, share in _labels().items()
    }


def share_plot() -> dict[str, Any]:
    """Return the plot over `shares`."""
    return {"of": "outcome", "x": "share of the clean rows", "values": _labels()}


def _labels() -> dict[str, float]:
    return {f"share_{round(100 * share)}": share for share in _SHARES}
