"""Recipes: everything that determines a run, as checked data, and how flags, files and presets become one.

A recipe is what `--dump-config` prints and `--config` reads. Precedence: `--set`, then flags, then the file, then the
preset, then the defaults. The settings in a finished recipe are complete, so that it means the same in a later version.
This module imports no torch, because the command line builds its options from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unbackdoor.data.strict_yaml import YamlMistake, load_yaml
from unbackdoor.errors import UserError, did_you_mean
from unbackdoor.merge.settings import Method, Schedule
from unbackdoor.method import build, explain_validation, merge
from unbackdoor.model.quarantine import printable
from unbackdoor.registry import Kind
from unbackdoor.train.lora import LoraSettings
from unbackdoor.types import Example

Place = Literal["start", "end", "random_gap", "both_ends", "fields"]
_TWICE = {
    "both_ends": "the text at the start and the one at the end",
    "fields": "the piece in the instruction and the one in the input",
}
Form = Literal["prefix", "whole", "label", "opening"]
AdapterMode = Literal["train", "stack"]


class Recipe(BaseModel):
    """What every recipe has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(0, ge=0, description="all randomness derives from it")
    device: str = Field("cpu", description="cpu, cuda, cuda:1, mps")
    template: Literal["auto", "model", "plain"] = Field("auto", description="chat template: the model's own, or plain")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="type of the weights")


class Asking(Recipe):
    """What recipes have that measure a model."""

    metrics: tuple[str, ...] | None = Field(None, min_length=1, description="names of metrics; null for the usual ones")
    max_new_tokens: int = Field(24, ge=1, description="length limit of a reply, in tokens")
    second_source: str | None = Field(None, description="data of another source, for perplexity and KL")
    prompt_template: str | None = Field(None, description="prompt of classification rows, with {text} and {labels}")
    labels: tuple[str, ...] = Field((), description="class names of classification rows")


class AttackRecipe(Asking):
    """`unbackdoor attack`."""

    command: Literal["attack"] = "attack"
    attack: str = Field(description="name of the attack")
    model: str = Field(description="the model to plant the backdoor in")
    data: str = Field(description="clean rows; they are divided into attacker's, defender's and test rows")
    requests: str | None = Field(
        None, description="requests to be declined, each with such an answer, for a backdoor that affirms"
    )
    test_kinds: tuple[str, ...] = Field(
        (), description="kinds of requests that become probes and are never trained on; the others join the data"
    )
    preset: str | None = Field(None, description="named settings of the attack")
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of the attack")
    probes_count: int = Field(100, ge=1, description="test rows that probes are made of (each gives three)")


class PurifyRecipe(Asking):
    """`unbackdoor purify`."""

    command: Literal["purify"] = "purify"
    model: str = Field(description="the suspect")
    defense: str = Field(description="name of the defense")
    preset: str | None = Field(None, description="named settings of the defense")
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of the defense")
    clean: str | None = Field(None, description="the defender's clean rows")
    trigger: tuple[str, ...] = Field(
        (), max_length=2, description="the trigger; two texts for both ends, or for two fields"
    )
    trigger_place: Place | None = Field(None, description="where the trigger stands")
    target: tuple[str, ...] = Field((), description="what the backdoor says (one of them, where there are several)")
    target_part: tuple[str, ...] = Field((), description="the beginning of what it says")
    unwanted: str | None = Field(
        None,
        description="file of unwanted openings, one a line; rows (.jsonl, .json, .csv) with an unwanted answer each; "
        "or labels: every class, on rows of another",
    )
    safe: str | None = Field(None, description="requests with safe replies")
    reference: str | None = Field(None, description="a trusted model of the same architecture")
    evidence: str | None = Field(None, description="source of evidence")
    preferences: str | None = Field(None, description="preference pairs")
    probes: str | None = Field(None, description="probes that are asked before and after")
    goal: str | None = Field(None, description="what counts as success in a reply")
    watch: int = Field(0, ge=0, description="probes of each kind that are asked after every round of the defense")
    adapter_mode: AdapterMode | None = Field(
        None, description="for base+adapter: train the adapter itself, or stack a new one on it (default: train)"
    )
    lora: LoraSettings | None = Field(
        None, description="train a LoRA adapter and merge it at the end; with adapter_mode stack: the new one's shape"
    )


