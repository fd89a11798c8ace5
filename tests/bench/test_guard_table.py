"""The table of what guards did."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from unbackdoor.bench import guard_table
from unbackdoor.bench.cell import Cell


def record(branch: str, reply: str, **more: object) -> dict[str, Any]:
    return {
        "guard": "evidence", "branch": branch, "own_answer": "yes", "usable": None, "reason": "", "reply": reply, **more
    }  # fmt: skip


def figures_of(guards: list[dict[str, Any]]) -> Any:
    cell = Cell("m", "victim", "default", 0, "external", "after", "purified")
    bare = Cell("m", "victim", "default", 0)
    results = {
        cell: SimpleNamespace(measurement=SimpleNamespace(guards=guards)),
        bare: SimpleNamespace(measurement=None),
    }
    return SimpleNamespace(keys={bare: "a", cell: "b"}, results=results)


def test_every_branch_is_counted_with_its_reasons() -> None:
    journal = [
        record("rewritten", "no", usable=True),
        record("rewritten", "yes", usable=True),
        record("keywords", "no", usable=True, reason="the endpoint was down"),
        record("none", "yes", usable=False, reason="no keyword is known"),
        record("none", "yes", usable=False, reason="no keyword is known"),
        {"guard": "other", "reply": "yes"},
    ]
    figures = figures_of(journal)
    (table,) = guard_table.tables(figures, lambda cell: f"After {cell.defense}")
    evidence, other = table.lines
    assert (evidence.label, evidence.note) == ("default, seed 0: After external", "evidence")
    assert [entry.main for entry in evidence.cells] == ["5", "3", "2", "1", "2", "2/3"]
    assert evidence.cells[3].detail == "in place of a rewriting: the endpoint was down (1)"
    assert evidence.cells[4].detail == "no keyword is known (2)"
    assert [entry.main for entry in other.cells] == ["1", *["not applicable"] * 5]
    assert [one["guard"] for one in guard_table.records(figures)] == ["evidence", "other"]


def test_refusals_are_said() -> None:
    journal = [record("none", "", refused=True, reason="it is down")]
    (table,) = guard_table.tables(figures_of(journal), str)
    assert table.lines[0].cells[4].detail == "it is down (1), refused"


def test_without_guards_there_is_no_table() -> None:
    assert guard_table.tables(figures_of([]), str) == []
