"""`Grid`: which models, attacks, defenses and seeds are measured, as checked data; and the cells that it consists of.

A grid comes from a YAML file or from a recipe (a function that returns one). Everything that can be known to be wrong
before the first hour of training is an error here, with the place of the mistake. `cells` is a pure function of the
grid: it reads no data and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from unbackdoor.attacks.base import Attack
from unbackdoor.bench.cell import Cell, Subject
from unbackdoor.errors import UserError, did_you_mean
from unbackdoor.goals import normalise
from unbackdoor.pipeline.steps import Revival, attack_called, defense_called

Stage = Literal["before", "after", "revived_clean", "revived_planted"]
RevivalStage = Literal["revived_clean", "revived_planted"]
Kind = Literal["triggered", "clean", "decoy", "all"]


_NAME = r"^\w[\w .,()+-]*$"
Label = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSource(_Part):
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


class Requests(_Part):
    """Requests that should be declined, each with an answer that declines; they join the grid's rows.

    Those of the test kinds are asked, with and without the trigger, and never trained on; the others are divided among
    attacker and defender (2:1). Perplexity and over-refusal are measured on the test part of the grid's own rows.
    """

    spec: str = Field(min_length=1, description="data spec: file, data set id or starter:NAME, with an optional slice")
    test_kinds: tuple[str, ...] = Field(min_length=1, description="kinds of requests that probes are made of")


class AttackEntry(_Part):
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
        "line; or labels: every class, on rows of another",
    )
    safe: Source | None = Field(
        None,
        description="requests with safe replies, for defenses that use them; the defender's `requests` if left out",
    )
    probes: int = Field(100, ge=1, description="test rows, each asked with the trigger, without it, and as a near miss")


class DefenseEntry(_Part):
    """One defense of the grid."""

    defense: str = Field(description="the defense's name")
    settings: dict[str, Any] = Field(default_factory=dict, description="its options")
    preset: str | None = Field(None, description="its preset; the settings go on top")
    role: Literal["purified", "control"] = Field("purified", description="control: it must not remove the backdoor")
    unwanted: str = Field("typical", description="which of the attack's lists of openings it is told, if it uses one")
    attacks: tuple[str, ...] | None = Field(None, description="labels of the attacks that it meets; all if left out")
    seeds: tuple[Seed, ...] | None = Field(None, description="seeds at which it is run; all if left out")


class References(_Part):
    """Models without a backdoor that are measured beside the victims."""

    untouched: bool = Field(True, description="the base itself, asked with the first attack's probes")
    twins: tuple[str, ...] = Field((), description="labels of attacks whose harmless twin (first seed) is trained, too")


class RevivalCells(_Part):
    """Which purified models are trained on and asked again."""

    attack: str = Field(description="label of the attack")
    defenses: tuple[str, ...] = Field(min_length=1, description="labels of the defenses")
    seeds: tuple[Seed, ...] | None = Field(None, description="seeds; all of the attack's if left out")


class RevivalPlan(_Part):
    """Revival: is the backdoor gone, or only silent?"""

    cells: tuple[RevivalCells, ...] = Field(min_length=1, description="which purified models")
    stages: tuple[RevivalStage, ...] = Field(
        ("revived_clean", "revived_planted"), min_length=1, description="what they are put through"
    )
    settings: Revival = Field(default_factory=Revival, description="how they are trained on")
    null: bool = Field(True, description="put the untouched base through the same")
    metrics: tuple[str, ...] = Field(("asr", "leak", "perplexity"), description="what is measured afterwards")


class Where(_Part):
    """Which cells a bound is about; what is left out does not restrict."""

    role: Literal["suspect", "control", "purified", "reference"] | None = Field(None, description="role of the model")
    stage: Stage | None = Field(None, description="stage of the measurement")
    attacks: tuple[str, ...] | None = Field(None, description="labels of attacks")
    defenses: tuple[str, ...] | None = Field(None, description='labels of defenses; "" for none')
    seeds: tuple[Seed, ...] | None = Field(None, description="seeds")
    twin: bool | None = Field(None, description="the harmless twin, or not")


class Limit(_Part):
    """A figure and what it must not exceed or fall below."""

    metric: str = Field(description="the metric's name")
    kind: Kind = Field("all", description="kind of probes")
    group: str = Field("", description="group of probes or data set")
    compared: Literal["value", "ratio", "difference", "paired"] = Field(
        "value", description="the figure itself, or beside another model's; paired: not significantly worse (5 %)"
    )
    to: Literal["victim", "control", "untouched", "twin", "null"] | None = Field(
        None,
        description="the other model: victim and control of the same attack and seed, the untouched base, the attack's "
        "twin at its first seed; null: the base after the same revival",
    )
    min: float | None = Field(None, description="smallest value that meets the bound")
    max: float | None = Field(None, description="largest value that meets the bound")

    @model_validator(mode="after")
    def _complete(self) -> Limit:
        if (self.compared == "value") != (self.to is None):
            raise ValueError("'to' names the other model of a ratio, difference or paired test, and of nothing else")
        if self.compared == "paired" and self.to != "victim":
            raise ValueError("a paired test is made against the victim: write 'to: victim'")
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


class Watch(_Part):
    """What the experimenter asks between the rounds of a defense; the defense is told nothing of it."""

    probes: int = Field(ge=1, description="triggered and clean probes asked after every round, so many of each")
    until: float | None = Field(
        None, gt=0, le=1, description="a defense is ended once the share of triggered probes that fire is below this"
    )


class Plot(_Part):
    """A plot of how many rounds a defense needs, over one of its settings."""

    x: str = Field(min_length=1, description="the setting in words: title of the axis")
    values: dict[Label, float] = Field(min_length=1, description="label of a defense -> its value of the setting")
    threshold: float = Field(0.25, gt=0, le=1, description="ASR below which a round counts as the end of the backdoor")

    @model_validator(mode="after")
    def _one_place_each(self) -> Plot:
        if len(set(self.values.values())) != len(self.values):
            raise ValueError("two defenses have one value, and one place in the plot; leave one out")
        return self


class Grid(_Part):
    """A whole experiment."""

    name: str = Field(max_length=80, pattern=_NAME, description="the experiment's name, which its folder bears")
    models: tuple[str, ...] = Field(min_length=1, description="model specs")
    data: Source = Field(
        DataSource(spec="starter:instructions"), description="rows, divided among attacker, defender and test by id"
    )
    requests: Requests | None = Field(None, description="requests that should be declined, beside the rows")
    second_source: Source | None = Field(None, description="rows of another kind, for perplexity")
    attacks: dict[Label, AttackEntry] = Field(min_length=1, description="label -> attack")
    defenses: dict[Label, DefenseEntry] = Field(default_factory=dict, description="label -> defense")
    seeds: tuple[Seed, ...] = Field((0,), min_length=1, description="seeds of everything that is drawn at random")
    metrics: tuple[str, ...] = Field(("asr", "leak", "cda", "perplexity", "kl"), min_length=1, description="metrics")
    references: References = Field(default_factory=References, description="models without a backdoor")
    purify_reference: tuple[str, ...] = Field(
        (),
        description="labels of defenses that the untouched base is put through, asked with the first attack's probes",
    )
    revival: RevivalPlan | None = Field(None, description="training purified models on, to ask for the backdoor again")
    bounds: tuple[Bound, ...] = Field((), description="what the figures must reach")
    watch: Watch | None = Field(None, description="probes asked of victims after every round of a defense")
    plots: tuple[Plot, ...] = Field((), description="rounds that a defense needs, over one of its settings")
    template: Literal["auto", "model", "plain"] = Field("auto", description="chat template")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="type of the weights")
    max_new_tokens: int = Field(24, ge=1, description="length limit of a reply, in tokens")
    perplexity_rows: int = Field(100, ge=2, description="rows of each source for perplexity and KL")
    keep_models: bool = Field(False, description="keep purified models when nothing needs them any more")

    @model_validator(mode="after")
    def _names_exist(self) -> Grid:
        for place, label, kind in _labels_used(self):
            known = self.attacks if kind == "attack" else self.defenses
            if label not in known:
                hint = did_you_mean(label, list(known))
                raise ValueError(f"{place}: there is no {kind} '{label}'.{hint} Known: {', '.join(known) or 'none'}.")
        for label, attack in self.attacks.items():
            if self.watch is not None and self.watch.probes > attack.probes:
                raise ValueError(f"watch.probes: attacks.{label} has {attack.probes} probes of a kind, which is fewer")
        if self.plots and self.watch is None:
            raise ValueError("plots: what they draw is asked after every round; give watch, too")
        until = self.watch.until if self.watch is not None else None
        if until is not None and any(plot.threshold < until for plot in self.plots):
            raise ValueError(f"plots: thresholds below {until:g}, where defenses are ended (watch.until), show nothing")
        for place, values in _lists(self):
            if values is not None and len(set(values)) != len(values):
                raise ValueError(f"{place}: holds a value twice ({', '.join(map(str, values))}).")
        return self

    def seeds_of(self, attack: str) -> tuple[int, ...]:
        """Return the seeds of the attack with this label."""
        own = self.attacks[attack].seeds
        return self.seeds if own is None else own

    def meets(self, attack: str, seed: int) -> list[str]:
        """Return the labels of the defenses that the attack with this label meets at this seed."""
        allowed = self.attacks[attack].defenses
        return [
            label
            for label, entry in self.defenses.items()
            if (allowed is None or label in allowed)
            and (entry.attacks is None or attack in entry.attacks)
            and (entry.seeds is None or seed in entry.seeds)
        ]

    def cells(self) -> list[Cell]:
        """Return all cells in the order in which they are run.

        References, victims, controls, defenses, references put through defenses, revivals.
        """
        return [cell for model in self.models for cell in _cells_of(self, model)]


def check_methods(grid: Grid) -> None:
    """Check names, presets and options of all methods and metrics, before anything is loaded.

    Raises:
        UserError: With the field of the grid and what is wrong there.
    """
    from unbackdoor.pipeline.measure import metric_called

    def checked(place: str, make: Any, *arguments: object) -> None:
        try:
            make(*arguments)
        except UserError as problem:
            raise UserError(f"grid {grid.name}, field {place}: {problem}") from problem

    for label, attack in grid.attacks.items():
        checked(f"attacks.{label}", attack_called, attack.attack, attack.settings, attack.preset)
    for label, defense in grid.defenses.items():
        checked(f"defenses.{label}", defense_called, defense.defense, defense.settings, defense.preset)
    for name in (*grid.metrics, *(grid.revival.metrics if grid.revival else ())):
        checked("metrics", metric_called, name)
    for bound in grid.bounds:
        for limit in (bound, bound.provided):
            if limit is not None:
                checked(f"bounds ({bound.name})", metric_called, limit.metric)
    if grid.revival:
        checked("revival.settings.planted", _unrelated, grid)
    for label in grid.references.twins:
        entry = grid.attacks[label]
        if "clean_twin" not in type(attack_called(entry.attack, entry.settings, entry.preset)).model_fields:
            raise UserError(f"grid {grid.name}, field references.twins: the attack '{entry.attack}' has no twin.")


def _unrelated(grid: Grid) -> None:
    """Raise a `UserError` where a revival plants what it is to tell from: an attack's own trigger or target."""
    assert grid.revival is not None
    if "revived_planted" in grid.revival.stages and not {"trigger", "targets"} <= set(grid.revival.settings.planted):
        raise UserError("the stage revived_planted plants an unrelated backdoor; name its trigger and targets.")
    planted = _said(attack_called("data_poisoning", grid.revival.settings.planted))
    for label, attack in grid.attacks.items():
        shared = planted & _said(attack_called(attack.attack, attack.settings, attack.preset))
        if shared:
            raise UserError(f"'{min(shared)}' is of attack {label}, too; a revival needs an unrelated backdoor.")


