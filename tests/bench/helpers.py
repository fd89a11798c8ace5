"""What the tests of grids share: figures without times, and grids in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Plan = Callable[..., dict[str, Any]]
WORKER = Path(__file__).parent / "worker.py"


def tables_without_times(out: Path) -> str:
    """Return tables.md without the column of seconds, which no two runs share."""
    text = (out / "tables.md").read_text()
    return re.sub(r"\| (\d+(\.\d+)? s|\d+ min \d+ s) \|$", "| |", text, flags=re.MULTILINE)


def figures_of(out: Path) -> list[dict[str, Any]]:
    """Return the rows of results.json without times and memory."""
    rows = json.loads((out / "results.json").read_text())["rows"]
    dropped = {"seconds", "peak_memory_bytes"}
    return [{k: v for k, v in row.items() if k not in dropped} for row in rows if row["metric"] != "seconds"]


def start_worker(data: dict[str, Any], out: Path, *more: str) -> subprocess.Popen[str]:
    """Run a grid in a process of its own; it prints a line for every cell and every training step."""
    file = out.parent / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(data))
    command = [sys.executable, str(WORKER), str(file), str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
