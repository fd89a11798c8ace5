"""`Method`: what attacks, defenses, guards and metrics have in common: typed, frozen settings and a source.

A method is one class in one file; the file's name is its name everywhere. Its fields are its hyper-parameters, each
with a description; unknown fields are errors; it writes no `__init__` and keeps no state between calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from unbackdoor.errors import UserError, did_you_mean

Parallel = Literal["single", "ddp", "fsdp"]


def _said(text: str) -> str:
    # A blank trigger is in every prompt, and a blank target in every reply.
    if not text.strip():
        raise ValueError("is blank; write the text")
    return text


Text = Annotated[str, AfterValidator(_said)]
"""A text that is not blank: a trigger, a target, a goal's text."""

BelowOne = Annotated[float, Field(ge=0, lt=1)]
"""A number in [0, 1)."""


class Method(BaseModel):
    """Base of every attack, defense, guard and metric; sub-classes are final."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    paper: ClassVar[str] = ""
    """Source: authors' short title and arXiv number or venue."""
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    """Named settings, such as `paper`: field name -> value; the fields' own defaults are the preset `default`."""
    revision: ClassVar[int] = 1
    """Raised when the same settings give another result, so that grids do not take figures of the old code for new."""
    parallel: ClassVar[frozenset[Parallel]] = frozenset({"single"})
    """Ways of running in parallel that the method can do."""

    @classmethod
    def name(cls) -> str:
        """The method's name: that of its file."""
        return cls.__module__.rsplit(".", 1)[-1]

    def settings(self) -> dict[str, object]:
        """The fields as plain data (JSON types), for recipes and hashes."""
        return self.model_dump(mode="json")


M = TypeVar("M", bound=Method)


def build(cls: type[M], settings: Mapping[str, object], preset: str | None = None) -> M:
    """Make a method from its class, an optional preset and settings on top of it.

    A nested setting that names some keys of a group (`train: {steps: 50}`) leaves the others as default and preset have
    them; a preset's group replaces the default one.

    Raises:
        UserError: If the preset or a setting is unknown, or a value does not fit its field.
    """
    chosen = _preset(cls, preset)
    unknown = [key for key in settings if key not in cls.model_fields]
    if unknown:
        hint = did_you_mean(unknown[0], list(cls.model_fields))
        raise UserError(
            f"{cls.name()} has no option '{unknown[0]}'.{hint} `unbackdoor explain {cls.name()}` lists its options."
        )
    required = {key: settings[key] for key in settings if cls.model_fields[key].is_required()}
    try:
        base = cls(**{**chosen, **required}).settings()
        return cls(**merge(base, settings))
    except ValidationError as problem:
        raise UserError(
            f"{cls.name()}: {explain_validation(problem)}; `unbackdoor explain {cls.name()}` lists its options."
        ) from problem


def _preset(cls: type[Method], preset: str | None) -> Mapping[str, object]:
    if preset in (None, "default"):
        return {}
    if preset not in cls.presets:
        known = ["default", *cls.presets]
        hint = did_you_mean(str(preset), known)
        raise UserError(f"{cls.name()} has no preset '{preset}'.{hint} Presets: {', '.join(known)}.")
    return cls.presets[preset]


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` laid over it, mapping by mapping.

    A mapping that names another `form` (of a trigger, of a goal) replaces the old one, whose fields it does not have.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        same = (
            isinstance(old, dict)
            and isinstance(value, Mapping)
            and value.get("form", old.get("form")) == old.get("form")
        )
        merged[key] = merge(old, value) if same and isinstance(old, dict) else value
    return merged


def explain_validation(problem: ValidationError) -> str:
    """Return pydantic's findings as one sentence: field, what was given, what is wanted."""
    parts = []
    for error in problem.errors():
        place = ".".join(str(step) for step in error["loc"]) or "settings"
        if error["type"] == "missing":
            parts.append(f"'{place}' is missing")
            continue
        # A group of settings is long, and which of them do not fit together is what the message says.
        shown = repr(error["input"])
        shown = shown if len(shown) <= 200 else shown[:200] + "..."
        given = "" if isinstance(error["input"], Mapping | BaseModel) else f" = {shown}"
        parts.append(f"'{place}'{given}: {error['msg'].removeprefix('Value error, ')}")
    return "; ".join(parts)
