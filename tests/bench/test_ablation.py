"""Plots of rounds over a setting, from made-up cells: points, crosses, cells that are left out, and hostile texts."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from unbackdoor.bench import ablation, tables
from unbackdoor.bench.cell import Cell
from unbackdoor.bench.figures import Figures
from unbackdoor.bench.grid import Grid
from unbackdoor.bench.store import Result, Store
from unbackdoor.bench.yaml_file import grid_from_data
from unbackdoor.errors import UserError
from unbackdoor.pipeline.measure import Measurement
from unbackdoor.report.plots import Panel

FOUND = {
    "l1": [[48, 50], [40, 50], [30, 50], [14, 50]],
    "l5": [[30, 50], [13, 50], [12, 50]],
    "l20": [[12, 50]],
}
EVIL = '<script>alert(1)</script>&"\x1b[31m\u202e$x$'


def grid(**changes: Any) -> Grid:
    defenses = {f"l{layer}": {"defense": "beear", "settings": {"rounds": 4, "layers": [layer]}} for layer in LAYERS}
    data = {
        "name": "g", "models": ["m"], "attacks": {"default": {}}, "defenses": defenses,
        "watch": {"probes": 50, "until": 0.25},
        "plots": [{"x": "layer", "values": {f"l{layer}": layer for layer in LAYERS}}],
    }  # fmt: skip
    return grid_from_data({**data, **changes}, "g")


LAYERS = (20, 1, 5, 9, 13)


def result(hits: list[list[int]], **notes: Any) -> Result:
    rounds = [{"round": at, "triggered": counts, "clean": [1, 50]} for at, counts in enumerate(hits, 1)]
    return Result("done", "", Measurement([], [], []), ("clean",), {"train": 1.0}, 5, {}, {"rounds": rounds, **notes})


def results() -> dict[str, Result]:
    ended = {"l20": {"ended": "ended by the experimenter after round 1"}}
    return {label: result(hits, **ended.get(label, {})) for label, hits in FOUND.items()}


def figures(made: Grid, found: dict[str, Result]) -> Figures:
    keys = {cell: f"key{number}" for number, cell in enumerate(made.cells())}
    return Figures(made, keys, {cell: found[cell.defense] for cell in keys if cell.defense in found})


def panels(tmp_path: Path, found: dict[str, Result] | None = None, **changes: Any) -> list[Panel]:
    return ablation.draw(figures(grid(**changes), results() if found is None else found), tmp_path)


def marks(svg: str, colour: str) -> list[tuple[float, float]]:
    """Return where the markers of a colour are."""
    root = ET.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
    return [
        (float(use.get("x", "")), float(use.get("y", "")))
        for use in root.iter("{http://www.w3.org/2000/svg}use")
        if f"stroke: {colour}" in use.get("style", "")
    ]


def test_earliest_rounds_are_points_and_failures_crosses_above_all_rounds(tmp_path: Path) -> None:
    first, _ = panels(tmp_path)
    assert first.title == "Earliest round with ASR below 25 %, default, seed 0, m"
    words = "Earliest round with ASR below 25 % by layer. 1: none within 4 rounds; 5: round 3; 20: round 1."
    assert words in first.svg
    (three, one), (cross,) = marks(first.svg, "var(--accent, #2f7f86)"), marks(first.svg, "currentColor")
    assert cross[0] < three[0] < one[0], "the values are in order"
    # Measured from the top, a round is as far from the next as the line of the crosses from the last round, 4.
    assert (one[1] - three[1]) / 2 == pytest.approx((three[1] - cross[1]) / 2, rel=1e-3)
    assert cross[1] < three[1] < one[1]
    assert "Cross: not below 25 % within 4 rounds." in first.key
    assert "n = 50 triggered probes a round" in first.key


def test_a_share_at_the_threshold_is_not_below_it() -> None:
    trial = ablation.Trial(1.0, ((25, 100), (24, 100)))
    assert trial.earliest(0.25) == 2
    assert trial.earliest(0.24) is None


def test_every_round_of_every_value_is_drawn(tmp_path: Path) -> None:
    _, second = panels(tmp_path)
    assert second.title == "ASR by round, default, seed 0, m"
    assert "1: 48/50, 40/50, 30/50, 14/50; 5: 30/50, 13/50, 12/50; 20: 12/50." in second.svg
    shown = [element.text for element in ET.fromstring(second.svg).iter("text")]
    assert [text for text in shown if text in {"1", "5", "20", "9", "13"}][-3:] == ["1", "5", "20"]
    assert "layer" in shown


def test_cells_that_are_not_finished_are_left_out_and_said_so(tmp_path: Path) -> None:
    found = {**results(), "l9": Result("failed", "boom")}
    for panel in panels(tmp_path, found):
        assert panel.key.endswith("Left out: 9 (failed), 13 (not run yet).")
        assert "9: " not in panel.svg
    unwatched = {**found, "l13": Result("done", "", Measurement([], [], []), (), {}, 5, {}, {})}
    assert "13 (nothing was asked between rounds)" in panels(tmp_path, unwatched)[0].key
    (nothing,) = panels(tmp_path, {})
    assert nothing.svg == ""
    assert nothing.key.startswith("Nothing is drawn yet. Left out: 1 (not run yet), 5 (not run yet)")
    assert not (tmp_path / ablation.FILE).exists(), "an older drawing is no drawing of this"


def test_two_settings_are_two_plots(tmp_path: Path) -> None:
    plots = [{"x": "layer", "values": {"l1": 1, "l5": 5}}, {"x": "depth", "values": {"l20": 0.7}, "threshold": 0.1}]
    found = panels(tmp_path, plots=plots, watch={"probes": 50, "until": 0.1})
    assert [panel.title.partition(",")[0] for panel in found] == [
        "Earliest round with ASR below 25 %", "ASR by round", "Earliest round with ASR below 10 %", "ASR by round",
    ]  # fmt: skip
    assert "0.7: none within 1 rounds" in found[2].svg
    with pytest.raises(UserError, match=r"thresholds below 0.25, where defenses are ended"):
        grid(plots=plots)
    identifiers = re.findall(r'\bid="([^"]+)"', (tmp_path / ablation.FILE).read_text())
    assert len(identifiers) == len(set(identifiers)) > 0


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.labels: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.labels += [value for name, value in attrs if tag == "svg" and name == "aria-label"]


def written(folder: Path, made: Grid, found: dict[str, Result]) -> Path:
    store = Store(folder / "out")
    store.open("name: g\n")
    known = figures(made, found)
    for cell, value in known.results.items():
        store.write(known.keys[cell], value, {})
    tables.write(made, store, known.keys)
    return store.folder


def test_tables_show_the_plots_and_name_the_file_beside_them(tmp_path: Path) -> None:
    out = written(tmp_path, grid(), results())
    markdown, page = (out / "tables.md").read_text(), (out / "tables.html").read_text()
    assert "; ASR by round, default, seed 0, m](plots.svg)" in markdown
    assert "**ASR by round, default, seed 0, m.** Dotted line: 25 %." in markdown
    found = _Page()
    found.feed(page)
    assert found.tags.count("figure") == found.tags.count("figcaption") == found.tags.count("svg") == 2
    assert all("by layer" in label for label in found.labels)
    file = ET.parse(out / "plots.svg").getroot()
    assert file.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(list(file.iter("{http://www.w3.org/2000/svg}svg"))) == 3
    assert "ASR by round" in (file.get("aria-label") or "")


def test_the_table_by_round_has_counts_intervals_and_the_early_end(tmp_path: Path) -> None:
    markdown = (written(tmp_path, grid(), results()) / "tables.md").read_text()
    by_round = markdown.split("## Round by round, default, seed 0, m")[1].split("##")[0]
    line = next(line for line in by_round.splitlines() if line.startswith("| l20"))
    assert line == (
        "| l20 (ended by the experimenter after round 1) | 12/50 = 24.0 % [14.3, 37.4]; clean 1/50 | – | – | – |"
    )
    assert "After l20 (knows: clean; ended by the experimenter after round 1)" in markdown
    plain = written(tmp_path / "plain", grid(watch=None, plots=[]), {})
    assert not (plain / "plots.svg").exists()
    assert "Round by round" not in (plain / "tables.md").read_text()
    assert "Plots" not in (plain / "tables.md").read_text()


def test_hostile_texts_stay_text(tmp_path: Path) -> None:
    defenses = {EVIL: {"defense": "beear", "settings": {"rounds": 4}}, "l9": {"defense": "beear"}}
    plots = [{"x": EVIL, "values": {EVIL: 1, "l9": 2}}]
    made = grid(attacks={EVIL: {}}, defenses=defenses, plots=plots)
    hostile = {EVIL: result(FOUND["l1"], ended=EVIL)}
    out = written(tmp_path, made, hostile)
    found = _Page()
    found.feed((out / "tables.html").read_text())
    assert "script" not in found.tags
    assert found.tags.count("svg") == 2
    for name in ("tables.html", "tables.md", "plots.svg"):
        text = (out / name).read_text()
        assert not re.search("[\x1b\u202e]", text), name
        assert "<script" not in text, name
    ET.parse(out / "plots.svg")


def test_the_same_cells_give_the_same_bytes(tmp_path: Path) -> None:
    assert panels(tmp_path) == panels(tmp_path)
    assert isinstance(next(iter(figures(grid(), {}).keys)), Cell)
