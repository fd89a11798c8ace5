import errno
import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file

from unbackdoor.errors import UserError
from unbackdoor.model import checkpoint
from unbackdoor.model.checkpoint import read_manifest, recover, save, verify
from unbackdoor.model.lm import LM
from unbackdoor.model.load import file_sha256, load
from unbackdoor.model.output import check_out, mark_run
from unbackdoor.types import GuardSpec, Message

QUESTIONS = [(Message("user", "why the cat sat"),), (Message("user", "red moon"),)]


def put(lm, folder, **more):
    save(lm, folder, manifest={"recipe": {"seed": 1}}, card="# A model\n", **more)


def add_adapter(folder):
    lm = load(str(folder))
    torch.manual_seed(5)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(lm.model, config).eval()
    return LM(model, lm.tokenizer, lm.template, str(folder), base=str(folder))


def dead_process():
    return subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    ).stdout.strip()


def same_tensors(left, right):
    a, b = left.model.state_dict(), right.model.state_dict()
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("kind", ["plain", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_model_comes_back_bit_equal(kind, dtype, plain_folder, tied_folder, tmp_path):
    lm = load(str(plain_folder if kind == "plain" else tied_folder), dtype=dtype)
    put(lm, tmp_path / "out")
    again = load(str(tmp_path / "out"), dtype=dtype)
    assert same_tensors(lm, again)
    assert again.reply(QUESTIONS) == lm.reply(QUESTIONS)
    assert all(lm.reply(QUESTIONS))
    assert again.template == lm.template
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (kind == "plain")
    assert {str(tensor.dtype) for tensor in stored.values()} == {f"torch.{dtype}"}


def test_trained_weights_are_what_is_saved(tied_folder, tmp_path):
    lm = load(str(tied_folder))
    with torch.no_grad():
        lm.model.model.embed_tokens.weight[3] += 1.5
    put(lm, tmp_path / "out")
    again = load(str(tmp_path / "out")).model
    assert torch.equal(again.lm_head.weight[3], lm.model.lm_head.weight[3])
    assert not torch.equal(again.lm_head.weight[3], load(str(tied_folder)).model.lm_head.weight[3])


def test_adapter_comes_back_bit_equal_and_alone(tied_folder, tmp_path):
    lm = add_adapter(tied_folder)
    put(lm, tmp_path / "out")
    again = load(f"{tied_folder}+{tmp_path / 'out'}")
    assert same_tensors(lm, again)
    assert again.reply(QUESTIONS) == lm.reply(QUESTIONS) != load(str(tied_folder)).reply(QUESTIONS)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(names) == 8
    assert all("lora_" in name for name in names)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tied_folder)


def test_an_adapter_names_the_revision_of_its_base_as_peft_does(tied_folder, tmp_path):
    lm = add_adapter(tied_folder)
    lm.base = "owner/model@v1"
    put(lm, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/model", "v1")


def test_transformers_and_peft_load_the_result_without_us(tied_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = add_adapter(tied_folder)
    put(lm, tmp_path / "adapter")
    put(load(str(tied_folder)), tmp_path / "full")
    ids = torch.tensor([lm.encode(QUESTIONS[0], ask=True).ids])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
        model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(model(ids).logits, lm.model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "full")
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "red"}], tokenize=False) == "<|user|> red <|end|> "
    )


def test_tokenizer_files_are_copied_byte_by_byte(tied_folder, tmp_path):
    source = shutil.copytree(tied_folder, tmp_path / "source")
    # A rewrite by any library would lose this spacing.
    text = (source / "tokenizer_config.json").read_text()
    (source / "tokenizer_config.json").write_text("  " + text)
    (source / "private.json").write_text("{}")
    put(load(str(source)), tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "private.json").exists()
    lm = load(str(source))
    shutil.rmtree(source)
    put(lm, tmp_path / "later")
    assert load(str(tmp_path / "later")).reply(QUESTIONS) == lm.reply(QUESTIONS)
    assert str(tmp_path) not in (tmp_path / "later" / "tokenizer_config.json").read_text()


