"""Measure a model: every metric's per-probe scores, the rows of results.json, the replies, and paired comparisons.

A `Measurement` is plain data and survives a trip through JSON, so a grid measures a victim once and compares every
purified model with it later.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from unbackdoor import registry
from unbackdoor.errors import NotApplicable, UserError
from unbackdoor.goals import Goal
from unbackdoor.method import build
from unbackdoor.metrics.base import Metric, Subject, fill_holes
from unbackdoor.model.lm import LM
from unbackdoor.pipeline.guarding import recorded
from unbackdoor.run import Run
from unbackdoor.types import Example, Probe, Scores

DEFAULT_METRICS = ("asr", "leak", "cda", "perplexity", "kl")


@dataclass(frozen=True)
class Label:
    """Who is measured: the columns that say so in every row of results.json."""

    model: str
    role: str
    stage: str = "before"
    attack: str = ""
    defense: str = ""
    knowledge: tuple[str, ...] = ()


@dataclass(frozen=True)
class Questions:
    """What every model of a comparison is asked.

    Attributes:
        probes: Triggered, clean and decoy probes; may be empty.
        goal: What counts as success; None where nothing is known.
        data: Named sets of clean rows for perplexity and KL.
        targets: The target's texts, for resistance.
        labels: Classes of a label task.
        metrics: Names of the metrics, in order.
        max_new_tokens: Length limit of a reply.
        stop_when_decided: Cut replies as soon as their outcome is decided.
        named: Whether a person named the metrics: what cannot be measured of them is then said, not left out.
    """

    probes: tuple[Probe, ...] = ()
    goal: Goal | None = None
    data: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = DEFAULT_METRICS
    max_new_tokens: int = 24
    stop_when_decided: bool = False
    named: bool = False


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model.

    Attributes:
        rows: Rows of results.json.
        scores: One record a metric, kind and group, with a score a probe.
        replies: One record a probe: prompt, marks, reply, whether the goal was reached.
        guards: One record a question and guard: what the guard did, and the reply.
    """

    rows: list[dict[str, Any]]
    scores: list[Scores]
    replies: list[dict[str, Any]]
    guards: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "rows": self.rows,
            "scores": [asdict(score) for score in self.scores],
            "replies": self.replies,
            "guards": self.guards,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Measurement:
        """Read what `to_json` wrote."""
        scores: list[Scores] = []
        for record in stored["scores"]:
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
            scores.append(Scores(**fields))
        return cls(list(stored["rows"]), scores, list(stored["replies"]), list(stored.get("guards", ())))


def measure(
    lm: LM, questions: Questions, label: Label, run: Run, *, before: LM | None = None, config_hash: str = ""
) -> Measurement:
    """Measure one model.

    Args:
        lm: The model.
        questions: What it is asked.
        label: Who it is.
        run: Seed and progress; metrics that draw at random use its streams.
        before: The model before, for KL.
        config_hash: Hash of everything that determined the model, for the rows.

    Raises:
        UserError: If a figure is not finite: no report could show it, and the model is good for nothing.
    """
    subject = _subject(lm, questions, before)
    common = {
        "model": label.model,
        "attack": label.attack,
        "defense": label.defense,
        "role": label.role,
        "stage": label.stage,
        "knowledge": list(label.knowledge),
        "template": lm.template,
        "seed": run.seed,
        "config_hash": config_hash,
    }
    rows: list[dict[str, Any]] = []
    scores: list[Scores] = []
    name = f"measure {label.model}"
    run.progress.start(name, len(questions.metrics))
    with recorded(lm) as journal:
        for done, metric_name in enumerate(questions.metrics, 1):
            started = time.perf_counter()
            metric = metric_called(metric_name)
            try:
                found = list(metric.measure(subject, run))
            except NotApplicable as reason:
                rows.append(_row(common, metric_name, None, started, status="not_applicable", reason=str(reason)))
            else:
                scores += found
                rows += [_row(common, metric_name, score, started) for score in found]
            run.progress.advance(name, done, {})
    run.progress.finish(name)
    return Measurement(rows, scores, _replies(subject, label), [dict(record) for record in journal])


def _subject(lm: LM, questions: Questions, before: LM | None) -> Subject:
    return Subject(
        lm,
        fill_holes(lm, questions.probes, questions.max_new_tokens),
        questions.goal,
        before,
        questions.data,
        questions.targets,
        questions.labels,
        questions.max_new_tokens,
        questions.stop_when_decided,
    )


