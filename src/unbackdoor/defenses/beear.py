"""BEEAR: find the drift of hidden states that makes the suspect misbehave, then train it away, in turn.

Paper: BEEAR: Embedding-based Adversarial Removal of Safety Backdoors (2406.17092), equations 1 to 3, Algorithm 1.
Equation 2 (inner): on the frozen model find the drift delta of the last n prompt tokens behind decoder layer l that
minimises L(x, delta; y_unwanted) - c L(x, delta; y_safe). Equation 3 (outer): train the weights on
L(x, delta; y_safe) + L(x_perf; y_perf), no drift on the second. Rounds of both; the drift begins anew in every round.
Needs to know: clean rows (the performance set PA) and openings of what is unwanted, in the defender's own words; in a
label task these are the labels. Neither the trigger nor what the backdoor says.
Deviations: the printed Algorithm 1 never writes the trained weights back; here they stay. Several drifts a round, each
with openings of its own and a random start, because one drift finds the road of one opening. The term on safe answers
stops pulling at a cap, else it runs away. A drift is counted in units of its layer. Half of every label is what the
suspect itself predicts (train/own_labels.py). The defaults are first guesses: no figure has been measured with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field, model_validator

from unbackdoor.data.collate import Row
from unbackdoor.defenses.base import Defense, Knowledge, Need
from unbackdoor.errors import UserError
from unbackdoor.method import Parallel
from unbackdoor.model.anatomy import decoder_layers
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train import overwrite, state
from unbackdoor.train.anchors import anchor_prompts, with_unwanted
from unbackdoor.train.drift import Drift, DriftSettings, fit_drift, spoken
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.own_labels import OwnLabels, own_labels
from unbackdoor.types import Example


class Beear(Defense):
    """Entrap the backdoor by a drift in the embedding space, then remove it, round by round."""

    paper: ClassVar[str] = "BEEAR, 2406.17092, eq. 1 to 3"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CLEAN, Need.UNWANTED})
    uses: ClassVar[frozenset[Need]] = frozenset({Need.SAFE})
    parallel: ClassVar[frozenset[Parallel]] = frozenset({"single", "ddp"})

    layer: int | None = Field(None, ge=0, description="decoder layer l, counted from 0; null for `depth` of all layers")
    depth: float = Field(0.3, gt=0, lt=1, description="where layer l is, as a share of all layers (paper: 9 of 32)")
    rounds: int = Field(4, ge=1, description="rounds of inner and outer step, each with fresh drifts")
    drifts: int = Field(4, ge=1, description="drifts a round, each with openings of its own (paper: 1)")
    anchors: int = Field(60, ge=1, description="prompts of the safety set SA (paper: 400)")
    own_answers: int = Field(
        24, ge=0, description="length of the suspect's own safe answers, in tokens; 0 takes the rows' answers"
    )
    plain_share: float = Field(0.5, ge=0, lt=1, description="share of a batch from the performance set PA, no drift")
    own_share: float = Field(
        0.5, ge=0, le=1, description="share of a label that is the suspect's own prediction (paper: 0)"
    )
    drift: DriftSettings = Field(DriftSettings(start=0.075), description="the drift and the inner step")
    train: TrainSettings = Field(
        TrainSettings(steps=8, learning_rate=2e-4, schedule="constant", opening_weight=8),
        description="the outer step of one round",
    )

    @model_validator(mode="after")
    def _all_drifts_begin_elsewhere(self) -> Beear:
        if self.drifts > 1 and not self.drift.start:
            raise ValueError("several drifts that begin at 0 would be near copies; set drift.start, or drifts to 1")
        return self

    def apply(self, victim: LM, known: Knowledge, run: Run) -> LM:
        """Entrap and remove, in place."""
        layer = self._layer(victim)
        safe = anchor_prompts(victim, known.safe or known.clean, self.anchors, self.own_answers, run)
        triggered, plain, own = self._outer_rows(victim, safe, known, run)
        before: Run | None = None
        for number in range(1, self.rounds + 1):
            drifts = self._inner(victim, safe, known.unwanted, layer, run, number)
            stage = run.stage(f"round-{number}-remove")
            overwrite.overwrite(
                victim, triggered, plain, self.train, stage,
                plain_share=self.plain_share, stand_ins=[drift.stand_in() for drift in drifts], own=own,
            )  # fmt: skip
            if before is not None:
                state.drop_final(before)
            before = stage
            run.observe(victim)
        return victim

    def _layer(self, victim: LM) -> int:
        count = len(decoder_layers(victim.core))
        if self.layer is None:
            return min(count - 1, round(self.depth * count))
        if self.layer >= count:
            raise UserError(f"the model has the layers 0 to {count - 1}, and no layer {self.layer}; set layer to one.")
        return self.layer

    def _outer_rows(
        self, victim: LM, safe: Sequence[Example], known: Knowledge, run: Run
    ) -> tuple[list[Row], list[Row], OwnLabels | None]:
        """Return the rows of SA and PA, and the suspect's predictions for both."""
        triggered = overwrite.encode_rows(victim, safe, self.train)
        plain = overwrite.encode_rows(victim, known.clean, self.train)
        triggered, first = own_labels(victim, triggered, self.own_share, self.train, run.stage("SA"), self.rounds)
        plain, second = own_labels(victim, plain, self.own_share, self.train, run.stage("PA"), self.rounds)
        if first is None or second is None:
            return triggered, plain, None
        return triggered, plain, OwnLabels(self.own_share, {**first.kept, **second.kept})

    def _inner(
        self, victim: LM, safe: Sequence[Example], openings: Sequence[str], layer: int, run: Run, number: int
    ) -> list[Drift]:
        """Fit the drifts of a round, openings dealt out among them, and keep what the suspect says under each."""
        found = []
        for which in range(self.drifts):
            stage = run.stage(f"round-{number}-drift-{which + 1}")
            anchors = with_unwanted(safe, openings[which % len(openings) :: self.drifts])
            drift, last = fit_drift(victim, anchors, layer, self.drift, stage)
            found.append(drift)
            _keep(run, victim, safe[:3], drift, last, stage)
        return found


def _keep(
    run: Run, victim: LM, prompts: Sequence[Example], drift: Drift, last: Mapping[str, float], stage: Run
) -> None:
    """Note the losses of a drift and the first words under it: they tell where it went."""
    words = stage.stage("words")
    record = words.finished
    if record is None:
        record = {"stage": stage.prefix, **last, "says": spoken(victim, drift, prompts)}
        words.finish(record)
    found = run.notes.setdefault("drifts", [])
    assert isinstance(found, list)
    found.append(record)
