"""The surface of the command line: its options (few, frozen), its quickness, its help, its lists."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from unbackdoor.cli.failing import parse_fail_on
from unbackdoor.cli.main import app, main
from unbackdoor.cli.options import COMMON_FLAGS
from unbackdoor.errors import UserError

KNOWLEDGE = {
    "--clean", "--trigger", "--trigger-place", "--target", "--target-part", "--unwanted", "--safe", "--reference",
    "--evidence", "--preferences",
}  # fmt: skip
OWN = {
    "demo": {"--track"},
    "attack": {
        "--model", "--data", "--trigger", "--trigger-place", "--target", "--target-form", "--poisoned", "--goal",
        "--probes-count", "--metrics", "--second-source", "--track", "--requests", "--test-kinds",
    },
    "purify": {
        "--defense", *KNOWLEDGE, "--probes", "--goal", "--metrics", "--second-source", "--adapter-mode", "--lora",
        "--track", "--watch",
    },
    "evaluate": {"--before", "--probes", "--metrics", "--data", "--second-source", "--goal", "--evidence"},
    "merge": {"--method", "--t", "--base", "--layers"},
    "bench": {"--size", "--only", "--retry-failed"},
    "inspect": set(),
    "serve": {"--upstream", "--guard", "--evidence", "--host", "--port"},
    "list": set(),
    "explain": set(),
    "report": set(),
}  # fmt: skip


def test_the_options_are_these_and_no_others() -> None:
    """A new option belongs into a recipe; one that must be a flag is added here with intent."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == set(OWN)
    for name, command in commands.items():
        flags = {flag for item in command.params for flag in item.opts if flag.startswith("--")}
        assert flags - {"--help"} == OWN[name] | set(COMMON_FLAGS), name
    assert set(COMMON_FLAGS) == {
        "--config", "--dump-config", "--set", "--preset", "--seed", "--json", "--quiet", "--dry-run", "--out",
        "--overwrite", "--device", "--template", "--fail-on",
    }  # fmt: skip


def test_help_and_list_import_no_torch_and_are_quick() -> None:
    code = (
        "import sys; from unbackdoor.cli.main import main; codes = [main(['--help']), main(['list'])];"
        "assert codes == [0, 0], codes; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "sande" in done.stdout
    # Processor time, because the machine may be busy with other things; with torch it would be several seconds.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.5


def test_list_gives_first_lines_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"name": "osft", "what": "OSFT: overwrite supervised fine-tuning, for a trigger that is known."} in found[
        "defenses"
    ]
    assert {"name": "sande --preset paper", "what": "of the defense"} in found["presets"]
    assert main(["list", "metrics"]) == 0
    assert "osft" not in capsys.readouterr().out


