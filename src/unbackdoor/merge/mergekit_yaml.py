"""A merge from YAML in mergekit's schema, for the methods that are here; what is not supported is refused, not ignored.

Supported: merge_method, base_model, models or slices with layer_range, parameters (numbers, lists over depth, filters
by parts of tensor names) at all three levels, dtype or out_dtype, tokenizer_source `base` or the name of a model whose
tokenizer it is. Models are specs as everywhere here (folder, hub id, base+adapter). What differs in meaning: `dtype` is
the type of the result alone, arithmetic is always float32; without it the result has the types of the suspect, which is
the base_model of a SLERP, else the first model that is not the base.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from unbackdoor.data.files import decoded
from unbackdoor.data.strict_yaml import YamlMistake, load_yaml
from unbackdoor.errors import UserError, did_you_mean
from unbackdoor.merge.settings import (
    METHODS,
    NEEDS_BASE,
    Input,
    Merge,
    Method,
    Parameters,
    Schedule,
    Slice,
    check_ranges,
)
from unbackdoor.model.quarantine import printable

_TOP = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source")
_REFUSED = {
    "modules": "models of several modules are not merged here",
    "tokenizer": "tokenizers are copied, not built; use tokenizer_source",
    "chat_template": "the chat template is the suspect's",
}
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_WITH_BASE = ("weight", "density", "lambda", "normalize", "rescale", "int8_mask")
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "linear": ("weight", "normalize"),
    "slerp": ("t",),
    "passthrough": ("scale",),
    **{method: _WITH_BASE for method in NEEDS_BASE},
}
_BOOLEANS = ("normalize", "rescale", "int8_mask")
_OF_INPUT = ("weight", "density", "scale")
"""Parameters that a single model may have."""


def read_merge(path: Path, *, seed: int = 0) -> Merge:
    """Return the merge that a YAML file describes.

    Args:
        path: The file.
        seed: For DARE.

    Raises:
        UserError: If it is not YAML, or a field is unknown, wrong or not supported; the message names file and field.
    """
    try:
        content = load_yaml(decoded(path))
    except YamlMistake as problem:
        line = f", line {problem.line}" if problem.line is not None else ""
        raise UserError(f"{path}{line}: is not YAML ({printable(problem.what)}); mend it.") from problem
    return _Reader(str(path)).merge(content, seed)


class _Reader:
    """Reads one file; every mistake is told with its place."""

    def __init__(self, place: str) -> None:
        """Read the file of this name."""
        self.place = place

    def wrong(self, field: str, what: str) -> UserError:
        """Return the error of a field."""
        return UserError(f"{self.place}, {field}: {what}")

    def merge(self, content: object, seed: int) -> Merge:
        """Return the merge of a whole file."""
        fields = self.fields(content, "file", _TOP, _REFUSED)
        method = self.method(fields.get("merge_method"))
        base = self.optional_text(fields, "base_model")
        allowed = _PARAMETERS[method]
        parameters = self.parameters(fields, "parameters", allowed, method)
        if ("models" in fields) == ("slices" in fields):
            raise self.wrong("models", "write either models or slices.")
        if "models" in fields:
            inputs = self.each(fields["models"], "models", lambda item, at: self.input(item, at, method, ranged=False))
            if method == "passthrough" and len(inputs) != 1:
                raise self.wrong("models", "passthrough takes layers of several models in slices with a layer_range.")
            known = {one.model for one in inputs}
            if method == "slerp" and base is not None and base not in known and len(inputs) == 1:
                inputs = (Input(base), *inputs)
            slices: tuple[Slice, ...] = (Slice(inputs),)
        else:
            slices = self.each(fields["slices"], "slices", lambda item, at: self.slice(item, at, method))
        if method in {"linear", "passthrough"} and base is not None and not self.uses(base, slices):
            raise self.wrong("base_model", f"{method} has no base; leave it out.")
        if method in NEEDS_BASE and base is None and any(part.base is None for part in slices):
            raise self.wrong("base_model", f"{method} needs one, the model that all others were trained from.")
        if method == "slerp" and base is None and any(part.base is None for part in slices):
            raise self.wrong("base_model", "slerp needs one, the model at t = 0.")
        suspect = self.suspect(method, base, slices)
        return Merge(
            method, slices, suspect, base=base if method in {"slerp", *NEEDS_BASE} else None, parameters=parameters,
            dtype=self.dtype(fields), tokenizer=self.tokenizer(fields, base, suspect, slices), seed=seed,
        )  # fmt: skip

    @staticmethod
    def uses(model: str, slices: Sequence[Slice]) -> bool:
        """Tell whether a model is in a slice."""
        return any(one.model == model for part in slices for one in part.inputs)

    def suspect(self, method: Method, base: str | None, slices: Sequence[Slice]) -> str:
        """Return the model that the result is like."""
        inputs = [one.model for part in slices for one in part.inputs]
        # As in mergekit, a base that is one of the models gives configuration and tokenizer.
        if method not in NEEDS_BASE and base is not None:
            return base
        others = [model for model in inputs if model != base] if method in NEEDS_BASE else inputs
        if not others:
            raise self.wrong("models", "there is none but the base; name one that differs from it.")
        return others[0]

    def fields(
        self, content: object, field: str, known: Sequence[str], refused: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Return a mapping of known fields."""
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise self.wrong(field, f"must hold named fields ({', '.join(known)}).")
        for key in content:
            if key in (refused or {}):
                raise self.wrong(key, f"is not supported: {(refused or {})[key]}.")
            if key not in known:
                hint = did_you_mean(key, list(known))
                raise self.wrong(printable(key), f"there is no such field in {field}.{hint} Known: {', '.join(known)}.")
        return content

    def each(self, content: object, field: str, read: Callable[[object, str], Any]) -> tuple[Any, ...]:
        """Return what every item of a list says."""
        if not isinstance(content, list) or not content:
            raise self.wrong(field, "must be a list of one item at least.")
        return tuple(read(item, f"{field}[{number}]") for number, item in enumerate(content))

    def input(self, item: object, field: str, method: Method, *, ranged: bool) -> Input:
        """Return one model."""
        known = ("model", "layer_range", "parameters") if ranged else ("model", "parameters")
        fields = self.fields(item, field, known)
        if not isinstance(fields.get("model"), str) or not fields["model"]:
            what = "must be a text" if fields.get("model") else "is missing"
            raise self.wrong(f"{field}.model", f"{what}; write a folder, a hub id or BASE+ADAPTER.")
        allowed = tuple(name for name in _PARAMETERS[method] if name in _OF_INPUT)
        found = self.parameters(fields, f"{field}.parameters", allowed, method)
        return Input(fields["model"], self.range(fields, field) if ranged else None, found)

    def range(self, fields: Mapping[str, Any], field: str) -> tuple[int, int]:
        """Return the layers of an input."""
        found = fields.get("layer_range")
        if not isinstance(found, list) or len(found) != 2 or not all(type(item) is int for item in found):
            raise self.wrong(f"{field}.layer_range", "write two whole numbers, such as [0, 12] (its end is excluded).")
        return found[0], found[1]

    def slice(self, item: object, field: str, method: Method) -> Slice:
        """Return one slice."""
        refused = {"residual_weight": "it is in none of these methods"}
        fields = self.fields(item, field, ("sources", "base_model", "parameters"), refused)
        at = f"{field}.sources"
        inputs = self.each(fields.get("sources"), at, lambda one, place: self.input(one, place, method, ranged=True))
        if method == "passthrough" and len(inputs) != 1:
            raise self.wrong(at, "passthrough takes one model for each slice.")
        base = self.optional_text(fields, "base_model", field)
        if base is not None and method not in {"slerp", *NEEDS_BASE}:
            raise self.wrong(f"{field}.base_model", f"{method} has no base; leave it out.")
        found = self.parameters(fields, f"{field}.parameters", _PARAMETERS[method], method)
        return Slice(inputs, found, base)

    def method(self, named: object) -> Method:
        """Return the method."""
        for method in METHODS:
            if named == method:
                return method
        hint = did_you_mean(named, list(METHODS)) if isinstance(named, str) else ""
        raise self.wrong(
            "merge_method", f"'{printable(str(named))}' is not here.{hint} There are {', '.join(METHODS)}."
        )

    def optional_text(self, fields: Mapping[str, Any], key: str, field: str = "") -> str | None:
        """Return a text, None where it is not there."""
        value = fields.get(key)
        if value is not None and (not isinstance(value, str) or not value):
            raise self.wrong(f"{field}.{key}".lstrip("."), "must be a text.")
        return value

    def dtype(self, fields: Mapping[str, Any]) -> str | None:
        """Return the type of the result."""
        named = fields.get("out_dtype") or fields.get("dtype")
        if named is None:
            return None
        if isinstance(named, str) and named in _DTYPES:
            return _DTYPES[named]
        field = "out_dtype" if fields.get("out_dtype") else "dtype"
        raise self.wrong(field, f"'{printable(str(named))}' is not supported; write one of {', '.join(_DTYPES)}.")

    def tokenizer(
        self, fields: Mapping[str, Any], base: str | None, suspect: str, slices: Sequence[Slice]
    ) -> str | None:
        """Return the model whose tokenizer is copied, None for the suspect."""
        named = fields.get("tokenizer_source")
        named = base if named == "base" and base is not None else named
        if named is None or named == suspect:
            return None
        if isinstance(named, str) and (named == base or self.uses(named, slices)):
            return named
        raise self.wrong(
            "tokenizer_source",
            f"'{printable(str(named))}' is not supported; leave it out for the tokenizer of '{printable(suspect)}'"
            + (", or write base." if base is not None else "."),
        )

    def parameters(self, fields: Mapping[str, Any], field: str, allowed: Sequence[str], method: Method) -> Parameters:
        """Return the parameters of one level."""
        content = fields.get("parameters")
        if content is None:
            return {}
        found: dict[str, Schedule] = {}
        rescales = method.startswith("dare")
        for key, value in self.fields(content, field, allowed).items():
            if key in _BOOLEANS:
                if not isinstance(value, bool):
                    raise self.wrong(f"{field}.{key}", "write true or false.")
                if key == "rescale" and value != rescales:
                    said = "dare always rescales" if rescales else "only dare rescales"
                    raise self.wrong(f"{field}.rescale", f"{said}, by 1 / density; leave it out.")
                if key == "normalize":
                    found[key] = float(value)
                continue  # int8_mask saves memory in mergekit and changes no result
            found[key] = self.schedule(value, f"{field}.{key}")
        check_ranges(found, f"{self.place}, {field}.")
        return found

    def schedule(self, value: object, field: str) -> Schedule:
        """Return a number, numbers over depth, or such with filters."""
        try:
            made: Schedule = _SCHEDULE.validate_python(_tuples(value))
        except ValidationError as problem:
            first = problem.errors()[0]["msg"].removeprefix("Value error, ")
            raise self.wrong(
                field, f"write a number, a list of numbers, or a list of filter and value ({first})."
            ) from problem
        return made


_SCHEDULE: TypeAdapter[Schedule] = TypeAdapter(Schedule)
_POWER = re.compile(r"[+-]?\d+\.?\d*[eE][+-]?\d+")
"""A number that is a text in YAML 1.1, where an exponent needs a point before it and a sign."""


def _tuples(value: object) -> object:
    """Return lists as tuples, and refuse what pydantic would make numbers of."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) if key == "value" else item for key, item in value.items()}
    if isinstance(value, str) and _POWER.fullmatch(value):
        return float(value)
    if isinstance(value, bool | str):
        return {"no number": value}
    return value
