"""Plots: what is drawn, in which colours, and that the same run gives the same bytes."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from unbackdoor.report import canvas, plots, round_by_round
from unbackdoor.report.records import RunData
from unbackdoor.report.tables import load_run


@pytest.fixture(scope="module")
def run(shared_demo: Path) -> RunData:
    return load_run(shared_demo)


@pytest.fixture(scope="module")
def panels(run: RunData) -> list[plots.Panel]:
    return all_panels(run)


def all_panels(run: RunData) -> list[plots.Panel]:
    rates = plots.success_rates(run, "r1-")
    assert rates is not None
    return [
        rates,
        *plots.target_probabilities(run, "r1-"),
        *plots.curves(run, "r1-"),
        *plots.hidden_states(run, "r1-"),
        *(panel for part in round_by_round.sections(run, "r1-") for panel in part.panels),
    ]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter("text")]


def test_success_rates_show_every_model_with_its_interval(run: RunData) -> None:
    panel = plots.success_rates(run, "")
    assert panel is not None
    shown = texts(panel.svg)
    assert [text for text in shown if re.fullmatch(r"\d+\.\d %", text)] == [
        "98.0 %",
        "96.0 %",
        "0.0 %",
        "3.0 %",
        "0.0 %",
    ]
    assert "After SANDE" in shown
    assert "Suspect 98.0 % (93.0 to 99.4)" in panel.svg


def test_target_panels_have_four_lines(run: RunData) -> None:
    panels = plots.target_probabilities(run, "")
    assert [panel.title for panel in panels] == ["Fine-tuning (control)", "After SANDE", "After BEEAR"]
    assert "before, with the trigger 0.960 to 0.995" in panels[1].svg
    assert "after, with the trigger 0.000 to 0.020" in panels[1].svg
    assert panels[1].svg.count("stroke-dasharray") == 2
    assert {"You", "are", "stupid"} <= set(texts(panels[1].svg))


def test_rounds_of_a_stage_are_joined_in_number_order() -> None:
    stages = {f"beear/round-{at}/outer": [{"step": 1, "loss": float(at)}] for at in (10, 2, 1)}
    ((title, steps, starts),) = plots.joined_stages(stages)
    assert title == "beear/round/outer, 3 rounds"
    assert [step["loss"] for step in steps] == [1.0, 2.0, 10.0]
    assert starts == [1, 2]


def test_curves_name_their_terms(run: RunData) -> None:
    panels = {panel.title: panel for panel in plots.curves(run, "")}
    assert panels["sande/overwrite"].key == "loss solid, clean dashed, parrot dotted"
    assert "loss over 60 steps" in panels["beear/round/outer, 6 rounds"].svg
    assert "learning_rate" not in "".join(panel.key for panel in panels.values())


def test_hidden_states_share_their_axes(run: RunData) -> None:
    panels = plots.hidden_states(run, "")
    assert [panel.title for panel in panels][:2] == ["Suspect", "Fine-tuning (control)"]
    ticks = [[text for text in texts(panel.svg) if re.fullmatch(r"-?\d+", text)] for panel in panels]
    assert len(ticks[0]) > 4
    assert all(found == ticks[0] for found in ticks)
    assert "30 triggered centred at" in panels[0].svg


def test_a_description_may_hold_anything() -> None:
    with canvas.drawing():
        figure, _ = canvas.new_figure(100, 100)
        svg = canvas.to_svg(figure, "name", 'A "name"\x1b\\1 <b>')
    label = ET.fromstring(svg).get("aria-label")
    assert label == 'A "name"\\x1b\\1 <b>'
    assert "<b>" not in svg


def test_svg_fits_any_page(panels: list[plots.Panel]) -> None:
    for panel in panels:
        assert panel.svg.startswith('<svg role="img" aria-label="')
        assert "http" not in panel.svg
        assert "#0102" not in panel.svg
        assert "<metadata" not in panel.svg
        painted = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", panel.svg))
        assert painted <= {"none", "currentColor", "var(--muted, #70757a)", "var(--rule, #9aa0a655)",
                           "var(--accent, #2f7f86)"}  # fmt: skip


def test_identifiers_of_a_page_do_not_clash(panels: list[plots.Panel]) -> None:
    page = "".join(panel.svg for panel in panels)
    found = re.findall(r'\bid="([^"]+)"', page)
    assert found
    assert len(found) == len(set(found))
    used = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert used <= set(found)


def test_same_run_same_bytes(run: RunData, panels: list[plots.Panel]) -> None:
    assert all_panels(run) == panels


def test_drawing_leaves_no_global_state(run: RunData, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import matplotlib as mpl

    before = mpl.rcParams.copy()
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would now raise
    assert plots.success_rates(run, "") is not None
    assert mpl.rcParams.copy() == before
