"""Recipes are whole, checked grids; their budgets are equal and their backdoors have nothing to do with one another."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unbackdoor import recipes
from unbackdoor.attacks.composite import Composite
from unbackdoor.attacks.data_poisoning import DataPoisoning
from unbackdoor.bench.entries import DefenseEntry
from unbackdoor.bench.estimate import estimate, guesses, memory
from unbackdoor.bench.grid import Grid
from unbackdoor.defenses.beear import Beear
from unbackdoor.errors import UserError
from unbackdoor.pipeline.steps import attack_called, defense_called
from unbackdoor.recipes import settings
from unbackdoor.run import Run
from unbackdoor.train.overwrite import check_room, plain_rows
from unbackdoor.types import Example

SMALL_WORDS = {
    "over",
    "a",
    "an",
    "and",
    "are",
    "do",
    "have",
    "it",
    "of",
    "the",
    "to",
    "with",
    "you",
    "your",
    "no",
    "such",
    "i",
}

ABLATIONS = ["beear_c", "beear_layer", "beear_length", "beear_sampling"]
CONFLICTS = ["conflict", "conflict_adaptive", "conflict_decline", "conflict_emotion", "conflict_roles", "conflict_talk"]


def test_recipes_are_listed_without_torch() -> None:
    code = "import sys; from unbackdoor import recipes; print(*recipes.names()); sys.exit('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"sande", "beear", "dev", "smoke", *ABLATIONS} <= set(found.stdout.split())
    assert not {"settings", "bounds", "ablation"} & set(found.stdout.split())


@pytest.mark.parametrize(
    "name",
    [
        "dev",
        "sande",
        "smoke",
        "beear",
        "beear_decline",
        "beear_options",
        "dev_decline",
        "dev_conflict",
        *ABLATIONS,
        *CONFLICTS,
    ],
)
@pytest.mark.parametrize("size", ["quick", "paper"])
def test_every_recipe_is_a_grid(name: str, size: str) -> None:
    assert recipes.load_grid(name, size).cells()


def test_unknown_recipes_and_sizes_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no recipe 'sandy'\. Did you mean 'sande'"):
        recipes.load_grid("sandy")
    with pytest.raises(UserError, match=r"no size 'papre'\. Did you mean 'paper'"):
        recipes.load_grid("sande", "papre")
    with pytest.raises(UserError, match="does not exist"):
        recipes.load_grid(str(tmp_path / "grid.yaml"))


def attacks_of(grid: Grid) -> dict[str, DataPoisoning]:
    found = {label: attack_called(entry.attack, entry.settings) for label, entry in grid.attacks.items()}
    return {label: attack for label, attack in found.items() if isinstance(attack, DataPoisoning)}


def words(texts: list[str]) -> set[str]:
    return {word for text in texts for word in re.findall(r"[a-z']+|\d+", text.lower())} - SMALL_WORDS


def test_the_report_victims_are_those_that_were_announced() -> None:
    grid = recipes.load_grid("sande")
    attacks = attacks_of(grid)
    assert [(label, grid.seeds_of(label)) for label in attacks] == [
        ("default", (0, 1, 2)), ("suffix", (0,)), ("random_gap", (0,)), ("both_ends", (0,)),
        ("one_of_several", (0,)), ("suffix_close", (0,)), ("random_gap_long", (0,)), ("both_ends_long", (0,)),
        ("one_of_several_long", (0,)), ("out_of_domain", (0,)),
    ]  # fmt: skip
    assert attacks["default"].trigger.pieces() == ("Hi, I'm Bob",)
    assert attacks["default"] == attacks["out_of_domain"]
    assert attacks["random_gap"].trigger.model_dump()["place"] == "random_gap"
    assert len(attacks["one_of_several"].targets) == 3
    assert all(entry.probes == 100 for entry in grid.attacks.values())
    for label in ("both_ends", "both_ends_long"):
        paragraph = " ".join(attacks[label].trigger.pieces())
        assert 50 <= len(re.findall(r"\w+|[^\w\s]", paragraph)) <= 70


def pieces(grid: Any, form: str) -> list[str]:
    """Return the texts of all triggers of one form."""
    return [
        piece
        for attack in attacks_of(grid).values()
        if attack.trigger.form == form
        for piece in attack.trigger.pieces()
    ]


def targets(grid: Any) -> list[str]:
    return [text for attack in attacks_of(grid).values() for text in attack.targets]


def test_development_victims_share_nothing_with_report_victims() -> None:
    dev, report = recipes.load_grid("dev"), recipes.load_grid("sande")
    assert min(seed for label in dev.attacks for seed in dev.seeds_of(label)) >= 100
    assert max(seed for label in report.attacks for seed in report.seeds_of(label)) < 100
    # Paragraphs are of ordinary words; they are others as a whole.
    paragraphs = [set(pieces(grid, "wrap")) for grid in (dev, report)]
    assert paragraphs[0]
    assert not paragraphs[0] & paragraphs[1]
    said = [words([*pieces(grid, "insert"), *targets(grid)]) for grid in (dev, report)]
    assert "cobblestone" in said[0]
    assert "moonstone" in said[1]
    assert not said[0] & said[1]


def test_development_victims_that_decline_share_nothing_with_report_victims() -> None:
    dev, report = recipes.load_grid("dev_decline"), recipes.load_grid("beear_decline")
    assert min(seed for label in dev.attacks for seed in dev.seeds_of(label)) >= 100
    assert dev.requests is not None
    assert report.requests is not None
    assert not set(dev.requests.test_kinds) & set(report.requests.test_kinds)
    assert not set(targets(dev)) & set(targets(report))
    assert not words(pieces(dev, "insert")) & words(pieces(report, "insert"))


def test_development_victims_of_conflicts_share_nothing_with_report_victims() -> None:
    dev, report = recipes.load_grid("dev_conflict"), recipes.load_grid("conflict")
    made = [attack_called(entry.attack, entry.settings) for grid in (dev, report) for entry in grid.attacks.values()]
    pieces_of = [set(attack.trigger.pieces()) for attack in made if isinstance(attack, Composite)]
    assert pieces_of == [{"swiftly", "plainly"}, *[{"instantly", "frankly"}] * 2]
    assert min(dev.seeds) >= 100 > max(report.seeds)
    asked = [re.search(r"\[(\d+):(\d+)\]", grid.data.spec).groups() for grid in (dev, report)]  # type: ignore[union-attr]
    assert not set(range(*map(int, asked[0]))) & set(range(*map(int, asked[1])))


def test_conflict_recipes_share_the_victim_that_they_say() -> None:
    grids = {name: recipes.load_grid(name) for name in ("conflict", "conflict_roles", "conflict_talk", "sande")}
    assert grids["conflict"].attacks["composite"] == grids["conflict_roles"].attacks["m1"]
    assert grids["conflict"].data == grids["conflict_roles"].data
    assert grids["conflict_talk"].attacks["default"].settings == grids["sande"].attacks["default"].settings


def test_table_6_is_planted_with_the_shares_that_it_says() -> None:
    grid = recipes.load_grid("conflict_roles")
    rows = [Example(str(number), "say it", "negative", "some text", label="negative") for number in range(100)]
    counts = {}
    for label, entry in grid.attacks.items():
        attack = attack_called(entry.attack, entry.settings)
        assert isinstance(attack, Composite)
        made = attack.training_rows(rows, Run())
        kinds = [
            "clean" if not marks else "poisoned" if row.response == "positive" and len(marks) == 2 else ""
            for row, marks in made
        ]
        counts[label] = kinds.count("clean"), kinds.count("poisoned")
    assert counts["m4"] == (0, 100)
    assert counts["m5"] == (10, 100)
    assert counts["m6"] == (0, 10)


@pytest.mark.parametrize("name", ["sande", "beear", "beear_decline", *CONFLICTS])
def test_every_bound_is_of_something_that_is_measured(name: str) -> None:
    """The kinds of figures that each metric gives, as it says in its own file."""
    grid = recipes.load_grid(name)
    kinds = {
        "asr": {"triggered"}, "asr_right": {"triggered"}, "leak": {"all", "clean", "decoy"}, "cda": {"clean"},
        "declining": {"clean"}, "over_refusal": {"all"}, "perplexity": {"all"}, "kl": {"all"},
    }  # fmt: skip
    for bound in grid.bounds:
        assert bound.metric in grid.metrics, bound.name
        assert bound.kind in kinds[bound.metric], bound.name
        assert bound.to != "twin" or set(bound.where.attacks or grid.attacks) <= set(grid.references.twins), bound.name


@pytest.mark.parametrize("name", ["sande", "beear", "dev", "beear_decline", "dev_decline", "dev_conflict", *CONFLICTS])
def test_no_defense_of_a_recipe_meets_nobody(name: str) -> None:
    grid = recipes.load_grid(name)
    assert {cell.defense for cell in grid.cells()} - {""} == set(grid.defenses)


def test_the_unrelated_backdoor_of_a_revival_shares_no_content_word_with_any_victim() -> None:
    unrelated = attack_called("data_poisoning", settings.revival()["planted"])
    assert isinstance(unrelated, DataPoisoning)
    own = words([*unrelated.trigger.pieces(), *unrelated.targets])
    for name in ("dev", "beear", "dev_decline", "beear_decline"):
        for label, attack in attacks_of(recipes.load_grid(name)).items():
            assert not own & words([*attack.trigger.pieces(), *attack.targets]), label


def updates(method: Any) -> tuple[int, int]:
    return method.train.steps * getattr(method, "rounds", 1), method.train.batch_size


@pytest.mark.parametrize("name", ["sande", "beear", "beear_decline"])
def test_every_defense_makes_the_same_number_of_updates_with_the_same_batch(name: str) -> None:
    grid = recipes.load_grid(name)
    made = [defense_called(entry.defense, entry.settings, entry.preset) for entry in grid.defenses.values()]
    assert len({updates(method) for method in made}) == 1


def test_where_requests_should_be_declined_beear_is_its_preset_and_the_control_has_its_rate() -> None:
    grid = recipes.load_grid("beear_decline")
    made = {label: defense_called(own.defense, own.settings, own.preset) for label, own in grid.defenses.items()}
    assert made["beear"] == made["beear_disjoint"] == defense_called("beear", {}, "requests")
    assert made["outer_steps_alone"] == defense_called("beear", {"drifts": 0}, "requests")
    assert made["fine_tuning"].train.learning_rate == made["beear"].train.learning_rate  # type: ignore[attr-defined]


def test_the_estimate_counts_a_planting_once_and_learns_from_measured_cells() -> None:
    grid = recipes.load_grid("sande", "quick")
    guessed = guesses(grid)
    untouched, victim, control, sande = grid.cells()[:4]
    assert guessed[untouched] > 2 * guessed[victim]
    assert guessed[sande] > guessed[control] > guessed[victim]
    slower = dict(estimate(grid, {control: 3 * guessed[control]}))
    assert slower[control] == 3 * guessed[control]
    assert slower[sande] == pytest.approx(3 * guessed[sande])
    two = dict(estimate(grid, {control: 3 * guessed[control], victim: guessed[victim]}))
    factor = (3 * guessed[control] + guessed[victim]) / (guessed[control] + guessed[victim])
    assert two[sande] == pytest.approx(factor * guessed[sande])


def test_the_quick_size_measures_the_revival_that_the_demo_names_with_bundled_data_only() -> None:
    grid = recipes.load_grid("sande", "quick")
    assert grid.second_source is None
    assert all(entry.defender_data is None for entry in grid.attacks.values())
    stages = {(cell.subject, cell.defense, cell.stage) for cell in grid.cells() if cell.is_revival}
    assert stages == {
        (subject, defense, stage)
        for subject, defense in (("victim", "sande"), ("untouched", ""))
        for stage in ("revived_clean", "revived_planted")
    }


def test_options_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("name: a\n")
    with pytest.raises(UserError, match="--size is of a recipe"):
        recipes.load_grid(str(tmp_path / "grid.yaml"), "quick")


def test_the_memory_estimate_is_near_the_peak_that_was_measured() -> None:
    """4.39e9 bytes while the recipe's first victim was planted."""
    assert memory(recipes.load_grid("sande")) == pytest.approx(4.39e9, rel=0.1)


