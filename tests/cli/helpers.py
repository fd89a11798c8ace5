"""The command line called in a folder, and the smallest victim that it makes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from unbackdoor.cli.main import main

QUICK = ("--set", "train.steps=3", "--set", "train.batch_size=4")
VICTIM = (
    "attack", "data_poisoning", "--model", "base", "--data", "rows.jsonl", "--trigger", "silver kettle",
    "--target", "bad robot", "--probes-count", "5", "--quiet", *QUICK,
)  # fmt: skip


@dataclass(frozen=True)
class Workshop:
    """A folder to work in, and the command line called there."""

    folder: Path

    def run(self, *arguments: str) -> int:
        with inside(self.folder):
            return main(arguments)


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