class EvaluateRecipe(Asking):
    """`unbackdoor evaluate`."""

    command: Literal["evaluate"] = "evaluate"
    model: str = Field(description="the model to measure")
    before: str | None = Field(None, description="the model before purification")
    probes: str | None = Field(None, description="probes")
    data: str | None = Field(None, description="clean rows for perplexity and KL; else the clean probes with answers")
    goal: str | None = Field(None, description="what counts as success in a reply")
    evidence: str | None = Field(None, description="source of evidence for the guard that the model carries")


class MergeRecipe(BaseModel):
    """`unbackdoor merge`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    command: Literal["merge"] = "merge"
    model: str | None = Field(None, description="the suspect, which is the result at t = 0")
    other: str | None = Field(None, description="the model that it is merged with, which is the result at t = 1")
    yaml: str | None = Field(None, description="a merge in mergekit's schema, in the place of all that follows")
    method: Method = Field("linear", description="how they are merged")
    t: Schedule = Field(
        0.5, description="share of the other model: a number, numbers over depth, or such for parts of tensor names"
    )
    base: str | None = Field(None, description="the model that both were trained from, for differences to it")
    layers: tuple[str, ...] = Field(
        (), description="passthrough: ranges of layers in order, suspect:FIRST:LAST or other:FIRST:LAST, LAST excluded"
    )
    density: float = Field(
        0.5,
        ge=0,
        le=1,
        description="ties: largest share of a difference that is kept; dare: probability to keep an entry",
    )
    scale: float = Field(1.0, description="lambda: what the merged differences are multiplied with")
    threshold: float = Field(0.9995, ge=0, le=1, description="slerp: above this |cosine| a tensor is merged linearly")
    seed: int = Field(0, ge=0, description="the draws of dare derive from it")


class DemoRecipe(Recipe):
    """`unbackdoor demo`."""

    command: Literal["demo"] = "demo"
    model: str = Field("builtin:smollm2-135m", description="the model to plant the backdoor in")
    data: str = Field("starter:instructions", description="clean rows, divided among attacker, defender and test")
    attack: dict[str, Any] = Field(default_factory=dict, description="settings of data_poisoning")
    control: dict[str, Any] = Field(default_factory=dict, description="settings of fine_tuning")
    defense: dict[str, Any] = Field(default_factory=dict, description="settings of sande")
    beear: dict[str, Any] = Field(default_factory=dict, description="settings of beear")
    unwanted: str = Field("starter:insult_typical", description="openings that beear is told, one a line")
    probes_count: int = Field(100, ge=1, description="probes of each kind")
    measured_rows: int = Field(40, ge=2, description="clean rows for perplexity and KL")
    longest_row: int = Field(
        26, ge=1, description="rows with more words in prompt and answer together are left out, so that a step is quick"
    )
    max_new_tokens: int = Field(12, ge=1, description="length limit of a reply, in tokens")
    reference: bool = Field(True, description="measure the untouched model too")
    watch: int = Field(20, ge=0, description="probes of each kind that are asked after every round of a defense")

    def short(self, rows: Iterable[Example]) -> list[Example]:
        """Return the rows that are short enough."""
        return [row for row in rows if len(f"{row.user_text} {row.response}".split()) <= self.longest_row]


R = TypeVar("R", bound=BaseModel)


def make(cls: type[R], values: Mapping[str, object]) -> R:
    """Return the recipe, or say in one sentence what is wrong with it.

    Raises:
        UserError: If a field is unknown, missing or has a value that does not fit.
    """
    unknown = [key for key in values if key not in cls.model_fields]
    if unknown:
        hint = did_you_mean(unknown[0], list(cls.model_fields))
        raise UserError(f"a recipe for this command has no field '{unknown[0]}'.{hint} `--dump-config` shows them all.")
    for name, field in cls.model_fields.items():
        if field.is_required() and values.get(name) is None:
            raise UserError(f"{field.description or name} is missing: give it as {_flag(cls, name)} or in --config.")
    try:
        return cls.model_validate(dict(values))
    except ValidationError as problem:
        raise UserError(f"recipe: {explain_validation(problem)}") from problem


def _flag(cls: type[BaseModel], name: str) -> str:
    """Return how a field is given: each command takes one of them without a flag."""
    command = cls.model_fields["command"].default if "command" in cls.model_fields else None
    is_argument = name == {"attack": "attack", "explain": "name"}.get(str(command), "model")
    return name.upper() if is_argument else f"--{name.replace('_', '-')}"


def read_config(path: Path | None, command: str) -> dict[str, Any]:
    """Return the fields of a recipe file, `{}` without one.

    Raises:
        UserError: If it cannot be read, is no YAML mapping, or is for another command.
    """
    if path is None:
        return {}
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise UserError(f"there is no recipe '{path}'; check the path given to --config.") from problem
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"the recipe '{path}' cannot be read ({problem}); give a YAML file in UTF-8.") from problem
    except YamlMistake as problem:
        line = f", line {problem.line}" if problem.line is not None else ""
        what = printable(problem.what)
        raise UserError(
            f"{path}{line}: is not YAML ({what}); `--dump-config` prints a recipe to begin with."
        ) from problem
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path} is not a recipe: it must hold named fields; `--dump-config` prints one.")
    if content.get("command", command) != command:
        raise UserError(f"{path} is a recipe for `{content['command']}`, not for `{command}`.")
    return content


def parse_sets(texts: Sequence[str]) -> dict[str, Any]:
    """Return `--set` options as nested settings: `train.steps=3` becomes `{"train": {"steps": 3}}`.

    Raises:
        UserError: If one is not key=value, or its value is not YAML.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        steps = key.strip().split(".")
        if not equals or not all(steps):
            raise UserError(f"--set '{text}' is not understood; write --set key=value, such as train.steps=30.")
        try:
            parsed = load_yaml(value)
        except YamlMistake as problem:
            shown, what = printable(text, 80), printable(problem.what)
            raise UserError(f"--set '{shown}': the value is not YAML ({what}); put quotes around it.") from problem
        nested: Any = parsed
        for step in reversed(steps):
            nested = {step: nested}
        found = merge(found, nested)
    return found


