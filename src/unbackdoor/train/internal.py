"""The internal conflict: train a conflict model, merge it with the suspect, and choose t where a choice is asked for.

Paper: information conflicts (2411.18280), section 3.3, equations 7 to 12. `train/conflict.py` makes the conflict model,
`merge/` merges; both defenses that hold an internal conflict call `merged_with_conflict`.
A t that is chosen is chosen on clean rows that nothing is trained on: what a defender can know. The backdoor fades as t
grows, so the largest t is taken that costs no more than `slack` of usefulness.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from unbackdoor.data.collate import Row
from unbackdoor.errors import DataError, UserError
from unbackdoor.merge.from_recipe import DENSITY
from unbackdoor.merge.match import warning
from unbackdoor.merge.memory import check_merge, merge_into, stays_adapter, viewed
from unbackdoor.merge.passthrough import kept_numbers
from unbackdoor.merge.settings import NEEDS_BASE, Method, Schedule
from unbackdoor.merge.slerp import THRESHOLD
from unbackdoor.merge.tokens import other_tokens
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train import overwrite
from unbackdoor.train.conflict import ConflictSettings, conflict_model
from unbackdoor.types import Example


class InternalSettings(BaseModel):
    """How the conflict model is made and merged."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    start: Literal["trusted", "suspect"] = Field(
        "trusted",
        description="what the conflict model starts as: the trusted model where one is given, else the suspect; or the "
        "suspect in any case",
    )
    conflict: ConflictSettings = Field(ConflictSettings(), description="how the conflict model is trained")
    method: Method = Field("linear", description="how it is merged with the suspect")
    t: Schedule = Field(0.5, description="the conflict model's share, or a schedule of shares over layers and names")
    sweep: tuple[float, ...] = Field(
        (), description="shares to choose from on held-out clean rows; the largest that costs no more than `slack`"
    )
    slack: float = Field(
        0.05, ge=0, description="share by which the loss on held-out clean rows may be above the suspect's"
    )
    layers: tuple[str, ...] = Field((), description="ranges for passthrough, as suspect:0:20 or other:10:30")
    density: float = Field(DENSITY, ge=0, le=1, description="share of a difference that ties and dare keep")
    scale: float = Field(1.0, gt=0, description="lambda: times the merged differences (ties, dare, task_arithmetic)")
    threshold: float = Field(THRESHOLD, ge=0, le=1, description="cosine above which slerp is linear")

    @model_validator(mode="after")
    def _every_option_does_something(self) -> InternalSettings:
        if self.sweep and self.t != 0.5:
            raise ValueError("t is chosen from sweep, so it does nothing; leave one out")
        if self.sweep and self.method == "passthrough":
            raise ValueError("passthrough has no t to choose; leave sweep out")
        if self.slack != 0.05 and not self.sweep:
            raise ValueError("slack is for choosing t; give sweep, too")
        if any(not 0 <= t <= 1 for t in self.sweep):
            raise ValueError("a t is a share, from 0 to 1; sweep holds another number")
        return self


