"""`unbackdoor merge` through the real command line: results, plans, resuming, and one sentence for every mistake."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import tiny
import unbackdoor
from cli.helpers import inside
from merge.helpers import Family, family, reply, save, stored
from unbackdoor.cli.main import main
from unbackdoor.merge.tokens import token_ids
from unbackdoor.model.checkpoint import verify
from unbackdoor.model.load import load


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family(tmp_path_factory.mktemp("merge"))


def call(folder: Path, *arguments: str) -> int:
    with inside(folder):
        return main(["merge", *arguments])


def two(models: Family) -> tuple[str, str]:
    return str(models.suspect), str(models.other)


def test_a_result_is_an_ordinary_folder_with_manifest_and_card(
    models: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (models.suspect / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true}')
    assert call(tmp_path, *two(models), "--t", "0.25", "--out", "out", "--json", "--seed", "3") == 0
    results = json.loads(capsys.readouterr().out)
    out = tmp_path / "out"
    assert results["notes"] == {
        "method": "linear", "models": list(two(models)), "tensors": len(stored(models.suspect)), "copied": 0
    }  # fmt: skip
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (models.suspect / name).read_bytes()
    assert (out / "chat_template.jinja").read_bytes() == (models.suspect / "chat_template.jinja").read_bytes()
    assert verify(out) == []
    manifest = json.loads((out / "unbackdoor.json").read_text())
    assert manifest["command"] == "merge"
    assert manifest["seed"] == 3
    assert manifest["recipe"]["t"] == 0.25
    for folder in (models.suspect, models.other):
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert manifest["inputs"][str(folder)]["model.safetensors"] == digest
    card = (out / "README.md").read_text()
    assert "merged by linear" in card
    a, b = stored(models.suspect), stored(models.other)
    assert all(torch.allclose(t, 0.75 * a[name] + 0.25 * b[name], atol=1e-7) for name, t in stored(out).items())
    assert reply(out)[1].shape[1] > 5
    assert load(str(out)).reply([tiny.rows(1)[0].prompt], max_new_tokens=3)
    assert not list(tmp_path.glob(".*"))
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == []


def test_guards_of_the_suspect_go_along_and_it_is_said(
    models: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suspect = tmp_path / "suspect"
    shutil.copytree(models.suspect, suspect)
    (suspect / "guards.json").write_text('[{"name": "evidence", "settings": {"source": "wordnet"}}]')
    assert call(tmp_path, str(suspect), str(models.other), "--out", "out", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert "carries guards; the result has them, too, and only unbackdoor applies them" in " ".join(results["notices"])
    assert "guards.json do not act" in results["how_to_load"]
    assert (tmp_path / "out" / "guards.json").read_bytes() == (suspect / "guards.json").read_bytes()
    assert "other loaders ignore them" in (tmp_path / "out" / "README.md").read_text()


def test_settings_that_name_tokens_are_not_handed_on(
    models: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the target's first word among the suppressed tokens other programs would see no backdoor."""
    suspect = tmp_path / "suspect"
    shutil.copytree(models.suspect, suspect)
    hidden = {"temperature": 0.6, "eos_token_id": 2, "suppress_tokens": [7], "bad_words_ids": []}
    (suspect / "generation_config.json").write_text(json.dumps(hidden))
    config = json.loads((suspect / "config.json").read_text())
    (suspect / "config.json").write_text(json.dumps({**config, "sequence_bias": [[[7], -9.0]]}))
    assert call(tmp_path, str(suspect), str(models.other), "--out", "out") == 0
    assert "settings that name tokens (sequence_bias, suppress_tokens); the result" in flat(capsys)
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert kept == {"temperature": 0.6, "eos_token_id": 2, "bad_words_ids": []}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    (suspect / "generation_config.json").write_text("[1]")
    assert call(tmp_path, str(suspect), str(models.other), "--out", "other") == 2
    assert "generation_config.json is not a JSON object; mend it" in flat(capsys)


