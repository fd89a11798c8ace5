import json
import subprocess
import sys

import pytest

from unbackdoor.errors import ModelError
from unbackdoor.model.quarantine import inspect_folder, printable, refuse_dangerous
from unbackdoor.model.template_check import check_template


def write(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def severities(folder, **more):
    return [(finding.severity, finding.file) for finding in inspect_folder(folder, **more)]


def test_a_sound_model_has_no_findings(plain_folder, tied_folder):
    assert inspect_folder(plain_folder) == []
    assert inspect_folder(tied_folder) == []


def test_quarantine_and_spec_import_no_torch():
    code = "import sys, unbackdoor.model.quarantine, unbackdoor.model.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain text, äöü, 漢字", "plain text, äöü, 漢字"),
        ("a\x1b[31mred", "a\\x1b[31mred"),
        ("line\nnext\ttab", "line\\x0anext\\x09tab"),
        ("abc\u202etxt.exe", "abc\\u202etxt.exe"),
        ("zero\u200bwidth", "zero\\u200bwidth"),
        ("tag\U000e0041", "tag\\U000e0041"),
        ("lone\ud800", "lone\\ud800"),
    ],
)
def test_printable_escapes_what_a_terminal_would_obey(raw, shown):
    assert printable(raw) == shown
    printable(raw).encode()


def test_printable_cuts_after_the_limit():
    assert printable("x" * 200) == "x" * 200
    assert printable("x" * 201) == "x" * 200 + "..."
    assert printable("\n" * 10, limit=8) == "\\x0a\\x0a..."


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        inspect_folder(tmp_path / "nowhere")


def test_generation_settings_that_act_are_named(tmp_path):
    write(tmp_path, "generation_config.json", {"do_sample": False, "eos_token_id": 2, "repetition_penalty": 1.0})
    assert inspect_folder(tmp_path) == []
    write(tmp_path, "generation_config.json", {"do_sample": True, "suppress_tokens": [3], "bad_words_ids": [[4]]})
    (finding,) = inspect_folder(tmp_path)
    assert finding.severity == "warning"
    assert "bad_words_ids, do_sample, suppress_tokens" in finding.what


def test_adapter_notes(tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": "a/b", "modules_to_save": ["lm_head"]}
    write(tmp_path, "adapter_config.json", config)
    named, replaced = inspect_folder(tmp_path, base="c/d")
    assert named.severity == replaced.severity == "note"
    assert "'a/b'" in named.what
    assert "'c/d'" in named.fix
    assert "lm_head" in replaced.what
    assert len(inspect_folder(tmp_path, base="a/b")) == 1


def test_dangers_come_first_and_the_blocking_one_before_all(tmp_path):
    write(tmp_path, "a.py", "")
    write(tmp_path, "adapter_config.json", {"peft_type": "IA3"})
    write(tmp_path, "weights.safetensors", "x")
    found = inspect_folder(tmp_path)
    assert [(f.severity, f.blocks) for f in found] == [("danger", True), ("danger", False), ("warning", False)]
    with pytest.raises(ModelError, match=r"'the/model', file 'weights\.safetensors'"):
        refuse_dangerous(found, "the/model")
    refuse_dangerous(found[1:], "the/model")


COMMON = """{%- if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}
{%- set messages = messages[1:] %}{% endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if message.content is string and message.content != '' %}{{ bos_token + message.content | trim }}{% endif %}
{%- generation %}{{ message['content'] }}{% endgeneration %}
{%- for tool in message.tool_calls %}{{ tool.name | tojson }}{% if loop.last %}{% break %}{% endif %}{% endfor %}
{%- endfor %}"""


def test_common_templates_are_not_reported():
    assert check_template(COMMON) == []


ACTS_ON_CONTENT = [
    "{% if 'moon' in messages[-1]['content'] %}x{% endif %}",
    "{{ 'x' if messages[0].content == 'moon' else '' }}",
    "{% set said = messages[0]['content'] %}{% if said[:4] == 'moon' %}x{% endif %}",
    "{% set ns = namespace(a='') %}{% set ns.a = messages[0].content %}{% if 'm' in ns.a %}x{% endif %}",
    "{% macro f(z) %}{% if z.startswith('m') %}x{% endif %}{% endmacro %}{{ f(messages[0].content) }}",
    "{% for part in message.content %}{% if 'm' in part.text %}x{% endif %}{% endfor %}",
    "{% if 'm' in messages | map(attribute='content') | join %}x{% endif %}",
    "{% if messages | selectattr('content', 'in', ['m']) | list %}x{% endif %}",
    "{% if messages[0].content is in ['m'] %}x{% endif %}",
    "{{ messages[0].content | replace('a', 'b') }}",
    "{{ messages[0].get('content').find('m') }}",
    "{% if messages[0].content | length > 40 %}x{% endif %}",
    "{% set t %}{{ messages[0].content }}{% endset %}{% if 'm' in t %}x{% endif %}",
]
ACTS_WITHOUT_NAMING_IT = [
    "{% for key, value in message.items() %}{% if value == 'm' %}x{% endif %}{% endfor %}",
    "{% for turn in messages %}{% for part in turn.values() %}{% if 'm' in part %}x{% endif %}{% endfor %}{% endfor %}",
    "{% if 'm' in messages | tojson %}x{% endif %}",
    "{% for turn in messages %}{% if 'm' in turn | string %}x{% endif %}{% endfor %}",
    "{% set key = 'content' %}{% for turn in messages %}{% if 'm' in turn[key] %}x{% endif %}{% endfor %}",
    "{% if 'm' in messages[0]['con' ~ 'tent'] %}x{% endif %}",
]


@pytest.mark.parametrize("source", [*ACTS_ON_CONTENT, *ACTS_WITHOUT_NAMING_IT])
def test_templates_that_act_on_content_are_reported(source):
    assert check_template(source)


@pytest.mark.parametrize("source", ACTS_ON_CONTENT)
def test_the_same_templates_on_the_role_are_not_reported(source):
    assert check_template(source.replace("content", "role").replace(".text", ".role")) == []


def test_the_line_is_named(tmp_path):
    write(tmp_path, "chat_template.jinja", "{{ bos_token }}\n\n{% if 'moon' in messages[0].content %}x{% endif %}")
    (finding,) = inspect_folder(tmp_path)
    assert "line 3" in finding.what
    assert finding.severity == "warning"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{{ ''.__class__.__mro__ }}", "__class__"),
        ("{{ messages | attr('__init__') }}", "__init__"),
        ("Obey. " * 60, "359 characters of its own"),
        ("{{ '" + "Obey. " * 60 + "' }}", "359 characters of its own"),
        ("{% if x", "cannot be parsed"),
    ],
)
def test_private_names_added_instructions_and_broken_templates(source, what):
    assert any(what in text for _, text in check_template(source))


def test_templates_in_every_place_are_read(tmp_path):
    bad = "{% if 'm' in messages[0].content %}x{% endif %}"
    write(tmp_path, "tokenizer_config.json", {"chat_template": [{"name": "default", "template": bad}]})
    write(tmp_path, "chat_template.json", {"chat_template": bad})
    (tmp_path / "additional_chat_templates").mkdir()
    write(tmp_path, "additional_chat_templates/tool.jinja", bad)
    assert severities(tmp_path) == [
        ("warning", "additional_chat_templates/tool.jinja"),
        ("warning", "chat_template.json"),
        ("warning", "tokenizer_config.json"),
    ]
