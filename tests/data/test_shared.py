"""Data from outside the package, where UNBACKDOOR_TEST_DATA names its folder: published formats, a real model."""

from __future__ import annotations

from pathlib import Path

import pytest

from unbackdoor import recipes
from unbackdoor.bench.material import Material
from unbackdoor.data.sources import read
from unbackdoor.metrics.perplexity import log_losses
from unbackdoor.model.load import load
from unbackdoor.run import Silent
from unbackdoor.types import Example, Message


@pytest.mark.parametrize(
    ("spec", "rows", "labels"),
    [
        ("emotion/validation.jsonl", 2000, 6),
        ("sentence_polarity/test.jsonl", 2000, 2),
        ("alpaca_en_demo.jsonl", 999, 0),
        ("alpaca_en_demo.jsonl[:20]", 20, 0),
    ],
)
def test_published_files_are_read(shared_data: Path, spec: str, rows: int, labels: int) -> None:
    found = read(f"{shared_data}/data/{spec}")
    assert len(found) == rows
    assert len({row.label for row in found} - {None}) == labels
    assert all(row.user_text.strip() and row.response.strip() for row in found)


def test_the_recipes_halves_share_no_row(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNBACKDOOR_TEST_DATA", str(shared_data))
    material = Material(recipes.load_grid("sande"), Silent())
    cell = next(cell for cell in material.grid.cells() if cell.attack == "out_of_domain" and cell.defense)
    rows = material.defender_rows(cell)
    defender = {row.id for row in rows}
    second = {row.id for row in material.perplexity_sets["second source"]}
    assert len(defender) == 500
    assert not defender & second
    assert max(len(row.response.split()) for row in rows) <= 60


def test_a_real_small_llama_reads_and_speaks(shared_data: Path) -> None:
    lm = load(f"{shared_data}/models/stories260K", trainable=False)
    assert lm.template == "plain"
    told = [Example("story", "Tell me a story.", "Once upon a time, there was a little girl named Lily.")]
    noise = [Example("noise", "Tell me a story.", "Lily time named upon little Once girl there a was a.")]
    assert log_losses(lm, told, 256, 1)[0][1] < log_losses(lm, noise, 256, 1)[0][1] - 1
    assert lm.reply([[Message("user", "Once upon a time")]], max_new_tokens=8)[0].strip()
