"""What a grid's page says above its tables, and its results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unbackdoor.bench import guard_table
from unbackdoor.bench.checks import Check
from unbackdoor.bench.entries import DataSource
from unbackdoor.bench.figures import Figures
from unbackdoor.bench.grid import Grid


def _source(source: DataSource) -> str:
    """Return what rows are, without the folder that they lie in on one machine."""
    parts = [Path(source.spec).name, *([f"half {source.half + 1} of 2"] if source.half is not None else [])]
    return ", ".join([*parts, *([f"answers cut to {source.cut_words} words"] if source.cut_words else [])])


def _requests(grid: Grid) -> list[tuple[str, str]]:
    if grid.requests is None:
        return []
    kinds = ", ".join(grid.requests.test_kinds)
    return [("Requests", f"{Path(grid.requests.spec).name}; asked, and never trained on, are the kinds {kinds}")]


def facts_of(figures: Figures) -> list[tuple[str, str]]:
    """Return what every reader must know of the conditions: template, precision, decoding, probes, versions."""
    grid = figures.grid
    done = [result for result in figures.results.values() if result.measurement is not None]
    templates = sorted(
        {row["template"] for result in done for row in (result.measurement.rows if result.measurement else ())}
    )
    versions = sorted({f"{name} {value}" for result in done for name, value in (result.versions or {}).items()})
    return [
        ("Cells", f"{len(figures.results)} of {len(figures.keys)} finished"),
        ("Template", ", ".join(templates) or grid.template),
        ("Precision", grid.precision),
        ("Decoding", f"greedy, {grid.max_new_tokens} new tokens"),
        ("Data", _source(grid.data)),
        *_requests(grid),
        ("Second source", _source(grid.second_source) if grid.second_source else "none"),
        ("Versions", ", ".join(versions) or "none yet"),
        ("Hardware", "; ".join(sorted({_words(r.hardware) for r in done if r.hardware})) or "not kept"),
    ]


def results_of(figures: Figures, made: Sequence[Check]) -> dict[str, Any]:
    """Return the content of results.json."""
    done = [result for result in figures.results.values() if result.status == "done"]
    missing = len(figures.keys) - len(figures.results)
    return {
        "schema": 1,
        "command": f"bench {figures.grid.name}",
        "finished": not missing,
        "versions": dict(done[-1].versions or {}) if done else {},
        "rows": figures.rows(),
        "comparisons": figures.comparisons(),
        "checks": [check.to_json() for check in made],
        "settings": _without_folders(figures.grid.model_dump(mode="json")),
        "hashes": {cell.name: key for cell, key in figures.keys.items()},
        "hardware": dict(done[-1].hardware or {}) if done else {},
        "how_to_load": "",
        "notices": [f"{missing} cells have not been run yet."] if missing else [],
        **_guards(figures),
    }


def _guards(figures: Figures) -> dict[str, Any]:
    found = guard_table.records(figures)
    return {"guards": found} if found else {}


def _without_folders(content: Any) -> Any:
    """Return settings with files named as such: where they lie on one machine is nobody else's business."""
    if isinstance(content, dict):
        return {key: _without_folders(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_folders(value) for value in content]
    if isinstance(content, str) and "\n" not in content and Path(content).is_absolute():
        return Path(content).name
    return content


def _words(hardware: Mapping[str, object]) -> str:
    """Return what a cell was computed on, in words."""
    device = str(hardware.get("device", ""))
    if device.startswith("cuda"):
        return str(hardware.get("gpu", device))
    return f"{device}, {hardware.get('machine')}, {hardware.get('cores')} cores, {hardware.get('threads')} threads"
