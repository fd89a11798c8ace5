"""The folder of a run that was killed while its files were about to appear."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from unbackdoor.errors import UserError
from unbackdoor.pipeline.folders import workspace


def test_what_a_killed_process_was_writing_is_not_published(tmp_path: Path) -> None:
    out = tmp_path / "run"

    with workspace(out, settings_hash="x", settings={}, overwrite=False) as place:
        # As if killed here: nothing behind this line is undone.
        place.staging.mkdir(parents=True)
        (place.stages / "step").write_text("kept")
        left = place.staging / ".replies.jsonl.77.tmp"
        left.write_bytes(b"half a character \xc3")
        killed = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for path, content in killed.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(content)
    with workspace(out, settings_hash="x", settings={}, overwrite=False) as place:
        assert place.resumed
        assert not left.exists()
        assert (place.stages / "step").read_text() == "kept"
        place.staging.mkdir(parents=True)
        (place.staging / "results.json").write_text("{}")
        place.publish_files()
    assert sorted(path.name for path in out.iterdir() if path.is_file() and path.suffix == ".tmp") == []
    assert (out / "results.json").is_file()


def test_a_stop_right_after_publishing_leaves_the_result(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def stopped() -> None:
        with workspace(out, settings_hash="x", settings={}, overwrite=False) as place:
            place.staging.mkdir(parents=True)
            (place.staging / "results.json").write_text("{}")
            place.publish_files()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert (out / "results.json").read_text() == "{}"


FILES = {"old": "curves.json", "new": "replies.jsonl"}


def finish(out: Path, settings_hash: str, text: str, *, overwrite: bool = False) -> None:
    with workspace(out, settings_hash=settings_hash, settings={}, overwrite=overwrite) as place:
        place.staging.mkdir(parents=True)
        (place.staging / "results.json").write_text(text)
        # Names that an evaluation writes: with others in it a result is not replaced.
        (place.staging / FILES.get(settings_hash, "report.md")).write_text(text)
        place.publish_files()


def content(out: Path) -> dict[str, str]:
    return {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("problem", [UserError("no such weights"), KeyboardInterrupt(), MemoryError()])
def test_the_old_result_stays_until_there_is_a_new_one(tmp_path: Path, problem: BaseException) -> None:
    out = tmp_path / "run"
    finish(out, "old", "{}")
    before = content(out)

    def begin(*, keep: bool) -> None:
        with workspace(out, settings_hash="new", settings={}, overwrite=True) as place:
            if keep:
                (place.stages / "step").write_text("1")
            raise problem

    with pytest.raises(type(problem)):
        begin(keep=False)
    assert content(out) == before
    with pytest.raises(type(problem)):
        begin(keep=True)
    assert content(out).items() >= {name: text for name, text in before.items() if name != "run.json"}.items()
    with pytest.raises(UserError, match="finished result; give --overwrite"):
        finish(out, "new", "[]")
    with workspace(out, settings_hash="new", settings={}, overwrite=True) as place:
        assert place.resumed
        assert (place.stages / "step").is_file()
    finish(out, "new", "[]", overwrite=True)
    assert sorted(content(out)) == ["replies.jsonl", "results.json", "run.json"]
    finish(out, "newer", "[]", overwrite=True)
    assert sorted(content(out)) == ["report.md", "results.json", "run.json"]


@pytest.mark.parametrize("stop", range(4))
@pytest.mark.parametrize("killed", [False, True])
def test_a_stop_while_publishing_leaves_the_old_result_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, killed: bool
) -> None:
    out = tmp_path / "run"
    finish(out, "old", "{}")
    before, moves, move = content(out), [0], os.replace

    def stopping(source: Path, target: Path) -> None:
        moves[0] += "stages" in str(source) or "stages" in str(target)
        if moves[0] == stop + 1:
            moves[0] += 1
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr("unbackdoor.pipeline.folders.os.replace", stopping)
    if killed:
        # Nothing behind the stop is undone.
        monkeypatch.setattr("unbackdoor.pipeline.folders._put_back", lambda *_: None)
        monkeypatch.setattr("unbackdoor.pipeline.folders._forget", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        finish(out, "new", "[]", overwrite=True)
    monkeypatch.undo()
    if killed:
        with (
            pytest.raises(ValueError, match="look only"),
            workspace(out, settings_hash="other", settings={}, overwrite=True),
        ):
            raise ValueError("look only")
    # Two old files are moved, then the folder that holds them is renamed: the new result comes after that.
    assert {name: text for name, text in content(out).items() if name != "run.json"} == {
        name: text for name, text in before.items() if name != "run.json"
    }


def test_a_folder_of_somebody_else_with_such_names_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "theirs"
    (out / "stages" / "replaced").mkdir(parents=True)
    (out / "thesis.txt").write_text("mine")
    (out / "stages" / "replaced" / "old.txt").write_text("mine, too")
    before = content(out)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="files that unbackdoor did not write"):
            finish(out, "new", "[]", overwrite=overwrite)
        assert content(out) == before


def test_what_somebody_put_into_a_result_is_not_deleted_with_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    finish(out, "old", "{}")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"what no run wrote there \(notes\.txt\), and --overwrite would delete it"):
        finish(out, "new", "[]", overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "curves.json").is_file()


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with workspace(out, settings_hash="x", settings={}, overwrite=False) as place:
        (place.stages / "step").write_text("kept")
        with pytest.raises(UserError, match="another process is at work"):
            finish(out, "x", "{}")
        assert (place.stages / "step").is_file()
    finish(out, "x", "{}")
    assert (out / "report.md").is_file()


def test_a_folder_may_be_called_as_its_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        settings = {"defense": "sande", "clean": "rows.jsonl"}
        with workspace(Path("sande"), settings_hash="x", settings=settings, overwrite=False) as place:
            place.stages.mkdir(exist_ok=True)
            (place.stages / "step").write_text("kept")
    (tmp_path / "sande" / "mine.py").write_text("")
    with (
        pytest.raises(UserError, match="lies in the folder of the result"),
        workspace(Path("sande"), settings_hash="x", settings={"defense": "sande/mine.py"}, overwrite=False),
    ):
        pass


def test_one_text_is_not_its_letters() -> None:
    from unbackdoor.pipeline import _texts

    assert _texts("You are stupid") == ("You are stupid",)
    assert _texts(["a", "b"]) == ("a", "b")
