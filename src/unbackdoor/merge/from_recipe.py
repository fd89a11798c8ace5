"""The merge of two models: suspect and other, one method, one t.

t is the other model's share, as in equation 9 of Information Conflicts: t * conflict + (1 - t) * suspect, so that t = 0
is the suspect and t = 1 the other, bit for bit. With task arithmetic, TIES and DARE, 1 - t and t weight the two
differences to the base; where these are trimmed or thinned (density below 1), the ends are not the models themselves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from unbackdoor.errors import UserError, did_you_mean
from unbackdoor.merge.settings import NEEDS_BASE, Filtered, Input, Merge, Method, Schedule, Slice, check_ranges
from unbackdoor.merge.slerp import THRESHOLD

DENSITY = 0.5
_THINNED = frozenset({"ties", "dare_linear", "dare_ties"})


def two_models(
    suspect: str | None,
    other: str | None,
    method: Method = "linear",
    t: Schedule = 0.5,
    *,
    base: str | None = None,
    layers: Sequence[str] = (),
    density: float = DENSITY,
    scale: float = 1.0,
    threshold: float = THRESHOLD,
    seed: int = 0,
) -> Merge:
    """Return the merge of two models.

    Args:
        suspect: Spec of the model at t = 0.
        other: Spec of the model at t = 1.
        method: How.
        t: The other's share.
        base: Spec of the model that both were trained from.
        layers: For passthrough: ranges such as "suspect:0:12", in order.
        density: For ties and dare.
        scale: lambda, for methods with a base.
        threshold: For slerp.
        seed: For dare.

    Raises:
        UserError: If something is missing, or is given that the method does not use.
    """
    if suspect is None or other is None:
        raise UserError("merge needs two models, the suspect and the other: unbackdoor merge A B, or a YAML file.")
    given = {
        "base": base is not None,
        "layers": bool(layers),
        "t": t != 0.5,
        "density": density != DENSITY,
        "scale": scale != 1.0,
        "threshold": threshold != THRESHOLD,
    }
    _refuse_unused(method, [name for name, is_given in given.items() if is_given])
    if method in NEEDS_BASE and base is None:
        raise UserError(f"{method} needs --base, the model that both were trained from.")
    check_ranges({"t": t}, "")
    if method == "passthrough":
        return Merge(method, _slices(layers, {"suspect": suspect, "other": other}), suspect)
    if suspect == other:
        raise UserError("both models are the same; name the one that the suspect is to be merged with.")
    if method == "slerp":
        both = Slice((Input(suspect), Input(other)))
        return Merge(method, (both,), suspect, parameters={"t": t, "threshold": threshold})
    both = Slice((Input(suspect, parameters={"weight": _rest(t)}), Input(other, parameters={"weight": t})))
    if method == "linear":
        return Merge(method, (both,), suspect, parameters={"normalize": 0.0})
    more: dict[str, Schedule] = {"lambda": scale}
    if method in _THINNED:
        more["density"] = density
    return Merge(method, (both,), suspect, base=base, parameters=more, seed=seed)


def _refuse_unused(method: Method, given: Sequence[str]) -> None:
    """Raise if the method does not use one of what was given."""
    used = {
        "base": method in NEEDS_BASE,
        "layers": method == "passthrough",
        "t": method != "passthrough",
        "density": method in _THINNED,
        "scale": method in NEEDS_BASE,
        "threshold": method == "slerp",
    }
    for name in given:
        if not used[name]:
            raise UserError(f"{method} does not use {name}; leave it out.")


def _rest(t: Schedule) -> Schedule:
    """Return 1 - t."""
    if isinstance(t, Filtered):
        value = _rest(t.value)
        assert not isinstance(value, Filtered)
        return t.model_copy(update={"value": value})
    if isinstance(t, tuple):
        return tuple(_rest(item) for item in t)  # type: ignore[return-value]
    return 1.0 - t


def _slices(ranges: Sequence[str], models: dict[str, str]) -> tuple[Slice, ...]:
    if not ranges:
        raise UserError(
            "passthrough needs the ranges of layers, in order, such as --layers suspect:0:12 --layers other:12:24 "
            "(ends excluded)."
        )
    found = []
    for text in ranges:
        parts = re.fullmatch(r"([^:]*):(\d{1,6}):(\d{1,6})", text)
        if parts is None:
            raise UserError(f"--layers '{text}' is not understood; write suspect:0:12 or other:12:24 (ends excluded).")
        if parts[1] not in models:
            hint = did_you_mean(parts[1], list(models))
            raise UserError(f"--layers '{text}': there is no '{parts[1]}'.{hint} Write suspect or other.")
        found.append(Slice((Input(models[parts[1]], (int(parts[2]), int(parts[3]))),)))
    return tuple(found)
