"""Checkpoints made to harm a reader: each is real, on disk, and goes through the same door as any model."""

import json
import os
import pickle
import pickletools
import struct
import sys

import pytest
from handmade import model_tensors, safetensors_bytes, tensor

from unbackdoor.errors import ModelError
from unbackdoor.model.load import load
from unbackdoor.model.quarantine import inspect_folder
from unbackdoor.types import Message

QUESTION = (Message("user", "cat dog"),)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def blocking(folder):
    return [finding for finding in inspect_folder(folder) if finding.blocks]


def refused(folder, message):
    """It must be refused by the quarantine and by the door, for the same reason."""
    assert blocking(folder)
    with pytest.raises(ModelError, match=message):
        load(str(folder))


def test_the_sound_checkpoint_loads_and_speaks(folder):
    assert inspect_folder(folder) == []
    lm = load(str(folder))
    assert len(lm.reply([QUESTION], max_new_tokens=3)) == 1
    entries, data = model_tensors()
    start, end = entries["model.norm.weight"]["data_offsets"]
    assert lm.model.model.norm.weight.tolist() == pytest.approx(struct.unpack("<4f", data[start:end]))


ENTRIES, DATA = model_tensors()
FIRST = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too few for a header"),
        (b"\x08\x00\x00", "too few for a header"),
        (safetensors_bytes(ENTRIES, DATA)[:100], "only 92 follow"),
        (safetensors_bytes(ENTRIES, DATA)[:-1], "ends at byte"),
        (safetensors_bytes(ENTRIES, DATA + b"\0"), "1 bytes at the end belong to no tensor"),
        (safetensors_bytes(ENTRIES, DATA, length=2**63), "the format allows"),
        (safetensors_bytes(ENTRIES, DATA, length=10**8 + 1), "the format allows"),
        (safetensors_bytes(ENTRIES, DATA, length=10**7), "follow"),
        (struct.pack("<Q", 4) + b"[1, ", "not a JSON object"),
        (struct.pack("<Q", 5) + b'{"a":', "not valid JSON"),
        (struct.pack("<Q", 200_001) + b'{"a":' + b"[" * 199_996, "not valid JSON"),
        (struct.pack("<Q", 60) + b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":0}'.ljust(60), "twice"),
        (safetensors_bytes({"a": tensor("F32", [2], 0, 8), "b": tensor("F32", [2], 4, 12)}, b"\0" * 12), "overlaps"),
        (safetensors_bytes({"a": tensor("F32", [1], 0, 4), "b": tensor("F32", [1], 8, 12)}, b"\0" * 12), "hole of 4"),
        (safetensors_bytes({"a": tensor("F32", [2], 0, 4)}, b"\0" * 4), "needs 8 bytes .* hold 4"),
        (safetensors_bytes({"a": tensor("F32", [1], 0, 10**15)}, b"\0" * 4), "needs 4 bytes"),
        (safetensors_bytes({"a": tensor("F32", [2**62, 4], 0, 0)}, b""), "needs"),
        (safetensors_bytes({"a": tensor("F32", [-1], 0, 4)}, b"\0" * 4), "shape"),
        (safetensors_bytes({"a": tensor("F32", [True], 0, 4)}, b"\0" * 4), "shape"),
        (safetensors_bytes({"a": tensor("F32", [1], 4, 0)}, b"\0" * 4), "not a range"),
        (safetensors_bytes({"a": tensor("F32", [1], -4, 0)}, b"\0" * 4), "not a range"),
        (safetensors_bytes({"a": tensor("OBJECT", [1], 0, 4)}, b"\0" * 4), "unknown dtype 'OBJECT'"),
        (safetensors_bytes({"a": {"dtype": "F32", "shape": [0]}}, b""), "exactly dtype, shape"),
        (safetensors_bytes({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    ],
)
def test_broken_safetensors_headers(folder, content, message):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, message)


class WritesAFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_is_not_opened_whatever_its_name(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    proof = tmp_path / "executed"
    (folder / name).write_bytes(pickle.dumps(WritesAFile(str(proof))))
    refused(folder, "pickle" if name.endswith(".bin") else "not a sound safetensors file")
    assert not proof.exists()
    # The control, without opening it: the file on the disk does hold a call of mkdir, and that call can be made.
    opcodes = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops((folder / name).read_bytes())]
    assert "REDUCE" in [opcode for opcode, _ in opcodes]
    assert {"mkdir", str(proof)} <= {argument for _, argument in opcodes if isinstance(argument, str)}
    call, arguments = WritesAFile(str(proof)).__reduce__()
    call(*arguments)
    assert proof.exists()


def test_the_conversion_command_works_and_is_named(folder, monkeypatch):
    import shlex

    import torch
    from safetensors.torch import load_file

    tied = torch.arange(4.0)
    torch.save({"a": tied, "b": tied, "c": torch.ones(2, 2).t()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (finding,) = blocking(folder)
    # What a shell would give to Python; run here, as another process would import torch for seconds.
    program, flag, code = shlex.split(finding.fix[finding.fix.index("python -c ") :])
    assert (program, flag) == ("python", "-c")
    monkeypatch.chdir(folder)
    exec(code, {})
    converted = load_file(folder / "model.safetensors")
    assert converted["b"].tolist() == [0, 1, 2, 3]
    assert converted["c"].tolist() == [[1, 1], [1, 1]]


def test_the_conversion_command_does_not_carry_a_name_that_is_code(folder):
    (folder / "model.safetensors").unlink()
    (folder / "a');import os;os.system('x.bin").write_bytes(b"")
    (finding,) = blocking(folder)
    assert "torch.load('FILE'" in finding.fix


def test_a_pickle_beside_safetensors_is_a_warning(folder):
    (folder / "training_args.bin").write_bytes(b"x")
    (finding,) = inspect_folder(folder)
    assert (finding.severity, finding.file) == ("warning", "training_args.bin")
    load(str(folder))


def test_code_files_are_reported_and_never_executed(folder, tmp_path):
    proof = tmp_path / "executed"
    code = f"import pathlib\npathlib.Path({str(proof)!r}).touch()\nclass C: pass\n"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (folder / f"{name}.py").write_text(code)
    auto = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.C"}
    edit(folder / "config.json", auto_map=auto)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_evil.C"]})
    found = inspect_folder(folder)
    assert sorted(finding.file for finding in found if finding.severity == "danger") == [
        "config.json", "configuration_evil.py", "modeling_evil.py", "tokenization_evil.py", "tokenizer_config.json",
    ]  # fmt: skip
    assert load(str(folder)).facts["architecture"] == "LlamaForCausalLM"
    edit(folder / "config.json", model_type="evil", auto_map=auto)
    with pytest.raises(ModelError, match="need code from the checkpoint, which is never run"):
        load(str(folder))
    assert not proof.exists()
    exec((folder / "modeling_evil.py").read_text(), {})
    assert proof.exists()  # the code is live: it was only never run


def write_index(folder, mapped):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapped}))


