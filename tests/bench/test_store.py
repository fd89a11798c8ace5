"""The folder as memory: locks, whole files, foreign folders."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from unbackdoor.bench.store import Result, Store
from unbackdoor.errors import UserError
from unbackdoor.pipeline.measure import Measurement
from unbackdoor.types import Scores

HOLD = """
import sys, time
from pathlib import Path
from unbackdoor.bench.store import Store
with Store(Path(sys.argv[1])).lock("cell-a") as free:
    print(free, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "out")
    made.open("name: x\n")
    return made


def some_result() -> Result:
    scores = Scores("asr", "triggered", ("a/", "b/"), (1.0, 0.0), "triggered probes")
    measured = Measurement(
        [{"metric": "asr", "value": 0.5}], [scores], [{"reply": "one\u2028two\nthree"}, {"reply": ""}]
    )
    return Result(
        "done", "", measured, ("clean",), {"train": 1.5}, 7, {"plant": [{"loss": 1.0}]}, {"a": 1}, {"torch": "2"},
        {"device": "cpu"},
    )  # fmt: skip


def test_a_result_is_read_as_it_was_written(store: Store) -> None:
    assert store.read("k") is None
    store.write("k", some_result(), {"name": "cell"})
    assert store.has("k")
    assert store.read("k") == some_result()
    path = store.folder / "cells" / "k.json"
    record = json.loads(path.read_text())
    del record["hardware"]  # as earlier versions wrote it
    path.write_text(json.dumps(record))
    assert store.read("k") == replace(some_result(), hardware=None)
    store.forget("k")
    assert not store.has("k")


def test_the_cell_appears_after_its_replies(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from unbackdoor.bench import store as module

    written: list[str] = []
    monkeypatch.setattr(module, "write_atomically", lambda path, text: written.append(path.name))
    store.write("k", some_result(), {})
    assert written == ["k.jsonl", "k.json"]


def test_a_broken_cell_is_named_with_the_fix(store: Store) -> None:
    store.write("k", some_result(), {})
    path = store.folder / "cells" / "k.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(UserError, match=r"k\.json is not a cell .*delete it"):
        store.read("k")


def test_a_lock_is_exclusive_and_given_back(store: Store) -> None:
    with store.lock("a") as first:
        assert first
        assert "process" in store.holder("a")
        with store.lock("a") as second, store.lock("b") as other:
            assert (second, other) == (False, True)
        assert "process" in store.holder("a")
    with store.lock("a") as again:
        assert again


def test_the_lock_of_a_killed_process_is_free(store: Store) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(store.folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    with store.lock("cell-a") as free:
        assert not free
    assert f"process {holder.pid} on" in store.holder("cell-a")
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with store.lock("cell-a") as free:
        assert free


def test_a_folder_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no grid of ours; choose another --out"):
        Store(tmp_path).open("name: x\n")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    own = tmp_path / "own"
    own.mkdir()
    (own / "grid.yaml").write_text("name: mine  # by hand")
    with pytest.raises(UserError, match="no grid of ours; choose another --out"):
        Store(own).open("name: x\n")
    assert (own / "grid.yaml").read_text() == "name: mine  # by hand"
    with pytest.raises(UserError, match="is a file"):
        Store(tmp_path / "thesis.txt").open("name: x\n")


def test_nothing_outside_the_folder_is_removed(store: Store, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        store.remove(tmp_path)


def test_a_folder_that_another_process_is_just_making_is_no_strangers(tmp_path: Path) -> None:
    (tmp_path / ".grid.yaml.123.tmp").write_text("name: g")
    Store(tmp_path).open("name: g\n")
    assert (tmp_path / "grid.yaml").read_text() == "name: g\n"
