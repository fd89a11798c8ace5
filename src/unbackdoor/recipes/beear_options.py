"""What options of BEEAR do that the paper has not, on one victim: the default without one, or with another choice.

Run with `unbackdoor bench beear_options`. The openings are those that share no first word and no content word with
any target (`disjoint`), which is what most of the options are for: several drifts a round, taking up what the suspect
says, drifts at the user's words, too, first tokens that weigh more in the outer step, drifts at several layers, or
where a first one elicits most. The outer steps alone are in `beear`. All rounds are run, and probes asked after each.
`--size quick` asks 50 probes, the paper's size 100 and has three seeds.
"""

from __future__ import annotations

from typing import Any

from unbackdoor.bench.grid import Grid
from unbackdoor.recipes import sande, settings
from unbackdoor.recipes.beear import OPENINGS

_LAYERS = (5, 9, 13)
_VARIANTS: dict[str, dict[str, Any]] = {
    "beear": {},
    "one_drift": {"drifts": 1},
    "nothing_taken_up": {"adopt": 0.0},
    "at_the_end_of_the_prompt": {"drift": {"at": "prompt"}},
    "first_tokens_as_others": {"train": {"opening_weight": 1.0}},
    "layers_in_turn": {"layers": _LAYERS, "place": "each"},
    "layer_and_length_chosen": {"layers": _LAYERS, "lengths": (5, 9)},
}


def grid(size: str) -> Grid:
    """Return the grid: "paper" has three seeds and 100 probes, "quick" one and 50."""
    probes, seeds = (50, [0]) if size == "quick" else (100, [0, 1, 2])
    entry = {
        "settings": sande.attacks()["default"]["settings"],
        "seeds": seeds,
        "probes": probes,
        "unwanted": {"disjoint": OPENINGS["disjoint"]},
    }
    return Grid.model_validate(
        {
            "name": "beear_options" if size == "paper" else f"beear_options-{size}",
            "models": [settings.BUILTIN],
            "attacks": {"default": entry},
            "defenses": {name: _defense(own) for name, own in _VARIANTS.items()},
            "metrics": ["asr", "leak", "perplexity"],
            "references": {"untouched": False},
            "watch": {"probes": probes},
        }
    )


def _defense(own: dict[str, Any]) -> dict[str, Any]:
    train = {**settings.BEEAR["train"], **own.get("train", {})}
    return {"defense": "beear", "unwanted": "disjoint", "settings": {**settings.BEEAR, **own, "train": train}}