def metric_called(name: str) -> Metric:
    """Return the metric with its default settings.

    Raises:
        UserError: If there is none of that name.
    """
    metric = build(registry.find("metrics", name), {})
    if not isinstance(metric, Metric):
        raise UserError(f"'{name}' is not a metric.")
    return metric


def _row(
    common: Mapping[str, Any],
    metric: str,
    score: Scores | None,
    started: float,
    *,
    status: str = "measured",
    reason: str = "",
) -> dict[str, Any]:
    figure = None if score is None else score.estimate()
    if figure is not None and not math.isfinite(figure.value):
        raise UserError(
            f"the {metric} of '{common['model']}' is beyond all numbers, so training destroyed the model; use a "
            "smaller learning rate, and --overwrite to begin anew."
        )
    # A single score has no interval, and JSON has no infinity.
    interval = None if figure is None or not math.isfinite(figure.high) else figure
    return {
        **common,
        "metric": metric,
        "kind": "all" if score is None else score.kind,
        "group": "" if score is None else score.group,
        "value": None if figure is None else figure.value,
        "low": None if interval is None else interval.low,
        "high": None if interval is None else interval.high,
        "n": 0 if figure is None else figure.n,
        "denominator": "" if score is None else score.denominator,
        "status": status,
        "reason": reason,
        "seconds": round(time.perf_counter() - started, 3),
        "peak_memory_bytes": peak_memory(),
    }


def peak_memory() -> int:
    """Return the largest resident set of this process so far, in bytes (GPU memory where the model is there)."""
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else peak_resident()


def peak_resident() -> int:
    """Return the largest resident set of this process so far, in bytes.

    On Linux it is read from /proc: what `getrusage` says is inherited from the process that started this one.
    """
    import resource
    import sys
    from pathlib import Path

    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _replies(subject: Subject, label: Label) -> list[dict[str, Any]]:
    if not subject.replies:
        return []
    goal = subject.goal
    return [
        {
            "model": label.model,
            "role": label.role,
            "stage": label.stage,
            "kind": probe.kind,
            "group": probe.group,
            "id": probe.example.id,
            "prompt": _asked(probe.example),
            "marks": list(probe.marks),
            "reply": reply,
            "reached": None if goal is None else goal.reached(reply, probe.example.label),
        }
        for probe, reply in zip(subject.probes, subject.replies, strict=True)
    ]


def _asked(example: Example) -> str:
    """Return what the model read: the user's words alone, or all turns where others stand before them."""
    if not example.history:
        return example.user_text
    return "\n".join(f"{turn.role}: {turn.content}" for turn in example.prompt)


def compare(before: Measurement, after: Measurement, seed: int = 0) -> list[dict[str, Any]]:
    """Return a paired before/after test for every score that both measurements hold.

    0/1 scores: McNemar's exact test, and the interval of `paired_shares`; others: sign flips of the (weighted) mean
    difference, whose interval is that of a bootstrap over pairs. Pairs are matched by example id; scores that one side
    lacks are left out, and n says how many pairs there were.
    """
    from unbackdoor.statistics import mcnemar_exact, paired_bootstrap, paired_shares, sign_flip

    earlier = {(score.metric, score.kind, score.group): score for score in before.scores}
    found = []
    for score in after.scores:
        past = earlier.get((score.metric, score.kind, score.group))
        if past is None:
            continue
        old, new = dict(zip(past.ids, past.values, strict=True)), dict(zip(score.ids, score.values, strict=True))
        shared = [name for name in score.ids if name in old]
        if not shared:
            continue
        pairs = [old[name] for name in shared], [new[name] for name in shared]
        if score.binary:
            shares = [bool(v) for v in pairs[0]], [bool(v) for v in pairs[1]]
            p_value, (difference, low, high) = mcnemar_exact(*shares), paired_shares(*shares)
            test = "McNemar exact"
        else:
            heavy = dict(zip(score.ids, score.weights, strict=True)) if score.weights else {}
            weights = [heavy[name] for name in shared] if heavy else []
            difference, low, high = paired_bootstrap(*pairs, seed=seed, weights=weights)
            p_value = sign_flip(*pairs, seed=seed, weights=weights)
            test = "sign flips"
        found.append(
            {
                "metric": score.metric,
                "kind": score.kind,
                "group": score.group,
                "before": past.estimate().value,
                "after": score.estimate().value,
                "n": len(shared),
                "test": test,
                "p_value": p_value,
                "difference": difference,
                "low": low,
                "high": high,
                "better": metric_called(score.metric).better,
            }
        )
    return found
