"""The files of a run folder, read and checked: a report is a pure function of them.

`results.json` must be there; `replies.jsonl`, `curves.json`, `case_studies.json`, `hidden_states.json` and
`rounds.json` (read in `rounds.py`) may be missing, and the section that needs one then says so. Every value is checked
here once, so that tables and plots can take it as it is; what is wrong is named by file, place and field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from unbackdoor.errors import DataError
from unbackdoor.report.escape import shown_line
from unbackdoor.report.fields import Record, as_float, as_record, read_json
from unbackdoor.report.rounds import Rounds, read_rounds
from unbackdoor.report.wording import SHARES

SCHEMA = 1
ROLES = ("suspect", "control", "purified", "reference")
STAGES = ("before", "after", "revived_clean", "revived_planted")
KINDS = ("triggered", "clean", "decoy", "all")
STATUSES = ("measured", "not_applicable", "failed")


@dataclass(frozen=True)
class Row:
    """One measurement of `results.json`; `value` and `n` are None unless `status` is "measured"."""

    model: str
    attack: str
    defense: str
    role: str
    stage: str
    knowledge: tuple[str, ...]
    metric: str
    kind: str
    group: str
    value: float | None
    low: float | None
    high: float | None
    n: int | None
    denominator: str
    status: str
    reason: str
    template: str
    seed: int | None
    seconds: float | None
    peak_memory_bytes: float | None
    config_hash: str


@dataclass(frozen=True)
class Comparison:
    """One paired test; `before` and `after` are the two values, or labels of the compared models.

    The difference is the mean over pairs of after - before of the scores themselves: log-losses for perplexity.
    """

    metric: str
    kind: str
    group: str
    before: str | float
    after: str | float
    n: int
    test: str
    p_value: float
    difference: float
    low: float | None
    high: float | None
    better: str
    defense: str


@dataclass(frozen=True)
class Reply:
    """One prompt and what one model answered; `reached` is None where nothing decides it."""

    model: str
    role: str
    stage: str
    kind: str
    group: str
    id: str
    prompt: str
    marks: tuple[str, ...]
    reply: str
    reached: bool | None


@dataclass(frozen=True)
class TargetCurve:
    """Mean probability of each target token for one model, with the trigger and without it."""

    model: str
    role: str
    triggered: tuple[float, ...]
    clean: tuple[float, ...]


@dataclass(frozen=True)
class CaseStudies:
    """Teacher-forced probabilities of the target by position."""

    target_tokens: tuple[str, ...]
    models: tuple[TargetCurve, ...]
    prompts: int


@dataclass(frozen=True)
class Point:
    """One prompt's last hidden state in the plane of the first two principal components."""

    model: str
    role: str
    kind: str
    x: float
    y: float


@dataclass(frozen=True)
class HiddenStates:
    """A projection of hidden states: the layer, the variance that each axis explains (0 to 1), and the points.

    `perturbed` says whether the layer is the one that the defense perturbs.
    """

    layer: int
    explained: tuple[float, float]
    points: tuple[Point, ...]
    perturbed: bool


@dataclass(frozen=True)
class RunData:
    """Everything that a report of one run shows.

    Attributes:
        folder: Where it was read from.
        name: The folder's name, which is the run's.
        curves: Stage name -> one record a step, or None without `curves.json`; likewise for the next ones.
        revival_command: What a person types to measure revival, or "" for the usual command.
    """

    folder: Path
    name: str
    command: str
    versions: Mapping[str, object]
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    settings: Mapping[str, object]
    hashes: Mapping[str, object]
    hardware: Mapping[str, object]
    how_to_load: str
    notices: tuple[str, ...]
    revival_command: str
    replies: tuple[Reply, ...] | None
    curves: Mapping[str, list[dict[str, float]]] | None
    case_studies: CaseStudies | None
    hidden_states: HiddenStates | None
    rounds: tuple[Rounds, ...] = ()


