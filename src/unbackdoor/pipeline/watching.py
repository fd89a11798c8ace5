"""Watch a defense: ask some probes after each of its rounds, and gather what is known of every round.

A defense calls `run.observe` after a round and nothing comes back, so it cannot see a probe and trains as if nobody had
asked. A resumed defense goes through its finished rounds again and calls for each of them, and a round whose weights a
later one has replaced is then called with other weights: what was asked is kept by the number of the call, and is never
asked again.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from unbackdoor.metrics.base import Subject, fill_holes, fired
from unbackdoor.model.lm import LM
from unbackdoor.run import Run, write_atomically

if TYPE_CHECKING:
    from unbackdoor.goals import Goal
    from unbackdoor.pipeline.measure import Questions
    from unbackdoor.types import Probe

KINDS = ("triggered", "clean", "decoy")
Asked = dict[str, list[int]]
"""Kind of probe -> how many fired, how many were asked."""


class Ended(Exception):
    """The experimenter ends a defense after a round, with the model as it is then.

    It goes through the defense from `run.observe`, which returns nothing else either: a defense learns of it only by
    being over.
    """

    def __init__(self, model: LM, number: int) -> None:
        """Keep the model, and the number of the round from 1."""
        super().__init__(f"ended by the experimenter after round {number}")
        self.model = model


@dataclass
class Watch:
    """An observer that asks probes, and may end the defense.

    Attributes:
        probes: What is asked after every round; nothing where it is empty.
        goal: What counts as success.
        max_new_tokens: Length limit of a reply.
        path: Where the figures are kept, so that a resumed run has them; None to keep them in memory.
        asked: What came out, a record a round.
        until: The defense is ended once the share of triggered probes that fire is below this; None never ends it.
        calls: Rounds that the defense has told of in this process.
        seconds: Time that asking took in this process.
    """

    probes: tuple[Probe, ...]
    goal: Goal | None
    max_new_tokens: int
    path: Path | None = None
    asked: list[Asked] = field(default_factory=list)
    until: float | None = None
    calls: int = 0
    seconds: float = 0.0

    def __call__(self, model: object) -> None:
        """Ask the model, unless this round was asked before an interruption.

        Raises:
            Ended: If so few triggered probes fire that the defense is to end here; also when it is told again.
        """
        self.calls += 1
        if not self.probes:
            return
        if self.calls > len(self.asked):
            assert isinstance(model, LM)
            self._keep(model)
        hits, count = self.asked[self.calls - 1].get("triggered", (0, 0))
        if self.until is not None and count and hits / count < self.until:
            assert isinstance(model, LM)
            raise Ended(model, self.calls)

    def _keep(self, model: LM) -> None:
        started = time.perf_counter()
        with _modes_kept(model):
            self.asked.append(self._ask(model))
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(self.asked))
        self.seconds += time.perf_counter() - started

    def _ask(self, lm: LM) -> Asked:
        probes = fill_holes(lm, self.probes, self.max_new_tokens)
        subject = Subject(lm, probes, self.goal, max_new_tokens=self.max_new_tokens, stop_when_decided=True)
        values = {kind: fired(subject, kind)[1] for kind in KINDS}
        return {kind: [round(sum(found)), len(found)] for kind, found in values.items() if found}


def watched(
    run: Run,
    questions: Questions,
    count: int,
    path: Path | None = None,
    *,
    kinds: Sequence[str] = KINDS,
    until: float | None = None,
) -> tuple[Run, Watch]:
    """Return the run with an observer, and the observer.

    Args:
        run: The defense's run.
        questions: Where the probes are drawn from, `count` of each kind by streams of the run's seed.
        count: How many of each kind are asked after every round; 0 asks nothing.
        path: Where the figures are kept; what is there already is taken as asked.
        kinds: Kinds that are asked.
        until: The share of triggered probes below which the defense is ended (`Ended`); None never ends it.
    """
    found: list[Probe] = []
    for kind in kinds:
        there = [probe for probe in questions.probes if probe.kind == kind]
        found += Run(run.seed).rng(f"watched {kind}").sample(there, min(count, len(there)))
    watch = Watch(tuple(found), questions.goal, questions.max_new_tokens, path, until=until)
    if found and path is not None and path.is_file():
        watch.asked = json.loads(path.read_text(encoding="utf-8"))
    return replace(run, observer=watch), watch


@contextmanager
def _modes_kept(lm: LM) -> Iterator[None]:
    """Give every module its own mode back: `train(True)` on the whole would wake what was put to sleep in it."""
    modes = [(module, module.training) for module in lm.model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def by_round(asked: Sequence[Asked], notes: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what is known of one defense's rounds, or None where nothing is known of any round.

    Args:
        asked: What a `Watch` has found.
        notes: The run's notes: "drifts" and "parrots" hold a record each, whose stage names the round; "adopted" holds
            the openings that were taken up, with their round; "layer" is the layer that the drifts are added behind,
            "drift choice" what it was chosen from.
    """
    rounds: dict[int, dict[str, Any]] = {}
    for number, figures in enumerate(asked, 1):
        _round(rounds, number)["asked"] = figures
    for number, record in _with_rounds(notes.get("drifts")):
        losses = {name: _finite(record.get(name)) for name in ("unwanted", "safe")}
        texts = {name: _texts(record[name]) for name in ("says", "openings") if name in record}
        layer = {"layer": record["layer"]} if _is_whole(record.get("layer")) else {}
        place = {"at": record["at"]} if record.get("at") in ("words", "prompt") else {}
        _round(rounds, number)["drifts"].append({**losses, "says": [], **texts, **layer, **place})
    for number, record in _with_rounds(notes.get("parrots")):
        parrot = {"loss": _finite(record.get("loss")), "steps": record.get("steps")}
        _round(rounds, number).setdefault("parrots", []).append(parrot)
    for record in _records(notes.get("adopted")):
        if _is_whole(record.get("round")) and isinstance(record.get("opening"), str):
            sure = {name: _finite(record.get(name)) for name in ("certainty", "evidence", "share", "likeness")}
            kept = {"opening": record["opening"], **sure}
            _round(rounds, record["round"]).setdefault("adopted", []).append(kept)
    if not rounds:
        return None
    return {"layer": noted_layer(notes), **_choice(notes), "rounds": [rounds[number] for number in sorted(rounds)]}


