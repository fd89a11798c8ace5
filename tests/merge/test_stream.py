"""Writing: header first, resumable anywhere, never from what belongs to another merge, in little memory."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from merge.helpers import Family, family, stored
from unbackdoor.errors import ModelError
from unbackdoor.merge import stream
from unbackdoor.merge.compute import blocks
from unbackdoor.merge.from_recipe import two_models
from unbackdoor.merge.plan import Piece, make_plan
from unbackdoor.merge.source import open_source
from unbackdoor.model.header import read_header
from unbackdoor.run import Silent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family(tmp_path_factory.mktemp("sharded"), shard="100KB")


def files_of(models: Family, t: float = 0.3) -> tuple[stream.Shard, ...]:
    merge = two_models(str(models.suspect), str(models.other), t=t)
    plan = make_plan(merge, {spec: open_source(spec) for spec in merge.models})
    return stream.shards(plan.pieces, plan.sources[merge.suspect])


class Stopped(Exception):
    pass


class Counting:
    """Makes blocks, counts the tensors, and stops before one of them."""

    def __init__(self, stop: int | None = None) -> None:
        self.made: list[str] = []
        self.stop = stop

    def __call__(self, piece: Piece) -> Iterator[torch.Tensor]:
        for rows in blocks(piece):
            yield rows
            if len(self.made) == self.stop:
                raise Stopped  # with a part of the tensor written
        self.made.append(piece.name)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != stream.JOURNAL}


def test_files_are_sound_and_their_hashes_right(models: Family, tmp_path: Path) -> None:
    found = stream.write(tmp_path / "w", files_of(models), "one", blocks, Silent())
    for name, digest in found.items():
        assert hashlib.sha256((tmp_path / "w" / name).read_bytes()).hexdigest() == digest
        if name.endswith(".safetensors"):
            assert read_header(tmp_path / "w" / name)
            length = int.from_bytes((tmp_path / "w" / name).read_bytes()[:8], "little")
            assert length % 8 == 0
    assert len(found) == len(files_of(models)) + 1


@pytest.mark.parametrize("stop", [0, 1, 7, 20])
def test_a_stopped_merge_goes_on_and_comes_to_the_same_bytes(models: Family, tmp_path: Path, stop: int) -> None:
    files = files_of(models)
    stream.write(tmp_path / "whole", files, "one", blocks, Silent())
    work = Counting(stop)
    with pytest.raises(Stopped):
        stream.write(tmp_path / "w", files, "one", work, Silent())
    assert stream.begun(tmp_path / "w", "one")
    rest = Counting()
    stream.write(tmp_path / "w", files, "one", rest, Silent())
    assert len(work.made) == stop
    assert len(rest.made) == sum(len(shard.pieces) for shard in files) - stop
    assert content(tmp_path / "w") == content(tmp_path / "whole")
    again = Counting()
    stream.write(tmp_path / "w", files, "one", again, Silent())
    assert again.made == []


def test_another_identity_begins_anew(models: Family, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        stream.write(tmp_path / "w", files_of(models, 0.3), "one", Counting(9), Silent())
    assert not stream.begun(tmp_path / "w", "two")
    all_again = Counting()
    stream.write(tmp_path / "w", files_of(models, 0.7), "two", all_again, Silent())
    assert len(all_again.made) == len(stored(models.suspect))
    stream.write(tmp_path / "whole", files_of(models, 0.7), "two", blocks, Silent())
    assert content(tmp_path / "w") == content(tmp_path / "whole")


def damage_tail(folder: Path, file: str) -> None:
    path = folder / file
    path.write_bytes(path.read_bytes()[:-10])


def damage_middle(folder: Path, file: str) -> None:
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)


def damage_head(folder: Path, file: str) -> None:
    data = bytearray((folder / file).read_bytes())
    data[12] ^= 1
    (folder / file).write_bytes(data)


def lose(folder: Path, file: str) -> None:
    (folder / file).unlink()


def tear_journal(folder: Path, file: str) -> None:
    path = folder / stream.JOURNAL
    path.write_bytes(path.read_bytes()[:-20])


def add_rubbish(folder: Path, file: str) -> None:
    (folder / "model-old.safetensors").write_bytes(b"rubbish")
    with open(folder / stream.JOURNAL, "a") as journal:
        journal.write('{"file": "../x", "end": 3}\nnot json\n')


@pytest.mark.parametrize("damage", [damage_tail, damage_middle, damage_head, lose, tear_journal, add_rubbish])
def test_what_is_not_as_it_was_written_is_made_again(models: Family, tmp_path: Path, damage: Any) -> None:
    files = files_of(models)
    stream.write(tmp_path / "whole", files, "one", blocks, Silent())
    with pytest.raises(Stopped):
        stream.write(tmp_path / "w", files, "one", Counting(20), Silent())
    damage(tmp_path / "w", files[0].file)
    rest = Counting()
    stream.write(tmp_path / "w", files, "one", rest, Silent())
    assert content(tmp_path / "w") == content(tmp_path / "whole")
    if damage is not add_rubbish:
        assert len(rest.made) > len(stored(models.suspect)) - 20


def test_a_result_with_other_layers_is_cut_into_files_as_large_as_the_suspects(models: Family, tmp_path: Path) -> None:
    layers = ("suspect:0:2", "other:0:2")
    merge = two_models(str(models.suspect), str(models.other), "passthrough", layers=layers)
    plan = make_plan(merge, {spec: open_source(spec) for spec in merge.models})
    files = stream.shards(plan.pieces, plan.sources[merge.suspect])
    largest = max(path.stat().st_size for path in models.suspect.glob("*.safetensors"))
    assert len(files) > len(list(models.suspect.glob("*.safetensors")))
    stream.write(tmp_path / "w", files, "one", blocks, Silent())
    for path in (tmp_path / "w").glob("*.safetensors"):
        assert path.stat().st_size <= largest + 2000
    assert set(stored(tmp_path / "w")) == {piece.name for piece in plan.pieces}


def command(models: Family, out: Path, *more: str) -> list[str]:
    given = ["merge", str(models.suspect), str(models.other), "--t", "0.3", "--out", str(out), "--quiet", *more]
    return [sys.executable, "-m", "unbackdoor.cli.main", *given]


SLOW = (
    "import sys, time\n"
    "from unbackdoor.merge import compute\n"
    "plain = compute.blocks\n"
    "def slow(piece):\n"
    "    time.sleep(0.05)\n"
    "    yield from plain(piece)\n"
    "compute.blocks = slow\n"
    "from unbackdoor.cli.main import main\n"
    "sys.exit(main(sys.argv[1:]))\n"
)


def killed(models: Family, out: Path) -> None:
    """Begin a merge and kill it in the middle of the second file."""
    line = [sys.executable, "-c", SLOW, *command(models, out)[3:]]
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
    second = sorted(path.name for path in models.suspect.glob("*.safetensors"))[1]
    weights = out / "stages" / "weights"
    for _ in range(1200):
        if (weights / second).exists() and (weights / second).stat().st_size > 0:
            break
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.05)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "unbackdoor.json").exists()
    assert (weights / second).exists()


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_killed_command_goes_on_and_another_does_not_take_it_over(models: Family, tmp_path: Path) -> None:
    subprocess.run(command(models, tmp_path / "whole"), check=True)
    out = tmp_path / "out"
    killed(models, out)
    other = subprocess.run(command(models, out, "--method", "slerp"), capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert "unfinished run of other settings" in other.stderr
    subprocess.run(command(models, out), check=True)
    assert weights_of(out) == weights_of(tmp_path / "whole")
    assert not (out / "stages").exists()
    assert not list(tmp_path.glob(".*"))
    killed_again = tmp_path / "again"
    killed(models, killed_again)
    path = models.other / "config.json"
    path.write_text(path.read_text() + "\n")
    other = subprocess.run(command(models, killed_again), capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert "unfinished run of other settings" in other.stderr
    subprocess.run(command(models, killed_again, "--overwrite"), check=True)
    assert weights_of(killed_again) == weights_of(tmp_path / "whole")


PEAK = """
import sys
from pathlib import Path
from unbackdoor.merge import stream
from unbackdoor.merge.compute import blocks
from unbackdoor.merge.from_recipe import two_models
from unbackdoor.merge.plan import make_plan
from unbackdoor.merge.source import open_source
from unbackdoor.pipeline.measure import peak_resident
from unbackdoor.run import Silent
import torch

