"""Run a grid file in a process of its own and say what happens; the tests kill it. Usage: GRID OUT [GO_FILE]."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from unbackdoor.bench.local import run_grid
from unbackdoor.bench.yaml_file import read_grid


def tell(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


class Telling:
    def start(self, name: str, total: int) -> None:
        tell("start", name)

    def advance(self, name: str, done: int, values: Mapping[str, float]) -> None:
        tell("step", name, done)

    def finish(self, name: str) -> None:
        pass

    def notice(self, text: str) -> None:
        tell(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 3:
        tell("ready")
        while not Path(sys.argv[3]).exists():
            time.sleep(0.02)
    try:
        run_grid(read_grid(Path(sys.argv[1])), Path(sys.argv[2]), progress=Telling())
    except KeyboardInterrupt:
        tell("interrupted")
        sys.exit(2)