def test_explain_names_needs_as_flags_and_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "osft", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["needs"] == ["--clean", "--trigger"]
    assert "Equation 3" in found["text"]
    assert "2405.07667" in found["paper"]
    fields = {field["name"]: field for field in found["fields"]}
    assert fields["plain_share"]["default"] == 0.25
    assert fields["train.steps"]["default"] == 30
    assert all(field["description"] for field in found["fields"])
    assert found["presets"]["paper"]["plain_share"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["purify", "m", "--defens", "sande"], "--defense"),
        (["purfy"], "Did you mean 'purify'"),
        (["list", "--preset", "paper"], "does not use --preset"),
        (["explain", "sandy"], "Did you mean 'sande'"),
        (["purify", "base", "--defense", "sandy"], "Did you mean 'sande'"),
        (["purify", "base"], "--defense"),
        (["purify", "base", "--defense", "osft", "--set", "train.step=3"], "Did you mean 'train.steps'"),
        (["purify", "base", "--defense", "osft", "--set", "plain_share=2"], "plain_share"),
        (["purify", "base", "--defense", "osft", "--set", "plain_share"], "key=value"),
        (["purify", "base", "--defense", "osft", "--preset", "papier"], "Did you mean 'paper'"),
        (["purify", "base", "--defense", "osft", "--fail-on", "asr is big"], "asr>0.05"),
        (["purify", "base", "--defense", "osft", "--fail-on", "as>0.1"], "Did you mean 'asr'"),
        (["purify", "base", "--defense", "osft", "--config", "no.yaml"], "no.yaml"),
        (["purify", "base", "--defense", "osft", "--seed", "few"], "--seed"),
        (["attack", "data_poisoning", "--trigger", "a", "--trigger-place", "both_ends"], "--trigger twice"),
        (["attack", "data_poisoning", "--goal", "hears:x", "--model", "m", "--data", "d"], "unknown goal"),
        (["report"], "RUN"),
        (["explain"], "give it as NAME"),
        (["attack", "data_poisoning", "--data", "d"], "give it as --model"),
        (["attack", "nope", "--model", "t"], "no attack called 'nope'"),
        (["list", "\udcff"], "the argument '\\udcff' is not UTF-8"),
        (["purify", "base", "--defense", "osft", "--fail-on", "asr>1e999"], "no finite number"),
        (["purify", "base", "--defense", "osft", "--fail-on", "kl<-1e999"], "no finite number"),
        (["purify", "base", "--defense", "osft", "--fail-on", "asr>5"], "write asr>0.05 or asr>5%"),
        (["purify", "base", "--defense", "osft", "--fail-on", "leak.decoy>=101%"], "write leak>=0.05 or leak>=5%"),
        (
            ["purify", "base", "--defense", "osft", "--set", "a=2026-13-45"],
            "is not YAML ('2026-13-45' is no timestamp)",
        ),
        (["purify", "base", "--defense", "osft", "--set", "a=!!int abc"], "is not YAML ('abc' is no int)"),
        (["purify", "base", "--defense", "osft", "--set", "a={[1]: 2}"], "is not YAML"),
        (["purify", "base", "--defense", "osft", "--set", "a=" + "[" * 3000], "is not YAML (it is nested too deeply)"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
    assert "Traceback" not in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nseed: 2\n", "recipe.yaml, line 2: is not YAML (the key 'seed' is there twice)"),
        ("seed: !!float x\n", "recipe.yaml, line 1: is not YAML ('x' is no float)"),
        ("? [seed]\n: 1\n", "recipe.yaml, line 1: is not YAML"),
        ("seed: \0\n", "recipe.yaml: is not YAML"),
        ("[" * 3000, "recipe.yaml: is not YAML (it is nested too deeply)"),
    ],
)
def test_a_recipe_that_is_not_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["purify", "--config", str(tmp_path / "recipe.yaml")]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_an_output_that_cannot_be_written(tmp_path: Path, more: list[str]) -> None:
    """A full disk is said without talk of checkpoints; that `head` stops reading is no error, and no finding."""
    command = [sys.executable, "-m", "unbackdoor.cli.main", "list", *more]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the output cannot be written, because the disk is full" in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    command[3:] = ["inspect", str(tmp_path), *more]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 2


def test_explain_says_of_what_kind_somebodys_own_method_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "mine.py"
    own.write_text(
        '"""Ask nothing."""\n\nfrom unbackdoor.metrics.base import Metric\n\n\n'
        "class Mine(Metric):\n    better = 'lower'\n\n    def measure(self, subject, run):\n        return []\n"
    )
    assert main(["explain", str(own)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("mine (metric)\n\nAsk nothing.")
    assert "Settings, in Python:" in said
    assert "--set" not in said
    own.write_text("from unbackdoor.method import Method\n\n\nclass Mine(Method):\n    pass\n")
    assert main(["explain", str(own)]) == 2
    assert "derive it from one of them" in capsys.readouterr().err


def test_fail_on_reads_sign_kind_and_per_cent() -> None:
    who = {"model": "m", "attack": "phrase", "defense": "osft", "seed": 3, "stage": "after"}
    row = {"metric": "leak", "group": "", "role": "purified", **who}
    rows = [{**row, "kind": "all", "value": 0.01}, {**row, "kind": "decoy", "value": 0.03}]
    suspect = {**row, "role": "suspect", "kind": "all", "value": 0.9}
    assert parse_fail_on("leak>0.02").missed([*rows, suspect]) == []
    assert len(parse_fail_on("leak.decoy > 2%").missed([*rows, suspect])) == 1
    (said,) = parse_fail_on("leak<=0.01").missed(rows)
    assert "leak of 'm' (phrase, after osft, seed 3) is 0.01" in said
    revived = {**row, "stage": "revived_planted", "kind": "all", "value": 0.9}
    assert parse_fail_on("leak>0.02").missed([*rows, revived]) == []
    assert len(parse_fail_on("leak>0.02").missed([suspect])) == 1
    with pytest.raises(UserError, match="was not measured"):
        parse_fail_on("asr>0").missed(rows)
