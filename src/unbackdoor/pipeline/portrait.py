"""A `Portrait`: everything a report shows of one model, as plain data that is kept on disk until the run has finished.

Figures, replies, the target's probabilities and hidden states are taken together while the model is in memory; a run
that was stopped and goes on finds the portraits of models that it need not load again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unbackdoor.metrics.base import fill_holes
from unbackdoor.model.lm import LM
from unbackdoor.pipeline.measure import Label, Measurement, Questions, measure
from unbackdoor.run import Run, write_atomically
from unbackdoor.types import Probe


@dataclass(frozen=True)
class Portrait:
    """One model.

    Attributes:
        model: Its name in tables.
        role: suspect, control, purified or reference.
        defense: What was done to it, or "".
        measurement: Rows, scores and replies.
        probabilities: What `studies.target_probabilities` found, or {}.
        states: Kind of probe -> hidden states [probes, hidden], or {}.
        layer: The layer of the hidden states.
        perturbed: Whether that is the layer that a defense perturbs.
    """

    model: str
    role: str
    defense: str
    measurement: Measurement
    probabilities: dict[str, Any] = field(default_factory=dict)
    states: dict[str, list[list[float]]] = field(default_factory=dict)
    layer: int = 0
    perturbed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {**self.__dict__, "measurement": self.measurement.to_json()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Portrait:
        """Read what `to_json` wrote."""
        return cls(**{**stored, "measurement": Measurement.from_json(stored["measurement"])})


def portray(
    lm: LM,
    questions: Questions,
    label: Label,
    run: Run,
    *,
    before: LM | None = None,
    config_hash: str = "",
    training_seconds: float | None = None,
    layer: int | None = None,
) -> Portrait:
    """Measure a model and look inside it.

    Args:
        lm: The model.
        questions: What it is asked; hidden states and probabilities are drawn where there are probes and targets.
        label: Who it is.
        run: Seed and progress.
        before: The model before, for KL; without it KL is not asked for, unless a person named the metrics.
        config_hash: For the rows.
        training_seconds: What making it took, for the row `seconds`.
        layer: The layer, from 0, that the run's defense perturbs: its states are drawn.
    """
    from unbackdoor.pipeline import studies

    if before is None and not questions.named:
        questions = replace(questions, metrics=tuple(name for name in questions.metrics if name != "kl"))
    questions = replace(questions, probes=fill_holes(lm, questions.probes, questions.max_new_tokens))
    measurement = measure(lm, questions, label, run, before=before, config_hash=config_hash)
    if training_seconds is not None and measurement.rows:
        measurement.rows.append(_seconds_row(measurement.rows[0], training_seconds))
    if lm.guards:
        # Both looks would see the weights without the guard, beside figures of the model with it.
        return Portrait(label.model, label.role, label.defense, measurement)
    probabilities: dict[str, Any] = {}
    if questions.targets and questions.probes:
        probabilities = studies.target_probabilities(lm, questions.probes, questions.targets[0])
    drawn = studies.middle_layer(lm) if layer is None else layer
    states = _states(lm, questions.probes, drawn)
    return Portrait(
        label.model, label.role, label.defense, measurement, probabilities, states, drawn, layer is not None
    )


def at_layer(portrait: Portrait, lm: LM, questions: Questions, layer: int) -> Portrait:
    """Return a portrait with the hidden states behind the layer that a defense came to perturb; not of a guarded one.

    Args:
        portrait: What was taken before anybody knew of a layer.
        lm: The same model.
        questions: What it was asked.
        layer: The layer, from 0.
    """
    if lm.guards:
        return portrait
    probes = fill_holes(lm, questions.probes, questions.max_new_tokens)
    return replace(portrait, states=_states(lm, probes, layer), layer=layer, perturbed=True)


def _states(lm: LM, probes: Sequence[Probe], layer: int) -> dict[str, list[list[float]]]:
    from unbackdoor.pipeline import studies

    found = studies.hidden_states(lm, probes, layer) if probes else {}
    return {kind: [[round(value, 5) for value in row] for row in rows.tolist()] for kind, rows in found.items()}


def _seconds_row(like: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    figure = {"metric": "seconds", "kind": "all", "group": "", "value": seconds, "low": None, "high": None, "n": 1}
    return {**like, **figure, "denominator": "runs", "status": "measured", "reason": "", "seconds": round(seconds, 3)}


def kept(path: Path, make: Callable[[], Portrait]) -> Portrait:
    """Return the portrait kept at `path`, or make it and keep it."""
    if path.is_file():
        return Portrait.from_json(json.loads(path.read_text(encoding="utf-8")))
    portrait = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(portrait.to_json(), ensure_ascii=False))
    return portrait


def case_studies(portraits: Sequence[Portrait]) -> dict[str, Any] | None:
    """Return the content of case_studies.json, or None where no target is known."""
    drawn = [portrait for portrait in portraits if portrait.probabilities.get("target_tokens")]
    if not drawn:
        return None
    return {
        "target_tokens": drawn[0].probabilities["target_tokens"],
        "prompts": drawn[0].probabilities["prompts"],
        "models": [
            {
                "model": portrait.model,
                "role": portrait.role,
                "triggered": portrait.probabilities.get("triggered", []),
                "clean": portrait.probabilities.get("clean", []),
            }
            for portrait in drawn
        ],
    }


def hidden_states(portraits: Sequence[Portrait]) -> dict[str, Any] | None:
    """Return the content of hidden_states.json: every model in the plane of the first, None without enough probes.

    Where a defense perturbs a layer, the plane is that layer's, and a model whose states were taken elsewhere is left
    out: two layers are two spaces.
    """
    drawn = [portrait for portrait in portraits if sum(len(rows) for rows in portrait.states.values()) > 2]
    if not drawn:
        return None
    import torch

    from unbackdoor.pipeline.studies import plane

    layer, perturbed = next(((item.layer, True) for item in drawn if item.perturbed), (drawn[0].layer, False))
    drawn = [portrait for portrait in drawn if portrait.layer == layer]
    states = {
        portrait.model: {kind: torch.tensor(rows) for kind, rows in portrait.states.items()} for portrait in drawn
    }
    roles = {portrait.model: portrait.role for portrait in drawn}
    return {**plane(states, roles, layer), "perturbed": perturbed}
