"""The pieces that every command and every grid cell is made of: plant, purify, revive, each from models in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from unbackdoor import registry
from unbackdoor.attacks.base import Attack
from unbackdoor.defenses.base import Defense, Need, knowledge_for
from unbackdoor.errors import NotApplicable, UserError
from unbackdoor.method import build
from unbackdoor.model.lm import LM
from unbackdoor.pipeline.guarding import with_guards
from unbackdoor.run import Run
from unbackdoor.secret import Secret
from unbackdoor.train import overwrite
from unbackdoor.train.engine import TrainSettings
from unbackdoor.types import Example, content_hash


def attack_called(name: str, settings: Mapping[str, object] | None = None, preset: str | None = None) -> Attack:
    """Return an attack by name.

    Raises:
        UserError: If the name, preset or a setting is unknown.
    """
    method = build(registry.find("attacks", name), settings or {}, preset)
    if not isinstance(method, Attack):
        raise UserError(f"'{name}' is not an attack.")
    return method


def defense_called(name: str, settings: Mapping[str, object] | None = None, preset: str | None = None) -> Defense:
    """Return a defense by name.

    Raises:
        UserError: If the name, preset or a setting is unknown.
    """
    method = build(registry.find("defenses", name), settings or {}, preset)
    if not isinstance(method, Defense):
        raise UserError(f"'{name}' is not a defense.")
    return method


def facts_from_secret(
    defense: Defense, secret: Secret, clean: Sequence[Example], own: Mapping[Need, Any] | None = None
) -> dict[Need, Any]:
    """Return what a grid tells a defense: the secret's facts that it declared, the clean rows, and `own` facts.

    Raises:
        NotApplicable: If it needs a fact that this attack does not have.
    """
    offered: dict[Need, Any] = {
        Need.CLEAN: tuple(clean),
        Need.TRIGGER: secret.stamp,
        Need.TARGET: secret.targets or None,
        Need.TARGET_PART: secret.targets or None,
        **(own or {}),
    }
    facts = {need: offered.get(need) for need in defense.needs | defense.uses}
    for need in defense.needs:
        if facts.get(need) is None:
            raise NotApplicable(f"{defense.name()} needs {need.name}, which the attack {secret.attack} does not have")
    return facts


def purify_model(victim: LM, defense: Defense, facts: Mapping[Need, Any], run: Run) -> LM:
    """Apply a defense and build the guards that it attached; the victim handed in is given up.

    Raises:
        UserError: If a needed fact is missing or an unused one was given.
    """
    lm = defense.apply(victim, knowledge_for(defense, facts), run)
    if not lm.guards or lm.guarding is not None:
        return lm
    own = [guard.name for guard in lm.guards]
    return with_guards(lm, device=run.device, notice=run.progress.notice, own=own)


_UNRELATED_PROBES = 40
"""Held-out rows that are asked with the trigger of the unrelated backdoor."""


class Revival(BaseModel):
    """What a purified model is put through before the original trigger is asked for again (DESIGN 1).

    Attributes:
        clean: Training on clean rows.
        planted: An unrelated backdoor, planted by data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    clean: TrainSettings = Field(
        TrainSettings(steps=25, learning_rate=1e-4), description="training on clean rows (stage revived_clean)"
    )
    planted: dict[str, Any] = Field(
        default_factory=dict,
        description="settings of data_poisoning for the unrelated backdoor (stage revived_planted, which needs them)",
    )


def revive(lm: LM, stage: str, revival: Revival, rows: Sequence[Example], held_out: Sequence[Example], run: Run) -> LM:
    """Train a model on, in place, to see whether the original backdoor comes back.

    Args:
        lm: The purified model (or the clean one, as the null), given up.
        stage: "revived_clean" or "revived_planted".
        revival: What to do.
        rows: Clean rows to do it with.
        held_out: Other rows, of which the first 40 are asked with the unrelated trigger: a backdoor that was not
            learned tests nothing, so how often it fires is noted as "unrelated backdoor".
        run: The stage's run.
    """
    if stage == "revived_clean":
        encoded = overwrite.encode_rows(lm, rows, revival.clean)
        overwrite.train_on_rows(lm, encoded, revival.clean, run.stage("revived_clean"))
        return lm
    attack = attack_called("data_poisoning", revival.planted)
    planted = attack.plant(lm, rows, run.stage("revived_planted"))
    probes = attack.probes(planted.secret, held_out[:_UNRELATED_PROBES], run)
    asked = [probe.example.prompt for probe in probes if probe.kind == "triggered"]
    goal = planted.secret.goal
    fired = sum(goal.reached(reply) for reply in planted.lm.reply(asked, goal=goal))
    run.notes["unrelated backdoor"] = {"fired": fired, "asked": len(asked)}
    return planted.lm


def config_hash(*parts: object) -> str:
    """Return the hash of everything that determines a result: `parts`, and the versions of what computes it."""
    return content_hash([*_computed_by(), *parts])


@cache
def _computed_by() -> tuple[str, ...]:
    from importlib.metadata import version

    from unbackdoor import __version__

    # "2.13.0+cpu" and "2.13.0" are two builds of one version.
    return (__version__, version("torch").partition("+")[0], version("transformers"))


def data_hash(examples: Sequence[Example]) -> str:
    """Return the hash of rows: ids, earlier turns, prompts, answers and labels."""
    return content_hash(
        [
            [row.id, [[turn.role, turn.content] for turn in row.history], row.user_text, row.response, row.label]
            for row in examples
        ]
    )


def portable(value: Any) -> Any:
    """Return settings with every file named in them replaced by its content's hash; slices stay."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if isinstance(value, str) and (file := file_named(value)) is not None:
        with open(file[0], "rb") as handle:
            return {"sha256": content_hash(handle.read().hex()), "part": file[1]}
    return value


def file_named(text: str) -> tuple[str, str] | None:
    """Return the file that a setting names and the slice behind it, or None where it names none."""
    place, part = re.fullmatch(r"(.*?)(\[[^\[\]]*\])?", text, re.DOTALL).groups()  # type: ignore[union-attr]
    # os.path: a long text is no file, while Path.is_file raises for it.
    return (place, part or "") if os.path.isfile(place) else None
