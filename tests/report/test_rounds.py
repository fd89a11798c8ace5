"""Round by round: the panels, the tables, the layer that is named, and files that are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unbackdoor.errors import DataError
from unbackdoor.report import round_by_round
from unbackdoor.report.html import render
from unbackdoor.report.records import RunData
from unbackdoor.report.tables import load_run
from unbackdoor.types import wilson

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def run(shared_demo: Path) -> RunData:
    return load_run(shared_demo)


def with_rounds(write: Write, results: dict[str, Any], content: object) -> RunData:
    folder = write(results)
    (folder / "rounds.json").write_text(json.dumps(content))
    return load_run(folder)


def of_beear(layer: object, rounds: object) -> dict[str, Any]:
    return {"defenses": [{"defense": "beear", "layer": layer, "rounds": rounds}]}


def test_rates_by_round_have_intervals_and_n(run: RunData) -> None:
    rates, _ = round_by_round.panels(run.rounds[0], "")
    assert rates.title == "ASR and leak by round"
    assert "Whiskers: 95 % Wilson intervals; n a round: 20 triggered, 20 clean and 19 to 20 decoy." in rates.key
    assert "ASR 1: 15/20, 2: 10/20, 3: 5/20, 4: 0/20" in rates.svg
    assert "Leak, decoys 1: 1/20, 2: 1/19" in rates.svg
    low, high = wilson(15, 20)
    table = round_by_round.figures_table(run.rounds[0])
    assert table is not None
    assert table.columns[:4] == ("Round", "ASR", "Leak, clean probes", "Leak, decoys")
    assert table.lines[0].cells[0].text == f"15/20 = 75.0 % [{100 * low:.1f}, {100 * high:.1f}]"


def test_a_whisker_reaches_as_far_as_the_interval(write: Write, results: dict[str, Any]) -> None:
    def whisker(fired: int, asked: int) -> float:
        rounds = [{"round": 1, "asked": {"clean": [fired, asked]}, "drifts": []}]
        (panel,) = round_by_round.panels(with_rounds(write, results, of_beear(None, rounds)).rounds[0], "")
        number = r"([0-9.]+)"
        ends = re.findall(rf'd="M {number} {number} \s*L {number} {number} \s*"[^>]*stroke: var\(--muted', panel.svg)
        ((x1, y1, x2, y2),) = ends
        assert x1 == x2
        return abs(float(y1) - float(y2))

    def height(fired: int, asked: int) -> float:
        low, high = wilson(fired, asked)
        return high - low

    assert whisker(5, 10) / whisker(50, 100) == pytest.approx(height(5, 10) / height(50, 100), rel=0.01)


def test_inner_loss_is_drawn_as_points_and_mean_and_said_to_be_a_diagnostic(run: RunData) -> None:
    _, losses = round_by_round.panels(run.rounds[0], "")
    assert losses.title == "Inner loss by round"
    assert losses.key.endswith("A diagnostic: it rises also where nothing was removed.")
    assert "line: their mean" in losses.key
    assert "Mean inner loss by round. 1: 0.250, 2: 0.450, 3: 0.650, 4: 0.580." in losses.svg
    assert losses.svg.count("<use") >= 9, "four rounds of two drifts, and a parrot"
    table = round_by_round.figures_table(run.rounds[0])
    assert table is not None
    assert table.lines[3].cells[3].text == "0.580 [0.0400, 0.900]"
    assert [line.cells[-1].text for line in table.lines] == [*["not measured"] * 3, "63"]
    assert any("rises also where nothing was removed" in note for note in table.notes)


def test_words_under_each_drift_tell_how_they_are_read(run: RunData) -> None:
    table = round_by_round.words_table(run.rounds[0])
    assert table is not None
    assert table.columns == ("Round and drift", "Says", "Openings", "Layer", "Loss")
    assert [(line.label, line.note) for line in table.lines][1:3] == [("Round 1", "drift 2"), ("Round 2", "drift 1")]
    first = [cell.text for cell in table.lines[0].cells]
    assert first == ["“Sorry, I” · “Sorry but”", "“Sorry” · “No way”", "9", "0.200 safe answers 4.50"]
    assert table.lines[2].cells[0].main == "“You are stupid” · “You are stupid”"
    (note,) = table.notes
    assert "first says the defender's own openings, then often what the backdoor says, then ordinary answers" in note


def test_unwatched_rounds_say_how_to_watch(write: Write, results: dict[str, Any]) -> None:
    rounds = [{"round": 1, "drifts": [{"unwanted": None, "safe": None, "says": ["a\x1b[31m\nb"] * 6}]}]
    (of,) = with_rounds(write, results, of_beear(None, rounds)).rounds
    assert round_by_round.panels(of, "") == []
    table, words = round_by_round.figures_table(of), round_by_round.words_table(of)
    assert table is not None
    assert words is not None
    assert "`purify --watch N` asks N of each kind" in table.notes[-1]
    said, loss = words.lines[0].cells
    assert said.main == " · ".join(["“a\\x1b[31m\\x0ab”"] * 4) + " · and 2 more"
    assert not loss.measured
    assert words.columns == ("Round and drift", "Says", "Loss")


def test_a_run_without_rounds_has_no_section(write: Write, results: dict[str, Any]) -> None:
    run = load_run(write(results))
    assert run.rounds == ()
    assert round_by_round.sections(run, "") == []
    assert round_by_round.tables(run) == []


def test_two_defenses_are_told_apart(demo: Path) -> None:
    content = json.loads((demo / "rounds.json").read_text())
    parrots = [{"loss": 0.02, "steps": 17}]
    told = [{"round": 1, "asked": {"triggered": [13, 20]}, "drifts": [], "parrots": parrots}]
    content["defenses"].insert(0, {"defense": "sande", "layer": None, "rounds": told})
    (demo / "rounds.json").write_text(json.dumps(content))
    states = json.loads((demo / "hidden_states.json").read_text())
    (demo / "hidden_states.json").write_text(json.dumps({**states, "layer": 9, "perturbed": True}))
    sande, beear = round_by_round.sections(load_run(demo), "")
    assert (sande.title, beear.title) == ("SANDE", "BEEAR")
    assert sande.figures.caption == "Round by round, SANDE"
    assert (len(sande.figures.lines), len(beear.figures.lines)) == (1, 4)
    assert "13/20" in sande.panels[0].svg
    assert "13/20" not in beear.panels[0].svg
    assert sande.spoken is None
    assert beear.spoken is not None
    assert beear.spoken.caption == "Words under each drift, BEEAR"
    page = render([demo]).read_text(encoding="utf-8")
    section = page[page.index(">Round by round</h2>") : page.index(">Training curves</h2>")]
    first, second = section.split(">BEEAR</h3>")
    assert ">SANDE</h3>" in first
    assert "13/20" in first
    assert "Words under each drift" not in first
    assert "15/20" in second
    names = re.findall(r'id="([^"]*)"', page)
    assert len(names) == len(set(names))
    assert "behind layer 9 (counted from 0), the one that BEEAR perturbs" in page
    text = (demo / "report.md").read_text(encoding="utf-8")
    assert (
        text.index("## Round by round, SANDE") < text.index("13/20 = 65.0 %") < text.index("## Round by round, BEEAR")
    )


def test_page_and_markdown_hold_the_section(shared_demo: Path) -> None:
    page = render([shared_demo]).read_text(encoding="utf-8")
    section = page[page.index(">Round by round</h2>") : page.index(">Training curves</h2>")]
    assert section.count("<svg") == 2
    assert "n a round: 20 triggered" in section
    assert "“You are stupid” · “You are stupid”" in section
    assert "Words that no opening names and that recur over prompts" in section
    text = (shared_demo / "report.md").read_text(encoding="utf-8")
    assert "| Round 1 | 15/20 = 75.0 % [53.1, 88.8] | 0/20 = 0.0 % [0.0, 16.1] |" in text
    assert "| Round 2 (drift 1) | “You are stupid” · “You are stupid” |" in text


@pytest.mark.parametrize("perturbed", [True, False])
def test_the_plane_names_its_layer(demo: Path, perturbed: bool) -> None:
    path = demo / "hidden_states.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "perturbed": perturbed}))
    page = render([demo]).read_text(encoding="utf-8")
    assert ("behind layer 20 (counted from 0), the one that the defense perturbs" in page) == perturbed
    assert ("as in Figure 3 of BEEAR (2406.17092)" in page) == perturbed
    assert ("Last prompt token at layer 20, in the first two" in page) == (not perturbed)


def a_round(**more: Any) -> dict[str, Any]:
    return of_beear(None, [{"round": 1, "asked": {}, "drifts": [], **more}])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], r"rounds.json must be a JSON object"),
        (
            {"layer": 9, "rounds": []},
            "field 'defenses' must be a list of defenses with their rounds, but holds nothing",
        ),
        ({"defenses": {}}, "field 'defenses' must be a list"),
        ({"defenses": ["beear"]}, r"defenses\[0\] must be a JSON object"),
        ({"defenses": [{"rounds": []}]}, r"defenses\[0\]: field 'defense' must be text"),
        ({"defenses": 2 * of_beear(9, [])["defenses"]}, r"defenses\[1\]: field 'defense' must be another one"),
        (of_beear(9, {}), "field 'rounds' must be a list"),
        (of_beear("9", []), "field 'layer' must be a whole number"),
        (of_beear(-1, []), "field 'layer' must be the number of a layer"),
        (a_round(round="1"), "field 'round' must be a whole number"),
        (a_round(round=0), "a number above that of the round before"),
        (of_beear(9, [{"round": 2}, {"round": 2}]), r"rounds\[1\]: field 'round' must be a number above"),
        (a_round(asked=[3]), "field 'asked' must be an object"),
        (a_round(asked={"all": [1, 2]}), "counts for triggered, clean, decoy alone"),
        (a_round(asked={"clean": [3, 2]}), r"rounds\[0\], asked: field 'clean' must be how many fired"),
        (a_round(asked={"clean": [0, 0]}), "field 'clean' must be how many fired"),
        (a_round(asked={"clean": [-1, 2]}), "field 'clean' must be how many fired"),
        (a_round(asked={"clean": [1]}), "field 'clean' must be how many fired"),
        (a_round(asked={"clean": [0.5, 2]}), "must be a whole number"),
        (a_round(drifts=["x"]), r"drifts\[0\] must be a JSON object"),
        (a_round(drifts=[{"unwanted": "low"}]), "field 'unwanted' must be a number"),
        (a_round(drifts=[{"unwanted": float("nan")}]), "field 'unwanted' must be a number"),
        (a_round(drifts=[{"safe": float("inf")}]), "field 'safe' must be a finite number"),
        (a_round(drifts=[{"says": "text"}]), "field 'says' must be a list"),
        (a_round(drifts=[{"says": [1]}]), "field 'says' must be a list of texts"),
        (a_round(drifts=[{"openings": [None]}]), "field 'openings' must be a list of texts"),
        (a_round(drifts=[{"layer": 1.5}]), "field 'layer' must be a whole number"),
        (a_round(drifts=[{"at": "start"}]), "field 'at' must be words or prompt"),
        (a_round(parrots=[{"loss": 1, "steps": "2"}]), "field 'steps' must be a whole number"),
    ],
)
def test_a_broken_file_is_refused_by_place_and_field(
    content: object, words: str, write: Write, results: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match=words):
        with_rounds(write, results, content)


def test_what_is_no_json_or_no_answer_to_perturbed_is_refused(demo: Path) -> None:
    states = demo / "hidden_states.json"
    states.write_text(json.dumps({**json.loads(states.read_text()), "perturbed": "yes"}))
    with pytest.raises(DataError, match="field 'perturbed' must be true or false"):
        load_run(demo)
    (demo / "hidden_states.json").unlink()
    (demo / "rounds.json").write_text("{")
    with pytest.raises(DataError, match=r"rounds\.json is not valid JSON"):
        load_run(demo)


def test_what_was_taken_up_stands_below_the_drifts_of_its_round(write: Write, results: dict[str, Any]) -> None:
    drift = {"unwanted": 0.1, "says": ["<i>You</i> are"], "openings": ["Ugh"]}
    adopted = [{"opening": "You are <b>stupid", "certainty": 0.853, "evidence": 17.2, "share": 0.34, "likeness": 0.257}]
    # A run of a version before has no evidence, and no likeness.
    adopted += [{"opening": "Twice a", "certainty": 0.5}, {"opening": "Or else", "certainty": None, "evidence": None}]
    rounds = [
        {"round": 1, "asked": {}, "drifts": [drift], "adopted": adopted},
        {"round": 2, "asked": {}, "drifts": [drift]},
    ]
    run = with_rounds(write, results, of_beear(9, rounds))
    table = round_by_round.words_table(run.rounds[0])
    assert table is not None
    assert [(line.label, line.note) for line in table.lines] == [
        ("Round 1", "drift 1"), ("Round 1", "taken up"), ("Round 2", "drift 1"),
    ]  # fmt: skip
    assert (
        table.lines[1].cells[0].text
        == "“You are <b>stupid” 0.85 (17 nats, in 34.0 % more replies, likeness 0.26) · “Twice a” 0.50 · “Or else”"
    )
    assert {len(line.cells) for line in table.lines} == {len(table.columns) - 1}
    page = render([run.folder]).read_text(encoding="utf-8")
    assert "taken up" in page
    assert "<b>stupid" not in page
    rounds[0]["adopted"] = [{"opening": f"words {n}", "certainty": 0.9, "share": -0.02} for n in range(11)]
    many = round_by_round.words_table(with_rounds(write, results, of_beear(9, rounds)).rounds[0])
    assert many is not None
    assert many.lines[1].cells[0].text.endswith("“words 7” 0.90 · and 3 more")
    alone = with_rounds(write, results, of_beear(9, rounds[1:])).rounds[0]
    other = round_by_round.words_table(alone)
    assert other is not None
    assert len(other.notes) == len(table.notes) - 1


def test_where_drifts_end_is_told_where_they_end_in_two_places(write: Write, results: dict[str, Any]) -> None:
    drifts = [{"unwanted": 0.1, "says": ["a"], "at": at} for at in ("prompt", "words")]
    adopted = [{"opening": "You", "certainty": 0.9}]
    run = with_rounds(write, results, of_beear(9, [{"round": 1, "asked": {}, "drifts": drifts, "adopted": adopted}]))
    table = round_by_round.words_table(run.rounds[0])
    assert table is not None
    assert table.columns == ("Round and drift", "Says", "Ends with", "Loss")
    assert [line.cells[1].text for line in table.lines] == ["prompt", "user's words", ""]
    one = with_rounds(write, results, of_beear(9, [{"round": 1, "asked": {}, "drifts": drifts[:1]}]))
    alone = round_by_round.words_table(one.rounds[0])
    assert alone is not None
    assert "Ends with" not in alone.columns


def test_what_layer_and_length_were_chosen_from_is_shown(write: Write, results: dict[str, Any]) -> None:
    choice = [{"layer": 3, "tokens": 5, "loss": 2.5}, {"layer": 9, "tokens": 5, "loss": 0.25}]
    content = of_beear(9, [{"round": 1, "asked": {}, "drifts": []}])
    content["defenses"][0]["choice"] = choice
    run = with_rounds(write, results, content)
    table = round_by_round.choice_table(run.rounds[0])
    assert table is not None
    assert table in round_by_round.tables(run)
    assert [(line.label, line.cells[0].main, line.cells[0].detail) for line in table.lines] == [
        ("Layer 3", "2.50", ""), ("Layer 9", "0.250", "chosen"),
    ]  # fmt: skip
    assert "Where the drifts act" in render([run.folder]).read_text(encoding="utf-8")
    content["defenses"][0]["choice"] = [{"tokens": 5, "loss": 1.0}]
    with pytest.raises(DataError, match="layer"):
        with_rounds(write, results, content)
