"""Simulate and eliminate (SANDE): rounds of learning a parrot for a text, then overwriting what it does.

`sande` knows the whole target text, `sande_p` its first tokens; the rest is the same and lives here. One round is the
paper's two stages; several rounds, each with a fresh parrot, are our extension: the parrot of round one stands for the
easiest road to the target, not for every road. A few updates close the road of one parrot, and the rest of a long round
is spent on a closed road, so rounds are short and many (docs/development-victims.md has the figures).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from unbackdoor.data.collate import encode_row
from unbackdoor.model.lm import LM
from unbackdoor.run import Run
from unbackdoor.train import overwrite, soft_prompt, state
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.own_labels import own_labels
from unbackdoor.types import Example


class ParrotSettings(BaseModel):
    """The soft prompt that stands for the unknown trigger."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tokens: int = Field(8, ge=1, description="length n of the parrot")
    initialisation: soft_prompt.Initialisation = Field(
        "tokens", description="zeros (paper) or tokens: embeddings of random ordinary tokens"
    )
    position: soft_prompt.Position = Field(
        "spread", description="where in the user's words it stands: start, end, middle; spread: elsewhere in every row"
    )
    stop_below: float = Field(0.05, ge=0, description="a parrot with a lower loss is good enough; 0 uses all steps")
    train: TrainSettings = Field(
        TrainSettings(steps=100, learning_rate=1e-2, schedule="constant", warmup=0.0, batch_size=4),
        description="how the parrot is trained; steps are a limit, because a parrot that never says the target removes "
        "nothing, and the backdoor comes back (public code: 100 steps at 1e-3)",
    )

    @model_validator(mode="after")
    def _learns(self) -> ParrotSettings:
        if self.train.steps < 1:
            raise ValueError("a parrot needs at least one step (train.steps)")
        return self


PAPER_PARROT: dict[str, object] = {
    "tokens": 6,
    "initialisation": "zeros",
    "position": "start",
    "stop_below": 0.0,
    "train": {"steps": 100, "learning_rate": 1e-3, "batch_size": 4, "warmup": 0.03},
}
"""The public code's parrot: 6 tokens, zeros, at the front, learning rate 1e-3."""


def rounds_of_parrots(
    victim: LM,
    clean: Sequence[Example],
    texts: Sequence[str],
    *,
    first_tokens: int | None,
    rounds: int,
    parrots: int,
    plain_share: float,
    own_share: float,
    parrot: ParrotSettings,
    train: TrainSettings,
    run: Run,
) -> LM:
    """Run SANDE's two stages `rounds` times, in place.

    Args:
        victim: The suspect.
        clean: The defender's rows.
        texts: What a parrot must make the model say before the clean answer. In several rounds each has at least one
            parrot for every text, as far as the rows of a batch go; in one round parrots take the texts in turn, and
            the rows of one share several where there are fewer, as in the paper.
        first_tokens: How many tokens of the text are known (SANDE-P), or None for the whole text.
        rounds: Rounds of simulate and overwrite, each with fresh parrots.
        parrots: Parrots a round, learned from different starts and overwritten together.
        plain_share: Share of a batch of the overwriting that carries no parrot.
        own_share: Share of every label that is the suspect's own prediction without parrot.
        parrot: The parrot's shape and training.
        train: The overwriting of one round.
        run: The run; each round has two stages.
    """
    plain = overwrite.encode_rows(victim, clean, train)
    # Asked before a finished round is read back, so a resumed run has the same labels.
    plain, own = own_labels(victim, plain, own_share, train, run, rounds)
    room = min(len(plain), train.batch_size - overwrite.plain_rows(train.batch_size, plain_share))
    overwrite.check_room(parrots, room)
    if rounds > 1:
        parrots = max(parrots, min(len(texts), room))
    before: Run | None = None
    for number in range(1, rounds + 1):
        learned = []
        for which in range(1, parrots + 1):
            own_texts = _texts_of(texts, (number - 1) * parrots + which - 1, rounds * parrots)
            stage = run.stage(f"round-{number}-parrot-{which}")
            made = learn_parrot(victim, clean, own_texts, first_tokens, parrot, stage)
            learned.append(soft_prompt.stand_in(victim, made, parrot.position))
        stage = run.stage(f"round-{number}-overwrite")
        overwrite.overwrite(
            victim, plain, plain, train, stage,
            plain_share=plain_share, stand_ins=learned, own=own,
        )  # fmt: skip
        if before is not None:
            state.drop_final(before)
        before = stage
        run.observe(victim)
    _tell_of_silent_parrots(run, parrot)
    return victim


def _texts_of(texts: Sequence[str], turn: int, parrots: int) -> Sequence[str]:
    """Return what one of all rounds' parrots must make the model say: one text, several if parrots are fewer.

    A parrot that says one of several at random never comes below the entropy of that choice.
    """
    return texts[turn % len(texts) :: parrots]


def _tell_of_silent_parrots(run: Run, settings: ParrotSettings) -> None:
    """Say it where parrots never came to say the text: overwriting them removed nothing."""
    learned = _learned(run)
    silent = [record for record in learned if record["loss"] >= settings.stop_below > 0]
    if silent:
        run.progress.notice(
            f"{len(silent)} of {len(learned)} parrots did not come to say the target in {settings.train.steps} steps "
            f"(loss {min(record['loss'] for record in silent):.2g} and more, good below {settings.stop_below:g}), and "
            "overwriting such a parrot removes little; raise parrot.train.steps or parrot.train.learning_rate."
        )


def _learned(run: Run) -> list[dict[str, Any]]:
    """Return the list of what every parrot of a run came to, which goes into the run's notes."""
    found = run.notes.setdefault("parrots", [])
    assert isinstance(found, list)
    return found


def learn_parrot(
    lm: LM,
    clean: Sequence[Example],
    texts: Sequence[str],
    first_tokens: int | None,
    settings: ParrotSettings,
    run: Run,
) -> Tensor:
    """Learn one parrot on the frozen model (eq. 4) and return it, float32 [n, hidden].

    Rows share the texts in turn. The loss counts the text's own tokens only, not the clean answer after it, and nothing
    behind them is computed.
    """
    rows = []
    for number, example in enumerate(clean):
        text = texts[number % len(texts)]
        known = first_tokens if first_tokens is not None else length_of(lm, example, text)
        rows.append(
            encode_row(
                lm,
                example.with_response(text),
                max_length=settings.train.max_length,
                first_tokens=known,
                opening_weight=settings.train.opening_weight,
            )
        )
    batches = overwrite.stream(lm, rows, settings.train.batch_size, run, "order")
    prompt = soft_prompt.new_prompt(lm, settings.tokens, settings.initialisation, run.generator("start"))
    result = soft_prompt.fit_prompt(
        lm, prompt, batches, settings.position, settings.train, run, stop_below=settings.stop_below
    )
    _learned(run).append({"stage": run.prefix, "steps": result.steps, "loss": result.history[-1]["loss"]})
    return prompt.detach()


def length_of(lm: LM, example: Example, text: str) -> int:
    """Return how many tokens the text has as an answer to this example."""
    span = lm.encode(example.with_response(text).turns).spans[-1]
    return span.end - span.start