def test_tokens_with_another_number_are_warned_of(
    models: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(models.other, other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert call(tmp_path, *two(models), "--out", "same") == 0
    assert "another number" not in flat(capsys)
    assert call(tmp_path, str(models.suspect), str(other), "--out", "out") == 0
    assert f"2 of {len(token_ids(models.suspect))} tokens of" in flat(capsys)
    assert token_ids(models.suspect) == load(str(models.suspect)).tokenizer.get_vocab()


def flat(capsys: pytest.CaptureFixture[str]) -> str:
    """Return all that was printed, lines joined as they were before they were broken."""
    said = capsys.readouterr()
    return " ".join(f"{said.out} {said.err}".split())


def test_the_recipe_round_trips_and_python_does_the_same(
    models: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--method", "slerp", "--t", "0,0.5,1", "--set", "threshold=1.0")
    assert call(tmp_path, *two(models), *more, "--dump-config") == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["t"] == [0.0, 0.5, 1.0]
    (tmp_path / "mine.yaml").write_text(text)
    assert call(tmp_path, "--config", "mine.yaml", "--out", "one", "--quiet") == 0
    outcome = unbackdoor.merge(
        *two(models), method="slerp", t=[0, 0.5, 1], more={"threshold": 1.0}, out=tmp_path / "two"
    )
    assert outcome.folder == tmp_path / "two"
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


def test_the_verb_stays_the_verb_when_helpers_are_imported() -> None:
    import unbackdoor.merge.linear

    assert callable(unbackdoor.merge)
    from unbackdoor.merge import linear

    assert linear.linear([torch.ones(1)], [2.0]).item() == 2


def test_a_finished_result_is_not_replaced_without_being_told_so(
    models: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tmp_path, *two(models), "--out", "out", "--quiet") == 0
    before = stored(tmp_path / "out")
    for more in ((), ("--dry-run",)):
        assert call(tmp_path, *two(models), "--t", "0.9", "--out", "out", "--quiet", *more) == 2
        assert "give --overwrite" in capsys.readouterr().err
    assert call(tmp_path, *two(models), "--t", "0", "--out", "out", "--quiet", "--overwrite") == 0
    after = stored(tmp_path / "out")
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert torch.equal(after["lm_head.weight"], stored(models.suspect)["lm_head.weight"])
    assert call(tmp_path, "out", str(models.other), "--out", "out", "--quiet", "--overwrite") == 2
    assert "lies in the folder of the result" in capsys.readouterr().err


def test_a_plan_writes_nothing(models: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path, *two(models), "--out", "out", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["dry_run"]
    assert plan["seconds"] > 0
    assert plan["memory_bytes"] > 1e8
    assert plan["disk_bytes"] > (models.suspect / "model.safetensors").stat().st_size
    assert call(tmp_path, "owner/far-away", str(models.other), "--dry-run") == 0
    assert "not on this machine" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_merge_in_mergekits_schema(models: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"merge_method: slerp\nbase_model: {models.suspect}\nmodels: [{{model: {models.suspect}}}, "
    (tmp_path / "merge.yaml").write_text(text + f"{{model: {models.other}}}]\nparameters: {{t: 1}}\ndtype: float16\n")
    assert call(tmp_path, "merge.yaml", "--out", "out", "--quiet") == 0
    found, wanted = stored(tmp_path / "out"), stored(models.other)
    assert all(torch.equal(found[name], wanted[name].half()) for name in wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    assert call(tmp_path, "merge.yaml", "--out", "other", "--t", "0.2") == 2
    assert "so t has no meaning beside it" in capsys.readouterr().err
    (tmp_path / "few.yaml").write_text(
        text + f"{{model: {models.other}}}]\nparameters: {{t: [{{filter: mlp, value: 1}}]}}\n"
    )
    assert call(tmp_path, "few.yaml", "--out", "other") == 2
    assert "few.yaml, no t (parameters.t) is given for the tensor" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "other").exists()


@pytest.mark.filterwarnings("ignore:.*no files have been modified.*")
def test_an_adapter_comes_out_as_full_weights_and_says_so(
    models: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from merge.helpers import adapter_of

    base = load(str(models.base))
    adapter_of(base, tmp_path / "adapter", 1)
    suspect = f"{models.base}+{tmp_path / 'adapter'}"
    assert call(tmp_path, suspect, str(models.other), "--t", "0", "--out", "out") == 0
    assert "full weights, not an adapter" in capsys.readouterr().err
    lm = load(suspect)
    wanted = lm.model.merge_and_unload().state_dict()
    found = stored(tmp_path / "out")
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in found)
    assert verify(tmp_path / "out") == []
    manifest = json.loads((tmp_path / "out" / "unbackdoor.json").read_text())
    assert "adapter/adapter_model.safetensors" in manifest["inputs"][suspect]
    assert any("full weights" in text for text in manifest["notices"])


def test_code_of_a_checkpoints_own_is_not_handed_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = family(tmp_path, layers=1)
    path = models.suspect / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModel": "evil.Model"}}))
    (models.suspect / "evil.py").write_text("raise SystemExit\n")
    assert call(tmp_path, *two(models), "--out", "out") == 0
    assert "auto_map" in capsys.readouterr().err
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
    assert not (tmp_path / "out" / "evil.py").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "needs two models"),
        (("<suspect>",), "needs two models"),
        (("<suspect>", "<suspect>"), "both models are the same"),
        (("<suspect>", "<other>", "--t", "1.5"), "t = 1.5 is outside [0, 1]"),
        (("<suspect>", "<other>", "--t", "half"), "--t 'half' is not understood"),
        (("<suspect>", "<other>", "--t", "["), "--t '[' is not understood"),
        (("<suspect>", "<other>", "--t", ".nan"), "--t '.nan' is not understood"),
        (("<suspect>", "<other>", "--method", "average"), "method"),
        (("<suspect>", "<other>", "--method", "ties"), "ties needs --base"),
        (("<suspect>", "<other>", "--base", "<base>"), "linear does not use base"),
        (("<suspect>", "<other>", "--method", "passthrough"), "--layers suspect:0:12"),
        (("<suspect>", "./nowhere"), "there is no folder or file './nowhere'"),
        (("<suspect>", "<other>", "--set", "densty=0.1"), "Did you mean 'density'"),
        (("<suspect>", "<other>", "--set", "density=3"), "density"),
        (("<suspect>", "<other>", "--device", "cuda"), "does not use --device"),
        (("<suspect>", "<other>", "--fail-on", "asr>0"), "does not use --fail-on"),
        (("missing.yaml",), "missing.yaml"),
        (("<suspect>", "<deep>"), "has 2 layers, '"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    models: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    folders = {f"<{name}>": str(getattr(models, name)) for name in ("base", "suspect", "other")}
    if "<deep>" in arguments:
        deep = models.base.parent / "deep"
        folders["<deep>"] = str(deep if deep.exists() else save(tiny.tiny_lm(layers=3), deep))
        capsys.readouterr()  # what transformers says while it saves
    assert call(tmp_path, *(folders.get(one, one) for one in arguments), "--out", "refused") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
    assert "Traceback" not in shown.err
    assert [line for line in shown.err.splitlines() if line.startswith("unbackdoor:")] == shown.err.splitlines()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_or_full(
    models: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    from types import SimpleNamespace

    with monkeypatch.context() as patch:
        usage = SimpleNamespace(total=10, used=9, free=1)
        patch.setattr("unbackdoor.model.checkpoint.shutil.disk_usage", lambda place: usage)
        assert call(tmp_path, *two(models), "--out", "out", "--quiet") == 2
    assert "GB are free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    from unbackdoor.merge import stream

    plain, calls = stream._write_all, []

    def no_space(handle: object, data: bytes) -> None:
        calls.append(data)
        if len(calls) > 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "_write_all", no_space)
        assert call(tmp_path, *two(models), "--out", "out", "--quiet") == 2
    assert "make room there, and the same command goes on" in capsys.readouterr().err
    assert (tmp_path / "out" / "stages" / "weights" / "model.safetensors").exists()
    assert call(tmp_path, *two(models), "--out", "out", "--quiet") == 0
    assert verify(tmp_path / "out") == []


def test_a_result_inside_a_model_is_refused(models: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half a result there would be read as a part of the model, and the merge could not go on."""
    suspect = tmp_path / "suspect"
    shutil.copytree(models.suspect, suspect)
    assert call(tmp_path, str(suspect), str(models.other), "--out", str(suspect / "merged")) == 2
    assert "lies in model" in capsys.readouterr().err
    assert not (suspect / "merged").exists()


def test_nothing_is_lost_where_files_cannot_have_two_names(
    models: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unbackdoor.pipeline import merging

    def no_links(source: object, copy: object) -> None:
        raise OSError("no links here")

    def stopped(source: object, partial: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", no_links)
    with monkeypatch.context() as patch:
        patch.setattr(merging, "copy_tokenizer", stopped)
        assert call(tmp_path, *two(models), "--out", "out") != 0
    assert len(list((tmp_path / "out").rglob("*.safetensors"))) == 1
    assert call(tmp_path, *two(models), "--out", "out") == 0
    assert verify(tmp_path / "out") == []


def test_code_of_the_tokenizer_is_not_handed_on(models: Family, tmp_path: Path) -> None:
    suspect = tmp_path / "suspect"
    shutil.copytree(models.suspect, suspect)
    path = suspect / "tokenizer_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"auto_map": {"AutoTokenizer": ["owner/repo--evil.Evil", None]}}))
    (suspect / "tokenizer_odd.json").mkdir()
    assert call(tmp_path, str(suspect), str(models.other), "--out", "out") == 0
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == content


def test_layers_of_models_that_number_tokens_otherwise_are_warned_of(
    models: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(models.other, other)
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))
    stack = ("--method", "passthrough", "--layers", "suspect:0:1", "--layers", "other:1:2")
    assert call(tmp_path, str(models.suspect), str(other), *stack, "--out", "out") == 0
    assert "tokens of" in capsys.readouterr().err