def test_a_sound_shard_index_loads(folder):
    write_index(folder, dict.fromkeys(set(ENTRIES) - {"__metadata__"}, "model-00001-of-00001.safetensors"))
    assert inspect_folder(folder) == []
    assert load(str(folder)).facts["parameters"] == len(DATA) // 4


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../outside.safetensors", "not the name of a safetensors file beside it"),
        ("/etc/outside.safetensors", "not the name of a safetensors file beside it"),
        ("..\\outside.safetensors", "not the name of a safetensors file beside it"),
        ("sub/model.safetensors", "not the name of a safetensors file beside it"),
        ("pytorch_model.bin", "not the name of a safetensors file beside it"),
        ("absent.safetensors", "is missing"),
    ],
)
def test_shard_names_that_lead_elsewhere(folder, tmp_path, shard, message):
    (tmp_path / "outside.safetensors").write_bytes(safetensors_bytes(ENTRIES, DATA))
    write_index(folder, {FIRST: shard})
    refused(folder, message)


@pytest.mark.parametrize(
    ("mapped", "message"),
    [
        ({"ghost": "model-00001-of-00001.safetensors"}, "'ghost' is not in the shard"),
        ({FIRST: 3}, "without a weight_map"),
        ([], "without a weight_map"),
    ],
)
def test_indexes_that_do_not_fit_their_shards(folder, mapped, message):
    write_index(folder, mapped)
    refused(folder, message)


def test_a_link_out_of_the_folder(folder, tmp_path):
    outside = tmp_path / "private.json"
    (folder / "tokenizer.json").rename(outside)
    (folder / "tokenizer.json").symlink_to(outside)
    refused(folder, "a link that leaves the folder")