def load_run(folder: Path) -> RunData:
    """Read a run folder.

    Raises:
        DataError: If `results.json` is missing, a file is not JSON, its schema number is another, or a field is wrong.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise DataError(
            f"'{folder}' holds no results.json, so it is no finished run; name the folder that a run wrote."
        )
    record = as_record(read_json(path), str(path))
    if record.data.get("schema") != SCHEMA:
        found = shown_line(repr(record.data.get("schema")), 40)
        raise DataError(
            f"{path}: field 'schema' is {found}, but this version reads {SCHEMA}; "
            "render the report with the version of unbackdoor that wrote the run."
        )
    return RunData(
        folder=folder,
        name=folder.resolve().name,
        command=record.text("command", ""),
        versions=record.mapping("versions"),
        rows=tuple(_row(item) for item in record.records("rows")),
        comparisons=tuple(_comparison(item) for item in record.records("comparisons")),
        settings=record.mapping("settings"),
        hashes=record.mapping("hashes"),
        hardware=record.mapping("hardware"),
        how_to_load=record.text("how_to_load", ""),
        notices=record.texts("notices"),
        revival_command=record.text("revival_command", ""),
        replies=_replies(folder / "replies.jsonl"),
        curves=_curves(folder / "curves.json"),
        case_studies=_case_studies(folder / "case_studies.json"),
        hidden_states=_hidden_states(folder / "hidden_states.json"),
        rounds=read_rounds(folder / "rounds.json"),
    )


def _row(record: Record) -> Row:
    status = record.choice("status", STATUSES)
    measured = status == "measured"
    is_share = record.data.get("metric") in SHARES

    def figure(key: str) -> float | None:
        if not measured or (key != "value" and record.data.get(key) is None):
            return None
        return record.share(key) if is_share else record.number(key, infinite=True)

    return Row(
        model=record.text("model"),
        attack=record.text("attack", ""),
        defense=record.text("defense", ""),
        role=record.choice("role", ROLES),
        stage=record.choice("stage", STAGES),
        knowledge=record.texts("knowledge"),
        metric=record.text("metric"),
        kind=record.choice("kind", KINDS),
        group=record.text("group", ""),
        value=figure("value"),
        low=figure("low"),
        high=figure("high"),
        n=record.whole("n") if measured else None,
        denominator=record.text("denominator", ""),
        status=status,
        reason=record.text("reason", ""),
        template=record.text("template", ""),
        seed=None if record.data.get("seed") is None else record.whole("seed"),
        seconds=record.number_or_none("seconds"),
        peak_memory_bytes=record.number_or_none("peak_memory_bytes"),
        config_hash=record.text("config_hash", ""),
    )


def _comparison(record: Record) -> Comparison:
    def side(key: str) -> str | float:
        if isinstance(record.data.get(key), str):
            return record.text(key)
        return record.share(key) if record.data.get("metric") in SHARES else record.number(key)

    return Comparison(
        metric=record.text("metric"),
        kind=record.text("kind", ""),
        group=record.text("group", ""),
        before=side("before"),
        after=side("after"),
        n=record.whole("n"),
        test=record.text("test"),
        p_value=record.number("p_value"),
        difference=record.number("difference"),
        low=record.number_or_none("low"),
        high=record.number_or_none("high"),
        better=record.choice("better", ("lower", "higher")),
        defense=record.text("defense", ""),
    )


def _replies(path: Path) -> tuple[Reply, ...] | None:
    if not path.is_file():
        return None
    replies = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            replies.append(_reply(line, f"{path}, line {number}"))
    return tuple(replies)


def _reply(line: str, place: str) -> Reply:
    try:
        record = as_record(json.loads(line), place)
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{place} is not valid JSON ({problem}); run the command again to write it anew.") from problem
    reached = record.data.get("reached")
    if reached is not None and not isinstance(reached, bool):
        raise record.wrong("reached", "true, false or null")
    return Reply(
        model=record.text("model"),
        role=record.choice("role", ROLES),
        stage=record.choice("stage", STAGES),
        kind=record.choice("kind", KINDS),
        group=record.text("group", ""),
        id=record.text("id"),
        prompt=record.text("prompt"),
        marks=record.texts("marks"),
        reply=record.text("reply"),
        reached=reached,
    )


def _curves(path: Path) -> dict[str, list[dict[str, float]]] | None:
    if not path.is_file():
        return None
    record = as_record(read_json(path), str(path))
    curves: dict[str, list[dict[str, float]]] = {}
    for stage in record.data:
        # A diverged step is written as NaN or infinity: it leaves a gap in the curve, so it is dropped, not refused.
        curves[stage] = [_finite_numbers(step.data) for step in record.records(stage)]
    return curves


def _finite_numbers(step: Mapping[str, object]) -> dict[str, float]:
    return {key: number for key, value in step.items() if math.isfinite(number := as_float(value))}


def _case_studies(path: Path) -> CaseStudies | None:
    if not path.is_file():
        return None
    record = as_record(read_json(path), str(path))
    tokens = record.texts("target_tokens")
    models = tuple(
        TargetCurve(item.text("model"), item.choice("role", ROLES), item.numbers("triggered"), item.numbers("clean"))
        for item in record.records("models")
    )
    for curve in models:
        if any(len(values) not in (0, len(tokens)) for values in (curve.triggered, curve.clean)):
            raise DataError(
                f"{path}: model '{shown_line(curve.model)}' must have one probability for each of the "
                f"{len(tokens)} target tokens; run the command again."
            )
    return CaseStudies(tokens, models, record.whole("prompts"))


def _hidden_states(path: Path) -> HiddenStates | None:
    if not path.is_file():
        return None
    record = as_record(read_json(path), str(path))
    explained = record.numbers("explained")
    if len(explained) != 2:
        raise DataError(f"{path}: field 'explained' must hold two shares, but holds {len(explained)}; run it again.")
    points = tuple(
        Point(
            item.text("model"),
            item.choice("role", ROLES),
            item.choice("kind", KINDS),
            item.number("x"),
            item.number("y"),
        )
        for item in record.records("points")
    )
    perturbed = record.data.get("perturbed", False)
    if not isinstance(perturbed, bool):
        raise record.wrong("perturbed", "true or false")
    return HiddenStates(record.whole("layer"), (explained[0], explained[1]), points, perturbed)
