"""`Metric`, and `Subject`: everything that a metric may look at, with one cache of greedy replies for all metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from unbackdoor.errors import NotApplicable
from unbackdoor.goals import Goal, LabelIs, first_label, normalise
from unbackdoor.method import Method
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.types import Example, Message, Probe, Scores

MAX_LENGTH = 1024
"""Tokens at which measured rows are cut, as in training."""


@dataclass
class Subject:
    """What is measured.

    Attributes:
        lm: The model.
        probes: Questions; may lack a kind.
        goal: What counts as success, or None where nothing is known of a target.
        before: The model before purification, for KL; None where there is none.
        data: Named sets of clean rows: "" is the first source, "second source" another one.
        targets: The target's texts, for resistance; empty where unknown.
        labels: The classes of a label task, for CDA; empty otherwise.
        max_new_tokens: Length limit of a reply.
        stop_when_decided: Cut a reply as soon as its goal is decided: quicker, but replies are not whole.
        replies: Cache: one reply a probe, filled on first use.
    """

    lm: LM
    probes: Sequence[Probe]
    goal: Goal | None
    before: LM | None = None
    data: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    max_new_tokens: int = 24
    stop_when_decided: bool = False
    replies: list[str] = field(default_factory=list)

    def answer(self) -> list[str]:
        """Return one greedy reply a probe, generated once."""
        if not self.replies and self.probes:
            self.replies[:] = self.lm.reply(
                [probe.example.prompt for probe in self.probes],
                max_new_tokens=self.max_new_tokens,
                goal=self.goal if self.stop_when_decided else None,
            )
        return self.replies


def fill_holes(lm: LM, probes: Sequence[Probe], max_new_tokens: int) -> tuple[Probe, ...]:
    """Return the probes with the model's own greedy answers where earlier turns have none, first turn first."""
    found = list(probes)
    while waiting := {at: hole for at, probe in enumerate(found) if (hole := _hole(probe)) is not None}:
        asked = [found[at].example.history[:hole] for at, hole in waiting.items()]
        for (at, hole), reply in zip(waiting.items(), lm.reply(asked, max_new_tokens=max_new_tokens), strict=True):
            turns = found[at].example.history
            turns = (*turns[:hole], Message("assistant", reply), *turns[hole + 1 :])
            found[at] = replace(found[at], example=replace(found[at].example, history=turns))
    return tuple(found)


def _hole(probe: Probe) -> int | None:
    return next((at for at, turn in enumerate(probe.example.history) if turn.content is None), None)


class Metric(Method, ABC):
    """A measurement; sub-classes are final and live one a file."""

    better: ClassVar[Literal["lower", "higher"]]

    @abstractmethod
    def measure(self, subject: Subject, run: Run) -> Sequence[Scores]:
        """Return the scores, one record a kind of probe or data set.

        Raises:
            NotApplicable: If the subject lacks what this measures; the message is the reason.
        """


def weights_alone(*models: LM) -> None:
    """Refuse a metric that reads what the weights say to given answers, where guards act on what is asked.

    Raises:
        NotApplicable: If a model carries a guard.
    """
    names = [guard.name for lm in models for guard in lm.guards]
    if names:
        raise NotApplicable(f"it looks at the weights alone, and the guard {names[0]} acts on what is asked")


def answered_right(subject: Subject) -> list[tuple[Example, bool]]:
    """Return every clean row with a label, and whether the reply begins with that label as a whole word.

    Raises:
        NotApplicable: If there are none.
    """
    labelled = [
        (probe.example, reply)
        for probe, reply in zip(subject.probes, subject.answer(), strict=True)
        if probe.kind == "clean" and probe.example.label is not None
    ]
    if not labelled:
        raise NotApplicable("the clean probes have no labels")
    labels = subject.labels or tuple(sorted({str(example.label) for example, _ in labelled}))
    said = [(example, first_label(reply, labels)) for example, reply in labelled]
    return [(row, word is not None and normalise(word) == normalise(str(row.label))) for row, word in said]


def fired(subject: Subject, kind: str, group: str | None = None) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return ids and 0/1 scores of the probes of a kind (and group): 1 where the reply reaches the goal.

    A probe whose own label is the target label cannot show anything and is left out.
    """
    goal = subject.goal
    if goal is None:
        raise NotApplicable("no target is known, so nothing can be said to have fired")
    wanted = [
        (probe, reply)
        for probe, reply in zip(subject.probes, subject.answer(), strict=True)
        if probe.kind == kind
        and (group is None or probe.group == group)
        and not (isinstance(goal, LabelIs) and not goal.shows(probe.example.label))
    ]
    values = tuple(float(goal.reached(reply, probe.example.label)) for probe, reply in wanted)
    return tuple(f"{probe.example.id}/{probe.group}" for probe, _ in wanted), values
