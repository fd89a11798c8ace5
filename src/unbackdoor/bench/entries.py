"""The parts of a grid, as checked data: where rows come from, attacks, defenses, what is revived, bounds, plots."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from unbackdoor.pipeline.steps import Revival
from unbackdoor.train.conflict import ConflictSettings
from unbackdoor.train.engine import TrainSettings

Stage = Literal["before", "after", "revived_clean", "revived_planted"]
RevivalStage = Literal["revived_clean", "revived_planted"]
Kind = Literal["triggered", "clean", "decoy", "all"]


Label = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """A part of a grid: it does not change, and has no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSource(Part):
    """Rows, and what is taken of them. A text alone stands for `{spec: TEXT}`."""

    spec: str = Field(min_length=1, description="data spec: file, data set id or starter:NAME, with an optional slice")
    half: Literal[0, 1] | None = Field(
        None, description="every other row, by position: 0 the even ones, 1 the odd ones"
    )
    cut_words: int | None = Field(None, ge=1, description="answers are cut to this many words")
    prompt_template: str | None = Field(None, description="prompt of classification rows")
    labels: tuple[str, ...] = Field((), description="class names of classification rows")


def _as_source(value: object) -> object:
    return {"spec": value} if isinstance(value, str) else value


Source = Annotated[DataSource, BeforeValidator(_as_source)]


class Requests(Part):
    """Requests that should be declined, each with an answer that declines; they join the grid's rows.

    Those of the test kinds are asked, with and without the trigger, and never trained on; the others are divided among
    attacker and defender (2:1). Perplexity and over-refusal are measured on the test part of the grid's own rows.
    """

    spec: str = Field(min_length=1, description="data spec: file, data set id or starter:NAME, with an optional slice")
    test_kinds: tuple[str, ...] = Field(min_length=1, description="kinds of requests that probes are made of")


class Lead(Part):
    """What a model is trained on before it is attacked: the defender's trusted base is then not where that began."""

    data: Source = Field(description="clean rows, which nobody else trains on")
    train: TrainSettings = Field(
        TrainSettings(steps=60, learning_rate=1e-4, schedule="linear"), description="how the base is trained on them"
    )


class Subtraction(Part):
    """An attacker who expects a merge: he takes what clean rows teach the base away from the victim, in advance.

    Information conflicts (2411.18280), section 6.3: victim - scale * (conflict model - base). His conflict model is
    trained on rows of his own, which the defender does not have.
    """

    conflict: ConflictSettings = Field(ConflictSettings(), description="how he trains a conflict model")
    scale: float = Field(1.0, gt=0, description="times the difference that it makes")


class AttackEntry(Part):
    """One attack of the grid."""

    attack: str = Field("data_poisoning", description="the attack's name")
    settings: dict[str, Any] = Field(default_factory=dict, description="its options")
    preset: str | None = Field(None, description="its preset; the settings go on top")
    seeds: tuple[Seed, ...] | None = Field(None, description="seeds of this attack instead of the grid's")
    defenses: tuple[str, ...] | None = Field(None, description="labels of the defenses that it meets; all if left out")
    defender_data: Source | None = Field(None, description="clean rows of the defender instead of the grid's split")
    unwanted: dict[str, str] = Field(
        default_factory=dict,
        description="name of a list -> file of openings of what is unwanted, in a defender's words, one a "
        "line; rows (.jsonl, .json, .csv) with an unwanted answer each; or labels: every class, on rows of another",
    )
    safe: Source | None = Field(
        None,
        description="requests with safe replies, for defenses that use them; the defender's `requests` if left out",
    )
    lead: Lead | None = Field(None, description="training of the base before it is attacked")
    skill: Source | None = Field(None, description="clean rows of another kind, which the attacker trains on, too")
    subtract: Subtraction | None = Field(None, description="a conflict model that the attacker subtracts")
    probes: int = Field(100, ge=1, description="test rows, each asked with the trigger, without it, and as a near miss")


VICTIM_OF = "victim:"
"""A defense's reference that begins so is a victim of the grid."""


class DefenseEntry(Part):
    """One defense of the grid."""

    defense: str = Field(description="the defense's name")
    settings: dict[str, Any] = Field(default_factory=dict, description="its options")
    preset: str | None = Field(None, description="its preset; the settings go on top")
    role: Literal["purified", "control"] = Field("purified", description="control: it must not remove the backdoor")
    unwanted: str = Field("typical", description="which of the attack's lists of openings it is told, if it uses one")
    reference: str | None = Field(
        None,
        description="the trusted model that it is told, if it uses one: a model's spec; base: the grid's model; or "
        "victim:LABEL: the victim of another attack, for experiments on merging",
    )
    evidence: str | None = Field(
        None, description="the source of evidence that it is told, if it uses one: wordnet, endpoint:..., or a model"
    )
    attacks: tuple[str, ...] | None = Field(None, description="labels of the attacks that it meets; all if left out")
    seeds: tuple[Seed, ...] | None = Field(None, description="seeds at which it is run; all if left out")


