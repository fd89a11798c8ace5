"""A folder with a tiny model, rows, and a victim that the command line itself has made; once a session."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import tiny
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


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop")
    lm = tiny.tiny_lm()
    lm.model.save_pretrained(folder / "base")
    lm.tokenizer.save_pretrained(folder / "base")
    rows = [{"id": row.id, "instruction": row.instruction, "output": row.response} for row in tiny.rows(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = Workshop(folder)
    assert found.run(*VICTIM, "--out", "victim") == 0
    return found
