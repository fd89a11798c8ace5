"""Choose layer and length of a drift on the defender's own prompts: no trigger is known, and none is asked with.

For every layer and length that may be chosen a drift is fitted to half of the anchors and scored on the other half: the
mean loss of the unwanted answers under it, over the places where drifts may stand (`drift.at`). Where that is lowest, a
drift has the most power over what is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from unbackdoor.model.anatomy import decoder_layers
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train.anchors import Anchor
from unbackdoor.train.drift import Drift, DriftSettings, encode_anchor, fit_drift, places_behind
from unbackdoor.train.overwrite import mean_loss
from unbackdoor.train.together import agreed, is_main


def choose(
    lm: LM, anchors: Sequence[Anchor], layers: Sequence[int], lengths: Sequence[int], settings: DriftSettings, run: Run
) -> tuple[int, int]:
    """Return the layer and the length of the drift that elicits unwanted answers best.

    Every score goes into the run's notes as "drift choice".

    Args:
        lm: The suspect; its weights are not changed.
        anchors: Prompts with both answers, two at least.
        layers: Decoder layers, counted from 0.
        lengths: Lengths in tokens.
        settings: How a drift is fitted.
        run: The run.
    """
    found: list[dict[str, float]] = []
    for layer in layers:
        for length in lengths:
            own = settings.model_copy(update={"tokens": length})
            losses = []
            for at in places_behind(layer, len(decoder_layers(lm.core)), settings):
                stage = run.stage(f"choice-layer-{layer}-tokens-{length}-{at}")
                drift, _ = fit_drift(lm, anchors[::2], layer, own, stage, at)
                scored = stage.stage("score")
                mine = scored.finished or {"loss": unwanted_loss(lm, drift, anchors[1::2], own)}
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
