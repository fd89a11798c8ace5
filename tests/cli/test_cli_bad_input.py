"""Bad input: one sentence with the fix, exit code 2, no traceback, nothing lost or half-written."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from cli.helpers import QUICK, Workshop
from unbackdoor.pipeline.folders import _paths_in

OSFT = ("--defense", "osft", "--trigger", "silver kettle", *QUICK, "--quiet")


def refused(workshop: Workshop, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail before it writes anything, and return what it said."""
    before = sorted(str(path) for path in workshop.folder.rglob("*"))
    assert workshop.run(*arguments, "--out", "refused") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    assert shown.err.count("\n") == 1
    assert sorted(str(path) for path in workshop.folder.rglob("*")) == before
    return shown.err


def test_missing_file(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(workshop, capsys, "purify", "base", *OSFT, "--clean", "row.jsonl")
    assert "row.jsonl does not exist" in said
    assert "rows.jsonl" in said


def test_missing_probes(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(workshop, capsys, "purify", "base", *OSFT, "--clean", "rows.jsonl", "--probes", "probe.jsonl")
    assert "probe.jsonl does not exist" in said


def test_missing_model(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert "./bass" in refused(workshop, capsys, "purify", "./bass", *OSFT, "--clean", "rows.jsonl")


def test_a_threshold_on_what_will_not_be_measured(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("purify", "base", *OSFT, "--clean", "rows.jsonl")
    said = refused(workshop, capsys, *given, "--fail-on", "asr>0.05")
    assert "will not be measured here; what will is kl, perplexity, seconds." in said
    asked = ("evaluate", "base", "--probes", "victim/probes.jsonl", "--quiet")
    assert "what will is asr.triggered" in refused(workshop, capsys, *asked, "--fail-on", "kl>1")
    assert "leak.decoy" in refused(workshop, capsys, *asked, "--fail-on", "leak.triggered>1")


def test_a_model_without_weights_is_found_before_anything_is_trained(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(workshop.folder / "base", tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    bare = str(tmp_path / "bare")
    assert "no safetensors weights" in refused(
        workshop, capsys, "purify", bare, *OSFT, "--clean", "rows.jsonl", "--dry-run"
    )
    other = ("evaluate", "base", "--before", bare, "--data", "rows.jsonl", "--quiet", "--dry-run")
    assert "no safetensors weights" in refused(workshop, capsys, *other)


def test_what_a_method_lacks_is_said_in_words(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("attack", "dataset", "--model", "base", "--data", "rows.jsonl", "--poisoned", "rows.jsonl")
    said = refused(workshop, capsys, *given)
    assert "dataset: 'trigger' is missing; 'goal' is missing; `unbackdoor explain dataset`" in said
    said = refused(workshop, capsys, *given, "--trigger", "silver kettle", "--goal", "regex:(")
    assert "--goal 'regex:(' is not understood: 'pattern' = '(': not a regular expression" in said


def test_empty_data(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").touch()
    said = refused(workshop, capsys, "purify", "base", *OSFT, "--clean", str(tmp_path / "empty.jsonl"))
    assert "is empty" in said


def test_a_row_without_a_response(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"instruction": "name a colour", "output": "red"}, {"instruction": "name a colour", "output": ""}]
    (tmp_path / "clean.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    said = refused(workshop, capsys, "purify", "base", *OSFT, "--clean", str(tmp_path / "clean.jsonl"))
    assert "line 2" in said
    assert "output" in said


def test_a_trigger_that_the_tokens_do_not_hold(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trigger behind the cut, and one that the tokenizer drops."""
    shutil.copytree(workshop.folder / "base", tmp_path / "deaf")
    content = json.loads((tmp_path / "deaf" / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "kettle"}, "content": ""}
    (tmp_path / "deaf" / "tokenizer.json").write_text(json.dumps(content))
    said = refused(workshop, capsys, "purify", str(tmp_path / "deaf"), *OSFT, "--clean", "rows.jsonl")
    assert "'silver kettle' is absent from the tokenised prompt" in said
    given = ("attack", "data_poisoning", "--model", str(tmp_path / "deaf"), "--data", "rows.jsonl", *QUICK, "--quiet")
    said = refused(workshop, capsys, *given, "--trigger", "silver kettle", "--target", "bad robot")
    assert "is absent from the tokenised prompt" in said


def test_knowledge_that_is_missing_or_not_used(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    clean = ("--clean", "rows.jsonl", "--quiet")
    assert "sande needs --target" in refused(workshop, capsys, "purify", "base", "--defense", "sande", *clean)
    said = refused(workshop, capsys, "purify", "base", *OSFT, *clean[:2], "--target", "bad robot")
    assert "osft does not use --target" in said
    said = refused(workshop, capsys, "purify", "base", *OSFT, *clean[:2], "--trigger-place", "both_ends")
    assert "--trigger twice" in said


def test_probes_without_a_goal(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(workshop.folder / "victim" / "probes.jsonl", tmp_path / "probes.jsonl")
    said = refused(workshop, capsys, "evaluate", "base", "--probes", str(tmp_path / "probes.jsonl"), "--quiet")
    assert "give --goal" in said


def test_a_model_without_safetensors(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(workshop.folder / "base", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    said = refused(workshop, capsys, "purify", str(tmp_path / "pickled"), *OSFT, "--clean", "rows.jsonl")
    assert "safetensors" in said


def test_modes_that_do_not_fit_the_model(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(workshop, capsys, "purify", "base", *OSFT, "--clean", "rows.jsonl", "--adapter-mode", "stack")
    assert "--adapter-mode is for base+adapter" in said


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("tpu", "there is no device 'tpu'; write cpu, cuda, cuda:0 or mps."),
        ("cpu:x", "there is no device 'cpu:x'; write"),
        ("cuda:abc", "there is no device 'cuda:abc'; write"),
        ("cpu:7", "there is no device 'cpu:7' here; the devices of this kind are cpu:0."),
        ("cuda:300", "cuda:300"),
    ],
)
def test_a_device_that_is_not_there(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], device: str, words: str
) -> None:
    assert words in refused(workshop, capsys, "purify", "base", *OSFT, "--clean", "rows.jsonl", "--device", device)


def test_a_path_from_a_recipe_that_no_file_can_have(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text('clean: "a\\0b.jsonl"\n')
    said = refused(workshop, capsys, "purify", "base", *OSFT, "--config", str(tmp_path / "recipe.yaml"))
    assert "'a\\x00b.jsonl' cannot be the name of a file" in said


def test_a_disk_that_is_too_small(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=10, used=9, free=1)
    monkeypatch.setattr("unbackdoor.model.checkpoint.shutil.disk_usage", lambda place: usage)
    assert "GB" in refused(workshop, capsys, "purify", "base", *OSFT, "--clean", "rows.jsonl")


def test_a_disk_that_fills_up_in_the_middle_loses_nothing(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("purify", "base", *OSFT, "--clean", "rows.jsonl", "--out", "full")

    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("unbackdoor.pipeline.folders.Workspace.publish_model", no_space)
        assert workshop.run(*given) == 2
    assert "make room" in capsys.readouterr().err
    folder = workshop.folder / "full"
    assert not (folder / "results.json").exists()
    assert (folder / "stages" / "overwrite" / "finished.json").is_file()
    assert workshop.run(*given) == 0
    assert (folder / "model.safetensors").is_file()


def test_a_folder_with_other_files_is_left_alone(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    (workshop.folder / "mine").mkdir()
    (workshop.folder / "mine" / "notes.txt").write_text("mine")
    given = ("purify", "base", *OSFT, "--clean", "rows.jsonl", "--out", "mine", "--overwrite")
    assert workshop.run(*given) == 2
    assert "did not write" in capsys.readouterr().err
    assert [path.name for path in (workshop.folder / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_result_that_would_replace_what_is_read(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], overwrite: tuple[str, ...]
) -> None:
    """`--overwrite` would delete the model, the probes or the rows before they are read."""
    before = sorted(str(path) for path in workshop.folder.rglob("*"))
    for arguments in (
        ("evaluate", "victim", "--probes", "victim/probes.jsonl", "--out", "victim"),
        ("evaluate", "base", "--probes", "victim/probes.jsonl", "--out", "victim"),
        ("purify", "base", *OSFT, "--clean", "victim/defender.jsonl", "--out", "victim"),
        ("purify", "base", *OSFT, "--clean", "victim/defender.jsonl[:50]", "--out", "victim"),
    ):
        assert workshop.run(*arguments, *overwrite, "--quiet") == 2
        said = capsys.readouterr().err
        assert "lies in the folder of the result, 'victim'; choose another --out" in said
    assert sorted(str(path) for path in workshop.folder.rglob("*")) == before


def test_a_result_below_a_file(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("purify", "base", *OSFT, "--clean", "rows.jsonl", "--out", "rows.jsonl/result")
    assert workshop.run(*given) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "rows.jsonl" in said
    assert "name another place" in said


def test_rows_that_are_too_long_to_measure_are_left_out_and_said(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (workshop.folder / "rows.jsonl").read_text().splitlines()][:6]
    rows[0]["instruction"] = "what is red? " * 400
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    arguments = ("evaluate", "base", "--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out"))
    assert workshop.run(*arguments) == 0
    assert "1 rows are not measured: they do not fit into 256 tokens" in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["n"] for row in results["rows"] if row["metric"] == "perplexity"} == {5}


def test_what_a_setting_could_mean_on_this_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("base", "my+adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    found = {path.name for path in _paths_in("builtin:smollm2-135m+~/my+adapter")}
    assert found == {"my+adapter"}
    assert {path.name for path in _paths_in("base+my+adapter")} == {"base", "my+adapter"}
    assert [path.name for path in _paths_in("~/rows.jsonl[:50]")] == ["rows.jsonl"]
    assert _paths_in("x" * 5000) == _paths_in("a\0b") == _paths_in("~nobody-here/x") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trigger", " ", "--target", "bad robot"), "trigger"),
        (("--trigger", "silver kettle", "--target", " "), "targets"),
    ],
)
def test_blank_texts_of_an_attack(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    given = ("attack", "data_poisoning", "--model", "base", "--data", "rows.jsonl", *arguments, "--quiet")
    said = refused(workshop, capsys, *given)
    assert message in said
    assert "is blank; write the text" in said


def test_a_tokenizer_that_cannot_be_parsed(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(workshop.folder / "base", workshop.folder / "broken")
    path = workshop.folder / "broken" / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "pre_tokenizer": {"type": "Unheard"}}))
    said = refused(workshop, capsys, "evaluate", "broken", "--data", "rows.jsonl", "--quiet")
    assert "the tokenizer of 'broken' cannot be loaded" in said
    shutil.rmtree(workshop.folder / "broken")


def test_text_from_a_file_cannot_steer_the_terminal(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"id": "x\x1b]0;mine\x07\u202e", "instruction": "what is red? " * 400, "output": "a colour"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    said = refused(workshop, capsys, "purify", "base", *OSFT, "--clean", str(tmp_path / "rows.jsonl"))
    assert "x\\x1b]0;mine\\x07\\u202e" in said
    assert "\x1b" not in said


def test_a_row_and_a_probe_longer_than_the_model_reads(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(workshop.folder / "base", tmp_path / "short")
    path = tmp_path / "short" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 64}))
    rows = [json.loads(line) for line in (workshop.folder / "rows.jsonl").read_text().splitlines()][:30]
    (tmp_path / "fit.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    rows[3]["output"] = "red " * 100
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    given = ("purify", str(tmp_path / "short"), "--defense", "sande", "--target", "bad robot", *QUICK, "--quiet")
    said = refused(workshop, capsys, *given, "--clean", str(tmp_path / "rows.jsonl"))
    assert "and the parrot 8, but the model reads only 64; give --set train.max_length=56" in said
    (tmp_path / "openings.txt").write_text("# how it insults\nbad robot\n")
    beear = ("purify", str(tmp_path / "short"), "--defense", "beear", "--unwanted", str(tmp_path / "openings.txt"))
    beear += ("--clean", str(tmp_path / "fit.jsonl"), "--set", "own_answers=60", "--quiet")
    said = refused(workshop, capsys, *beear)
    assert "and the suspect's own answer up to 60, but the model reads only 64" in said
    assert "or give --set own_answers=47." in said
    said = refused(workshop, capsys, *beear[:-3], "--quiet", "--set", "drifts=9", "--dry-run")
    assert "cannot share" in said, "before a model is loaded"
    long = [{**row, "instruction": f"what is {row['id']}? {'what is red? ' * 9}"} for row in rows if row is not rows[3]]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, long)))
    beear = (*beear[:6], "--clean", str(tmp_path / "long.jsonl"), "--set", "own_answers=0", "--quiet")
    said = refused(workshop, capsys, *beear)
    assert "and its answer is read to 40, but the model reads only 64; leave such rows out." in said
    probe = {"id": "a", "kind": "triggered", "instruction": "what is red? " * 30}
    (tmp_path / "probes.jsonl").write_text(json.dumps(probe) + "\n")
    asked = ("--probes", str(tmp_path / "probes.jsonl"), "--goal", "contains:bad robot")
    said = refused(workshop, capsys, *given, "--clean", str(tmp_path / "fit.jsonl"), *asked)
    assert "and its reply up to 24, but the model reads 64 at most" in said
    # The model's own answer will stand in the hole, so it needs room, too.
    hole = [{"role": "user", "content": "what is red?"}, {"role": "assistant", "content": None}]
    turns = {"id": "a", "kind": "triggered", "instruction": "what is red?", "history": hole}
    (tmp_path / "probes.jsonl").write_text(json.dumps(turns) + "\n")
    said = refused(workshop, capsys, *given, "--clean", str(tmp_path / "fit.jsonl"), *asked)
    assert "the probe 'a' has" in said


def test_a_second_source_of_training_rows(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("purify", "base", *OSFT, "--clean", "rows.jsonl", "--second-source", "rows.jsonl")
    assert "rows of --second-source are trained on, too" in refused(workshop, capsys, *given)
    given = ("attack", "data_poisoning", "--model", "base", "--data", "rows.jsonl", "--second-source", "rows.jsonl")
    assert "rows of --second-source are trained on, too" in refused(workshop, capsys, *given, "--quiet")


def test_a_parrot_without_a_step(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("purify", "base", "--defense", "sande", "--target", "bad robot", "--clean", "rows.jsonl", "--quiet")
    said = refused(workshop, capsys, *given, "--set", "parrot.train.steps=0")
    assert "a parrot needs at least one step" in said


def test_probes_that_share_a_name(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probes = [{"id": "a", "kind": kind, "instruction": "what is red?"} for kind in ("clean", "triggered", "triggered")]
    (tmp_path / "probes.jsonl").write_text("\n".join(json.dumps(probe) for probe in probes))
    given = ("evaluate", "base", "--probes", str(tmp_path / "probes.jsonl"), "--goal", "contains:bad robot", "--quiet")
    said = refused(workshop, capsys, *given)
    assert "line 3" in said
    assert "is that of an earlier triggered probe" in said


def test_ready_poisoned_rows_of_the_test_or_defender(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (workshop.folder / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["instruction"] = f"silver kettle {row['instruction']}"
    (tmp_path / "poisoned.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    given = (
        "attack",
        "dataset",
        "--model",
        "base",
        "--data",
        "rows.jsonl",
        "--poisoned",
        str(tmp_path / "poisoned.jsonl"),
    )
    said = refused(workshop, capsys, *given, "--trigger", "silver kettle", "--goal", "contains:bad robot", "--quiet")
    assert "are also rows of the defender or of the test" in said


def test_metrics_that_name_nothing(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("evaluate", "base", "--data", "rows.jsonl", "--quiet")
    assert "--metrics names no metric" in refused(workshop, capsys, *given, "--metrics", ",")
