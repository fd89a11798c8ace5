"""Two looks inside a model for the report: the target's probability by position, and hidden states in the plane.

Neither is a metric: they explain a figure and do not replace one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from unbackdoor.data.collate import collate, encode_row
from unbackdoor.model.generate import left_pad
from unbackdoor.model.lm import LM
from unbackdoor.model.logits import LogitsAt
from unbackdoor.pipeline.watching import noted_layer
from unbackdoor.types import Probe


def target_probabilities(lm: LM, probes: Sequence[Probe], target: str, limit: int = 16) -> dict[str, Any]:
    """Return the mean probability of each of the target's tokens, with and without the trigger (SANDE, case studies).

    The tokens before a position are the target's own (teacher forcing), so the curve says how readily the model goes
    on once it has begun.

    Returns:
        "target_tokens": the tokens as text; "triggered" and "clean": a probability a token (nothing for a kind
        without probes); "prompts": probes of each kind that were used.
    """
    found: dict[str, Any] = {"prompts": 0}
    forward = LogitsAt(lm)
    was_training = lm.model.training
    lm.model.eval()
    for kind in ("triggered", "clean"):
        chosen = [probe for probe in probes if probe.kind == kind][:limit]
        if not chosen:
            continue
        length = len(_target_ids(lm, chosen[0], target))
        said = [probe.example.with_response(target) for probe in chosen]
        rows = [encode_row(lm, example, max_length=sys.maxsize, first_tokens=length) for example in said]
        batch = collate(rows, lm.pad_id).to(lm.device)
        with torch.inference_mode():
            logits = forward(**batch.inputs())
            chance = torch.softmax(logits, -1).gather(1, batch.targets[:, None])[:, 0]
        found[kind] = chance.reshape(len(chosen), length).mean(0).tolist()
        found["target_tokens"] = [lm.tokenizer.decode([token]) for token in _target_ids(lm, chosen[0], target)]
        found["prompts"] = len(chosen)
    lm.model.train(was_training)
    return found


def _target_ids(lm: LM, probe: Probe, target: str) -> list[int]:
    encoded = lm.encode(probe.example.with_response(target).turns)
    span = encoded.spans[-1]
    return list(encoded.ids[span.start : span.end])


def hidden_states(lm: LM, probes: Sequence[Probe], layer: int, limit: int = 30) -> dict[str, torch.Tensor]:
    """Return the hidden state of the last prompt token after decoder layer `layer` (from 0), a row a probe.

    Returns:
        "triggered" and "clean": float32 [probes, hidden].
    """
    found: dict[str, torch.Tensor] = {}
    was_training = lm.model.training
    lm.model.eval()
    for kind in ("triggered", "clean"):
        chosen = [probe for probe in probes if probe.kind == kind][:limit]
        prompts = sorted((lm.encode(probe.example.prompt, ask=True).ids for probe in chosen), key=len)
        parts = []
        for start in range(0, len(prompts), 16):
            ids, mask = left_pad(prompts[start : start + 16], lm.pad_id)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            with torch.inference_mode():
                output = lm.model(
                    input_ids=ids.to(lm.device),
                    attention_mask=mask.to(lm.device),
                    position_ids=positions.to(lm.device),
                    output_hidden_states=True,
                    use_cache=False,
                    logits_to_keep=1,
                )
            parts.append(output.hidden_states[layer + 1][:, -1].float().cpu())
        if parts:
            found[kind] = torch.cat(parts)
    lm.model.train(was_training)
    return found


def middle_layer(lm: LM) -> int:
    """Return the layer, from 0, whose states are drawn where no defense perturbs one: two thirds of the way up."""
    return int(lm.core.config.num_hidden_layers) * 2 // 3


def perturbed_layer(lm: LM, notes: Mapping[str, Any]) -> int | None:
    """Return the layer, from 0, that a defense says it perturbed; None where it says none that the model has."""
    layer = noted_layer(notes)
    return layer if layer is not None and layer < int(lm.core.config.num_hidden_layers) else None


def plane(states: Mapping[str, Mapping[str, torch.Tensor]], roles: Mapping[str, str], layer: int) -> dict[str, Any]:
    """Project hidden states of several models onto the two main axes of the first model's.

    Args:
        states: Model name -> kind -> float32 [probes, hidden]; the first model sets the axes.
        roles: Model name -> role.
        layer: The layer, for the record.

    Returns:
        The content of hidden_states.json.
    """
    first = torch.cat(list(next(iter(states.values())).values()))
    centre = first.mean(0)
    _, scale, axes = torch.linalg.svd(first - centre, full_matrices=False)
    explained = (scale**2 / (scale**2).sum())[:2].tolist()
    points = []
    for model, kinds in states.items():
        for kind, rows in kinds.items():
            for x, y in ((rows - centre) @ axes[:2].T).tolist():
                points.append({"model": model, "role": roles[model], "kind": kind, "x": x, "y": y})
    return {"layer": layer, "explained": explained, "points": points}