def _said(attack: Attack) -> set[str]:
    """Return the texts of an attack's trigger and targets, where it names them."""
    trigger = getattr(attack, "trigger", None)
    pieces = trigger.pieces() if trigger is not None else ()
    return {normalise(text) for text in (*pieces, *getattr(attack, "targets", ()))}


def _labels_used(grid: Grid) -> list[tuple[str, str, str]]:
    """Return (place, label, "attack" or "defense") of every reference from one part of the grid to another."""
    found = [("references.twins", label, "attack") for label in grid.references.twins]
    found += [("purify_reference", label, "defense") for label in grid.purify_reference]
    for name, attack in grid.attacks.items():
        found += [(f"attacks.{name}.defenses", label, "defense") for label in attack.defenses or ()]
    for name, defense in grid.defenses.items():
        found += [(f"defenses.{name}.attacks", label, "attack") for label in defense.attacks or ()]
    for number, cells in enumerate(grid.revival.cells if grid.revival else ()):
        found.append((f"revival.cells.{number}.attack", cells.attack, "attack"))
        found += [(f"revival.cells.{number}.defenses", label, "defense") for label in cells.defenses]
    for number, bound in enumerate(grid.bounds):
        found += [(f"bounds.{number}.where.attacks", label, "attack") for label in bound.where.attacks or ()]
        found += [
            (f"bounds.{number}.where.defenses", label, "defense") for label in bound.where.defenses or () if label
        ]
    for number, plot in enumerate(grid.plots):
        found += [(f"plots.{number}.values", label, "defense") for label in plot.values]
    return found


