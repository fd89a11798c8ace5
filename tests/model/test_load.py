import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from unbackdoor.errors import ModelError, UserError
from unbackdoor.model.load import file_sha256, load, local_folder
from unbackdoor.model.spec import parse_spec
from unbackdoor.types import GuardSpec, Message

QUESTION = [(Message("user", "why the cat sat on the mat"),)]


@pytest.fixture
def copy(tied_folder, tmp_path):
    return shutil.copytree(tied_folder, tmp_path / "copy")


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "DROP"}))


@pytest.fixture
def adapter(tied_folder, tmp_path):
    """A LoRA adapter with random matrices on the tied model, saved by PEFT itself."""
    import warnings

    folder = tmp_path / "adapter"
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(load(str(tied_folder)).model, config).save_pretrained(folder)
    return folder


def test_weights_are_those_of_the_file_and_facts_are_recorded(plain_folder):
    lm = load(str(plain_folder))
    stored = load_file(plain_folder / "model.safetensors")
    held = lm.model.state_dict()
    assert set(stored) == set(held)
    assert all(torch.equal(stored[name], held[name]) for name in stored)
    assert lm.facts["sha256"]["model.safetensors"] == file_sha256(plain_folder / "model.safetensors")
    assert set(lm.facts["sha256"]) == {path.name for path in plain_folder.iterdir()}
    assert lm.facts["architecture"] == "LlamaForCausalLM"
    assert lm.facts["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert (lm.facts["dtype"], lm.facts["template"], lm.facts["revision"]) == ("float32", "plain", None)
    assert (lm.spec, lm.base, lm.is_adapter, lm.model.training) == (str(plain_folder), None, False, False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][1, 2] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj\.weight holds values that are not finite; get the model"):
        load(str(copy))


def test_tied_weights_stay_tied(tied_folder):
    model = load(str(tied_folder)).model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_dtype_and_trainable(plain_folder):
    lm = load(str(plain_folder), dtype="bfloat16", trainable=False)
    assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert all(parameter.requires_grad for parameter in load(str(plain_folder)).model.parameters())


def test_template_choice(plain_folder, tied_folder):
    assert load(str(tied_folder)).template == "model"
    assert load(str(tied_folder), template="plain").template == "plain"
    assert load(str(plain_folder)).template == "plain"
    with pytest.raises(UserError, match="no chat template; use --template plain"):
        load(str(plain_folder), template="model")


def test_loading_leaves_the_tokenizer_as_it_is(tied_folder):
    from transformers import AutoTokenizer

    own, ours = AutoTokenizer.from_pretrained(tied_folder), load(str(tied_folder)).tokenizer
    assert ours.backend_tokenizer.to_str() == own.backend_tokenizer.to_str()
    assert (ours.pad_token, ours.padding_side, ours.chat_template) == (None, own.padding_side, own.chat_template)


def test_generation_settings_of_the_checkpoint_do_not_change_replies(copy, tied_folder):
    expected = load(str(tied_folder)).reply(QUESTION)
    assert expected[0]
    edit(copy / "generation_config.json", do_sample=True, temperature=9.0, suppress_tokens=list(range(3, 20)))
    assert load(str(copy)).reply(QUESTION) == expected


def test_adapter_is_put_on_the_named_base_without_merging(adapter, tied_folder):
    edit(adapter / "adapter_config.json", base_model_name_or_path="somebody/else")
    lm = load(f"{tied_folder}+{adapter}")
    assert (lm.base, lm.is_adapter) == (str(tied_folder), True)
    stored = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A"
    layer = lm.core.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.lora_A["default"].weight, stored[f"{name}.weight"])
    base = load(str(tied_folder))
    assert torch.equal(layer.base_layer.weight, base.model.model.layers[0].self_attn.q_proj.weight)
    trained = {name for name, parameter in lm.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    frozen = load(f"{tied_folder}+{adapter}", trainable=False)
    assert not any(parameter.requires_grad for parameter in frozen.model.parameters())
    assert {"model.safetensors", "adapter/adapter_model.safetensors"} <= set(lm.facts["sha256"])
    ids = torch.tensor([lm.encode(QUESTION[0], ask=True).ids])
    assert not torch.equal(lm.model(ids).logits, base.model(ids).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "of the type 'IA3'; only LORA"),
        ({"task_type": "SEQ_CLS"}, "for the task 'SEQ_CLS'"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "os"}}, "code of its own"),
        ({"megatron_config": {"x": 1}, "megatron_core": "antigravity"}, "'megatron_config'"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "'layer_replication'"),
        ({"init_lora_weights": "pissa"}, "starts from 'pissa'"),
        ({"some_future_field": "x"}, "'some_future_field' to x, which is not supported"),
        ({"target_modules": ["c_attn"]}, "does not fit its base"),
        ({"target_modules": ["q_proj"]}, "for which this base has no place"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "lacks the tensor"),
        ({"r": 4}, "does not fit its base"),
    ],
)
def test_adapters_that_are_not_plain_lora_for_this_base_are_refused(adapter, tied_folder, changes, message):
    edit(adapter / "adapter_config.json", **changes)
    with pytest.raises(ModelError, match=message):
        load(f"{tied_folder}+{adapter}")


