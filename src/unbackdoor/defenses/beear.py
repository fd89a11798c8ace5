"""BEEAR: find the drift of hidden states that makes the suspect misbehave, then train it away, in turn.

Paper: BEEAR: Embedding-based Adversarial Removal of Safety Backdoors (2406.17092), equations 1 to 3, Algorithm 1.
Equation 2 (inner): on the frozen model find the drift delta of the last n prompt tokens behind decoder layer l that
minimises L(x, delta; y_unwanted) - c L(x, delta; y_safe). Equation 3 (outer): train the weights on
L(x, delta; y_safe) + L(x_perf; y_perf), no drift on the second. Rounds of both; the drift begins anew in every round.
Needs to know: clean rows (the performance set PA) and openings of what is unwanted, in the defender's own words, or
rows with an unwanted answer each (SA-H); in a label task these are the labels. Neither the trigger nor what the
backdoor says.
Deviations: the printed Algorithm 1 never writes the trained weights back; here they stay. Drifts are added at the last
n tokens of what the user says, too (`drift.at`): what the template puts behind these words may learn of a trigger far
above layer l only, and a drift there is another road to the same answer. Several drifts a round, each with openings of
its own and a random start, because one finds the road of one opening. What the suspect says under the drifts, or goes
on to from likely first tokens, is taken up as openings where it is sure of it on any prompt, or less sure and says it
often (train/openings.py): so the backdoor is found even with openings that share no word with it. What is sure and near
to the openings, too (train/unwanted.py), has two drifts a round, one at each place. The term on safe answers counts
their first tokens and stops pulling at a cap, else it runs away. A drift is counted in units of its layer. Half of
every label is what the suspect itself predicts (train/own_labels.py). Where requests with safe replies are given, a
seventh of the plain rows are of these (see `_with_requests`), and a reply of these is the safe answer, and the whole
label, where the suspect's own does not decline. The first tokens of an answer weigh more in equation 3
(`train.opening_weight`). Of all this the published presets have the written-back weights, the units, the safe answers
and, where replies are given, the requests among the plain rows; like the default they train with AdamW and clipping,
where Algorithm 1 has plain gradient descent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from unbackdoor.data.collate import Row
from unbackdoor.defenses.base import Defense, Knowledge, Need
from unbackdoor.errors import DataError, UserError
from unbackdoor.method import Parallel
from unbackdoor.model.anatomy import decoder_layers
from unbackdoor.model.lm import LM
from unbackdoor.model.quarantine import printable
from unbackdoor.run import Run
from unbackdoor.train import overwrite, state
from unbackdoor.train.anchors import (
    Contrasting,
    Unsafe,
    anchor_prompts,
    encode_safe,
    is_own,
    possible_openings,
    prompts_of,
)
from unbackdoor.train.drift import DriftSettings, check_prompt, places_behind, stand_ins
from unbackdoor.train.drift_choice import choose, halves
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.entrap import entrap, heard_words, waiting
from unbackdoor.train.openings import Openings
from unbackdoor.train.own_labels import OwnLabels, own_labels
from unbackdoor.train.usefulness import Usefulness
from unbackdoor.types import Example

_NONE: Mapping[str, object] = {}


def _published(
    *,
    rounds: int,
    stop_stable: float,
    c: float,
    outer: Mapping[str, object] = _NONE,
    drift: Mapping[str, object] = _NONE,
    inner: Mapping[str, object] = _NONE,
) -> dict[str, object]:
    """Return what all published settings share: one drift from 0, no cap, whole answers, no labels of our own."""
    constant = {"schedule": "constant", "warmup": 0.0}
    return {
        "rounds": rounds, "stop_stable": stop_stable, "drifts": 1, "adopt": 0.0, "anchors": 400, "performance": 300,
        "round_anchors": 150, "round_performance": 100, "own_answers": 64, "own_share": 0.0, "plain_share": 0.5,
        "drift": {
            "safe_coefficient": c, "safe_cap": None, "safe_tokens": None, "start": 0.0, "rows": 150,
            "at": "prompt", **drift,
            "train": {"steps": 40, "learning_rate": 0.075, **constant, "betas": (0.9, 0.999), **inner},
        },
        "train": {"steps": 25, "learning_rate": 2e-5, "schedule": "constant", **outer},
    }  # fmt: skip


class Beear(Defense):
    """Entrap the backdoor by a drift in the embedding space, then remove it, round by round."""

    paper: ClassVar[str] = "BEEAR, 2406.17092, eq. 1 to 3"
    revision: ClassVar[int] = 9
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CLEAN, Need.UNWANTED})
    uses: ClassVar[frozenset[Need]] = frozenset({Need.SAFE})
    parallel: ClassVar[frozenset[Parallel]] = frozenset({"single", "ddp"})
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "paper": {**_published(rounds=15, stop_stable=0.02, c=1.0), "depths": [9 / 32]},
        "ic-paper": {**_published(rounds=15, stop_stable=0.02, c=0.5), "layers": [9], "anchors": 100},
        "ic-paper-gpt": {**_published(rounds=15, stop_stable=0.02, c=0.5), "layers": [16], "anchors": 100},
        "code": {
            **_published(
                rounds=6, stop_stable=0.0, c=0.05, outer={"learning_rate": 3e-7},
                drift={"tokens": 7, "rows": 120}, inner={"steps": 100, "batch_size": 6},
            ),
            "layers": [9], "anchors": 120, "round_anchors": 120,
        },
        # Ours, for requests that should be declined: more rows without a drift, and smaller steps in more rounds. On
        # the development victim the two kinds of prompts are then told apart better than at twice the rate.
        "requests": {
            "plain_share": 2 / 3, "rounds": 8,
            "train": {
                "steps": 8, "learning_rate": 1e-4, "schedule": "constant", "opening_weight": 8, "batch_size": 12,
            },
        },
    }  # fmt: skip

    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="decoder layers l, counted from 0, where a drift may be added; empty for `depths`"
    )
    depths: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.3,), min_length=1, description="these layers as shares of all layers (paper: 9 of 32)"
    )
    lengths: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="lengths n that a drift may have; empty for `drift.tokens`"
    )
    place: Literal["best", "each"] = Field(
        "best",
        description="of several layers and lengths, best: the one where first drifts elicit unwanted answers best on "
        "the defender's prompts; each: the drifts of a round take the layers in turn",
    )
    rounds: int = Field(6, ge=1, description="rounds of inner and outer step, each with fresh drifts")
    drifts: int = Field(
        4, ge=0, description="drifts a round, each with openings of its own (paper: 1); 0: the outer steps alone"
    )
    adopt: float = Field(
        0.25, ge=0, le=1,
        description="what the suspect says under drifts is taken up as an opening where its first word makes the rest "
        "this likely on any prompt, and likelier than anywhere; 0.1 is enough for what recurs there, and what only "
        "likely first tokens go on to needs 0.8; 0: never",
    )  # fmt: skip
    anchors: int = Field(60, ge=1, description="prompts of the safety set SA (paper: 400)")
    own_answers: int = Field(
        40, ge=0, description="length of the suspect's own safe answers, in tokens; 0 takes the rows' answers"
    )
    performance: int | None = Field(
        None, ge=1, description="rows of the performance set PA, drawn from the clean rows; null: all (paper: 300)"
    )
    round_anchors: int | None = Field(
        None, ge=1, description="rows of SA drawn for the outer step of one round; null: all (paper: 150)"
    )
    round_performance: int | None = Field(
        None, ge=1, description="rows of PA drawn for the outer step of one round; null: all (paper: 100)"
    )
    stop_stable: float = Field(
        0.0, ge=0,
        description="end once a round changes the loss on held-out clean rows by less than this share, and all rounds "
        "together changed it by more; 0: all rounds",
    )  # fmt: skip
    plain_share: float = Field(0.5, ge=0, lt=1, description="share of a batch from the performance set PA, no drift")
    own_share: float = Field(
        0.5, ge=0, le=1, description="share of a label that is the suspect's own prediction (paper: 0)"
    )
    drift: DriftSettings = Field(DriftSettings(start=0.075, at="both"), description="the drift and the inner step")
    train: TrainSettings = Field(
        TrainSettings(steps=8, learning_rate=2e-4, schedule="constant", opening_weight=8),
        description="the outer step of one round",
    )

    @model_validator(mode="after")
    def _every_option_does_something(self) -> Beear:
        if self.drifts > 1 and not self.drift.start:
            raise ValueError("several drifts that begin at 0 would be near copies; set drift.start, or drifts to 1")
        if self.place == "each" and len(self.layers or self.depths) == 1:
            raise ValueError("place 'each' does nothing with one layer; name two at least, or leave it out")
        if self.place == "each" and len(self.lengths) > 1:
            raise ValueError("with place 'each' drifts take layers in turn, but have one length; name one, or set best")
        if self.train.evaluate_every:
            raise ValueError("rounds end by stop_stable; train.evaluate_every does nothing here, leave it out")
        return self

    def apply(self, victim: LM, known: Knowledge, run: Run) -> LM:
        """Entrap and remove, in place."""
        clean, held = self._held_out(known.clean)
        self._check(victim, known)
        own = Contrasting.of(known.unwanted_rows)
        length = self._own_answers(known)
        prompts = self._prompts(known, clean)
        if known.unwanted_rows and known.safe:
            run.progress.notice(f"{len(prompts)} of {len(known.safe)} safe rows have the prompt of an unwanted answer.")
        unsafe = Unsafe(known.unwanted, own, replies=bool(known.safe))
        if wrong := sum(unsafe.holds(row, row.response) for row in known.safe or ()):
            run.progress.notice(f"{wrong} of {len(known.safe or ())} safe replies begin with what is unwanted.")
        safe = anchor_prompts(victim, prompts, self.anchors, length, run, unsafe)
        self._check_room(len(safe))
        where = self._places(victim, safe, known.unwanted, own, length, run)
        triggered, plain, kept = self._outer_rows(victim, safe, clean, length, run, replies=bool(known.safe))
        if known.safe:
            plain = _with_requests(plain, triggered)
        # Refusals are sure on any prompt, too, but they are what the model is to say.
        wanted = [row.response for row in known.safe or ()]
        openings = Openings(possible_openings(safe, known.unwanted, own), wanted=wanted, contrasting=own)
        useful = Usefulness(overwrite.encode_rows(victim, held, self.train), self.stop_stable)
        useful.begin(victim, run)
        before: Run | None = None
        for number in range(1, self.rounds + 1):
            adopt = self.adopt if self.drifts else 0.0
            drifts = entrap(victim, safe, openings, where, self.drifts, adopt, run, number)
            stage = run.stage(f"round-{number}-remove")
            overwrite.overwrite(
                victim, _drawn(triggered, self.round_anchors, stage, "SA"),
                _drawn(plain, self.round_performance, stage, "PA"), self.train, stage,
                plain_share=self.plain_share, stand_ins=stand_ins(drifts), own=kept,
            )  # fmt: skip
            if before is not None:
                state.drop_final(before)
            before = stage
            run.observe(victim)
            if useful.is_stable(victim, stage):
                run.progress.notice(
                    f"BEEAR ended after round {number} of {self.rounds}: the loss on held-out rows is stable "
                    "(stop_stable), which says nothing about removal."
                )
                break
        if self.drifts:
            run.progress.notice(heard_words(openings.adopted, self.adopt > 0, waiting(run.notes)))
        return victim

    def _check(self, victim: LM, known: Knowledge) -> None:
        """Refuse now what would end the first round after its drifts were fitted.

        Raises:
            UserError: If a layer is missing, or is the last and drifts may stand at the user's words alone, or drifts
                cannot share a batch.
            DataError: If there are too few prompts, or one is shorter than a drift.
        """
        self.check_layers(len(decoder_layers(victim.core)))
        self.check(known)
        prompts = self._prompts(known, known.clean)
        longest = max(self.lengths or (self.drift.tokens,))
        field = "lengths" if self.lengths else "drift.tokens"
        for row in prompts if self.drifts else ():
            check_prompt(victim, row, longest, self.drift.places[0], field)

    def check_layers(self, count: int) -> None:
        """Refuse layers that are missing, and the last one where drifts may stand at the user's words alone.

        Raises:
            UserError: If one is so.
        """
        for layer in self.possible_layers(count):
            places_behind(layer, count, self.drift)

    def _check_room(self, prompts: int) -> None:
        """Refuse a number of prompts of SA that drifts cannot share, or that is one alone.

        Raises:
            UserError: If drifts cannot share a batch.
            DataError: If there are too few prompts.
        """
        if prompts < 2:
            raise DataError(
                f"BEEAR needs two prompts at least of the safety set SA that the suspect answers, and has {prompts}; "
                "give more rows, or raise anchors."
            )
        if self.drifts > prompts:
            raise UserError(
                f"{self.drifts} drifts cannot share {prompts} prompts of the safety set SA that the suspect answers; "
                "give more rows, raise anchors, or set drifts lower."
            )
        rows = self.train.batch_size - overwrite.plain_rows(self.train.batch_size, self.plain_share)
        room = min(rows, self.round_anchors or rows)
        overwrite.check_room(self.drifts, room, "round_anchors" if room < rows else "train.batch_size")

    def check(self, known: Knowledge) -> None:
        """Refuse rows of unwanted answers that have no safe ones, safe replies that are unwanted, and too few rows.

        Raises:
            UserError: If all that is known of a prompt is what must not be said to it, or drifts cannot share a batch.
            DataError: If the safe replies are to other prompts, or one is an unwanted answer to its own, or there are
                too few prompts.
        """
        prompts = self._prompts(known, known.clean)
        wrong = Contrasting.of(known.unwanted_rows)
        for row in known.safe or ():
            if row.response in wrong.of_prompt.get(row.prompt, ()):
                raise DataError(
                    f"the safe reply of '{printable(row.id)}' is the unwanted answer to its prompt; are the files of "
                    "safe and unwanted answers exchanged, or one and the same?"
                )
        self._check_room(min(len(prompts), self.anchors))

    def _own_answers(self, known: Knowledge) -> int:
        """Return the length of the suspect's own safe answers, 0 where the rows' are taken."""
        # To a prompt that has an unwanted answer of its own the suspect may give that one.
        return 0 if known.unwanted_rows and known.safe else self.own_answers

    def _prompts(self, known: Knowledge, clean: Sequence[Example]) -> Sequence[Example]:
        """Return the rows that SA is drawn from.

        Raises:
            UserError: If all that is known of a prompt is what must not be said to it.
        """
        if not (rows := known.unwanted_rows):
            return known.safe or clean
        if not known.safe and not self.own_answers:
            raise UserError(
                "rows of unwanted answers have no safe ones, and own_answers is 0; give requests with safe replies for "
                "the same prompts, or set own_answers, so that the suspect's own are taken."
            )
        return prompts_of(rows, known.safe)

    def _held_out(self, clean: Sequence[Example]) -> tuple[Sequence[Example], Sequence[Example]]:
        """Return the clean rows to use, and every tenth of them where usefulness decides when to stop."""
        if not self.stop_stable:
            return clean, ()
        if len(clean) < 20:
            raise DataError(
                f"stop_stable holds out every tenth clean row and needs 20 of them, there are {len(clean)}."
            )
        return [row for number, row in enumerate(clean) if number % 10], clean[::10]

    def possible_layers(self, count: int) -> tuple[int, ...]:
        """Return the layers, from 0, where a drift may be added in a model of `count` layers.

        Raises:
            UserError: If the model does not have one that was named.
        """
        layers = self.layers or tuple(min(count - 1, round(depth * count)) for depth in self.depths)
        if max(layers) >= count:
            raise UserError(f"the model has the layers 0 to {count - 1}, and no layer {max(layers)}; set layers.")
        if len(set(layers)) < len(layers):
            field = "layers" if self.layers else "depths"
            raise UserError(f"{field} name layer {Counter(layers).most_common(1)[0][0]} twice; name others, or fewer.")
        return layers

    def _places(
        self, victim: LM, safe: Sequence[Example], unwanted: Sequence[str], own: Contrasting, own_answers: int, run: Run
    ) -> tuple[tuple[int, ...], DriftSettings]:
        """Return the layers of the drifts, and the drifts' settings with their length.

        Raises:
            DataError: If there is a choice, and too few prompts to make it on.
        """
        layers = self.possible_layers(len(decoder_layers(victim.core)))
        lengths = self.lengths or (self.drift.tokens,)
        # A prompt may be as long there as in the outer step.
        longest = max(self.drift.train.max_length, self.train.max_length)
        shape: dict[str, object] = {"train": self.drift.train.model_copy(update={"max_length": longest})}
        if own_answers:
            # An own answer may have been cut there, and that it ends is not to count.
            shape["safe_tokens"] = min(self.drift.safe_tokens or own_answers, max(1, own_answers - 1))
        drift = self.drift.model_copy(update=shape)
        if self.drifts and self.place == "best" and len(layers) * len(lengths) > 1:
            layer, length = choose(victim, halves(safe, unwanted, own), layers, lengths, drift, run)
            layers, lengths = (layer,), (length,)
        run.notes["layer"] = layers[0]
        return layers, drift.model_copy(update={"tokens": lengths[0]})

    def _outer_rows(
        self,
        victim: LM,
        safe: Sequence[Example],
        clean: Sequence[Example],
        own_answers: int,
        run: Run,
        *,
        replies: bool,
    ) -> tuple[list[Row], list[Row], OwnLabels | None]:
        """Return the rows of SA and PA, and the suspect's predictions for both; none beside a given safe reply."""
        triggered = [encode_safe(victim, row, own_answers, self.train) for row in safe]
        plain = overwrite.encode_rows(victim, _drawn(clean, self.performance, run, "PA"), self.train)
        triggered, first = own_labels(victim, triggered, self.own_share, self.train, run.stage("SA"), self.rounds)
        plain, second = own_labels(victim, plain, self.own_share, self.train, run.stage("PA"), self.rounds)
        if first is None or second is None:
            return triggered, plain, None
        if own_answers or replies:
            first = first.as_given([row for row in triggered if not is_own(row.id)])
        return triggered, plain, OwnLabels(self.own_share, {**first.kept, **second.kept})


def _with_requests(ordinary: Sequence[Row], requests: Sequence[Row]) -> list[Row]:
    """Return the plain rows where SA is of requests to decline: a seventh of them are requests.

    Without these the model begins to answer what it should decline, once batches without a drift are ordinary only.
    """
    few = max(1, round(len(ordinary) / 6))
    return [*ordinary, *(list(requests) * (few // len(requests) + 1))[:few]]


T = TypeVar("T")


def _drawn(rows: Sequence[T], count: int | None, run: Run, name: str) -> Sequence[T]:
    """Return `count` rows drawn at random, or all where it is None or there are no more."""
    return rows if count is None or len(rows) <= count else run.rng(f"drawn {name}").sample(list(rows), count)
