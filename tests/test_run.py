"""Named random streams and finished stages."""

from __future__ import annotations

import os

import pytest
import torch

from unbackdoor.run import Run, Silent, write_atomically


def test_a_stream_depends_on_seed_stage_and_name_and_on_nothing_else():
    run = Run(seed=1)
    first = run.rng("poison").random()
    run.rng("other").random()
    assert run.rng("poison").random() == first
    assert run.rng("other").random() != first
    assert Run(seed=2).rng("poison").random() != first
    assert run.stage("a").rng("poison").random() != first
    assert run.stage("a").rng("b").random() == Run(seed=1, prefix="a").rng("b").random()


def test_streams_are_the_same_on_every_machine():
    # sha256("0:poison"), first eight bytes, big-endian, shifted by one: written out here once.
    import hashlib

    wanted = int(hashlib.sha256(b"0:poison").hexdigest()[:16], 16) // 2
    assert Run().stream_seed("poison") == wanted
    assert Run().stage("x").stream_seed("y") == int(hashlib.sha256(b"0:x/y").hexdigest()[:16], 16) // 2


def test_torch_generators_follow_the_same_streams():
    def draw(run):
        return torch.rand(3, generator=run.generator("start"))

    assert torch.equal(draw(Run(seed=1)), draw(Run(seed=1)))
    assert not torch.equal(draw(Run(seed=1)), draw(Run(seed=2)))


def test_stages_nest_and_share_curves_and_notes(tmp_path):
    run = Run(folder=tmp_path)
    inner = run.stage("one").stage("two")
    assert (inner.prefix, inner.folder) == ("one/two", tmp_path / "one" / "two")
    inner.curves["one/two"] = [{"loss": 1.0}]
    inner.notes["fact"] = 3
    assert run.curves == {"one/two": [{"loss": 1.0}]}
    assert run.notes == {"fact": 3}
    assert Run().curves == {}, "a new run starts with none"


def test_a_finished_stage_keeps_its_record(tmp_path):
    stage = Run(folder=tmp_path).stage("one")
    assert stage.finished is None
    stage.finish({"steps": 3, "why": "é"})
    assert Run(folder=tmp_path).stage("one").finished == {"steps": 3, "why": "é"}
    assert Run(folder=tmp_path).stage("two").finished is None
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["finished.json"]


def test_a_run_without_folder_remembers_nothing():
    stage = Run().stage("one")
    stage.finish({"steps": 3})
    assert stage.finished is None


def test_the_observer_is_told_and_nothing_comes_back():
    seen = []
    assert Run(observer=seen.append).stage("a").observe("model") is None
    assert seen == ["model"]
    Run().observe("model")


def test_an_interrupted_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomically(path, "old")

    def full(handle):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_the_default_progress_is_silent(capsys):
    quiet = Silent()
    quiet.start("a", 1), quiet.advance("a", 1, {}), quiet.finish("a"), quiet.notice("text")
    assert capsys.readouterr().out == ""