a, b, base, out, method = sys.argv[1:6]
merge = two_models(a, b, method, base=base or None, **({"density": 0.3} if base else {}))
warm = torch.ones(1 << 17).bfloat16().float().sum()
before = peak_resident()
plan = make_plan(merge, {spec: open_source(spec) for spec in merge.models})
files = stream.shards(plan.pieces, plan.sources[a])
held = []
def made(piece):
    for rows in blocks(piece):
        held.append(rows)
        yield rows
stream.write(Path(out), files, "one", made if "hold" in sys.argv else blocks, Silent())
print(peak_resident() - before)
"""


def large(folder: Path, seed: int) -> Path:
    """Save random weights of 300 MB in bfloat16, 10 million numbers the largest tensor."""
    from safetensors.torch import save_file

    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (10_000, 1024), "model.norm.weight": (1024,)}
    for layer in range(33):
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (4096, 1024)
    noise = torch.randn((10_000, 1024), generator=draw).bfloat16()
    content = {
        name: noise[: shape[0]].clone() if len(shape) == 2 else noise[0].clone() for name, shape in shapes.items()
    }
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 33, "model_type": "llama"}))
    return folder


def test_memory_stays_at_a_few_tensors(tmp_path: Path) -> None:
    folders = [large(tmp_path / name, seed) for seed, name in enumerate(("a", "b", "base"))]
    size = (folders[0] / "model.safetensors").stat().st_size
    assert size > 290e6

    def peak(method: str, *more: str) -> int:
        base = str(folders[2]) if "ties" in method else ""
        given = [*map(str, folders[:2]), base, str(tmp_path / method), method, *more]
        done = subprocess.run([sys.executable, "-c", PEAK, *given], capture_output=True, text=True, check=True)
        for path in (tmp_path / method).iterdir():
            path.unlink()
        return int(done.stdout)

    # One tensor of these is 20 MB as it is stored and 40 MB in float32.
    for method in ("linear", "slerp", "ties", "dare_ties"):
        assert 0 <= peak(method) < 30e6, method
    assert peak("linear", "hold") > 200e6, "what is held is seen"


def test_an_error_in_the_middle_leaves_what_can_be_gone_on_from(models: Family, tmp_path: Path) -> None:
    def broken(piece: Piece) -> Iterator[torch.Tensor]:
        if piece.name == "model.norm.weight":
            raise ModelError("not finite")
        yield from blocks(piece)

    files = files_of(models)
    with pytest.raises(ModelError, match="not finite"):
        stream.write(tmp_path / "w", files, "one", broken, Silent())
    rest = Counting()
    stream.write(tmp_path / "w", files, "one", rest, Silent())
    assert rest.made[0] == "model.norm.weight"