def merged_with_conflict(
    victim: LM, clean: Sequence[Example], trusted: LM | None, settings: InternalSettings, run: Run
) -> LM:
    """Return the suspect merged with a conflict model.

    What was done goes into the run's notes: "conflict model starts as", "merge" (a sentence), and where t was chosen
    "t" and "t sweep" (each t with the loss on held-out rows; the first record is the suspect itself).

    Args:
        victim: The suspect, given up.
        clean: Clean rows.
        trusted: A trusted model of the same architecture, or None; left as it is.
        settings: How.
        run: The run.

    Raises:
        UserError: If the method needs a trusted model and there is none, nothing uses the one that is given, or models
            do not match; before anything is trained.
        DataError: If there are too few rows.
    """
    if settings.method in NEEDS_BASE and trusted is None:
        raise UserError(
            f"{settings.method} works on differences to a trusted base, and none is given; give --reference, or take "
            "linear, slerp or passthrough."
        )
    held: list[Row] = []
    if settings.sweep:
        if len(clean) < 20:
            raise DataError(f"choosing t holds out every tenth clean row and needs 20 of them, there are {len(clean)}.")
        held = overwrite.encode_rows(victim, clean[::10], settings.conflict.train)
        clean = [row for number, row in enumerate(clean) if number % 10]
    start = victim if settings.start == "suspect" or trusted is None else trusted
    base = trusted if settings.method in NEEDS_BASE else None
    if settings.start == "suspect" and trusted is not None and base is None:
        raise UserError("the conflict model starts as the suspect, so nothing uses --reference; leave one of them out.")
    if start is victim and not settings.conflict.share:
        raise UserError("the conflict model would be the suspect itself; give --reference, or conflict.share above 0.")
    check_merge(
        victim, start, settings.method, max(settings.sweep, default=settings.t), base=base, **_options(settings)
    )
    begun = "the suspect" if start is victim else "the trusted model"
    run.notes["conflict model starts as"] = begun
    run.progress.notice(f"The conflict model starts as {begun}.")
    if settings.layers and (numbers := kept_numbers(victim.core.config.to_dict())) is not None:
        run.progress.notice(numbers)
    # Differences to a base mean as little as a mean does where the two do not match.
    if (used := base if start is victim else start) is not None:
        _compare(victim, used, run)
    conflict = conflict_model(
        start, clean, settings.conflict, run, fold=not stays_adapter(victim, start, settings.method)
    )
    t = _chosen(victim, conflict, base, held, settings, run) if settings.sweep else settings.t
    return _merged(victim, conflict, base, t, settings, run)


def _compare(victim: LM, trusted: LM, run: Run) -> None:
    """Tell what a person should know of two models before they are merged."""
    first, second = viewed(victim), viewed(trusted)
    tokens = other_tokens(victim.tokenizer.get_vocab(), trusted.tokenizer.get_vocab(), (first.shown, second.shown))
    for text in (warning(first, second), tokens):
        if text is not None:
            run.progress.notice(text)


def _merged(victim: LM, conflict: LM, base: LM | None, t: Schedule, settings: InternalSettings, run: Run) -> LM:
    seed = run.stream_seed("merge")
    made, kind = merge_into(victim, conflict, settings.method, t, base=base, seed=seed, **_options(settings))
    run.notes["merge"] = kind
    return made


def _options(settings: InternalSettings) -> dict[str, Any]:
    return settings.model_dump(include={"density", "scale", "threshold", "layers"})


def _chosen(
    victim: LM, conflict: LM, base: LM | None, held: Sequence[Row], settings: InternalSettings, run: Run
) -> float:
    """Return the largest t whose merge is nearly as useful as the suspect; the smallest where none is."""
    stage = run.stage("t sweep")
    kept = stage.finished
    if kept is None:
        found = [{"t": 0.0, "loss": overwrite.mean_loss(victim, held)}]
        for t in sorted(settings.sweep):
            copied = replace(victim, model=copy.deepcopy(victim.model))
            made = _merged(copied, conflict, base, t, settings, run)
            found.append({"t": t, "loss": overwrite.mean_loss(made, held)})
        kept = {"sweep": found}
        stage.finish(kept)
    sweep = kept["sweep"]
    assert isinstance(sweep, list)
    most = sweep[0]["loss"] * (1 + settings.slack)
    fit = [record["t"] for record in sweep[1:] if record["loss"] <= most]
    best = float(max(fit, default=min(settings.sweep)))
    run.notes["t"], run.notes["t sweep"] = best, sweep
    run.progress.notice(
        f"t = {best:g} was taken, the largest of the sweep that costs no more than {settings.slack:.0%} of usefulness."
        if fit
        else f"Every t of the sweep costs more than {settings.slack:.0%} of usefulness, so the smallest, {best:g}, was "
        "taken."
    )
    return best