def _choice(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores of the layers and lengths that a drift was chosen from, as "choice"; {} where none was."""
    found = [
        {"layer": int(record["layer"]), "tokens": int(record["tokens"]), "loss": _finite(record["loss"])}
        for record in _records(notes.get("drift choice"))
        if all(_finite(record.get(name)) is not None for name in ("layer", "tokens"))
    ]
    return {"choice": found} if found else {}


def by_defense(found: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Return the content of rounds.json, or None where nothing is known of any defense's rounds.

    Args:
        found: Name of a defense -> what `by_round` returned for it.
    """
    told = [{"defense": name, **content} for name, content in found.items() if content is not None]
    return {"defenses": told} if told else None


def noted_layer(notes: Mapping[str, Any]) -> int | None:
    """Return the layer that a defense says it perturbs, the first where there are several; None where it says none."""
    told = [notes.get("layer"), *(record.get("layer") for _, record in _with_rounds(notes.get("drifts")))]
    return next((layer for layer in told if _is_whole(layer)), None)


def _round(rounds: dict[int, dict[str, Any]], number: int) -> dict[str, Any]:
    return rounds.setdefault(number, {"round": number, "asked": {}, "drifts": []})


def _with_rounds(records: object) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield each record with the round that its stage names; notes of other shapes belong to somebody else."""
    for record in _records(records):
        stage = record.get("stage")
        place = re.search(r"\bround-([1-9][0-9]{0,8})\b", stage) if isinstance(stage, str) else None
        if place is not None:
            yield int(place.group(1)), record


def _records(value: object) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _finite(value: object) -> float | None:
    """Return a number that JSON has: a term that was left out of a loss is noted as NaN."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _texts(value: object) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list | tuple) else []


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
