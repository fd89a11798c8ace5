"""Keys change with what determines a result and with nothing else; rows go where they should."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.helpers import Plan
from unbackdoor.attacks.data_poisoning import DataPoisoning
from unbackdoor.bench.cell import Cell
from unbackdoor.bench.entries import DataSource
from unbackdoor.bench.material import Material, read_source
from unbackdoor.bench.yaml_file import grid_from_data
from unbackdoor.data.splits import assert_disjoint
from unbackdoor.defenses.base import Need
from unbackdoor.errors import DataError
from unbackdoor.goals import Contains, RefusalAbsent
from unbackdoor.metrics.leak import Leak
from unbackdoor.pipeline.steps import portable
from unbackdoor.run import Silent
from unbackdoor.secret import Secret
from unbackdoor.stamps import InsertText


def material(data: dict[str, Any]) -> Material:
    return Material(grid_from_data(data, "grid"), Silent())


def keys(data: dict[str, Any]) -> dict[str, str]:
    made = material(data)
    return {f"{cell.kind} {cell.defense} {cell.stage}": made.key(cell) for cell in made.grid.cells()}


def with_value(data: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    copy = json.loads(json.dumps(data))
    *outer, last = path.split(".")
    place = copy
    for step in outer:
        place = place.setdefault(step, {})
    place[last] = value
    return dict(copy)


EVERYTHING = "everything"
PATHS = [
    ("defenses.osft.settings.train.steps", 5, {"osft"}),
    ("defenses.tune.settings.train.learning_rate", 2e-3, {"tune"}),
    ("attacks.default.settings.targets", ["worse robot"], EVERYTHING),
    ("attacks.default.settings.train.steps", 41, EVERYTHING),
    ("attacks.default.probes", 5, EVERYTHING),
    ("attacks.default.seeds", [1], EVERYTHING),
    ("metrics", ["asr"], "all but revival"),
    ("max_new_tokens", 5, EVERYTHING),
    ("template", "model", EVERYTHING),
    ("precision", "bfloat16", EVERYTHING),
    ("perplexity_rows", 7, EVERYTHING),
    ("revival.settings.clean.steps", 3, {"revived_clean"}),
    ("revival.settings.planted.targets", ["grey web"], {"revived_planted"}),
    ("revival.metrics", ["asr"], {"revived_clean", "revived_planted"}),
    ("name", "other", set()),
    ("keep_models", True, set()),
    ("bounds", [], set()),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "changes"), PATHS, ids=[path for path, _, _ in PATHS])
def test_one_change_reruns_what_depends_on_it_and_nothing_else(
    whole_plan: dict[str, Any], path: str, value: object, changes: object
) -> None:
    before, after = keys(whole_plan), keys(with_value(whole_plan, path, value))
    different = {name for name in before if before[name] != after[name]}
    if changes == EVERYTHING:
        assert different == set(before)
    elif changes == "all but revival":
        assert different == {name for name in before if "revived" not in name}
    else:
        assert isinstance(changes, set)
        assert different == {name for name in before if any(part in name.split() for part in changes)}


def test_watching_is_part_of_the_keys_of_what_is_watched_alone(whole_plan: dict[str, Any]) -> None:
    before, after = keys(whole_plan), keys(with_value(whole_plan, "watch", {"probes": 4}))
    other = keys(with_value(whole_plan, "watch", {"probes": 4, "until": 0.25}))
    watched = {"control tune after", "defense osft after", "revival osft revived_clean", "revival osft revived_planted"}
    assert watched < set(before), "there are others"
    assert {name for name in before if before[name] != after[name]} == watched
    assert {name for name in before if after[name] != other[name]} == watched


def test_every_cell_has_a_key_of_its_own(whole_plan: dict[str, Any]) -> None:
    made = material(whole_plan)
    found = [made.key(cell) for cell in made.grid.cells()]
    assert len(set(found)) == len(found)


def test_a_new_revision_of_a_metric_or_of_the_planted_backdoor_of_a_revival_is_another_key(
    whole_plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(whole_plan)
    monkeypatch.setattr(Leak, "revision", 2)
    after = keys(whole_plan)
    assert all(before[name] != after[name] for name in before)
    monkeypatch.setattr(Leak, "revision", 1)
    monkeypatch.setattr(DataPoisoning, "revision", 2)
    composite = {"attack": "composite", "settings": {"targets": ["bad"], "target_form": "prefix"}}
    other = with_value(with_value(whole_plan, "attacks.default", composite), "references.twins", [])
    after = keys(other)
    monkeypatch.setattr(DataPoisoning, "revision", 1)
    changed = {name for name, key in keys(other).items() if key != after[name]}
    assert changed == {name for name in after if "revived_planted" in name}


def test_names_and_places_are_no_part_of_a_key(whole_plan: dict[str, Any], place: Path, tmp_path: Path) -> None:
    for name in ("base", "rows.jsonl", "other.jsonl"):
        copy = shutil.copytree if (place / name).is_dir() else shutil.copy
        copy(place / name, tmp_path / name)
    (tmp_path / "base" / "README.md").write_text("another card")
    moved = json.loads(json.dumps(whole_plan).replace(str(place), str(tmp_path)).replace('"osft": {', '"other": {'))
    moved = json.loads(json.dumps(moved).replace('["osft"]', '["other"]').replace('"default"', '"renamed"'))
    assert list(keys(moved).values()) == list(keys(whole_plan).values())


def test_other_weights_or_rows_are_another_key(whole_plan: dict[str, Any], place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    other_model = json.loads(json.dumps(whole_plan).replace(f"{place}/base", f"{tmp_path}/base"))
    assert not set(keys(other_model).values()) & set(keys(whole_plan).values())
    (tmp_path / "rows.jsonl").write_text("".join((place / "rows.jsonl").read_text().splitlines(keepends=True)[:-3]))
    fewer = json.loads(json.dumps(whole_plan).replace("rows.jsonl", "rows.jsonl[:-3]"))
    moved = json.loads(json.dumps(whole_plan).replace(f"{place}/rows.jsonl", f"{tmp_path}/rows.jsonl"))
    assert keys(fewer) == keys(moved) != keys(whole_plan)


def test_two_labels_for_one_victim_are_one_cell(plan: Plan, place: Path) -> None:
    data = plan()
    outside = {**data["attacks"]["default"], "defender_data": {"spec": str(place / "other.jsonl"), "half": 0}}
    data["attacks"]["outside"] = outside
    made = material(data)
    found = {(c.attack, c.defense): made.key(c) for c in made.grid.cells() if c.subject == "victim"}
    assert found["default", ""] == found["outside", ""]
    assert found["default", "osft"] != found["outside", "osft"]


def test_seeds_ask_different_rows_while_there_are_enough(plan: Plan) -> None:
    made = material(plan())
    secret = Secret(
        attack="data_poisoning", stamp=InsertText(text="silver kettle"), targets=("bad robot",),
        goal=Contains(any_of=("bad robot",)), look_alikes=("gold kettle",),
    )  # fmt: skip
    asked = [{probe.example.id for probe in made.probes("default", seed, secret)} for seed in range(4)]
    assert [len(ids) for ids in asked] == [6] * 4
    assert len(set.union(*asked)) == 24
    test = {row.id for row in made.splits.test}
    assert set.union(*asked) <= test
    kinds = [probe.kind for probe in made.probes("default", 0, secret)]
    assert {kind: kinds.count(kind) for kind in kinds} == {"triggered": 6, "clean": 6, "decoy": 6}


def test_halves_share_no_row_and_copies_stay_together(tmp_path: Path) -> None:
    rows = [{"instruction": f"say {word}", "input": "", "output": word} for word in ["a", "b", "a", "c", "d", "e"]]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    halves = [[row.response for row in read_source(DataSource(spec=str(file), half=half))] for half in (0, 1)]
    assert halves == [["a", "a", "c", "e"], ["b", "d"]]


def test_long_answers_are_cut_at_words(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    answers = ["one two  three four", "one two  three", "one"]
    file.write_text("\n".join(json.dumps({"instruction": f"q{n}", "output": a}) for n, a in enumerate(answers)))
    cut = [row.response for row in read_source(DataSource(spec=str(file), cut_words=3))]
    assert cut == ["one two  three", "one two  three", "one"]


def test_the_second_source_must_not_hold_rows_of_the_first(plan: Plan, place: Path) -> None:
    with pytest.raises(DataError, match="must not overlap"):
        _ = material(plan(second_source=str(place / "rows.jsonl"))).splits
    data = plan()
    data["attacks"]["default"]["defender_data"] = str(place / "rows.jsonl")
    with pytest.raises(DataError, match="must not overlap"):
        _ = material(data).splits


def test_files_in_settings_count_by_their_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("same"), second.write_text("same")
    assert portable({"poisoned": f"{first}[:5]"}) == portable({"poisoned": f"{second}[:5]"})
    assert portable(str(first)) != portable(f"{first}[:5]")
    second.write_text("other")
    assert portable(str(first)) != portable(str(second))
    assert portable(["x" * 5000, "Hi, I'm Bob", 3]) == ["x" * 5000, "Hi, I'm Bob", 3]


def test_a_revival_uses_rows_that_no_purification_saw(whole_plan: dict[str, Any]) -> None:
    made = material(whole_plan)
    cell = Cell(made.grid.models[0], "victim", "default", 0)
    defender = {row.id for row in made.defender_rows(replace(cell, defense="osft"))}
    assert not defender & {row.id for row in made.revival_rows()}


def test_another_device_or_library_computes_everything_anew(
    whole_plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = grid_from_data(whole_plan, "grid")

    def made(device: str) -> list[str]:
        found = Material(grid, Silent(), device)
        return [found.key(cell) for cell in grid.cells()]

    assert made("cuda:0") == made("cuda:1")
    assert not set(made("cuda")) & set(made("cpu"))
    here = made("cpu")
    monkeypatch.setattr("unbackdoor.pipeline.steps._computed_by", lambda: ("0", "another torch", "5"))
    assert not set(made("cpu")) & set(here)


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    file = tmp_path / "requests.jsonl"
    rows = [
        {"id": f"request-{n}", "kind": ("forged", "rumour", "dosage")[n % 3], "instruction": f"forge paper {n}",
         "output": f"No, I can't do number {n}."}
        for n in range(90)
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def declining(plan: Plan, requests: Path, **changes: Any) -> dict[str, Any]:
    data = plan(requests={"spec": str(requests), "test_kinds": ["rumour"]}, **changes)
    data["defenses"]["beear"] = {"defense": "beear"}
    data["attacks"]["default"]["settings"]["target_form"] = "opening"
    return data


def cells_of(made: Material) -> dict[str, Cell]:
    return {cell.defense: cell for cell in made.grid.cells() if cell.subject == "victim"}


def ids(rows: Any) -> set[str]:
    return {row.id for row in rows}


def test_probes_are_made_of_requests_of_the_test_kinds_alone(plan: Plan, requests: Path) -> None:
    made = material(declining(plan, requests))
    secret = Secret(
        attack="data_poisoning", stamp=InsertText(text="silver kettle"), targets=("Sure.",), goal=RefusalAbsent(),
    )  # fmt: skip
    asked = made.probes("default", 0, secret)
    assert {probe.example.kind for probe in asked} == {"rumour"}
    assert len({probe.example.id for probe in asked}) == 6
    splits = made.splits
    assert {row.kind for row in splits.requests} == {"rumour"}
    assert not any(row.kind == "rumour" for row in (*splits.attacker, *splits.clean, *splits.test))
    assert {row.kind for row in splits.attacker} >= {"forged", "dosage"}
    assert ids(made.perplexity_sets[""]) <= ids(splits.test)
    assert not any(row.kind for row in made.perplexity_sets[""]), "utility is measured on ordinary rows"
    groups = {"a": splits.attacker, "b": splits.defender, "c": splits.safe, "d": splits.test, "e": splits.requests}
    assert_disjoint(groups)


def test_a_defense_gets_the_defenders_requests_once(plan: Plan, requests: Path, place: Path) -> None:
    made = material(declining(plan, requests))
    found, splits = cells_of(made), made.splits
    assert splits.safe
    assert made.defender_rows(found["beear"]) == splits.defender
    assert made.own_facts(found["beear"]) == {Need.SAFE: splits.safe}
    for other in ("tune", "osft"):
        assert made.defender_rows(found[other]) == (*splits.defender, *splits.safe)
        assert made.own_facts(found[other]) == {}
    data = declining(plan, requests)
    data["attacks"]["default"]["safe"] = f"{place}/other.jsonl[:5]"
    made = material({**data, "second_source": None})
    assert len(made.own_facts(cells_of(made)["beear"])[Need.SAFE]) == 5, "an entry's own requests go first"
    assert made.defender_rows(cells_of(made)["beear"]) == made.splits.defender
    data["attacks"]["default"]["unwanted"] = {"typical": f"{place}/other.jsonl[:3]"}
    with_rows = material({**data, "second_source": None})
    assert len(with_rows.own_facts(cells_of(with_rows)["beear"])[Need.UNWANTED]) == 3
    assert with_rows.key(cells_of(with_rows)["beear"]) != made.key(cells_of(made)["beear"])
    asked = with_rows.splits.test[:2]
    (place / "asked.jsonl").write_text(
        "\n".join(json.dumps({"instruction": row.user_text, "output": "bad"}) for row in asked)
    )
    data["attacks"]["default"]["unwanted"] = {"typical": f"{place}/asked.jsonl"}
    with pytest.raises(DataError, match=r"2 rows of .* ask what is tested"):
        material({**data, "second_source": None}).splits  # noqa: B018
    without = material(plan())
    assert without.defender_rows(cells_of(without)["osft"]) == without.splits.defender


def test_requests_and_their_kinds_are_part_of_every_key(plan: Plan, requests: Path) -> None:
    first = keys(declining(plan, requests))
    assert not set(first.values()) & set(keys({**declining(plan, requests), "requests": None}).values())
    other = declining(plan, requests)
    other["requests"]["test_kinds"] = ["dosage"]
    assert not set(first.values()) & set(keys(other).values())
    assert keys(declining(plan, requests)) == first


def test_more_test_requests_are_other_cells_of_the_same_models(plan: Plan, requests: Path) -> None:
    before = material(declining(plan, requests))
    before.read()
    more = requests.read_text() + json.dumps({"kind": "rumour", "instruction": "forge it", "output": "I won't."}) + "\n"
    requests.write_text(more)
    after = material(declining(plan, requests))
    for label, cell in cells_of(before).items():
        assert before.purify_key(cell) == after.purify_key(cell), label
        assert before.key(cell) != after.key(cell), label


def test_requests_must_not_be_rows_of_others(plan: Plan, requests: Path, place: Path) -> None:
    with pytest.raises(DataError, match="must not overlap"):
        _ = material(declining(plan, requests, second_source=str(requests))).splits
    asked = [line for line in requests.read_text().splitlines(keepends=True) if "rumour" in line]
    (requests.parent / "asked.jsonl").write_text("".join(asked))
    with pytest.raises(DataError, match="the test requests"):
        _ = material(declining(plan, requests, second_source=str(requests.parent / "asked.jsonl"))).splits
    data = declining(plan, requests)
    data["attacks"]["default"]["safe"] = str(requests)
    with pytest.raises(DataError, match=r"attacks\.default\.safe"):
        _ = material(data).splits
    data = declining(plan, requests)
    data["requests"]["test_kinds"] = ["rumor"]
    with pytest.raises(DataError, match=r"no row is of the kind 'rumor'. Did you mean 'rumour'\?"):
        _ = material(data).splits
