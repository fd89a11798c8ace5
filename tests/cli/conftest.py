"""A folder with a tiny model, rows, and a victim that the command line itself has made; once a session."""

from __future__ import annotations

import json

import pytest

import tiny
from cli.helpers import VICTIM, Workshop


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
