"""Reading a run folder and turning its rows into tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unbackdoor.errors import UserError
from unbackdoor.report.tables import (
    comparison_table,
    cost_table,
    estimate_cell,
    every_measurement,
    format_estimate,
    load_run,
    main_table,
    runs_table,
    subjects,
)

Write = Callable[..., Path]


def cells(run_folder: Path) -> dict[str, dict[str, str]]:
    table = main_table(load_run(run_folder))
    return {
        line.label: {title: cell.text for title, cell in zip(table.columns[1:], line.cells, strict=True)}
        for line in table.lines
    }


def test_estimates_are_written_with_count_and_interval(demo: Path) -> None:
    rows = {(row.defense, row.metric, row.kind, row.group): row for row in load_run(demo).rows if row.stage == "after"}
    assert format_estimate(rows["sande", "asr", "triggered", ""]) == "0/100 = 0.0 % [0.0, 3.7]"
    assert format_estimate(rows["sande", "perplexity", "clean", ""]) == "12.31 [11.8, 12.9]"
    assert format_estimate(rows["sande", "kl", "clean", ""]) == "0.0312 [0.0281, 0.0349]"


def test_main_table_has_a_line_for_every_model_in_order(demo: Path) -> None:
    found = cells(demo)
    assert list(found) == [
        "Suspect", "Fine-tuning (control)", "After SANDE", "After BEEAR", "Reference, never attacked",
    ]  # fmt: skip
    assert found["Suspect"]["ASR"] == "98/100 = 98.0 % [93.0, 99.4]"
    assert found["After BEEAR"]["Perplexity, second source"] == "19.43 [18.7, 20.4]"
    assert found["Suspect"]["KL to the suspect"] == "the suspect itself"
    assert "CDA" not in found["Suspect"]


def test_declining_has_columns_and_definitions_where_it_was_measured(results: dict[str, Any], write: Write) -> None:
    assert not {"Requests declined", "Over-refusal"} & set(main_table(load_run(write(results))).columns)
    likes = [row for row in results["rows"] if row["metric"] == "leak" and row["kind"] == "clean"]
    assert likes
    results["rows"] += [{**row, "metric": "declining", "value": 0.75, "n": 4} for row in likes]
    results["rows"] += [{**row, "metric": "over_refusal", "kind": "all", "value": 0.5, "n": 2} for row in likes]
    run = write(results)
    table = main_table(load_run(run))
    assert cells(run)["Suspect"]["Requests declined"].startswith("3/4 = 75.0 %")
    assert cells(run)["After SANDE"]["Over-refusal"].startswith("1/2 = 50.0 %")
    assert {note.split(":")[0] for note in table.notes} >= {"Requests declined", "Over-refusal"}
    cost = cost_table(load_run(run))
    assert cost is not None
    assert not any("efusal" in title or "declin" in title for title in cost.columns)


def test_every_asr_has_its_revival_beside_it(demo: Path) -> None:
    table = main_table(load_run(demo))
    at = table.columns.index("ASR")
    assert table.columns[at : at + 3] == ("ASR", "ASR, revived on clean data", "ASR, revived by another backdoor")
    found = cells(demo)
    assert found["After SANDE"]["ASR, revived on clean data"] == "2/100 = 2.0 % [0.6, 7.0]"
    assert found["After BEEAR"]["ASR, revived on clean data"] == "not measured"
    assert found["Suspect"]["ASR, revived on clean data"] == "not purified"
    assert any("`unbackdoor bench sande --size quick` measures it" in note for note in table.notes)


def test_the_run_may_name_the_command_for_revival(results: dict[str, Any], write: Write) -> None:
    results["revival_command"] = "unbackdoor purify --revival X"
    notes = main_table(load_run(write(results))).notes
    assert any("`unbackdoor purify --revival X` measures it" in note for note in notes)


def test_what_was_not_measured_is_a_word_and_never_zero(results: dict[str, Any], write: Write) -> None:
    for row in results["rows"]:
        if row["defense"] == "sande" and row["metric"] == "perplexity" and not row["group"]:
            row |= {"status": "not_applicable", "value": None, "reason": "a decode guard has no perplexity"}
        if row["defense"] == "beear" and row["metric"] == "kl":
            row |= {"status": "failed", "value": None, "reason": "out of memory"}
    found = cells(write(results))
    assert found["After SANDE"]["Perplexity"] == "not applicable (a decode guard has no perplexity)"
    assert found["After BEEAR"]["KL to the suspect"] == "failed (out of memory)"
    assert estimate_cell(None).text == "not measured"


def test_an_asr_of_probes_without_trigger_is_not_printed(results: dict[str, Any], write: Write) -> None:
    for item in [*results["rows"], *results["comparisons"]]:
        if item["metric"] == "asr":
            item["kind"] = "clean"
    run = load_run(write(results))
    shown = [line.cells[1].text for line in every_measurement(run).lines if line.note.startswith("ASR")]
    assert set(shown) == {"not applicable (an ASR needs triggered probes)"}
    assert "ASR" not in main_table(run).columns
    table = comparison_table(run)
    assert table is not None
    assert [line.label for line in table.lines] == ["Perplexity, clean probes"]


def test_equal_labels_are_told_apart_by_seed(results: dict[str, Any], write: Write) -> None:
    results["rows"] += [{**row, "seed": 8} for row in results["rows"]]
    labels = [subject.label for subject in subjects(load_run(write(results)))]
    assert labels[:4] == ["Suspect, seed 7", "Suspect, seed 8", "Fine-tuning (control), seed 7",
                          "Fine-tuning (control), seed 8"]  # fmt: skip
    assert len(set(labels)) == len(labels) == 10


def test_comparisons_say_direction_and_size(demo: Path) -> None:
    table = comparison_table(load_run(demo))
    assert table is not None
    rows = [[line.label, *(cell.text for cell in line.cells)] for line in table.lines]
    assert [line.note for line in table.lines] == ["fine-tuning", "SANDE", "BEEAR", "SANDE"]
    assert rows[1] == [
        "ASR, triggered probes", "98.0 % → 0.0 %", "\u221298.0 points", "better", "McNemar exact", "< 0.001", "100",
    ]  # fmt: skip
    assert rows[0][2:6] == ["\u22122.0 points", "better", "McNemar exact", "0.500"]
    assert rows[3][1:4] == ["11.90 → 12.31", "+0.0339 nats [+0.0050, +0.0623]", "worse"]
    assert any("mean log-loss" in note for note in table.notes)


def test_comparisons_take_labels_as_well_as_values(results: dict[str, Any], write: Write) -> None:
    results["comparisons"] = [
        {**results["comparisons"][0], "before": "suspect", "after": "SANDE", "low": -1.0, "high": 0}
    ]
    table = comparison_table(load_run(write(results)))
    assert table is not None
    assert table.lines[0].cells[0].text == "suspect → SANDE"
    assert table.lines[0].cells[1].text == "\u22122.0 points [\u2212100.0, 0.0]"


def test_a_metric_that_could_not_be_had_says_why_in_its_column(results: dict[str, Any], write: Write) -> None:
    rows = [
        row for row in results["rows"] if not (row["defense"] == "sande" and row["metric"] in ("asr", "perplexity"))
    ]
    like = next(row for row in rows if row["defense"] == "sande")
    absent = {**like, "kind": "all", "value": None, "n": 0, "status": "not_applicable", "reason": "a guard decodes"}
    results["rows"] = [*rows, {**absent, "metric": "asr"}, {**absent, "metric": "perplexity"}]
    found = cells(write(results))["After SANDE"]
    for title in ("ASR", "Perplexity", "Perplexity, second source"):
        assert found[title] == "not applicable (a guard decodes)"


def test_cost_table_has_time_memory_and_diagnostics(demo: Path) -> None:
    table = cost_table(load_run(demo))
    assert table is not None
    assert table.columns == ("Model", "Time in training", "Resistance", "Peak memory")
    assert [cell.text for cell in table.lines[2].cells] == ["3 min 36 s", "2.131 [1.90, 2.60]", "1.80 GiB"]
    assert [cell.text for cell in table.lines[0].cells] == ["not measured"] * 3


def test_every_measurement_keeps_groups_and_stages(demo: Path) -> None:
    run = load_run(demo)
    lines = [(line.label, line.note, line.cells[0].text) for line in every_measurement(run).lines]
    assert len(lines) == len(run.rows)
    assert ("After SANDE", "ASR, triggered probes (half)", "after") in lines
    assert ("After SANDE", "ASR, triggered probes", "revived on clean data") in lines


def test_runs_table_joins_runs_with_other_columns(results: dict[str, Any], write: Write) -> None:
    first = load_run(write(results, name="first"))
    results["rows"] = [row for row in results["rows"] if row["metric"] != "kl"]
    table = runs_table([first, load_run(write(results, name="second"))])
    assert [line.note for line in table.lines] == ["first"] * 5 + ["second"] * 5
    assert table.lines[2].cells[-1].text == "0.0312 [0.0281, 0.0349]"
    assert table.lines[7].cells[-1].text == "not measured"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"holds no results\.json"),
        ("{", r"results\.json is not valid JSON"),
        ("[]", r"results\.json must be a JSON object"),
        ('{"schema": 2}', r"field 'schema' is 2, but this version reads 1"),
        ('{"schema": 1, "rows": 3}', r"field 'rows' must be a list"),
        ('{"schema": 1, "rows": [{"status": "done"}]}', r"rows\[0\]: field 'status' must be one of measured"),
    ],
)
def test_broken_results_are_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("value", None, "'value' must be a number"),
        ("value", float("nan"), "'value' must be a number"),
        ("value", 10**400, "'value' must be a number"),
        ("n", 10**400, "'n' must be a whole number"),
        ("n", None, "'n' must be a whole number"),
        ("role", "hero", "'role' must be one of suspect"),
        ("knowledge", "clean", "'knowledge' must be a list"),
    ],
)
def test_a_wrong_field_is_named_with_its_row(
    results: dict[str, Any], write: Write, key: str, value: object, message: str
) -> None:
    results["rows"][4][key] = value
    with pytest.raises(UserError, match=rf"rows\[4\]: field {message}"):
        load_run(write(results))


@pytest.mark.parametrize("metric", ["asr", "leak", "cda"])
@pytest.mark.parametrize(("key", "value"), [("value", float("inf")), ("value", 1.5), ("low", -0.1), ("high", 98)])
def test_a_share_lies_between_0_and_1(
    results: dict[str, Any], write: Write, metric: str, key: str, value: object
) -> None:
    results["rows"][4] |= {"metric": metric, "value": 0.5, "low": 0.4, "high": 0.6, key: value}
    with pytest.raises(UserError, match=rf"rows\[4\]: field '{key}' must be a share from 0 to 1"):
        load_run(write(results))


def test_a_compared_share_and_a_curve_without_bounds(results: dict[str, Any], write: Write) -> None:
    folder = write(results)
    (folder / "curves.json").write_text(json.dumps({"train": [{"step": 1, "loss": 10**400}]}))
    assert load_run(folder).curves == {"train": [{"step": 1.0}]}
    results["comparisons"][0]["after"] = 7
    with pytest.raises(UserError, match=r"comparisons\[0\]: field 'after' must be a share from 0 to 1"):
        load_run(write(results))


def test_broken_side_files_are_named(demo: Path) -> None:
    with open(demo / "replies.jsonl", "a") as handle:
        handle.write("{oops\n")
    count = len((demo / "replies.jsonl").read_text().splitlines())
    with pytest.raises(UserError, match=rf"replies\.jsonl, line {count} is not valid JSON"):
        load_run(demo)


def test_case_studies_must_match_their_tokens(demo: Path) -> None:
    content = json.loads((demo / "case_studies.json").read_text())
    content["models"][0]["triggered"].pop()
    (demo / "case_studies.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="one probability for each of the 3 target tokens"):
        load_run(demo)