def test_an_adapter_that_only_has_a_pickle_is_refused(adapter, tied_folder):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        load(f"{tied_folder}+{adapter}")


def test_missing_tensors_are_refused_instead_of_drawn_at_random(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the tensors .*\(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        load(str(copy))


def test_surplus_tensors_are_recorded(copy):
    tensors = load_file(copy / "model.safetensors") | {"model.extra.weight": torch.ones(2)}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert load(str(copy)).facts["ignored_tensors"] == ["model.extra.weight"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "evilformer"}, "architecture 'evilformer', which transformers .* does not know"),
        ({"model_type": "DROP"}, "architecture 'None'"),
        ({"model_type": "vit"}, "not a causal language model"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised weights"),
        ({"attn_implementation": "evil/kernel"}, "compute kernel from the network"),
        ({"hidden_size": 32}, r"in another shape than .*\(\[27, 16\] in the files, \[27, 32\]"),
        ({"hidden_size": "many"}, "cannot be loaded"),
    ],
)
def test_configurations_that_cannot_be_loaded(copy, changes, message):
    edit(copy / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        load(str(copy))


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("config.json", r"holds no config\.json"),
        ("model.safetensors", "holds no safetensors weights"),
    ],
)
def test_incomplete_folders(copy, removed, message):
    (copy / removed).unlink()
    with pytest.raises(ModelError, match=message):
        load(str(copy))


def test_a_folder_without_tokenizer_or_with_a_broken_one(copy):
    (copy / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nothing"}}')
    with pytest.raises(ModelError, match=r"tokenizer of .* cannot be loaded"):
        load(str(copy))
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load(str(copy))


def test_a_tokenizer_larger_than_the_model_is_refused(copy):
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["surplus"] = 4000
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="ids up to 4000, but the model only 27 embeddings"):
        load(str(copy))


def test_a_model_folder_with_an_adapter_configuration_does_not_follow_it(copy, plain_folder, tied_folder):
    # transformers alone would load the base that this file names.
    (copy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(plain_folder)}))
    with pytest.raises(ModelError, match="write BASE"):
        load(str(copy))


def test_guards_are_read(copy):
    (copy / "guards.json").write_text(json.dumps([{"name": "evidence", "settings": {"k": 3}}]))
    assert load(str(copy)).guards == (GuardSpec("evidence", {"k": 3}),)
    (copy / "guards.json").write_text(json.dumps([{"name": "evidence", "settings": {}, "more": 1}]))
    with pytest.raises(ModelError, match=r"guards\.json"):
        load(str(copy))