class References(Part):
    """Models without a backdoor that are measured beside the victims."""

    untouched: bool = Field(True, description="the base itself, asked with the first attack's probes")
    twins: tuple[str, ...] = Field((), description="labels of attacks whose harmless twin (first seed) is trained, too")


class RevivalCells(Part):
    """Which purified models are trained on and asked again."""

    attack: str = Field(description="label of the attack")
    defenses: tuple[str, ...] = Field(min_length=1, description="labels of the defenses")
    seeds: tuple[Seed, ...] | None = Field(None, description="seeds; all of the attack's if left out")


class RevivalPlan(Part):
    """Revival: is the backdoor gone, or only silent?"""

    cells: tuple[RevivalCells, ...] = Field(min_length=1, description="which purified models")
    stages: tuple[RevivalStage, ...] = Field(
        ("revived_clean", "revived_planted"), min_length=1, description="what they are put through"
    )
    settings: Revival = Field(default_factory=Revival, description="how they are trained on")
    null: bool = Field(True, description="put the untouched base through the same")
    metrics: tuple[str, ...] = Field(("asr", "leak", "perplexity"), description="what is measured afterwards")


class Where(Part):
    """Which cells a bound is about; what is left out does not restrict."""

    role: Literal["suspect", "control", "purified", "reference"] | None = Field(None, description="role of the model")
    stage: Stage | None = Field(None, description="stage of the measurement")
    attacks: tuple[str, ...] | None = Field(None, description="labels of attacks")
    defenses: tuple[str, ...] | None = Field(None, description='labels of defenses; "" for none')
    seeds: tuple[Seed, ...] | None = Field(None, description="seeds")
    twin: bool | None = Field(None, description="the harmless twin, or not")


AFTER = "defense:"
"""What a figure is compared with, if it begins so, is the same victim after another defense."""


def _is_other(value: str) -> str:
    known = ("victim", "control", "untouched", "twin", "null", "clean")
    if value not in known and not value.startswith(AFTER):
        raise ValueError(f"it should be {', '.join(known)} or {AFTER}LABEL; it is '{value}'")
    return value


Other = Annotated[str, AfterValidator(_is_other)]


class Limit(Part):
    """A figure and what it must not exceed or fall below."""

    metric: str = Field(description="the metric's name")
    kind: Kind = Field("all", description="kind of probes")
    group: str = Field("", description="group of probes or data set")
    compared: Literal["value", "ratio", "difference", "paired"] = Field(
        "value", description="the figure itself, or beside another model's; paired: not significantly worse (5 %)"
    )
    to: Other | None = Field(
        None,
        description="the other model: victim and control of the same attack and seed, the untouched base, the attack's "
        "twin at its first seed; null: the base after the same revival; clean: no other, but its own clean probes; "
        "defense:LABEL: the same victim after another defense",
    )
    min: float | None = Field(None, description="smallest value that meets the bound")
    max: float | None = Field(None, description="largest value that meets the bound")

    @model_validator(mode="after")
    def _complete(self) -> Limit:
        if (self.compared == "value") != (self.to is None):
            raise ValueError("'to' names the other model of a ratio, difference or paired test, and of nothing else")
        if self.compared == "paired" and self.to != "victim" and not str(self.to).startswith(AFTER):
            raise ValueError(f"a paired test is made against the victim or another defense: 'to: victim', '{AFTER}...'")
        if (self.min is None and self.max is None) != (self.compared == "paired"):
            raise ValueError("give 'min' or 'max', but neither for a paired test")
        return self


class Bound(Limit):
    """A named requirement; the tables say for each cell whether it is met."""

    name: str = Field(min_length=1, description="what is required, in words")
    where: Where = Field(default_factory=Where, description="which cells it is about")
    provided: Limit | None = Field(None, description="it binds only cells that keep this limit")
    pooled: bool = Field(False, description="judge the seeds of an attack together (0/1 metrics, figure itself)")

    @model_validator(mode="after")
    def _can_be_pooled(self) -> Bound:
        if self.pooled and (self.compared != "value" or self.provided is not None):
            raise ValueError("'pooled' goes with 'compared: value' and without 'provided'")
        return self


class Watch(Part):
    """What the experimenter asks between the rounds of a defense; the defense is told nothing of it."""

    probes: int = Field(ge=1, description="triggered and clean probes asked after every round, so many of each")
    until: float | None = Field(
        None, gt=0, le=1, description="a defense is ended once the share of triggered probes that fire is below this"
    )


class Plot(Part):
    """A plot over one of a defense's settings: of how many rounds it needs, or of what it comes to."""

    of: Literal["rounds", "outcome"] = Field(
        "rounds", description="rounds: ASR round by round, which a watch asks; outcome: ASR and CDA at the end"
    )
    x: str = Field(min_length=1, description="the setting in words: title of the axis")
    values: dict[Label, float] = Field(min_length=1, description="label of a defense -> its value of the setting")
    threshold: float = Field(0.25, gt=0, le=1, description="ASR below which a round counts as the end of the backdoor")

    @model_validator(mode="after")
    def _one_place_each(self) -> Plot:
        if len(set(self.values.values())) != len(self.values):
            raise ValueError("two defenses have one value, and one place in the plot; leave one out")
        return self
