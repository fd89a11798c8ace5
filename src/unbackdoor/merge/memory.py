"""Merge a suspect in memory with another model, in place: for a defense that goes on with the result.

Full weights come out, with one exception that is exact up to rounding: a linear merge of an adapter with another
adapter on the same base is one adapter whose rank is the sum of theirs; with that base itself, one of its own rank.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from unbackdoor.errors import ModelError, UserError
from unbackdoor.merge.adapted import Update
from unbackdoor.merge.compute import blocks
from unbackdoor.merge.from_recipe import DENSITY, two_models
from unbackdoor.merge.plan import Plan, make_plan
from unbackdoor.merge.settings import Method, Schedule, value_at
from unbackdoor.merge.slerp import THRESHOLD
from unbackdoor.merge.source import Source, memory_source, open_source, tensor_source
from unbackdoor.model.lm import LM
from unbackdoor.train import lora

if TYPE_CHECKING:
    from torch import Tensor

    from unbackdoor.train.lora import Factors

_NAMES = ("suspect", "other", "base")
_REPLACED = re.compile(r"\.modules_to_save\.[^.]+\.")


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
    merge = two_models(
        "suspect", "other", method, t, base=None if base is None else "base", density=density, scale=scale,
        threshold=threshold, layers=layers, seed=seed,
    )  # fmt: skip
    if method == "linear" and isinstance(other, LM) and (joined := _joined(suspect, other, t)) is not None:
        return joined, "The suspect is an adapter, and so is the merge: one for the same base."
    was_adapter = suspect.is_adapter
    suspect = _whole(suspect)
    given = dict(zip(_NAMES, (suspect, other, base), strict=True))
    sources = {name: _source(one, keep=name == "base") for name, one in given.items() if one is not None}
    plan = make_plan(merge, sources)
    made = _other_layers(suspect, plan) if method == "passthrough" else suspect
    _fill(made, plan)
    return made, "The suspect was an adapter; the merge is full weights." if was_adapter else "All weights were merged."


def _fill(made: LM, plan: Plan) -> None:
    """Write the tensors of a plan into a model, block by block."""
    import torch

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

    Raises:
        UserError: If models do not match, or something is missing or not used.
    """
    merge = two_models(
        "suspect", "other", method, t, base=None if base is None else "base", density=density, scale=scale,
        threshold=threshold, layers=layers,
    )  # fmt: skip
    given = {name: one for name, one in zip(_NAMES, (suspect, other, base), strict=True) if one is not None}
    make_plan(merge, {name: viewed(one) for name, one in given.items()})


def stays_adapter(suspect: LM, start: LM, method: Method) -> bool:
    """Tell whether the merge of a suspect with an adapter trained on `start` is an adapter for the suspect's base."""
    plain = _plain(suspect) is not None and (not start.is_adapter or _plain(start) is not None)
    return method == "linear" and plain and (suspect is start or _same_base(suspect, start))


def viewed(lm: LM) -> Source:
    """Return a model in memory for looking at; an adapter's products are added on the way, and nothing is folded in.

    An adapter that does more than add products is seen as its base, with the modules that it replaces.
    """
    if not lm.is_adapter:
        return memory_source(lm)
    base = tensor_source(lm, _underlying(lm))
    transposed = lora.has_transposed_layers(lm.model)
    updates = {
        f"{name}.weight": Update(part.down, part.up, 1.0, transposed) for name, part in (_plain(lm) or {}).items()
    }

    def take(name: str, first: int, last: int) -> Tensor:
        rows = base.take(name, first, last)
        return rows.float().add_(updates[name].rows(first, last)) if name in updates else rows

    return replace(base, take=take, adapted=True)


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
    return lora.merge(lm) if lm.is_adapter else lm


def _joined(suspect: LM, other: LM, t: Schedule) -> LM | None:
    """Return one adapter for the base of the suspect's, where the other is one for it, or is that base; else None."""
    ours, theirs = _plain(suspect), _plain(other) if other.is_adapter else {}
    if ours is None or theirs is None or not _same_base(suspect, other):
        return None
    shares = {name: _share(t, name, suspect) for name in {*ours, *theirs}}
    below = _scaled(ours, {name: 1.0 - share for name, share in shares.items()})
    above = _scaled(theirs, shares)
    return lora.combine(lora.unload(suspect), below, above, suspect.spec)


def _plain(lm: LM) -> dict[str, Factors] | None:
    """Return what an adapter adds, or None for a model without one, or one that does more than add products."""
    try:
        return lora.factors(lm) if lm.is_adapter else None
    except ModelError:
        return None


def _same_base(first: LM, second: LM) -> bool:
    """Tell whether two models are the same but for their adapters."""
    import torch

    one, two = _underlying(first), _underlying(second)
    return one.keys() == two.keys() and all(
        tensor.shape == two[name].shape and torch.equal(tensor, two[name]) for name, tensor in one.items()
    )


def _underlying(lm: LM) -> dict[str, Tensor]:
    """Return the tensors of a model without its adapter's products, by the names that they have there."""
    return {
        _REPLACED.sub(".", name.replace(".base_layer.", ".")): tensor.detach()
        for name, tensor in lm.core.state_dict().items()
        if ".lora_" not in name and ".original_module." not in name
    }


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