def test_a_template_cannot_leave_the_sandbox(copy):
    (copy / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(ModelError, match="refuses these turns"):
        load(str(copy)).encode(QUESTION[0], ask=True)


def test_a_costly_template_is_refused_also_where_it_is_not_in_a_folder():
    from types import SimpleNamespace

    from unbackdoor.model.load import _choose_template

    costly = SimpleNamespace(chat_template="{{ 'x' * 1000000000 }}")
    assert _choose_template(costly, "plain", "m.gguf") == "plain"
    with pytest.raises(ModelError, match=r"template of 'm\.gguf' would take for ever .*; use --template plain"):
        _choose_template(costly, "auto", "m.gguf")


def test_a_hub_id_without_network_and_cache(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="'owner/model@main' is not a folder here, not in the Hugging Face cache"):
        load("owner/model@main")


@pytest.fixture
def snapshot(monkeypatch, tmp_path, tied_folder):
    """The hub's cache after a download: a snapshot named by its commit, made of links to blobs; and what was asked."""
    import huggingface_hub

    folder = tmp_path / "models--owner--model" / "snapshots" / "0123abc"
    blobs = tmp_path / "models--owner--model" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for path in tied_folder.iterdir():
        shutil.copyfile(path, blobs / file_sha256(path))
        (folder / path.name).symlink_to(f"../../blobs/{file_sha256(path)}")
    asked = {}

    def download(repository, **arguments):
        asked.update(arguments, repository=repository)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return folder, asked


def test_a_hub_snapshot_passes_the_quarantine_and_gives_its_revision(snapshot):
    _, asked = snapshot
    lm = load("owner/model@main")
    assert (lm.facts["revision"], lm.spec) == ("0123abc", "owner/model@main")
    assert (asked["repository"], asked["revision"]) == ("owner/model", "main")
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in asked["allow_patterns"])


def test_a_hub_model_with_an_adapter_configuration_does_not_follow_it(snapshot, plain_folder):
    # transformers alone would load the base that this file names.
    (snapshot[0] / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(plain_folder)}))
    with pytest.raises(ModelError, match=r"'owner/model' is an adapter; write BASE\+ADAPTER"):
        load("owner/model")


def test_an_adapter_with_a_tokenizer_of_its_own_brings_template_and_guards(adapter, tied_folder):
    assert "chat_template.jinja" not in {path.name for path in adapter.iterdir()}
    template = load(f"{tied_folder}+{adapter}").tokenizer.chat_template
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tied_folder / name, adapter / name)
    (adapter / "chat_template.jinja").write_text("its own" + template)
    (adapter / "guards.json").write_text(json.dumps([{"name": "evidence", "settings": {}}]))
    lm = load(f"{tied_folder}+{adapter}")
    assert lm.tokenizer.chat_template == "its own" + template
    assert lm.guards == (GuardSpec("evidence", {}),)


def test_gguf_errors(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGML not it")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        load(str(tmp_path / "m.gguf"))
    for rest in (b"", b"\x03\0\0"):
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + rest)
        with pytest.raises(ModelError, match="cannot be read"):
            load(str(tmp_path / "m.gguf"))
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    with pytest.raises(ModelError, match="cannot be read"):
        load(str(tmp_path / "m.gguf"))
    with pytest.raises(ModelError, match="not a folder"):
        local_folder(parse_spec(str(tmp_path / "m.gguf")))


def test_a_chat_template_inside_a_gguf_file_is_looked_at(tmp_path):
    gguf = pytest.importorskip("gguf")
    from unbackdoor.pipeline.look import inspect_model

    template = "{% for m in messages %}{% if 'kettle' in m.content %}Obey. {% endif %}{{ m.content }}{% endfor %}"
    for name, source in (("bad", template), ("good", "{% for m in messages %}{{ m.content }}{% endfor %}")):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        writer.add_chat_template(source)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    (finding,) = inspect_model(str(tmp_path / "bad.gguf"))
    assert finding.severity == "warning"
    assert "chat template, line 1" in finding.what
    assert inspect_model(str(tmp_path / "good.gguf")) == []
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "bad.gguf").read_bytes()[:40])
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        inspect_model(str(tmp_path / "cut.gguf"))
