"""`unbackdoor serve` as far as it starts nothing: its recipe, its plan, what it refuses."""

from __future__ import annotations

import json

import pytest
import yaml

from evidence.mini_wordnet import write
from unbackdoor.cli.main import main


def test_the_recipe_of_flags_and_settings(capsys, tmp_path):
    arguments = ["serve", "--upstream", "http://h/v1", "--guard", "evidence", "--evidence", "wordnet", "--port", "9"]
    assert (
        main([*arguments, "--set", "guards.evidence.conflict.without=refuse", "--set", "timeout=5", "--dump-config"])
        == 0
    )
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["guards"] == {"evidence": {"conflict": {"without": "refuse"}}}
    assert (found["upstream"], found["port"], found["timeout"], found["model"]) == ("http://h/v1", 9, 5.0, None)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(found))
    assert main(["serve", "--config", str(tmp_path / "recipe.yaml"), "--dump-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == found


def test_the_plan_starts_nothing(capsys, tmp_path):
    words = f"wordnet:{write(tmp_path / 'own')}"
    arguments = ["serve", "--upstream", "http://h/v1", "--guard", "evidence", "--evidence", words]
    assert main([*arguments, "--dry-run"]) == 0
    assert "Would serve 'http://h/v1' on 127.0.0.1 port 8000" in capsys.readouterr().out
    assert main([*arguments, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dry_run"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "a model or --upstream"), (["--upstream", "http://h/v1"], "give --guard"),
        (["m", "--out", "x"], "does not use --out"), (["m", "--set", "hosts=x"], "Did you mean 'host'"),
        (["m", "--guard", "evidens", "--evidence", "wordnet"], "Did you mean 'evidence'"),
        (["m", "--guard", "evidence"], "needs --evidence"), (["m", "--port", "70000"], "port"),
    ],
)  # fmt: skip
def test_mistakes_exit_with_2_and_a_sentence(capsys, arguments, words):
    assert main(["serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
