"""The folder of a run that was killed while its files were about to appear."""

from __future__ import annotations

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