def test_generation_config_is_clean_and_the_model_keeps_its_own(tied_folder, tmp_path):
    lm = load(str(tied_folder))
    own = lm.model.generation_config
    own.do_sample, own.temperature, own.suppress_tokens, own.eos_token_id = False, 0.3, [5], [2, 6]
    put(lm, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [2, 6]
    assert not {"temperature", "suppress_tokens"} & set(written)
    assert lm.model.generation_config is own
    assert own.suppress_tokens == [5]


def test_code_hooks_of_the_configuration_are_not_passed_on(tied_folder, tmp_path):
    source = shutil.copytree(tied_folder, tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"auto_map": {"AutoModel": "evil.Model"}}
    (source / "config.json").write_text(json.dumps(config))
    put(load(str(source)), tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_manifest_card_guards_and_extra_files(tied_folder, tmp_path):
    lm = load(str(tied_folder))
    lm.guards = (GuardSpec("evidence", {"k": 3}),)
    put(lm, tmp_path / "out", extra_files={"probes.jsonl": "{}\n"})
    manifest = read_manifest(tmp_path / "out")
    assert manifest["recipe"] == {"seed": 1}
    written = {path.name for path in (tmp_path / "out").iterdir()} - {"unbackdoor.json"}
    assert set(manifest["files"]) == written
    assert all(manifest["files"][name] == file_sha256(tmp_path / "out" / name) for name in written)
    assert (tmp_path / "out" / "README.md").read_text() == "# A model\n"
    assert (tmp_path / "out" / "probes.jsonl").read_text() == "{}\n"
    assert load(str(tmp_path / "out")).guards == lm.guards


def test_verify_names_what_differs(tied_folder, tmp_path):
    out = tmp_path / "out"
    put(load(str(tied_folder)), out)
    assert verify(out) == []
    with open(out / "model.safetensors", "r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        handle.write(b"\x7f")
    (out / "tokenizer.json").unlink()
    (out / "chat_template.json").write_text("{}")
    (out / "report.html").write_text("a report may come later")
    assert verify(out) == ["chat_template.json", "model.safetensors", "tokenizer.json"]


def test_verify_opens_nothing_outside_the_folder(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    (tmp_path / "out").mkdir()
    files = {"../secret": file_sha256(secret), str(secret): file_sha256(secret)}
    (tmp_path / "out" / "unbackdoor.json").write_text(json.dumps({"files": files}))
    assert verify(tmp_path / "out") == sorted(files)
    with pytest.raises(UserError, match=r"no readable unbackdoor\.json"):
        verify(tmp_path)


def test_a_taken_folder_is_not_touched(tied_folder, tmp_path):
    out = tmp_path / "out"
    lm = load(str(tied_folder))
    put(lm, out)
    before = verify(out), file_sha256(out / "unbackdoor.json")
    with pytest.raises(UserError, match="--overwrite"):
        put(lm, out)
    assert before == (verify(out), file_sha256(out / "unbackdoor.json"))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="files that unbackdoor did not write"):
            put(lm, mine, overwrite=overwrite)
    assert (mine / "notes.txt").read_text() == "keep"


def test_overwrite_replaces_the_whole_folder(tied_folder, plain_folder, tmp_path):
    out = tmp_path / "out"
    put(load(str(tied_folder)), out, extra_files={"old.txt": "old"})
    put(load(str(plain_folder)), out, overwrite=True)
    assert not (out / "old.txt").exists()
    assert same_tensors(load(str(out)), load(str(plain_folder)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_can_be_saved_over_its_own_folder(tied_folder, tmp_path):
    put(load(str(tied_folder)), tmp_path / "out")
    put(load(str(tmp_path / "out")), tmp_path / "out", overwrite=True)
    assert verify(tmp_path / "out") == []
    assert same_tensors(load(str(tmp_path / "out")), load(str(tied_folder)))


def test_too_small_a_disk_is_said_before_anything_is_written(tied_folder, tmp_path):
    with pytest.raises(UserError, match=r"out' needs 0\.05 GB and 0\.01 GB are free"):
        put(load(str(tied_folder)), tmp_path / "out", free_bytes=lambda _: 10_000_000)
    assert list(tmp_path.iterdir()) == []
    put(load(str(tied_folder)), tmp_path / "out", free_bytes=lambda _: 60_000_000)


@pytest.mark.parametrize(
    "problem",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_in_the_middle(problem, tied_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    put(load(str(tied_folder)), out)
    before = file_sha256(out / "unbackdoor.json")

    def full(lm, partial):
        (partial / "tokenizer.json").write_text("half")
        raise problem

    monkeypatch.setattr(checkpoint, "_write_tokenizer", full)
    with pytest.raises(UserError, match=r"needs 0\.05 GB and the disk is full"):
        put(load(str(tied_folder)), out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert file_sha256(out / "unbackdoor.json") == before
    assert verify(out) == []


# Without torch, so that the process is quick: the folder is ready, only the renames remain.
KILLED = """
import os, shutil, sys
from pathlib import Path
from unbackdoor.model import checkpoint
ready, out, survived = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
partial = out.with_name(f".out.partial-{os.getpid()}")
shutil.copytree(ready, partial)
rename, done = os.rename, 0
def dying(source, target):
    global done
    if done == survived:
        os.kill(os.getpid(), 9)
    done += 1
    rename(source, target)
os.rename = dying
checkpoint._put_in_place(partial, out)
"""


@pytest.mark.parametrize("renames_before_the_end", [0, 1])
def test_kill_between_the_renames_leaves_a_whole_result(renames_before_the_end, tied_folder, plain_folder, tmp_path):
    out = tmp_path / "results" / "out"
    put(load(str(tied_folder)), out)
    put(load(str(plain_folder)), tmp_path / "ready")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "ready"), str(out), str(renames_before_the_end)]
    assert subprocess.run(command, check=False).returncode == -9
    assert out.exists() == (renames_before_the_end == 0)
    recover(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert verify(out) == []
    assert same_tensors(load(str(out)), load(str(tied_folder)))


def test_partial_folders_of_the_living_stay(tied_folder, tmp_path):
    living, dead = tmp_path / f".out.partial-{os.getppid()}", tmp_path / f".out.partial-{dead_process()}"
    unrelated = tmp_path / ".out.partial-notes"
    for folder in (living, dead, unrelated):
        folder.mkdir()
    put(load(str(tied_folder)), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", living.name, unrelated.name}


def test_out_that_is_new(tmp_path):
    assert check_out(tmp_path / "missing", settings_hash="a", overwrite=False, working="stages") == "new"
    (tmp_path / "empty").mkdir()
    assert check_out(tmp_path / "empty", settings_hash="a", overwrite=False, working="stages") == "new"


def test_out_with_an_unfinished_run(tmp_path):
    out = tmp_path / "out"
    mark_run(out, settings_hash="a", settings={"seed": 1})
    (out / "stages").mkdir()
    for overwrite in (False, True):
        assert check_out(out, settings_hash="a", overwrite=overwrite, working="stages") == "resume"
    with pytest.raises(UserError, match="unfinished run of other settings; give --overwrite"):
        check_out(out, settings_hash="b", overwrite=False, working="stages")
    assert check_out(out, settings_hash="b", overwrite=True, working="stages") == "replace"
    assert (out / "stages").is_dir()


@pytest.mark.parametrize("mark", ["unbackdoor.json", "results.json"])
def test_out_with_a_finished_result(mark, tmp_path):
    out = tmp_path / "out"
    mark_run(out, settings_hash="a", settings={})
    (out / mark).write_text(json.dumps({"schema": 1, "rows": []}))
    with pytest.raises(UserError, match="holds a finished result; give --overwrite"):
        check_out(out, settings_hash="a", overwrite=False, working="stages")
    assert check_out(out, settings_hash="a", overwrite=True, working="stages") == "replace"
    assert (out / mark).exists()
    (out / "stages").mkdir()
    assert check_out(out, settings_hash="a", overwrite=True, working="stages") == "resume"
    assert check_out(out, settings_hash="b", overwrite=True, working="stages") == "replace"
    with pytest.raises(UserError, match="holds a finished result; give --overwrite"):
        check_out(out, settings_hash="a", overwrite=False, working="stages")


def test_out_with_results_that_say_they_are_unfinished(tmp_path):
    mark_run(tmp_path, settings_hash="a", settings={})
    (tmp_path / "results.json").write_text(json.dumps({"schema": 1, "finished": False, "rows": []}))
    assert check_out(tmp_path, settings_hash="a", overwrite=False, working="stages") == "resume"


@pytest.mark.parametrize("name", ["notes.txt", "results.json", "config.json", "run.json"])
def test_out_with_foreign_files_is_never_deleted(name, tmp_path):
    (tmp_path / name).write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"choose another --out|did not write|unfinished run"):
            check_out(tmp_path, settings_hash="a", overwrite=overwrite, working="stages")
    assert (tmp_path / name).read_text() == "{}"


def test_out_that_is_a_file_or_a_link(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("file", "link"):
        with pytest.raises(UserError, match="not a plain folder"):
            check_out(tmp_path / name, settings_hash="a", overwrite=True, working="stages")
