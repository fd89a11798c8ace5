"""`Defense`, and `Knowledge`: what the defender knows, given as data and guarded.

A defense declares which facts it needs and which it would use. `Knowledge` raises when it reads any other, so no
defense can peek at the answer, and every table prints what each one had to know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from unbackdoor.errors import UserError
from unbackdoor.method import Method
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.stamps import InsertText, PutPieces, WrapEnds
from unbackdoor.types import Example


class Need(Enum):
    """A fact that a defender may know; the value is its flag on the command line."""

    CLEAN = "clean"
    TRIGGER = "trigger"
    TARGET = "target"
    TARGET_PART = "target-part"
    UNWANTED = "unwanted"
    SAFE = "safe"
    REFERENCE = "reference"
    EVIDENCE = "evidence"
    PREFERENCES = "preferences"


@dataclass(frozen=True)
class Knowledge:
    """What the defender knows, restricted to what the defense declared.

    Attributes:
        facts: The facts given.
        declared: What may be read.
    """

    facts: Mapping[Need, Any]
    declared: frozenset[Need]

    def _read(self, need: Need) -> Any:
        if need not in self.declared:
            raise PermissionError(f"this defense did not declare that it needs {need.name}")
        return self.facts.get(need)

    @property
    def clean(self) -> tuple[Example, ...]:
        """Clean rows of the defender."""
        return tuple(self._read(Need.CLEAN) or ())

    @property
    def trigger(self) -> InsertText | WrapEnds | PutPieces:
        """The trigger, with its place."""
        stamp: InsertText | WrapEnds | PutPieces = self._read(Need.TRIGGER)
        return stamp

    @property
    def target(self) -> tuple[str, ...]:
        """The target texts: what the backdoor says (one of them, where there are several)."""
        return tuple(self._read(Need.TARGET) or ())

    @property
    def target_part(self) -> tuple[str, ...]:
        """Texts that begin with the part of the target that was noticed."""
        return tuple(self._read(Need.TARGET_PART) or ())

    @property
    def unwanted(self) -> tuple[str, ...]:
        """Openings of unwanted replies, in the defender's words, or the answers of `unwanted_rows`; each once."""
        return unwanted_texts(self._read(Need.UNWANTED) or ())

    @property
    def unwanted_rows(self) -> tuple[Example, ...]:
        """Rows whose responses are unwanted, each to its own prompt; none where openings are given."""
        return tuple(entry for entry in self._read(Need.UNWANTED) or () if isinstance(entry, Example))

    @property
    def safe(self) -> tuple[Example, ...]:
        """Requests with safe replies."""
        return tuple(self._read(Need.SAFE) or ())

    @property
    def reference(self) -> LM | None:
        """A trusted model of the same architecture, or None."""
        model: LM | None = self._read(Need.REFERENCE)
        return model

    @property
    def evidence(self) -> str:
        """The name of a source of evidence."""
        return str(self._read(Need.EVIDENCE) or "")


class Defense(Method, ABC):
    """A way to purify a suspect; sub-classes are final and live one a file."""

    needs: ClassVar[frozenset[Need]]
    """Facts without which it cannot run."""
    uses: ClassVar[frozenset[Need]] = frozenset()
    """Facts that it takes where given."""
    control: ClassVar[bool] = False
    """Whether it is here to be compared with, known not to remove a backdoor."""
    trains: ClassVar[bool] = True
    """Whether it changes weights; else it attaches guards only."""
    merges: ClassVar[bool] = False
    """Whether its result is a merge: full weights as a rule, whatever the suspect is; the notes say it as "merge"."""

    def check(self, known: Knowledge) -> None:
        """Refuse facts that do not go together; called before a model is loaded.

        Raises:
            UserError: If they do not.
        """

    def check_layers(self, count: int) -> None:
        """Refuse settings that do not fit a model of `count` decoder layers; called before it is loaded.

        Raises:
            UserError: If they do not.
        """

    @abstractmethod
    def apply(self, victim: LM, known: Knowledge, run: Run) -> LM:
        """Return the purified model; `victim` is given up by the caller and usually trained in place."""


def unwanted_texts(entries: Iterable[str | Example]) -> tuple[str, ...]:
    """Return what is unwanted, each text once: openings, or the responses of rows."""
    return tuple(dict.fromkeys(entry if isinstance(entry, str) else entry.response for entry in entries))


def knowledge_for(defense: Defense, facts: Mapping[Need, Any]) -> Knowledge:
    """Return the guarded knowledge for a defense.

    Raises:
        UserError: If a needed fact is missing, or one is given that the defense does not use.
    """
    given = {need for need, value in facts.items() if value is not None and value != ()}
    missing = sorted(need.value for need in defense.needs - given)
    if missing:
        raise UserError(
            f"{defense.name()} needs --{missing[0]}: `unbackdoor explain {defense.name()}` says what it is."
        )
    unused = sorted(need.value for need in given - defense.needs - defense.uses)
    if unused:
        raise UserError(f"{defense.name()} does not use --{unused[0]}; leave it out, or choose a defense that does.")
    return Knowledge(dict(facts), defense.needs | defense.uses)
