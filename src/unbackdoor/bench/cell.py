"""`Cell`: one model of a grid at one stage, asked one set of questions; what is kept or done again as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Subject = Literal["untouched", "twin", "victim"]
CellKind = Literal["reference", "victim", "control", "defense", "purified reference", "revival"]


@dataclass(frozen=True)
class Cell:
    """One model at one stage.

    Attributes:
        model: Spec of the model that everything starts from.
        subject: What is made of it before any defense: nothing, the harmless twin of an attack, its victim.
        attack: Label of the attack, or of the attack whose probes an untouched model is asked.
        seed: Seed of planting, purification and probes.
        defense: Label of the defense, "" for none.
        defense_role: "control" or "purified", "" without a defense.
        stage: "before" (no defense), "after", "revived_clean" or "revived_planted".
    """

    model: str
    subject: Subject
    attack: str
    seed: int
    defense: str = ""
    defense_role: str = ""
    stage: str = "before"

    @property
    def is_revival(self) -> bool:
        """Whether the model is trained on before it is asked."""
        return self.stage.startswith("revived")

    @property
    def kind(self) -> CellKind:
        """Which sort of work it is."""
        if self.is_revival:
            return "revival"
        if not self.defense:
            return "victim" if self.subject == "victim" else "reference"
        if self.subject != "victim":
            return "purified reference"
        return "control" if self.defense_role == "control" else "defense"

    @property
    def role(self) -> str:
        """The column `role` of results.json."""
        if self.subject != "victim":
            return "reference"
        if not self.defense:
            return "suspect"
        return "control" if self.defense_role == "control" else "purified"

    @property
    def shown_model(self) -> str:
        """The column `model` of results.json: the twin is another model than the untouched one."""
        return f"{self.model} (twin)" if self.subject == "twin" else self.model

    @property
    def name(self) -> str:
        """What `--only` is matched against and progress shows: "MODEL/ATTACK/SEED/SUBJECT/DEFENSE/STAGE"."""
        parts = (self.model, self.attack, f"seed {self.seed}", self.subject, self.defense, self.stage)
        return "/".join(part for part in parts if part)