@pytest.mark.parametrize("target", ["nowhere", "config2.json"])
def test_links_to_nowhere_and_in_circles(folder, target):
    (folder / "config2.json").symlink_to(folder / target)
    refused(folder, "leads nowhere or in a circle")


def test_a_linked_folder_is_not_walked(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "evil.bin").write_bytes(b"")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    assert [finding.file for finding in blocking(folder)] == ["sub"]


def test_a_pipe_does_not_hang_the_reader(folder):
    os.mkfifo(folder / "generation_config.json")
    refused(folder, "neither a file nor a folder")


@pytest.mark.parametrize("name", ["snapshots", "elsewhere"])
def test_links_to_blobs_are_for_the_cache_only(folder, tmp_path, name):
    repository = tmp_path / "repository"
    (repository / name).mkdir(parents=True)
    (repository / "blobs").mkdir()
    folder.rename(repository / name / "abc")
    config = repository / name / "abc" / "config.json"
    config.rename(repository / "blobs" / "123")
    config.symlink_to("../../blobs/123")
    assert bool(blocking(repository / name / "abc")) == (name == "elsewhere")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b'{"a": ', b"\xff\xfe{}", b"[" * 200_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_json_that_breaks_a_parser(folder, name, content):
    (folder / name).write_bytes(content)
    refused(folder, "not valid JSON")


def test_json_of_implausible_size_is_not_parsed(folder):
    with open(folder / "generation_config.json", "wb") as handle:
        handle.truncate(6_000_000)
    refused(folder, "a JSON file of 6000000 bytes")


def test_a_configuration_that_is_no_object(folder):
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="not a JSON object"):
        load(str(folder))


def test_a_kernel_from_the_network_at_any_depth(folder):
    edit(folder / "config.json", text_config={"_attn_implementation": "evil/kernel"})
    refused(folder, "compute kernel from the network")


def test_a_template_that_tries_to_leave_the_sandbox(folder, tmp_path):
    proof = tmp_path / "executed"
    source = "{{ cycler.__init__.__globals__.os.mkdir('" + str(proof) + "') }}"
    edit(folder / "tokenizer_config.json", chat_template=source)
    assert any("__globals__" in finding.what for finding in inspect_folder(folder))
    with pytest.raises(ModelError, match="refuses these turns"):
        load(str(folder)).encode(QUESTION, ask=True)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for a in range(99999) %}x{% endfor %}", "counts to 99999"),
        ("{% for a in range(900) %}{% for b in range(900) %}x{% endfor %}{% endfor %}", "counts inside of counting"),
        ("{{ 'x' * 1000000000 }}", "repeats or widens a text 1000000000 times"),
        ("{{ 'x' | center(1000000000) }}", "repeats or widens"),
        ("{{ 'x'.ljust(1000000000) }}", "repeats or widens"),
        ("{{ 10 ** 10 ** 10 }}", "raises to a power"),
    ],
)
def test_templates_that_would_take_for_ever(folder, source, message):
    edit(folder / "tokenizer_config.json", chat_template=source)
    refused(folder, message)


@pytest.mark.parametrize("debugged", [False, True])
def test_a_template_whose_cost_cannot_be_read_is_stopped(folder, debugged):
    source = (
        "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(60) }}{{ messages[0].content }}"
    )
    edit(folder / "tokenizer_config.json", chat_template=source)
    seen, earlier = [], sys.gettrace()

    def debugger(frame, event, argument):
        seen.append(frame.f_code.co_name)

    wanted = debugger if debugged else earlier
    try:
        sys.settrace(wanted)
        with pytest.raises(
            ModelError, match="takes more than 1,000,000 steps for one conversation; use --template pla"
        ):
            load(str(folder)).encode(QUESTION, ask=True)
        assert sys.gettrace() is wanted
    finally:
        sys.settrace(earlier)
    assert ("apply_chat_template" in seen) == debugged, "a debugger still sees what is no template"


def test_templates_that_count_turns_are_as_they_should_be(folder):
    source = (
        "{% for i in range(messages|length - 1, -1, -1) %}{% for j in range(i) %}{% endfor %}{% endfor %}"
        "{% for i in range(10) %}{% endfor %}{% for m in messages %}{{ ' ' * 4 + m.content }}{% endfor %}"
    )
    edit(folder / "tokenizer_config.json", chat_template=source)
    assert inspect_folder(folder) == []
    assert load(str(folder)).encode(QUESTION, ask=True).ids