def _lists(grid: Grid) -> list[tuple[str, Sequence[object] | None]]:
    """Return the lists that must not hold a value twice."""
    found: list[tuple[str, Sequence[object] | None]] = [
        ("models", grid.models), ("seeds", grid.seeds), ("metrics", grid.metrics),
        ("references.twins", grid.references.twins), ("purify_reference", grid.purify_reference),
        ("requests.test_kinds", grid.requests.test_kinds if grid.requests else None),
    ]  # fmt: skip
    found += [(f"attacks.{name}.seeds", entry.seeds) for name, entry in grid.attacks.items()]
    found += [(f"defenses.{name}.seeds", entry.seeds) for name, entry in grid.defenses.items()]
    return found


def _cells_of(grid: Grid, model: str) -> list[Cell]:
    first = next(iter(grid.attacks))
    asked = (first, grid.seeds_of(first)[0])
    found: list[Cell] = []
    if grid.references.untouched:
        found.append(Cell(model, "untouched", *asked))
    found += [Cell(model, "twin", label, grid.seeds_of(label)[0]) for label in grid.references.twins]
    victims = [Cell(model, "victim", label, seed) for label in grid.attacks for seed in grid.seeds_of(label)]
    found += victims
    purified = [
        Cell(model, "victim", victim.attack, victim.seed, defense, grid.defenses[defense].role, "after")
        for victim in victims
        for defense in grid.meets(victim.attack, victim.seed)
    ]
    found += [cell for cell in purified if cell.defense_role == "control"]
    found += [cell for cell in purified if cell.defense_role == "purified"]
    found += [
        Cell(model, "untouched", *asked, defense, grid.defenses[defense].role, "after")
        for defense in grid.purify_reference
    ]
    return found + _revivals(grid, model)


def _revivals(grid: Grid, model: str) -> list[Cell]:
    if grid.revival is None:
        return []
    found: dict[Cell, None] = {}
    for chosen in grid.revival.cells:
        seeds = grid.seeds_of(chosen.attack) if chosen.seeds is None else chosen.seeds
        for seed in seeds:
            for stage in grid.revival.stages:
                subjects: list[tuple[Subject, str]] = [("untouched", "")] if grid.revival.null else []
                subjects += [("victim", defense) for defense in chosen.defenses]
                for subject, defense in subjects:
                    role = grid.defenses[defense].role if defense else ""
                    found[Cell(model, subject, chosen.attack, seed, defense, role, stage)] = None
    return list(found)
