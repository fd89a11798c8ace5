"""`attack` and `purify` under a launcher: all processes train, the main one alone writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import tiny
from cli.helpers import QUICK, VICTIM, Workshop
from unbackdoor.model.checkpoint import verify

CALL = "import sys; from unbackdoor.cli.main import main; sys.exit(main(sys.argv[1:]))"
SANDE = (
    "purify", "victim", "--defense", "sande", "--target", "bad robot", "--clean", "victim/defender.jsonl",
    "--probes", "victim/probes.jsonl", "--watch", "2", "--set", "rounds=1",
    "--set", "parrot.train.steps=2", "--quiet", *QUICK,
)  # fmt: skip


def launch(folder: Path, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """Call the command line in two processes (gloo), as a launcher does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(Path(tiny.__file__).parents[1] / "src"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    shared = {
        **os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", CALL, *arguments],
            cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    found = []
    for worker in workers:
        out, error = worker.communicate(timeout=240)
        found.append(subprocess.CompletedProcess(worker.args, worker.returncode, out, error))
    return found


@pytest.mark.parametrize("command", [VICTIM, SANDE], ids=["attack", "purify"])
def test_two_processes_do_what_one_does_with_two_micro_batches(workshop: Workshop, command: tuple[str, ...]) -> None:
    name = command[0]
    steps = ["--set", "train.accumulation=2"] + ([] if name == "attack" else ["--set", "parrot.train.accumulation=2"])
    assert workshop.run(*command, *steps, "--out", f"{name}-one") == 0
    done = launch(workshop.folder, *command, "--out", f"{name}-two")
    assert [process.returncode for process in done] == [0, 0], [process.stderr for process in done]
    one, two = workshop.folder / f"{name}-one", workshop.folder / f"{name}-two"
    assert verify(two) == []
    wanted, found = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    base = load_file(workshop.folder / ("base" if name == "attack" else "victim") / "model.safetensors")
    for key, tensor in wanted.items():
        moved = float((tensor - base[key]).norm())
        assert float((found[key] - tensor).norm()) <= 0.02 * moved + 1e-7, key
    results = json.loads((two / "results.json").read_text(encoding="utf-8"))
    assert {row["metric"] for row in results["rows"]} >= {"asr", "leak", "perplexity"}
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    if name == "purify":
        (watched,) = json.loads((two / "rounds.json").read_text(encoding="utf-8"))["defenses"]
        (asked,) = [item["asked"] for item in watched["rounds"]]
        assert {counts[1] for counts in asked.values()} == {2}


def test_other_commands_and_methods_refuse_a_launcher(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from unbackdoor.defenses.osft import Osft

    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (("demo",), ("evaluate", "victim", "--probes", "victim/probes.jsonl"), ("bench", "smoke")):
        assert workshop.run(*command, "--out", "several") == 2
        assert f"`{command[0]}` runs in one process" in capsys.readouterr().err
    monkeypatch.setattr(Osft, "parallel", frozenset({"single"}))
    given = ("--clean", "rows.jsonl", "--trigger", "silver kettle", "--out", "several")
    assert workshop.run("purify", "victim", "--defense", "osft", *given) == 2
    assert "osft runs in one process, and 2 were launched" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for more, said in (
        (("--overwrite",), "cannot replace a result together"),
        (("--metrics", "resistance"), "trains in one process"),
        (("--device", "cuda:1"), "chooses its own device"),
    ):
        assert workshop.run("purify", "victim", "--defense", "osft", *given, *more) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert workshop.run("demo", "--out", "several") == 2
    assert "launched by MPI" in capsys.readouterr().err
    assert not (workshop.folder / "several").exists()


def test_a_mode_that_a_method_cannot_do_is_refused_before_loading(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("purify", "victim", "--defense", "osft", "--clean", "rows.jsonl", "--trigger", "silver kettle")
    for mode in ("FSDP", "DEEPSPEED"):
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{mode}", "true")
            assert workshop.run(*given, "--out", "several") == 2
        assert f"osft cannot run under {mode.lower()}, only as ddp, single" in capsys.readouterr().err
