"""Finding methods by name, by file and through entry points, without importing the others."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from unbackdoor import registry
from unbackdoor.errors import UserError


def test_names_are_the_files():
    assert {"data_poisoning"} <= set(registry.names("attacks"))
    assert {"fine_tuning", "gradient_ascent", "osft", "sande", "sande_p"} <= set(registry.names("defenses"))
    assert {"asr", "cda", "kl", "leak", "perplexity", "resistance"} <= set(registry.names("metrics"))
    assert "base" not in registry.names("defenses")
    assert registry.names("metrics") == sorted(registry.names("metrics"))


def test_listing_imports_no_method_and_no_torch():
    code = (
        "import sys; from unbackdoor import registry; [registry.names(k) for k in registry.KINDS];"
        "print([m for m in sys.modules if m == 'torch' or m.startswith('unbackdoor.defenses')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["sande_p", "sande-p", "SANDE-P"])
def test_a_name_in_any_spelling(name):
    from unbackdoor.defenses.sande_p import SandeP

    assert registry.find("defenses", name) is SandeP


def test_a_typing_mistake_gets_a_hint():
    with pytest.raises(UserError, match=r"no defense called 'sandy'\. Did you mean 'sande'\?"):
        registry.find("defenses", "sandy")


MINE = """
from unbackdoor.defenses.base import Defense, Knowledge, Need
class Mine(Defense):
    needs = frozenset()
    def apply(self, victim, known, run):
        return victim
"""


def test_a_method_from_a_file(tmp_path):
    path = tmp_path / "mine_from_file.py"
    path.write_text(MINE)
    found = registry.find("defenses", str(path))
    assert (found.__name__, found.name()) == ("Mine", "mine_from_file")


@pytest.mark.parametrize(
    ("text", "message"),
    [("x = 1", "exactly one method class; it defines 0"), (MINE + MINE.replace("Mine", "Other"), "it defines 2")],
)
def test_a_file_must_define_one_method(tmp_path, text, message):
    path = tmp_path / "wrong_file.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        registry.find("defenses", str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "x = 1\ndef f(:\n",
            r"wrong_file\.py', line 2 cannot be imported \(SyntaxError: invalid syntax\); mend the file",
        ),
        (
            "\nimport nowhere_at_all",
            r"wrong_file\.py', line 2 cannot be imported \(ModuleNotFoundError: No module named",
        ),
        ("x = int('z')", r"wrong_file\.py', line 1 cannot be imported \(ValueError: invalid literal"),
        ("raise SystemExit(0)", r"wrong_file\.py', line 1 cannot be imported \(SystemExit: 0\)"),
    ],
)
def test_a_file_with_a_mistake_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "wrong_file.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        registry.find("defenses", str(path))
    assert "unbackdoor_method_files.wrong_file" not in sys.modules


def test_a_missing_file():
    with pytest.raises(UserError, match=r"there is no file 'nowhere/x\.py'"):
        registry.find("defenses", "nowhere/x.py")


def test_a_plug_in_is_listed_and_found(tmp_path, monkeypatch):
    (tmp_path / "plugged_package.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    good = EntryPoint("plugged", "plugged_package:Mine", "unbackdoor.defenses")
    bad = EntryPoint("broken", "plugged_package:Need", "unbackdoor.defenses")
    monkeypatch.setattr(registry, "_plugged", lambda kind: (good, bad) if kind == "defenses" else ())
    assert {"plugged", "sande"} <= set(registry.names("defenses"))
    assert "plugged" not in registry.names("metrics")
    assert registry.find("defenses", "plugged").__name__ == "Mine"
    with pytest.raises(UserError, match=r"'broken' \(plugged_package:Need\) is not a Method class"):
        registry.find("defenses", "broken")


def test_a_plug_in_cannot_take_the_name_of_a_method_of_ours(tmp_path, monkeypatch):
    from unbackdoor.defenses.sande import Sande

    (tmp_path / "shadowing_package.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = EntryPoint("sande", "shadowing_package:Mine", "unbackdoor.defenses")
    monkeypatch.setattr(registry, "_plugged", lambda kind: (entry,))
    assert registry.find("defenses", "sande") is Sande


def test_a_methods_file_does_not_replace_a_module_of_its_name(tmp_path):
    import json

    (tmp_path / "json.py").write_text(MINE)
    found = registry.find("defenses", str(tmp_path / "json.py"))
    assert found.name() == "json"
    assert sys.modules["json"] is json