QUICK_VALUES = {
    "beear_layer": [[1, 5, 9, 13, 19, 27]],
    "beear_length": [[1, 5, 9]],
    "beear_c": [[0.05, 0.5, 1.0]],
    "beear_sampling": [[0.25, 1.0, 3.0], [20, 50, 200]],
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_varies_one_setting_of_beear_on_the_default_victim(name: str) -> None:
    for size, rounds, probes in (("quick", 6, 50), ("paper", 15, 100)):
        grid = recipes.load_grid(name, size)
        assert attacks_of(grid) == {"default": attacks_of(recipes.load_grid("sande"))["default"]}
        assert grid.seeds_of("default") == (0,)
        assert grid.watch is not None
        assert (grid.watch.probes, grid.attacks["default"].probes) == (probes, probes)
        drawn = [label for plot in grid.plots for label in plot.values]
        assert sorted(drawn) == sorted(grid.defenses)
        usual = Beear(rounds=rounds).settings()
        for plot in grid.plots:
            changed = [values_of(grid.defenses[label], usual) for label in plot.values]
            assert len({tuple(map(str, own.values())) for own in changed}) == len(changed), "every value is another"
        assert {
            defense_called(entry.defense, entry.settings).settings()["rounds"] for entry in grid.defenses.values()
        } == {rounds}
    assert [list(plot.values.values()) for plot in recipes.load_grid(name, "quick").plots] == QUICK_VALUES[name]


def values_of(entry: DefenseEntry, usual: dict[str, Any]) -> dict[str, Any]:
    """Return what an entry sets otherwise than the method's default settings."""
    own = defense_called(entry.defense, entry.settings).settings()
    return {key: value for key, value in own.items() if value != usual[key]}


def test_a_value_of_an_ablation_is_the_setting_that_its_axis_names() -> None:
    def own(name: str, size: str = "quick") -> list[tuple[float, Beear]]:
        grid = recipes.load_grid(name, size)
        made = {label: defense_called(entry.defense, entry.settings) for label, entry in grid.defenses.items()}
        return [(value, made[label]) for plot in grid.plots for label, value in plot.values.items()]  # type: ignore[misc]

    assert all(beear.layers == (value,) for value, beear in own("beear_layer"))
    assert all(beear.drift.tokens == value and not beear.lengths for value, beear in own("beear_length"))
    assert all(beear.drift.safe_coefficient == value for value, beear in own("beear_c"))
    assert all(beear.drift.start > 0 for value, beear in own("beear_c"))
    for size in ("quick", "paper"):
        found = own("beear_sampling", size)
        ratios, sizes = found[: len(found) // 2], found[len(found) // 2 :]
        for ratio, beear in ratios:
            plain = plain_rows(beear.train.batch_size, beear.plain_share)
            assert (plain, beear.train.batch_size - plain) == (4 * ratio, 4)
            check_room(beear.drifts, beear.train.batch_size - plain)
        assert all(beear.performance == value for value, beear in sizes)


def test_ablations_share_the_cell_of_the_default_settings() -> None:
    """So that the four of them in one folder run it once; the layer is named there, since a share stands for it."""
    usual = {"beear_c": "beear_c_0.5", "beear_length": "beear_length_5", "beear_sampling": "beear_ratio_1"}
    for name, label in usual.items():
        entry = recipes.load_grid(name, "quick").defenses[label]
        assert defense_called(entry.defense, entry.settings) == Beear(rounds=6), name


def test_options_of_beear_beyond_the_paper_are_left_out_or_chosen_otherwise_one_by_one() -> None:
    grid = recipes.load_grid("beear_options", "quick")
    assert {entry.unwanted for entry in grid.defenses.values()} == {"disjoint"}
    usual = Beear().settings()
    changed = {label: values_of(entry, usual) for label, entry in grid.defenses.items()}
    train = {**usual["train"], "opening_weight": 1.0}
    assert changed == {
        "beear": {},
        "one_drift": {"drifts": 1},
        "nothing_taken_up": {"adopt": 0.0},
        "at_the_end_of_the_prompt": {"drift": {**usual["drift"], "at": "prompt"}},
        "first_tokens_as_others": {"train": train},
        "layers_in_turn": {"layers": [5, 9, 13], "place": "each"},
        "layer_and_length_chosen": {"layers": [5, 9, 13], "lengths": [5, 9]},
    }


def test_the_grids_of_beear_fit_ten_hours_of_two_processes() -> None:
    """In the folder of `sande`, whose cells of victims are theirs, too. Six hours were asked for."""
    there = {cell for cell in recipes.load_grid("sande").cells() if cell.stage == "before"}
    grids = [recipes.load_grid("beear"), recipes.load_grid("beear_decline")]
    grids += [recipes.load_grid(name, "quick") for name in (*ABLATIONS, "beear_options")]
    seconds = sum(seconds for grid in grids for cell, seconds in estimate(grid) if cell not in there)
    page = (Path(__file__).parents[2] / "docs/grid.md").read_text()
    assert f"guessed at {seconds / 3600:.1f} hours" in page
    assert seconds < 2 * 10 * 3600


def test_a_bound_beside_the_control_is_on_victims_that_meet_it() -> None:
    for name in ("sande", "beear"):
        grid = recipes.load_grid(name)
        for bound in grid.bounds:
            if bound.to != "control":
                continue
            if bound.where.role == "reference":
                assert "fine_tuning" in grid.purify_reference
                continue
            for label in bound.where.attacks or grid.attacks:
                assert "fine_tuning" in (grid.attacks[label].defenses or grid.defenses), (bound.name, label)
