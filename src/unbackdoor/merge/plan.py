"""What a merge comes to, before a tensor is read: for each tensor of the result its parts and numbers, and its file.

Whole models are checked against the suspect here; with ranges of layers, every tensor that is taken is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from unbackdoor.errors import ModelError, UserError
from unbackdoor.merge import linear
from unbackdoor.merge.layers import Layers, layers_of, stands_before
from unbackdoor.merge.match import (
    aligned,
    check_head,
    check_models,
    check_names,
    check_shapes,
    embedding_of,
    without_lone_buffers,
)
from unbackdoor.merge.passthrough import resized
from unbackdoor.merge.settings import NEEDS_BASE, Input, Merge, Method, Slice, value_at
from unbackdoor.merge.source import FLOATS, Info, Source, is_head
from unbackdoor.model.quarantine import printable

_DEFAULTS = {"density": 1.0, "lambda": 1.0, "threshold": 0.9995, "scale": 1.0}
_NORMALIZES = frozenset({"linear", "ties"})
"""Methods that divide by the weights unless told otherwise, as in mergekit."""


@dataclass(frozen=True)
class Part:
    """One model's share of a tensor.

    Attributes:
        source: The model.
        name: The tensor's name there.
        weight: Weight, or scale of a tensor that is passed through.
        density: Share of the difference to the base that is kept.
    """

    source: Source
    name: str
    weight: float = 1.0
    density: float = 1.0


@dataclass(frozen=True)
class Piece:
    """One tensor of the result.

    Attributes:
        name: Its name.
        info: Its dtype and shape.
        method: How it is made; "copy" for what is no floating-point number.
        parts: What it is made of.
        base: The base of differences.
        t: For SLERP.
        threshold: For SLERP.
        scale: lambda.
        normalize: Whether to divide by the weights.
        seed: For DARE.
    """

    name: str
    info: Info
    method: Method | str
    parts: tuple[Part, ...]
    base: Part | None = None
    t: float = 0.0
    threshold: float = 0.9995
    scale: float = 1.0
    normalize: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """A whole merge.

    Attributes:
        pieces: In the order of the suspect's files.
        config: A new config.json, or None where the suspect's fits.
        sources: Spec -> source, names aligned with the suspect's.
    """

    pieces: tuple[Piece, ...]
    config: dict[str, Any] | None
    sources: Mapping[str, Source]


def make_plan(merge: Merge, sources: Mapping[str, Source]) -> Plan:
    """Return the plan of a merge.

    Args:
        merge: The merge.
        sources: Spec -> source of every model in it.

    Raises:
        UserError: If models do not match, a range or a number is not there.
    """
    suspect = sources[merge.suspect]
    for source in sources.values():
        check_head(source)
    sources = {spec: one if one is suspect else aligned(one, suspect) for spec, one in sources.items()}
    sources = without_lone_buffers(sources)
    suspect = sources[merge.suspect]
    whole = all(one.layers is None for part in merge.slices for one in part.inputs)
    if whole:
        for spec in merge.models:
            check_models(suspect, sources[spec])
    maker = _Maker(merge, sources, layers_of(suspect.infos, suspect.shown))
    pieces = maker.outside() | maker.inside()
    picks = maker.picks
    ordered = [pieces.pop(name) for name in suspect.infos if name in pieces]
    kept = whole or picks == [(suspect.config, index) for index in range(maker.layers.count)]
    config = None if kept else resized(suspect.config, picks, suspect.shown)
    return Plan((*ordered, *pieces.values()), config, sources)


@dataclass(frozen=True)
class _Maker:
    merge: Merge
    sources: Mapping[str, Source]
    layers: Layers

    @property
    def suspect(self) -> Source:
        return self.sources[self.merge.suspect]

    @property
    def picks(self) -> list[tuple[Mapping[str, Any], int]]:
        """For each layer of the result, of which model and number it is; of several models in a slice, the first."""
        return [
            (self.sources[part.inputs[0].model].config, index)
            for part in self.merge.slices
            for index in range(*self._range(part.inputs[0]))
        ]

    def outside(self) -> dict[str, Piece]:
        """Return what is outside the layers."""
        made = {}
        for name in self.suspect.infos:
            if self.layers.index(name) is not None:
                continue
            part = self.merge.slices[0 if stands_before(self._like(name)) else -1]
            made[name] = self._piece(name, part, [self._like(name)] * len(part.inputs), 0.0)
        return made

    def _like(self, name: str) -> str:
        """Return the tensor that another is the same as: the embedding, for the stored head of a model that ties it."""
        if is_head(name) and self.suspect.ties_head and (embedding := embedding_of(self.suspect)) is not None:
            return embedding
        return name

    def inside(self) -> dict[str, Piece]:
        """Return the layers."""
        made: dict[str, Piece] = {}
        number = 0
        for part in self.merge.slices:
            ranges = [self._range(one) for one in part.inputs]
            lengths = {last - first for first, last in ranges}
            if len(lengths) != 1:
                raise UserError(f"a slice takes {sorted(lengths)} layers of its models; take as many of each.")
            (length,) = lengths
            for step in range(length):
                depth = step / (length - 1) if length > 1 else 1.0
                for name in self._layer(part.inputs[0], ranges[0][0] + step):
                    names = [self.layers.moved(name, first + step) for first, _ in ranges]
                    new = self.layers.moved(name, number)
                    made[new] = self._piece(new, part, names, depth)
                number += 1
        return made

    def _range(self, one: Input) -> tuple[int, int]:
        count = layers_of(self.sources[one.model].infos, self.sources[one.model].shown).count
        first, last = one.layers or (0, count)
        if not 0 <= first < last <= count:
            raise UserError(
                f"the layers {first} to {last} are not in '{printable(one.model)}', which has {count}; write a range "
                f"within 0 to {count}, its end excluded."
            )
        return first, last

    def _layer(self, one: Input, index: int) -> list[str]:
        source = self.sources[one.model]
        names = [name for name in source.infos if self.layers.index(name) == index]
        if index < self.layers.count:
            alike = [name for name in self.suspect.infos if self.layers.index(name) == index]
            check_names(self.suspect, alike, source)
            check_names(source, names, self.suspect)
        return names

    def _piece(self, name: str, part: Slice, names: list[str], depth: float) -> Piece:
        like = self._like(name)
        parts = []
        for one, own in zip(part.inputs, names, strict=True):
            source = self.sources[one.model]
            check_names(self.suspect, [own], source)
            parts.append(Part(source, own))
        first = parts[0]
        shape = first.source.infos[first.name].shape
        if (there := self.suspect.infos.get(first.name)) is not None:
            check_shapes(self.suspect.shown, first.name, there.shape, first.source, first.name)
        for other in parts[1:]:
            check_shapes(first.source.shown, first.name, shape, other.source, other.name)
            _check_kinds(first, other)
        info = Info(self._dtype(name, first), shape)
        if first.source.infos[first.name].dtype not in FLOATS:
            return Piece(name, info, "copy", (first,))
        return self._numbers(Piece(name, info, self.merge.method, tuple(parts)), part, like, depth)

    def _dtype(self, name: str, part: Part) -> str:
        own = part.source.infos[part.name].dtype
        if own not in FLOATS:
            return own
        index = self.layers.index(name)
        there = name if index is None or index < self.layers.count else self.layers.moved(name, 0)
        like = self.suspect.infos.get(there)
        return self.merge.dtype or (like.dtype if like is not None else own)

    def _numbers(self, piece: Piece, part: Slice, like: str, depth: float) -> Piece:
        """Return the piece with the numbers that hold for it."""
        method = self.merge.method

        # As in mergekit a filter for a number of one model is compared with the name that a tensor has there, which
        # that of the result is not where layers are shifted.
        def number(key: str, one: Input | None = None, own: str = like) -> float:
            levels = ([one.parameters] if one is not None else []) + [part.parameters, self.merge.parameters]
            for level in levels:
                if key in level and (found := value_at(level[key], own, depth)) is not None:
                    return found
            if key in _DEFAULTS:
                return _DEFAULTS[key]
            if key == "normalize":
                return float(method in _NORMALIZES)
            of = f" of '{printable(one.model)}'" if one is not None else ""
            what = f"{key} (parameters.{key}{'; t, on the command line' if key == 'weight' else ''})"
            raise UserError(f"no {what}{of} is given for the tensor {printable(like)}; write one without a filter.")

        if method == "slerp":
            first, second = self._ordered(piece.parts, part)
            return replace(piece, parts=(first, second), t=number("t"), threshold=number("threshold"))
        if method == "passthrough":
            weights = [number("scale", one, own.name) for own, one in zip(piece.parts, part.inputs, strict=True)]
            return replace(piece, parts=(replace(piece.parts[0], weight=weights[0]),))
        base = self._base(part) if method in NEEDS_BASE else None
        chosen = [
            replace(
                own,
                weight=number("weight", one, own.name),
                density=number("density", one, own.name) if base is not None else 1.0,
            )
            for own, one in zip(piece.parts, part.inputs, strict=True)
            if base is None or one.model != base
        ]
        found = replace(piece, parts=tuple(chosen), normalize=bool(number("normalize")), seed=self.merge.seed)
        if base is None:
            linear.total(weights=[one.weight for one in chosen], normalize=found.normalize)
            return found
        own = next((p for p, one in zip(piece.parts, part.inputs, strict=True) if one.model == base), None)
        origin = own or Part(self.sources[base], piece.parts[0].name)
        check_names(self.suspect, [origin.name], origin.source)
        check_shapes(self.suspect.shown, piece.name, piece.info.shape, origin.source, origin.name)
        if not chosen:
            raise UserError("a slice names no model but the base; name one that differs from it.")
        return replace(found, base=origin, scale=number("lambda"))

    def _base(self, part: Slice) -> str:
        base = part.base or self.merge.base
        if base is None:
            raise UserError(f"{self.merge.method} needs a base, the model that all others were trained from.")
        return base

    def _ordered(self, parts: tuple[Part, ...], part: Slice) -> tuple[Part, Part]:
        """Return the two parts of a SLERP, that for t = 0 first."""
        if len(parts) != 2:
            raise UserError(f"slerp takes two models, and a slice names {len(parts)}; name two.")
        zero = part.base or self.merge.base or self.merge.suspect
        models = [one.model for one in part.inputs]
        if zero not in models:
            raise ModelError(f"'{printable(zero)}', the model at t = 0, is none of the two of a slice; name it there.")
        return parts if models[0] == zero else (parts[1], parts[0])


def _check_kinds(first: Part, other: Part) -> None:
    """Refuse numbers with a point beside integers, such as quantised weights without their scale.

    Raises:
        UserError: If the two tensors are of different kinds.
    """
    types = [part.source.infos[part.name].dtype for part in (first, other)]
    if (types[0] in FLOATS) != (types[1] in FLOATS):
        raise UserError(
            f"the tensor {printable(first.name)} is {types[0]} in '{first.source.shown}' and {types[1]} in "
            f"'{other.source.shown}'; merge models whose weights are stored alike."
        )
