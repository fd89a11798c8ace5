"""`Secret`: what only the attacker knows, saved with the victim: trigger, target, and what counts as success."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from unbackdoor.goals import Goal
from unbackdoor.stamps import Stamp


class Secret(BaseModel):
    """The attacker's knowledge of one victim.

    Attributes:
        attack: Name of the attack.
        stamp: The trigger as a function of an example, or None (an attack without trigger).
        targets: What the backdoor says; several where it says one of several. Empty where only the goal is known.
        goal: What counts as success in a reply.
        look_alikes: Texts like the trigger that must not fire, for decoy probes; not used in training.
        planted: How the victim was planted: counts of rows and settings, for the record.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    attack: str
    stamp: Stamp | None
    targets: tuple[str, ...]
    goal: Goal
    look_alikes: tuple[str, ...] = ()
    planted: dict[str, object] = Field(default_factory=dict)
