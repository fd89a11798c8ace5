"""Merge a suspect in memory with another model, in place: for a defense that goes on with the result.

Full weights come out, with one exception that is exact up to rounding: a linear merge of two adapters on the same base
is one adapter whose rank is the sum of theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from unbackdoor.errors import ModelError, UserError
from unbackdoor.merge.compute import blocks
from unbackdoor.merge.from_recipe import DENSITY, two_models
from unbackdoor.merge.plan import Plan, make_plan
from unbackdoor.merge.settings import Method, Schedule, value_at
from unbackdoor.merge.slerp import THRESHOLD
from unbackdoor.merge.source import Source, memory_source, open_source
from unbackdoor.model.lm import LM
from unbackdoor.train import lora

if TYPE_CHECKING:
    from unbackdoor.train.lora import Factors

_NAMES = ("suspect", "other", "base")


def merge_into(
    suspect: LM,
    other: LM | str,
    method: Method = "linear",
    t: Schedule = 0.5,
    *,
    base: LM | str | None = None,
    density: float = DENSITY,
    scale: float = 1.0,
    threshold: float = THRESHOLD,
    layers: Sequence[str] = (),
    seed: int = 0,
) -> tuple[LM, str]:
    """Merge a suspect with another model.

    Args:
        suspect: The model at t = 0, given up: its weights are changed in place. Arithmetic is float32, rounded to the
            type of its weights.
        other: The model at t = 1: in memory (an adapter there is given up, too), or a spec whose files are read.
        method: How; passthrough makes a second model in memory.
        t: The other's share, as in `from_recipe.two_models`.
        base: For methods that work on differences to it, as `other`.
        density: For ties and dare.
        scale: lambda.
        threshold: For slerp.
        layers: For passthrough.
        seed: For dare.

    Returns:
        The merged model, and a sentence on what kind of weights it has.

    Raises:
        UserError: If models do not match, or something is missing or not used.
    """
    import torch

    merge = two_models(
        "suspect", "other", method, t, base=None if base is None else "base", density=density, scale=scale,
        threshold=threshold, layers=layers, seed=seed,
    )  # fmt: skip
    if method == "linear" and isinstance(other, LM) and (joined := _joined(suspect, other, t)) is not None:
        return joined, "The suspect's adapter and the other's were joined into one for the same base."
    was_adapter = suspect.is_adapter
    suspect = _whole(suspect)
    given = dict(zip(_NAMES, (suspect, other, base), strict=True))
    sources = {name: _source(one, keep=name == "base") for name, one in given.items() if one is not None}
    plan = make_plan(merge, sources)
    made = _other_layers(suspect, plan) if method == "passthrough" else suspect
    target = made.model.state_dict()
    with torch.no_grad():
        for piece in plan.pieces:
            first, place = 0, target[piece.name]
            for rows in blocks(piece):
                if place.dim() == 0:
                    place.copy_(rows)
                    continue
                place[first : first + len(rows)] = rows.to(place.device)
                first += len(rows)
    kind = "The suspect was an adapter; the merge is full weights." if was_adapter else "All weights were merged."
    return made, kind


def check_merge(
    suspect: LM,
    other: LM,
    method: Method = "linear",
    t: Schedule = 0.5,
    *,
    base: LM | None = None,
    density: float = DENSITY,
    scale: float = 1.0,
    threshold: float = THRESHOLD,
    layers: Sequence[str] = (),
) -> None:
    """Refuse a merge that `merge_into` would refuse, before anything is trained for it; no model is changed.

    Models with an adapter are not compared: that would fold it in.

    Raises:
        UserError: If models do not match, or something is missing or not used.
    """
    merge = two_models(
        "suspect", "other", method, t, base=None if base is None else "base", density=density, scale=scale,
        threshold=threshold, layers=layers,
    )  # fmt: skip
    given = {name: one for name, one in zip(_NAMES, (suspect, other, base), strict=True) if one is not None}
    if not any(one.is_adapter for one in given.values()):
        make_plan(merge, {name: memory_source(one) for name, one in given.items()})


def _other_layers(suspect: LM, plan: Plan) -> LM:
    """Return a new model of the result's layers, whose weights are still to be filled in."""
    config = suspect.core.config if plan.config is None else type(suspect.core.config).from_dict(plan.config)
    model = type(suspect.core)(config).to(dtype=suspect.core.dtype, device=suspect.device).eval()
    model.generation_config = suspect.core.generation_config
    return replace(suspect, model=model, base=None)


def _source(model: LM | str, *, keep: bool = False) -> Source:
    if isinstance(model, str):
        return open_source(model)
    # The base is still its owner's; only the other may be given up.
    return memory_source(
        _whole(replace(model, model=copy.deepcopy(model.model)) if keep and model.is_adapter else model)
    )


def _whole(lm: LM) -> LM:
    """Return the model with its adapter folded in; the adapted one is given up."""
    if not lm.is_adapter:
        return lm
    merged = lora.merge(lm)
    # PEFT leaves its configuration on the unloaded model, which would be taken for an adapter.
    if hasattr(merged.model, "peft_config"):
        del merged.model.peft_config
    return merged


def _joined(suspect: LM, other: LM, t: Schedule) -> LM | None:
    """Return one adapter for the base of two, where both are plain ones on the same base; else None."""
    if not (suspect.is_adapter and other.is_adapter) or suspect.base is None or suspect.base != other.base:
        return None
    try:
        ours, theirs = lora.factors(suspect), lora.factors(other)
    except ModelError:
        return None  # an adapter that does more than add products; its weights can be merged, it cannot
    shares = {name: _share(t, name, suspect) for name in {*ours, *theirs}}
    below = _scaled(ours, {name: 1.0 - share for name, share in shares.items()})
    above = _scaled(theirs, shares)
    base = replace(suspect, model=suspect.model.unload(), base=None, spec=suspect.base)
    if hasattr(base.model, "peft_config"):
        del base.model.peft_config
    return lora.combine(base, below, above, suspect.spec)


def _share(t: Schedule, module: str, lm: LM) -> float:
    from unbackdoor.merge.layers import layers_of

    layers = layers_of((f"{name}.weight" for name, _ in lm.core.named_modules() if name), lm.spec)
    name = f"{module}.weight"
    index = layers.index(name)
    depth = 0.0 if index is None else index / (layers.count - 1) if layers.count > 1 else 1.0
    share = value_at(t, name, depth)
    if share is None:
        raise UserError(f"no t is given for the tensor {name}; write one without a filter.")
    return share


def _scaled(factors: Mapping[str, Factors], shares: Mapping[str, float]) -> dict[str, Factors]:
    return {name: replace(part, up=part.up * shares[name]) for name, part in factors.items()}
