"""`Grid`: which models, attacks, defenses and seeds are measured, as checked data; and the cells that it consists of.

A grid comes from a YAML file or from a recipe (a function that returns one). Everything that can be known to be wrong
before the first hour of training is an error here, with the place of the mistake. `cells` is a pure function of the
grid: it reads no data and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from unbackdoor.attacks.base import Attack
from unbackdoor.bench.cell import Cell, Subject
from unbackdoor.bench.entries import (
    AFTER,
    VICTIM_OF,
    AttackEntry,
    Bound,
    DataSource,
    DefenseEntry,
    Label,
    Part,
    Plot,
    References,
    Requests,
    RevivalPlan,
    Seed,
    Source,
    Watch,
)
from unbackdoor.errors import UserError, did_you_mean
from unbackdoor.evidence.sources import check_source
from unbackdoor.goals import normalise
from unbackdoor.pipeline.steps import attack_called, defense_called

_NAME = r"^\w[\w .,()+-]*$"


class Grid(Part):
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
        lists = sorted({name for attack in self.attacks.values() for name in attack.unwanted})
        for label, defense in self.defenses.items():
            if defense.unwanted not in {DefenseEntry.model_fields["unwanted"].default, *lists}:
                hint = did_you_mean(defense.unwanted, lists)
                raise ValueError(f"defenses.{label}.unwanted: no attack has a list '{defense.unwanted}'.{hint}")
        for label, attack in self.attacks.items():
            if self.watch is not None and self.watch.probes > attack.probes:
                raise ValueError(f"watch.probes: attacks.{label} has {attack.probes} probes of a kind, which is fewer")
        if any(plot.of == "rounds" for plot in self.plots) and self.watch is None:
            raise ValueError("plots: what they draw is asked after every round; give watch, too, or of: outcome")
        until = self.watch.until if self.watch is not None else None
        if until is not None and any(plot.threshold < until for plot in self.plots if plot.of == "rounds"):
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
        if defense.evidence is not None:
            checked(f"defenses.{label}.evidence", check_source, defense.evidence)
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
        if (spec := defense.reference or "").startswith(VICTIM_OF):
            found.append((f"defenses.{name}.reference", spec.removeprefix(VICTIM_OF), "attack"))
    for number, cells in enumerate(grid.revival.cells if grid.revival else ()):
        found.append((f"revival.cells.{number}.attack", cells.attack, "attack"))
        found += [(f"revival.cells.{number}.defenses", label, "defense") for label in cells.defenses]
    for number, bound in enumerate(grid.bounds):
        found += [(f"bounds.{number}.where.attacks", label, "attack") for label in bound.where.attacks or ()]
        found += [
            (f"bounds.{number}.where.defenses", label, "defense") for label in bound.where.defenses or () if label
        ]
        for place, to in (("to", bound.to), ("provided.to", bound.provided.to if bound.provided else None)):
            if (to or "").startswith(AFTER):
                found.append((f"bounds.{number}.{place}", str(to).removeprefix(AFTER), "defense"))
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
