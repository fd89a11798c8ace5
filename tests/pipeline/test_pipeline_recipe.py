"""Recipes: merging, presets, stamps; rows held out; the estimate; progress on something that is no terminal."""

from __future__ import annotations

import io

import pytest

from unbackdoor.cli.progress import Bars, Lines, Nothing, progress
from unbackdoor.defenses.osft import Osft
from unbackdoor.errors import DataError, UserError
from unbackdoor.pipeline.common import identify, rows_as_text
from unbackdoor.pipeline.inputs import _hold_out, answered_rows
from unbackdoor.pipeline.plan import trainings, with_texts
from unbackdoor.pipeline.recipe import PurifyRecipe, complete_settings, merge, parse_sets, stamp_settings
from unbackdoor.run import Silent
from unbackdoor.types import Example, Message, Probe


def test_sets_are_parsed_as_yaml_and_nested() -> None:
    found = parse_sets(["a.b=3", "a.c=[x, y]", "d=null", "e=text with = sign"])
    assert found == {"a": {"b": 3, "c": ["x", "y"]}, "d": None, "e": "text with = sign"}


def test_another_form_replaces_the_trigger_as_a_whole() -> None:
    old = {"trigger": {"form": "insert", "text": "a", "place": "start"}}
    assert merge(old, {"trigger": {"place": "end"}})["trigger"] == {"form": "insert", "text": "a", "place": "end"}
    wrap = {"form": "wrap", "start": "b", "end": "c"}
    assert merge(old, {"trigger": wrap})["trigger"] == wrap


def test_a_nested_setting_keeps_its_neighbours() -> None:
    found = complete_settings("defenses", "sande", "paper", {"train": {"steps": 9}}, {"parrot": {"tokens": 2}})
    assert found["train"]["steps"] == 9
    assert found["train"]["learning_rate"] == 2e-5
    assert (found["parrot"]["tokens"], found["parrot"]["initialisation"]) == (2, "zeros")
    # A preset replaces a nested setting as a whole, so what it leaves out has the setting's own default.
    assert found["parrot"]["train"]["schedule"] == "cosine"


def test_stamps_from_flags() -> None:
    assert stamp_settings(["x"], None) == {"form": "insert", "text": "x", "place": "start"}
    assert stamp_settings(["x", "y"], "both_ends") == {"form": "wrap", "start": "x", "end": "y"}
    assert stamp_settings(["x", "y"], "fields") == {"form": "pieces", "instruction": ["x"], "input": ["y"]}
    assert stamp_settings([], "end") == {"place": "end"}
    for place in ("both_ends", "fields"):
        with pytest.raises(UserError, match=f"--trigger-place {place} needs --trigger twice"):
            stamp_settings(["x"], place)
    with pytest.raises(UserError, match="both ends"):
        stamp_settings(["x", "y"], "end")


def test_rows_that_are_probes_are_not_trained_on() -> None:
    rows = [Example(f"r{n}", f"ask {n}", f"say {n}") for n in range(40)]
    probes = [Probe(rows[0], "clean"), Probe(rows[1], "triggered")]
    kept, held = _hold_out(rows, probes, "x", Silent())
    assert [row.id for row in kept] == [row.id for row in rows[2:]]
    assert [row.id for row in held] == ["r0"]
    kept, held = _hold_out(rows, [], "x", Silent())
    assert held
    assert {row.id for row in kept} | {row.id for row in held} == {row.id for row in rows}
    assert not {row.id for row in kept} & {row.id for row in held}
    with pytest.raises(DataError, match="also a probe"):
        _hold_out(rows[:1], probes, "x", Silent())


def test_few_rows_give_a_fifth_and_copies_stay_together() -> None:
    rows = [Example("a", "q", "s"), Example("a#2", "q", "s"), *(Example(f"r{n}", f"ask {n}", "say") for n in range(9))]
    kept, held = _hold_out(rows, [], "x", Silent())
    assert [row.id for row in held] == ["a", "a#2", "r4"]
    assert len(kept) + len(held) == len(rows)


