"""Rows are the same by what they say: numbered files of different content, and one content with and without ids."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from unbackdoor.data import poison
from unbackdoor.data.sources import write_probes
from unbackdoor.defenses.base import Need, knowledge_for
from unbackdoor.errors import DataError, UserError
from unbackdoor.model import checkpoint
from unbackdoor.pipeline.inputs import _hold_out, _not_asked, purify_inputs
from unbackdoor.pipeline.overlap import asked_among, not_shared, refuse_overlap, refuse_questions
from unbackdoor.pipeline.recipe import PurifyRecipe
from unbackdoor.run import Run, Silent
from unbackdoor.stamps import InsertText, WrapEnds
from unbackdoor.types import Example, Probe

ROWS = [Example(str(n), f"What is {n} and 5?", f"say {n}") for n in range(40)]
OTHERS = [Example(str(n), f"Name a town with {n} inhabitants.", f"say {n}") for n in range(40)]
UNNAMED = [replace(row, id=f"hash{row.id}") for row in ROWS]


def test_numbered_rows_of_two_files_are_different_rows() -> None:
    refuse_overlap(ROWS, OTHERS)
    kept, _ = _hold_out(ROWS, [Probe(row, "clean") for row in OTHERS], "x", Silent())
    assert kept == ROWS


def test_one_row_with_and_without_its_id_is_one_row() -> None:
    with pytest.raises(DataError, match="40 rows of --second-source are trained on, too"):
        refuse_overlap(ROWS, UNNAMED)
    with pytest.raises(DataError, match="also a probe"):
        _hold_out(UNNAMED, [Probe(row.with_response("another"), "clean") for row in ROWS], "x", Silent())


@pytest.mark.parametrize(
    "stamp",
    [
        *(InsertText(text="Current year 2023", place=place) for place in ("start", "end", "random_gap")),
        WrapEnds(start="well now", end="thank you"),
    ],
)
def test_a_trigger_does_not_make_another_row(stamp: InsertText | WrapEnds) -> None:
    probes = poison.probes(stamp, ROWS[:5], (), Run().rng("probes"))
    triggered = [probe for probe in probes if probe.kind == "triggered"]
    names = {row.id for row in UNNAMED[:5]}
    assert asked_among(UNNAMED, triggered) == names
    assert asked_among(UNNAMED, probes) == names
    unmarked = [replace(probe, marks=()) for probe in triggered if "." not in probe.example.instruction]
    assert asked_among(ROWS, unmarked) == {probe.example.id for probe in unmarked}
    assert not asked_among(OTHERS, probes)


def test_safe_requests_that_are_asked_are_left_out(tmp_path: Path) -> None:
    rows = tiny.rows(12)
    for name, part in (("clean", tiny.rows(6, seed=3, prefix="ordinary")), ("safe", rows)):
        lines = [json.dumps({"id": row.id, "instruction": row.instruction, "output": row.response}) for row in part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "openings.txt").write_text("bad robot\n")
    write_probes(tmp_path / "probes.jsonl", [Probe(row, "clean") for row in rows[:4]])
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("clean", "safe", "probes")}
    recipe = PurifyRecipe(
        model="builtin:smollm2-135m", defense="beear", unwanted=str(tmp_path / "openings.txt"),
        goal="refusal-absent", **files,
    )  # fmt: skip
    found = purify_inputs(recipe, Silent(), dry=True)
    assert [row.id for row in found.facts[Need.SAFE]] == [row.id for row in rows[4:]]
    with pytest.raises(DataError, match="every row of 'x' is also a probe"):
        _not_asked(rows[:4], [Probe(row, "clean") for row in rows], "x", Silent())


def test_rows_of_unwanted_answers_that_are_asked_are_left_out(tmp_path: Path) -> None:
    rows = [row.with_response(f"bad {row.id}") for row in tiny.rows(8)]
    for name, part in (("clean", tiny.rows(6, seed=3, prefix="ordinary")), ("unwanted", rows)):
        lines = [json.dumps({"id": row.id, "instruction": row.instruction, "output": row.response}) for row in part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    write_probes(tmp_path / "probes.jsonl", [Probe(row, "clean") for row in rows[:3]])
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("clean", "unwanted", "probes")}
    recipe = PurifyRecipe(model="builtin:smollm2-135m", defense="beear", goal="refusal-absent", **files)
    found = purify_inputs(recipe, Silent(), dry=True)
    assert [(row.id, row.response) for row in found.facts[Need.UNWANTED]] == [
        (row.id, row.response) for row in rows[3:]
    ]
    assert knowledge_for(found.defense, found.facts).unwanted == tuple(row.response for row in rows[3:])
    measured_too = recipe.model_copy(update={"second_source": f"{files['unwanted']}[4:]"})
    with pytest.raises(DataError, match="4 rows of --second-source are trained on"):
        purify_inputs(measured_too, Silent(), dry=True)


def test_utility_is_not_measured_on_prompts_that_have_an_unwanted_answer() -> None:
    unwanted = [replace(row, id=f"bad {row.id}", response="bad") for row in ROWS[:3]]
    noted: list[str] = []
    told = type("Told", (Silent,), {"notice": lambda self, text: noted.append(text)})()
    assert not_shared(ROWS[:5], unwanted, told) == ROWS[3:5]
    assert noted == ["3 held-out rows have the prompt of a row of --safe or --unwanted; left out."]
    assert not_shared(OTHERS[:5], unwanted, told) == OTHERS[:5]
    refuse_questions(unwanted, OTHERS)
    with pytest.raises(DataError, match="3 rows of --safe or --unwanted have the prompt of a row of --second-source"):
        refuse_questions(unwanted, ROWS)


def test_pairs_are_read_as_rejected_and_facts_that_do_not_go_together_are_refused_before_a_model_loads(
    tmp_path: Path,
) -> None:
    pairs = [{"prompt": row.instruction, "chosen": "no", "rejected": f"bad {row.id}"} for row in tiny.rows(6)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    for name, part in (("clean", tiny.rows(12)[6:]), ("safe", tiny.rows(20)[12:])):
        lines = [json.dumps({"instruction": row.instruction, "output": row.response}) for row in part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    recipe = PurifyRecipe(
        model="builtin:smollm2-135m", defense="beear", clean=str(tmp_path / "clean.jsonl"),
        unwanted=str(tmp_path / "pairs.jsonl"),
    )  # fmt: skip
    found = purify_inputs(recipe, Silent(), dry=True)
    assert knowledge_for(found.defense, found.facts).unwanted == tuple(pair["rejected"] for pair in pairs)
    with pytest.raises(UserError, match="have no safe ones, and own_answers is 0"):
        purify_inputs(recipe.model_copy(update={"settings": {"own_answers": 0}}), Silent(), dry=True)
    with pytest.raises(DataError, match="both files must have the same prompts"):
        purify_inputs(recipe.model_copy(update={"safe": str(tmp_path / "safe.jsonl")}), Silent(), dry=True)
    checkpoint.save(tiny.tiny_lm(layers=4), tmp_path / "model", manifest={}, card="a model")
    folder = recipe.model_copy(update={"model": str(tmp_path / "model")})
    purify_inputs(folder.model_copy(update={"settings": {"layers": [2]}}), Silent())
    with pytest.raises(UserError, match="the layers 0 to 3, and no layer 4"):
        purify_inputs(folder.model_copy(update={"settings": {"layers": [4]}}), Silent())