def test_a_shard_index_without_metadata(folder):
    write_index(folder, dict.fromkeys(set(ENTRIES) - {"__metadata__"}, "model-00001-of-00001.safetensors"))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    refused(folder, 'without the field metadata.* Add "metadata": {} to it')


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1_000_000_000}, "1000000000 layers, but its files hold 1;"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "1000000000 layers, but its files hold 1;"),
        ({"num_hidden_layers": 0}, "says that the model has 0 layers"),
        ({"vocab_size": 10**9}, r"embed_tokens.weight in another shape .*\[6, 4\] in the files, \[1000000000, 4\]"),
        ({"vocab_size": 10**18}, "cannot be loaded|another shape"),
        ({"intermediate_size": 10**9}, r"in another shape .*\[6, 4\] in the files"),
        ({"pad_token_id": 99_999_999}, "the pad_token_id 99999999, but a vocabulary of 6; set it to null"),
        ({"eos_token_id": "x"}, "cannot be loaded|the eos_token_id 'x', which is no token id"),
        ({"hidden_act": "nope"}, r"names the activation 'nope' \(hidden_act\)"),
        ({"num_attention_heads": 0}, "cannot be loaded"),
    ],
)
def test_configurations_that_ask_for_too_much_or_nonsense(folder, changes, message):
    edit(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        load(str(folder))


def test_a_configuration_that_is_another_models(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"32 layers, but its files hold 1; get config\.json and weights"):
        load(str(folder))
    (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    with pytest.raises(ModelError, match=r"\[6, 4\] in the files, \[32000, 4096\] described"):
        load(str(folder))


def test_an_output_without_names_is_not_what_a_configuration_decides(folder):
    edit(folder / "config.json", return_dict=False)
    assert len(load(str(folder)).reply([QUESTION], max_new_tokens=2)) == 1


def test_generation_ids_that_are_none(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ModelError, match=r"generation_config.json has the eos_token_id 'x', which is no token id"):
        load(str(folder))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_of_replies_that_is_a_word_is_found_and_not_used(folder, name):
    usual = load(str(folder)).stop_ids
    assert not [finding for finding in inspect_folder(folder) if "eos_token_id" in finding.what]
    (folder / "generation_config.json").write_text("{}")
    edit(folder / name, eos_token_id=[2, 5])
    found = [finding for finding in inspect_folder(folder) if "eos_token_id" in finding.what]
    assert [(finding.severity, finding.file) for finding in found] == [("warning", name)]
    assert "(5)" in found[0].what
    assert load(str(folder)).stop_ids == usual == (2,)


@pytest.mark.parametrize("changes", [{"model_max_length": "x"}, {"tokenizer_class": "BertTokenizer"}])
def test_tokenizers_that_only_break_when_they_are_used(folder, changes):
    edit(folder / "tokenizer_config.json", **changes)
    with pytest.raises(ModelError, match=r"the tokenizer of .* (cannot be loaded or used|has ids up to 9)"):
        load(str(folder)).encode(QUESTION)


def test_a_manifest_whose_template_is_none(folder):
    from unbackdoor.pipeline.preflight import _template_of

    (folder / "unbackdoor.json").write_text('{"recipe": {"template": ["x"]}}')
    assert _template_of(folder, load(str(folder))) == "plain"


def test_names_and_values_are_escaped_wherever_they_are_shown(folder):
    evil = "\x1b]0;owned\x07\u202e<script>"
    (folder / f"{evil}.py").write_text("")
    (folder / f"{evil}.json").write_text("{")
    edit(folder / "config.json", _attn_implementation=f"{evil}/x")
    (folder / "chat_template.jinja").write_text("{% if '" + evil + "' in messages[0].content %}{{ x.__" + evil[-6:-2])
    (folder / "b.safetensors").write_bytes(safetensors_bytes({evil: tensor("F32", [1], 0, 1)}, b"\0"))
    found = inspect_folder(folder)
    assert len(found) >= 4
    for finding in found:
        for text in (finding.file, finding.what, finding.fix):
            assert text.isprintable(), repr(text)
    with pytest.raises(ModelError) as caught:
        load(str(folder))
    assert str(caught.value).isprintable()
    edit(folder / "config.json", model_type=evil)
    (folder / f"{evil}.json").unlink()
    (folder / "b.safetensors").unlink()
    edit(folder / "config.json", _attn_implementation="eager")
    with pytest.raises(ModelError, match="architecture") as caught:
        load(str(folder))
    assert str(caught.value).isprintable()
