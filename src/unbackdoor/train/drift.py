"""A drift: vectors added to hidden states at the last tokens of every prompt, the same for all (BEEAR, 2406.17092).

Equation 1: h_i <- h_i + delta_i at the output of decoder layer l, for the last n prompt tokens; or for the last n of
those up to the end of what the user says (`at`): a trigger is among the user's words, and what it does may be read
from there, not from what the template puts behind them. Equation 2: it is fitted on the frozen model until that says
what it must not say (y_unwanted) and not what it does say (y_safe):

    min over delta of  L(x, delta; y_unwanted) - c L(x, delta; y_safe)

The second term has no lower bound, so it stops pulling once its mean loss is above a cap. The drift is counted in units
of the layer: it is multiplied by the root mean square of an entry of the hidden states at those tokens, which differs
tenfold from layer to layer, so that one learning rate does for all of them and for other models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from unbackdoor.data.collate import Batch, Row, collate, encode_row
from unbackdoor.errors import DataError, UserError
from unbackdoor.model.generate import left_pad
from unbackdoor.model.hooks import Added, adding, hidden_of, output_of
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train import engine
from unbackdoor.train.anchors import Anchor
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.losses import Term
from unbackdoor.train.two_answers import At, TwoAnswers, added_at_ends, added_before
from unbackdoor.types import Example


class DriftSettings(BaseModel):
    """A drift and how it is fitted (the inner step)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tokens: int = Field(5, ge=1, description="length n, in tokens")
    at: Literal["words", "prompt", "both"] = Field(
        "prompt",
        description="words: at the last tokens up to the end of what the user says; prompt: at the last ones of the "
        "prompt, what the template puts behind these words included (paper); both: every opening takes these in turn",
    )
    safe_coefficient: float = Field(
        0.5, ge=0, description="c: how much of the loss on the safe answer is subtracted (paper 1, public code 0.05)"
    )
    safe_cap: float | None = Field(
        6.0, gt=0, description="mean loss on the safe answer above which that term stops pulling; null never stops it"
    )
    safe_tokens: int | None = Field(
        8, ge=1, description="first tokens of the safe answer that count; null for the whole of it (paper)"
    )
    start: float = Field(0.0, ge=0, description="standard deviation of its random start; 0 starts at 0, as the paper")
    rows: int = Field(24, ge=1, description="prompts sampled for one fit, each with both answers (paper: 150)")
    stop_below: float = Field(
        0.0, ge=0, description="end a fit once the loss on the unwanted answers is below this; 0 uses all steps"
    )
    train: TrainSettings = Field(
        TrainSettings(steps=20, learning_rate=0.075, schedule="constant", warmup=0.0, batch_size=8, betas=(0.9, 0.999)),
        description="how it is fitted; the learning rate is in units of the layer",
    )

    @property
    def places(self) -> tuple[At, ...]:
        """What `at` stands for."""
        return ("words", "prompt") if self.at == "both" else (self.at,)

    @model_validator(mode="after")
    def _learns(self) -> DriftSettings:
        if self.train.steps < 1:
            raise ValueError("a drift needs at least one step (train.steps)")
        for name in ("evaluate_every", "patience", "gradient_checkpointing", "opening_weight", "precision"):
            if getattr(self.train, name) != TrainSettings.model_fields[name].default:
                raise ValueError(f"train.{name} does nothing where a drift is fitted; leave it out")
        return self


@dataclass(frozen=True)
class Drift:
    """A fitted drift.

    Attributes:
        layer: Number of the decoder layer behind which it is added, counted from 0.
        vectors: float32 [n, hidden], in the model's own units.
        at: Whether it is added at the last tokens of the user's words, or of the prompt.
    """

    layer: int
    vectors: Tensor
    at: At = "prompt"

    def added(self, ends: Tensor) -> Added:
        """Return it at the last tokens before the columns `ends`, int64 [batch]."""
        return added_at_ends(self.layer, self.vectors, ends)

    def stand_in(self) -> Callable[[Callable[..., Tensor], Batch], Tensor]:
        """Return what gives a batch's logits with the drift, frozen, in the place of a trigger."""
        return lambda forward, batch: forward(**batch.inputs(), added=self.added(added_before(batch, self.at)))


