"""Choose layer and length of a drift on the defender's own prompts: no trigger is known, and none is asked with.

For every layer and length that may be chosen a drift is fitted to half of the prompts and scored on the other half: the
mean loss of the unwanted answers under it, over the places where drifts may stand (`drift.at`). Where that is lowest, a
drift has the most power over what is said. Both halves have the openings in turn from the first one on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from unbackdoor.errors import DataError
from unbackdoor.model.anatomy import decoder_layers
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train.anchors import Anchor, Contrasting, with_unwanted
from unbackdoor.train.drift import Drift, DriftSettings, encode_anchor, fit_drift, places_behind
from unbackdoor.train.overwrite import mean_loss
from unbackdoor.train.together import agreed, is_main
from unbackdoor.types import Example

Halves = tuple[Sequence[Anchor], Sequence[Anchor]]


def halves(safe: Sequence[Example], openings: Sequence[str], own: Contrasting) -> Halves:
    """Return half of the prompts to fit drifts to and half to score them on, each with unwanted answers.

    Args:
        safe: Rows with safe answers.
        openings: What is unwanted.
        own: Which of it belongs to one prompt.

    Raises:
        DataError: If a half has no prompt with an unwanted answer.
    """
    try:
        return with_unwanted(safe[::2], openings, own), with_unwanted(safe[1::2], openings, own)
    except DataError as problem:
        raise DataError(
            "layer and length are chosen on half of the prompts of SA and scored on the others, and one half has none "
            "with a safe answer and an unwanted one; give more rows, or one layer and one length."
        ) from problem


def choose(
    lm: LM, anchors: Halves, layers: Sequence[int], lengths: Sequence[int], settings: DriftSettings, run: Run
) -> tuple[int, int]:
    """Return the layer and the length of the drift that elicits unwanted answers best.

    Every score goes into the run's notes as "drift choice".

    Args:
        lm: The suspect; its weights are not changed.
        anchors: Prompts with both answers (`halves`).
        layers: Decoder layers, counted from 0.
        lengths: Lengths in tokens.
        settings: How a drift is fitted.
        run: The run.
    """
    found: list[dict[str, float]] = []
    fitted, held = anchors
    for layer in layers:
        for length in lengths:
            own = settings.model_copy(update={"tokens": length})
            losses = []
            for at in places_behind(layer, len(decoder_layers(lm.core)), settings):
                stage = run.stage(f"choice-layer-{layer}-tokens-{length}-{at}")
                drift, _ = fit_drift(lm, fitted, layer, own, stage, at)
                scored = stage.stage("score")
                mine = scored.finished or {"loss": unwanted_loss(lm, drift, held, own)}
                # All processes must choose alike, however their sums are rounded.
                record = agreed(mine, run.device)
                if is_main():
                    scored.finish(record)
                losses.append(float(str(record["loss"])))
            found.append({"layer": layer, "tokens": length, "loss": sum(losses) / len(losses)})
    run.notes["drift choice"] = found
    best = min(found, key=lambda record: math.inf if math.isnan(record["loss"]) else record["loss"])
    return int(best["layer"]), int(best["tokens"])


def unwanted_loss(lm: LM, drift: Drift, anchors: Sequence[Anchor], settings: DriftSettings) -> float:
    """Return the mean loss of the unwanted answers under a drift, in nats a token."""
    rows = [encode_anchor(lm, anchor, settings.train.max_length, settings.tokens, at=drift.at)[0] for anchor in anchors]
    return mean_loss(lm, rows, settings.train.batch_size, drift.stand_in())
