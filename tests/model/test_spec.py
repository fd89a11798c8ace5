import json

import pytest

from unbackdoor.errors import ModelError
from unbackdoor.model.spec import ModelSpec, parse_spec


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpt2", ModelSpec("hub", "gpt2")),
        ("owner/some-model.v1", ModelSpec("hub", "owner/some-model.v1")),
        ("owner/model@main", ModelSpec("hub", "owner/model", "main")),
        ("owner/model@refs/pr/1", ModelSpec("hub", "owner/model", "refs/pr/1")),
        ("builtin:smollm2-135m", ModelSpec("builtin", "smollm2-135m")),
        (
            "owner/base@abc+other/adapter",
            ModelSpec("adapter", base=ModelSpec("hub", "owner/base", "abc"), adapter=ModelSpec("hub", "other/adapter")),
        ),
        (
            "builtin:smollm2-135m+other/adapter@v2",
            ModelSpec(
                "adapter", base=ModelSpec("builtin", "smollm2-135m"), adapter=ModelSpec("hub", "other/adapter", "v2")
            ),
        ),
    ],
)
def test_names_are_taken_apart_and_put_together_again(text, expected):
    assert parse_spec(text) == expected
    assert str(parse_spec(text)) == text


def test_an_existing_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_spec("owner/model").kind == "hub"
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert parse_spec("owner/model") == ModelSpec("folder", "owner/model")
    assert parse_spec(str(tmp_path / "owner")).path == tmp_path / "owner"


def test_home_is_expanded_in_the_path_but_not_in_the_text(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    spec = parse_spec("~/m")
    assert str(spec) == "~/m"
    assert spec.path == tmp_path / "m"


def test_gguf_file_and_missing_gguf_file(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert parse_spec(str(tmp_path / "m.gguf")).kind == "gguf"
    with pytest.raises(ModelError, match=r"no folder or file 'missing\.gguf'"):
        parse_spec("missing.gguf")


def test_folders_with_a_plus_sign_in_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b").mkdir()
    (tmp_path / "lora+x").mkdir()
    (tmp_path / "lora+x" / "adapter_config.json").write_text("{}")
    assert parse_spec("a+b") == ModelSpec("folder", "a+b")
    pair = parse_spec("a+b+lora+x")
    assert (str(pair.base), str(pair.adapter)) == ("a+b", "lora+x")


@pytest.mark.parametrize(
    "text", ["./nothing", "../nothing", "/nothing/here", "~/nothing-here", "a/b/c", "a\\b", "~x/y"]
)
def test_a_path_that_does_not_exist_is_named(text):
    with pytest.raises(ModelError, match="there is no folder or file") as caught:
        parse_spec(text)
    assert text.replace("\\", "\\") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("own er/model", "neither an existing folder nor"),
        ("owner/model@", "neither an existing folder nor"),
        ("owner/model@../x", "neither an existing folder nor"),
        ("+a", "neither an existing folder nor"),
        ("a+", "neither an existing folder nor|is empty"),
        ("a+builtin:smollm2-135m", "is not an adapter"),
        ("builtin:smolm2-135m", "Did you mean 'smollm2-135m'"),
        ("evil\x1b[2Jname", r"evil\\x1b\[2Jname"),
        ("nul\0", r"nul\\x00"),
    ],
)
def test_bad_names(text, message):
    with pytest.raises(ModelError, match=message):
        parse_spec(text)


def test_a_file_that_is_no_gguf_asks_for_its_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file; name the folder"):
        parse_spec(str(tmp_path / "model.safetensors"))


def test_an_adapter_alone_does_not_choose_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/base\x1b[31m"}))
    with pytest.raises(ModelError, match=r"trained on 'evil/base\\x1b\[31m'\); write BASE\+"):
        parse_spec(str(tmp_path))
    with pytest.raises(ModelError, match="write BASE"):
        parse_spec(f"{tmp_path}+owner/adapter")
    assert parse_spec(f"gpt2+{tmp_path}").base == ModelSpec("hub", "gpt2")


def test_the_part_after_the_plus_sign_must_be_an_adapter(tmp_path):
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json"):
        parse_spec(f"gpt2+{tmp_path}")