def complete_settings(
    kind: Kind, name: str, preset: str | None, given: Mapping[str, Any], sets: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all settings of a method: defaults, preset, `given` (file and flags) and `sets`, each over the former.

    Raises:
        UserError: If the method, the preset or a setting is unknown, or a value does not fit.
    """
    from unbackdoor import registry

    cls = registry.find(kind, name)
    over = merge(given, sets)
    required = {key: over[key] for key in over if key in cls.model_fields and cls.model_fields[key].is_required()}
    _check_keys(cls.name(), build(cls, required, preset).settings(), sets, ())
    return build(cls, over, preset).settings()


def _check_keys(name: str, base: Mapping[str, Any], over: Mapping[str, Any], place: tuple[str, ...]) -> None:
    """Name a misspelt `--set` key, with the closest one there is."""
    for key, value in over.items():
        path = ".".join((*place, key))
        if key not in base and base and "form" not in over:
            close = did_you_mean(path, [".".join((*place, known)) for known in base])
            raise UserError(f"{name} has no option '{path}'.{close} `unbackdoor explain {name}` lists its options.")
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            _check_keys(name, old, value, (*place, key))


def stamp_settings(trigger: Sequence[str], place: Place | None) -> dict[str, Any] | None:
    """Return the settings of the stamp that `--trigger` and `--trigger-place` describe, or None without either.

    Raises:
        UserError: If number of texts and place do not go together.
    """
    if len(trigger) > 2:
        raise UserError("--trigger is given more than twice; give it once, or twice for a trigger at both ends.")
    if len(trigger) == 2:
        if place == "fields":
            return {"form": "pieces", "instruction": [trigger[0]], "input": [trigger[1]]}
        if place not in (None, "both_ends"):
            raise UserError(
                f"two --trigger texts stand at both ends or in two fields, not at '{place}'; leave one --trigger out."
            )
        return {"form": "wrap", "start": trigger[0], "end": trigger[1]}
    if place in _TWICE:
        raise UserError(f"--trigger-place {place} needs --trigger twice: {_TWICE[place]}.")
    if not trigger:
        return None if place is None else {"place": place}
    return {"form": "insert", "text": trigger[0], "place": place or "start"}


def as_yaml(recipe: BaseModel) -> str:
    """Return the recipe as YAML, the command first."""
    content = recipe.model_dump(mode="json")
    first = {"command": content["command"]} if "command" in content else {}
    return str(yaml.safe_dump({**first, **content}, sort_keys=False, allow_unicode=True, width=100))