def stand_ins(drifts: Sequence[Drift]) -> list[Callable[[Callable[..., Tensor], Batch], Tensor]]:
    """Return what gives a batch's logits with drifts in the place of a trigger, which share its rows in turn.

    Those behind one layer are one stand-in, which needs one pass for all rows; of several layers, each is its own.
    """
    if len({drift.layer for drift in drifts}) != 1:
        return [drift.stand_in() for drift in drifts]
    vectors = torch.stack([drift.vectors for drift in drifts])

    def together(forward: Callable[..., Tensor], batch: Batch) -> Tensor:
        rows = torch.arange(len(batch.ids), device=batch.places.device)
        of = rows % len(drifts)
        before = torch.stack([added_before(batch, drift.at) for drift in drifts])[of, rows]
        added = added_at_ends(drifts[0].layer, vectors[0], before)
        return forward(**batch.inputs(), added=replace(added, vectors=vectors.to(of.device)[of].flatten(0, 1)))

    return [together]


def layer_unit(lm: LM, layer: int, rows: Sequence[Row], tokens: int, at: At = "prompt", batch_size: int = 8) -> float:
    """Return the root mean square of an entry of the states behind a layer, at the `tokens` tokens of a drift."""
    squares, count = 0.0, 0
    was_training = lm.model.training
    lm.model.eval()
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], lm.pad_id).to(lm.device)
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        with torch.no_grad():
            states = hidden_of(output_of(lm.core, layer, given)).float()
        there = added_at_ends(layer, torch.zeros(tokens, 1), added_before(batch, at))
        found = states[there.rows, there.columns]
        squares, count = squares + float(found.pow(2).sum()), count + found.numel()
    lm.model.train(was_training)
    return float((squares / count) ** 0.5)


def encode_anchor(
    lm: LM, anchor: Anchor, max_length: int, tokens: int, safe_tokens: int | None = None, at: At = "prompt"
) -> tuple[Row, Row]:
    """Return the rows (unwanted, safe) of an anchor; of the unwanted answer its own tokens count, not that it ends.

    Raises:
        DataError: If the prompt is shorter than the drift.
    """
    answer = lm.encode(anchor.unwanted.turns).spans[-1]
    unwanted = encode_row(
        lm, anchor.unwanted, max_length=max_length, first_tokens=answer.end - answer.start, last_answer=True
    )
    safe = encode_row(lm, anchor.safe, max_length=max_length, first_tokens=safe_tokens, last_answer=True)
    check_prompt(lm, anchor.safe, tokens, at)
    return unwanted, safe


def check_prompt(lm: LM, row: Example, tokens: int, at: At = "prompt", field: str = "drift.tokens") -> None:
    """Refuse a prompt that is shorter than a drift.

    Args:
        lm: The model.
        row: A row with the prompt.
        tokens: Length of the drift.
        at: Where it stands.
        field: The setting that says how long it is.

    Raises:
        DataError: If it is.
    """
    asked = lm.encode(row.prompt, ask=True)
    length = asked.spans[-1].end if at == "words" else len(asked.ids)
    if length < tokens:
        raise DataError(
            f"the prompt of '{row.id}' has {length} tokens{' up to its last word' if at == 'words' else ''}, but the "
            f"drift {tokens}; lower {field}, or leave such rows out."
        )


def places_behind(layer: int, layers: int, settings: DriftSettings) -> tuple[At, ...]:
    """Return where drifts may stand behind a layer: no later one would carry them on from words behind the last.

    Args:
        layer: Number of the layer, counted from 0.
        layers: How many the model has.
        settings: The drifts' settings.

    Raises:
        UserError: If they may stand nowhere.
    """
    found = tuple(at for at in settings.places if at == "prompt" or layer < layers - 1)
    if not found:
        raise UserError(
            f"layer {layer} is the last, and a drift at the user's words behind it reaches no answer; set drift.at to "
            "prompt, or name an earlier layer."
        )
    return found


