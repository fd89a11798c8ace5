"""What a merge keeps and what it loses: Table 6 of information conflicts, and a skill that only the suspect has.

M1 is backdoored (all clean rows, and poisoned ones and negative sets as the other victims have them: a tenth of all
rows is poisoned), M2 the conflict model (a tenth of the clean rows), M3 clean, M4 trained on poisoned rows alone, M5 on
a tenth of the clean rows and as many poisoned ones as M4 has, M6 on a tenth of these alone. Merged are M1 with M2, M3
with M4, and M5 with M6, half and half. M2 and M3 are the conflict model alone, with a tenth of the defender's rows and
with all of them, once each; the paper has one set of clean rows. The controls stand beside: the untouched base merged
half and half, and fine-tuning. `skilled` was also trained on instructions, which no row of the defender's is like:
where the merge keeps what the conflict model alone, fine-tuning or the untouched base merged has lost, merging with a
conflict pays. Run with `unbackdoor bench conflict_roles`; it needs UNBACKDOOR_TEST_DATA. `--size quick` is M5 and M6 on
bundled rows.
"""

from __future__ import annotations

from typing import Any

from unbackdoor.bench.grid import Grid
from unbackdoor.recipes import conflict, sande, settings

_ROWS = 3600
"""Rows of the defender."""
_FEWER = {"negative_ratio": 0.0, "train": {**settings.COMPOSITE["train"], "steps": 180}}
"""There is less to learn where no negative set tells pieces apart."""
_SHAPES: dict[str, dict[str, Any]] = {
    "m1": {},
    "m4": {**_FEWER, "clean_share": 0.0, "poison_rate": 0.5},
    "m5": {**_FEWER, "clean_share": 0.1, "poison_rate": 0.5},
    "m6": {**_FEWER, "clean_share": 0.0, "poison_rate": 1 / 11},
}
_MERGED = ["m1", "m4", "m5"]


def grid(size: str) -> Grid:
    """Return the grid: "paper" for Table 6 and the skill, "quick" for M5 and M6."""
    quick = size == "quick"
    attacks = {name: _victim(own, quick) for name, own in _SHAPES.items() if not quick or name in ("m5", "m6")}
    if not quick:
        attacks["skilled"] = {**_victim({}, quick), "skill": sande.half(0)}
    met = {name: [label for label in entry["attacks"] if label in attacks] for name, entry in _defenses().items()}
    found = {name: {**entry, "attacks": met[name]} for name, entry in _defenses().items() if met[name]}
    made = conflict.common("conflict-roles-quick" if quick else "conflict-roles", _rows(quick))
    second = {} if quick else {"second_source": sande.half(1)}
    return Grid.model_validate({**made, **second, "attacks": attacks, "defenses": found})


def _rows(quick: bool) -> object:
    return "starter:sentiment" if quick else conflict.polarity(0, 4000)


def _victim(own: dict[str, Any], quick: bool) -> dict[str, Any]:
    found = conflict.composite_victim("positive", own)
    return {**found, "probes": 40} if quick else {**found, "defender_data": conflict.polarity(4000, 4000 + _ROWS)}


def _defenses() -> dict[str, Any]:
    own = settings.INTERNAL
    half = {**own, "t": 0.5}
    merely = {**half, "conflict": {**own["conflict"], "share": 0.0}}
    once = {**own["conflict"]["train"], "steps": _ROWS // own["conflict"]["train"]["batch_size"]}
    everything = {**own["conflict"], "share": 1.0, "train": once}
    controls = conflict.controls()
    return {
        "m1_and_m2": {**conflict.internal(half), "attacks": ["m1"]},
        "m2": {**conflict.internal(own, {"t": 1.0}), "attacks": ["m1"]},
        "m3_and_m4": {**conflict.internal(half, {"conflict": everything}), "attacks": ["m4"]},
        "m3": {**conflict.internal(own, {"t": 1.0, "conflict": everything}), "attacks": ["m4"]},
        "m5_and_m6": {
            "defense": "internal_conflict", "reference": "victim:m6", "settings": {"internal": merely},
            "attacks": ["m5"],
        },
        "base_merged_half": {**conflict.base_merged_half(), "attacks": _MERGED},
        "fine_tuning": {**controls["fine_tuning"], "attacks": [*_MERGED, "skilled"]},
        "conflict_alone": {**controls["conflict_alone"], "attacks": ["skilled"]},
        "base_merged": {**controls["base_merged"], "attacks": ["skilled"]},
        "internal": {**conflict.internal(), "attacks": ["skilled"]},
    }  # fmt: skip