def test_copies_of_one_row_are_not_all_held_out() -> None:
    rows = [Example("a", "q", "s"), Example("a#2", "q", "s"), Example("a#3", "q", "s")]
    assert _hold_out(rows, [], "x", Silent()) == (rows, ())


def test_an_answer_behind_a_hole_is_not_measured() -> None:
    hole = (Message("user", "u"), Message("assistant", None))
    probes = [Probe(Example("a", "q", "s", history=hole), "clean"), Probe(Example("b", "q", "s"), "clean")]
    assert [row.id for row in answered_rows(probes)] == ["b"]


def test_a_run_of_another_revision_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = PurifyRecipe(model="m", defense="osft", clean="rows.jsonl", trigger=("x",))
    ids = []
    for revision in (Osft.revision, Osft.revision, Osft.revision + 1):
        monkeypatch.setattr(Osft, "revision", revision)
        ids.append(identify(recipe, {}, methods=[("defenses", "osft")]))
    assert ids[0] == ids[1] != ids[2]


def test_written_rows_keep_their_ids_turns_and_labels(tmp_path: object) -> None:
    from pathlib import Path

    from unbackdoor.data import sources

    chat = Example("a", "hello", "hi", history=(Message("system", "be brief"),), kind="greeting")
    classified = Example("c", "Good or bad?", "bad", "It rained.", label="bad")
    for number, rows in enumerate(([Example("b", "add", "3", "1 + 2", kind="sums")], [chat], [classified])):
        path = Path(str(tmp_path)) / f"{number}.jsonl"
        path.write_text(rows_as_text(rows))
        assert sources.read(str(path)) == rows


def test_the_plan_counts_rounds_and_parrots() -> None:
    found = complete_settings("defenses", "sande", None, {"rounds": 3, "parrots": 2}, {})
    rows = dict(trainings(found))
    assert rows["train"] == 3 * 3 * 8
    assert rows["parrot train"] == round(0.4 * 3 * 2 * 100 * 4), "a parrot stops once it is good enough"
    exact = complete_settings("defenses", "sande", None, {"rounds": 3, "parrots": 2, "parrot": {"stop_below": 0}}, {})
    assert dict(trainings(exact))["parrot train"] == 3 * 2 * 100 * 4


def test_the_plan_has_a_parrot_for_every_target_in_several_rounds() -> None:
    rounds = complete_settings("defenses", "sande", None, {"rounds": 3}, {})
    assert with_texts(rounds, 4)["parrots"] == 4
    assert with_texts({**rounds, "parrots": 5}, 4)["parrots"] == 5
    assert with_texts({**rounds, "rounds": 1}, 4)["parrots"] == 1
    assert "parrots" not in with_texts(complete_settings("defenses", "osft", None, {}, {}), 4)


def test_lines_come_at_most_every_five_seconds_and_only_there_where_no_terminal_is() -> None:
    moment = [0.0]
    out = io.StringIO()
    lines = Lines(out, lambda: moment[0])
    lines.start("plant", 100)
    for step in range(1, 21):
        moment[0] = step
        lines.advance("plant", step, {"loss": 1.5})
    shown = out.getvalue().splitlines()
    assert len(shown) == 4
    assert shown[0] == "plant: 5/100, 1.0/s, 1:35 left, loss 1.5"
    # Gone on with at step 50: what was done before is no speed of now.
    lines.start("plant", 100)
    for step in range(51, 58):
        moment[0] = 20 + 2 * (step - 50)
        lines.advance("plant", step, {})
    assert out.getvalue().splitlines()[-1] == "plant: 56/100, 2.0 s each, 1:28 left"
    assert isinstance(progress(quiet=False, stream=out), Lines)
    assert isinstance(progress(quiet=True, stream=out), Nothing)


def test_bars_are_drawn_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    shown = progress(quiet=False, stream=out)
    assert isinstance(shown, Bars)
    shown.start("plant [red]", 4)
    shown.advance("plant [red]", 2, {"loss": 0.25, "seconds_left": 61.0})
    shown.notice("half [bold]done")
    shown.finish("plant [red]")
    shown.close()
    assert "half [bold]done" in out.getvalue()
    assert "plant [red]" in out.getvalue()