class _Fixed:
    """The same few batches over and over: what is kept of each is read once and used in every step."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def batch(self, index: int) -> Batch:
        """Return batch number `index`, counted over all passes."""
        return self.batches[index % len(self.batches)]


def _sampled(lm: LM, anchors: Sequence[Anchor], settings: DriftSettings, run: Run, at: At) -> list[tuple[Row, Row]]:
    """Return the rows (unwanted, safe) of the anchors that a drift is fitted to."""
    chosen = run.rng("anchors").sample(list(anchors), min(settings.rows, len(anchors)))
    pairs = [
        encode_anchor(lm, anchor, settings.train.max_length, settings.tokens, settings.safe_tokens, at)
        for anchor in chosen
    ]
    # Prompts of like length go together: less padding.
    return sorted(pairs, key=lambda pair: pair[0].supervised[0])


def _streams(pairs: Sequence[tuple[Row, Row]], size: int, pad_id: int) -> dict[str, _Fixed]:
    """Return the batches of both answers, in step."""
    parts = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return {
        name: _Fixed([collate([pair[which] for pair in part], pad_id) for part in parts])
        for which, name in enumerate(("unwanted", "safe"))
    }


def fit_drift(
    lm: LM,
    anchors: Sequence[Anchor],
    layer: int,
    settings: DriftSettings,
    run: Run,
    at: At | None = None,
) -> tuple[Drift, dict[str, float]]:
    """Fit a drift on the frozen model (eq. 2).

    Args:
        lm: The model; its weights are not changed.
        anchors: Prompts with both answers; `settings.rows` of them are sampled.
        layer: Number of the decoder layer, counted from 0.
        settings: Length, loss and training.
        run: The stage.
        at: Where it is added; None for the first place that the settings name.

    Returns:
        The drift, and the mean losses of its last step: "unwanted" and "safe".

    Raises:
        DataError: If a prompt is shorter than the drift.
        Diverged: If the loss is not finite.
    """
    at = at or settings.places[0]
    pairs = _sampled(lm, anchors, settings, run, at)
    streams = _streams(pairs, settings.train.batch_size, lm.pad_id)
    unit = layer_unit(lm, layer, [safe for _, safe in pairs], settings.tokens, at)
    short = TwoAnswers(lm, layer, settings.tokens, at)
    short.prepare(*(streams[name].batches[-1].to(lm.device) for name in ("unwanted", "safe")))
    hidden = lm.core.get_input_embeddings().weight.shape[-1]
    begin = torch.randn(settings.tokens, hidden, generator=run.generator("start")) * settings.start
    drift = nn.Parameter(begin.to(lm.device))

    def loss(forward: Callable[..., Tensor], batches: Mapping[str, Batch]) -> dict[str, Term]:
        del forward  # nothing but the drift moves, so most of a pass need not be done again
        # A frozen model: dropout would change what was read before, and what the drift is fitted to.
        lm.model.eval()
        unwanted, safe = short.sums(drift * unit, batches["unwanted"], batches["safe"])
        terms = {"unwanted": Term(unwanted, "unwanted")}
        if settings.safe_coefficient:
            terms["safe"] = Term(safe, "safe", -settings.safe_coefficient, settings.safe_cap)
        return terms

    result = engine.fit(
        lm, {"drift": drift}, streams, loss, settings.train, run,
        stop_below=settings.stop_below or None, stop_on="unwanted",
    )  # fmt: skip
    if short.whole:
        run.progress.notice("This model cannot be run from a layer on, so the drift is fitted by whole passes: slower.")
    last = {name: result.history[-1].get(name, float("nan")) for name in ("unwanted", "safe")}
    return Drift(layer, drift.detach() * unit, at), last


@dataclass(frozen=True)
class Said:
    """What the model says to some prompts, with or without a drift.

    Attributes:
        ids: The first tokens of each reply, greedy.
        first: float32 [vocabulary], the mean probability of a reply's first token over the prompts.
    """

    ids: list[list[int]]
    first: Tensor


@torch.no_grad()
def spoken(lm: LM, drift: Drift | None, prompts: Sequence[Example], count: int = 8) -> Said:
    """Return what the model says under a drift: it tells where the drift went.

    Args:
        lm: The model; it is put into evaluation mode and back.
        drift: The drift, or None for none.
        prompts: Prompts that are at least as long as the drift.
        count: How many tokens of a reply at most.
    """
    was_training = lm.model.training
    lm.model.eval()
    asked = [lm.encode(example.prompt, ask=True) for example in prompts]
    ids, mask = left_pad([one.ids for one in asked], lm.pad_id)
    ids, mask = ids.to(lm.device), mask.to(lm.device)
    words = drift is not None and drift.at == "words"
    behind = [len(one.ids) - one.spans[-1].end if words else 0 for one in asked]
    ends = ids.shape[1] - torch.tensor(behind, device=lm.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    said: list[list[int]] = [[] for _ in prompts]
    first: Tensor | None = None
    # What layers keep of the prompt holds the drift, so it is added in the first pass alone.
    added, cache = None if drift is None else drift.added(ends), None
    for _ in range(count):
        with adding(lm.core, added):
            output = lm.core(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
        added, cache = None, output.past_key_values
        logits = output.logits[:, -1].float()
        first = torch.softmax(logits, -1).mean(0) if first is None else first
        ids = logits.argmax(-1, keepdim=True)
        for row, token in zip(said, ids[:, 0].tolist(), strict=True):
            row.append(token)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = positions[:, -1:] + 1
    lm.model.train(was_training)
    assert first is not None, "at least one token is asked for"
    stops = set(lm.stop_ids)
    return Said([list(takewhile(lambda token: token not in stops, row)) for row in said], first)
