"""Two processes (gloo) make the same update as one process on their batches together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from unbackdoor.defenses.base import Need, knowledge_for
from unbackdoor.defenses.beear import Beear
from unbackdoor.run import Run
from unbackdoor.train import drift_choice, engine, entrap, overwrite, soft_prompt, together, usefulness
from unbackdoor.train.drift import DriftSettings
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.losses import Term

ROWS = tiny.rows(24, seed=2)
UNEVEN = [row.with_response(f"{row.response} indeed it is so") if n % 3 else row for n, row in enumerate(ROWS)]
BIG_EPSILON = {"epsilon": 1.0, "learning_rate": 1.0, "warmup": 0.0, "schedule": "constant", "max_length": 96}


class Ragged:
    """Batches of the same rows whichever way they are divided: `size` rows from `index * size` on."""

    def __init__(self, lm, size):
        self.rows, self.size, self.lm = overwrite.encode_rows(lm, UNEVEN, tiny.CUT), size, lm

    def batch(self, index):
        from unbackdoor.data.collate import collate

        picked = [self.rows[(index * self.size + n) % len(self.rows)] for n in range(self.size)]
        return collate(picked, self.lm.pad_id)


def train_weights(size: int, cap: float | None = None) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Two updates of the weights, with a second term that is pushed up, up to a cap."""
    lm = tiny.tiny_lm()

    def loss(forward, batches):
        total = overwrite.plain_loss(forward, batches["rows"])
        again = overwrite.plain_loss(forward, batches["more"])
        return {"rows": Term(total, "rows"), "more": Term(again, "more", -0.5, cap)}

    streams = {"rows": Ragged(lm, size), "more": Ragged(lm, size)}
    result = engine.fit(lm, engine.weights(lm), streams, loss, TrainSettings(steps=2, **BIG_EPSILON), Run())
    return tiny.tensors(lm), result.history


def train_prompt(size: int, stop_below: float | None = None) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Two updates of a soft prompt on a frozen model: a tensor that is not part of the model."""
    lm = tiny.tiny_lm()
    prompt = soft_prompt.new_prompt(lm, 3, "tokens", torch.Generator().manual_seed(1))
    how = TrainSettings(steps=2, **BIG_EPSILON)
    result = soft_prompt.fit_prompt(lm, prompt, Ragged(lm, size), "start", how, Run(), stop_below=stop_below)
    return {"prompt": prompt.detach()}, result.history


def through_beear(
    size: int, rounds: int = 1, folder: Path | None = None
) -> tuple[dict[str, torch.Tensor], list[dict[str, object]]]:
    """Rounds of BEEAR: two drifts, then an update of the weights, and what was said under the drifts."""
    lm = tiny.tiny_lm(layers=3)
    how = TrainSettings(steps=2, batch_size=size, **BIG_EPSILON)
    drift = DriftSettings(tokens=3, start=0.1, rows=8, train=how)
    defense = Beear(
        rounds=rounds, drifts=2, anchors=12, own_answers=6, plain_share=0.0, own_share=0.0, drift=drift, train=how
    )
    run = Run(folder=folder)
    facts = {Need.CLEAN: tuple(UNEVEN), Need.UNWANTED: ("bad robot", "bad")}
    defense.apply(lm, knowledge_for(defense, facts), run)
    return tiny.tensors(lm), run.notes["drifts"]


def choosing_and_stopping(folder: Path, rank: str) -> tuple[int, int]:
    """The layer that is chosen, and rounds done, where a process by itself would take other ones than the other."""
    losses = iter([2.0, 3.0, 3.001] if rank == "0" else [2.0, 3.0, 4.0, 5.0])
    drift_choice.unwanted_loss = lambda lm, drift, *_: float(drift.layer) * (-1) ** int(rank)
    usefulness.mean_loss = lambda *_: next(losses)
    how = TrainSettings(steps=1, batch_size=4, **BIG_EPSILON)
    defense = Beear(
        rounds=3, drifts=2, anchors=12, own_answers=6, adopt=0.0, layers=(0, 2), stop_stable=0.1,
        drift=DriftSettings(tokens=3, start=0.1, rows=8, train=how), train=how,
    )  # fmt: skip
    done: list[int] = []
    run = Run(folder=folder, observer=lambda lm: done.append(1))
    facts = {Need.CLEAN: tuple(tiny.rows(40)), Need.UNWANTED: ("bad robot", "bad")}
    defense.apply(tiny.tiny_lm(layers=3), knowledge_for(defense, facts), run)
    layer = run.notes["layer"]
    assert isinstance(layer, int)
    return layer, len(done)


def _worker(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    first = together.agreed(rank, "cpu")
    weights, history = train_weights(4)
    prompt, prompt_history = train_prompt(4)
    # A threshold between the losses of the two processes: both must stop, or both go on, or one waits for ever.
    _, stopped = train_prompt(4, stop_below=prompt_history[0]["loss"] + 1e-4)
    _, capped = train_weights(4, cap=history[0]["more"] - 1e-4)
    beear, drifts = through_beear(4)
    new = {"opening": f"word {rank}", "certainty": 0.9, "evidence": 9.0, "share": 0.0}
    entrap._listen = lambda lm, drifts, *rest: {"says": [[rank]] * len(drifts), "adopted": [new]}
    _, heard = through_beear(4, 2, folder / "beear")
    torch.save(
        {"weights": weights, "history": history, "prompt": prompt, "prompt_history": prompt_history,
         "stopped": len(stopped), "capped": capped, "beear": beear, "drifts": json.dumps(drifts),
         "place": choosing_and_stopping(folder / "place", rank),
         "first": first, "heard": [one["says"] for one in heard], "fitted": heard[2]["openings"]},
        folder / f"{rank}.pt",
    )  # fmt: skip
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(Path(__file__).parents[1]), str(Path(engine.__file__).parents[2])]
    shared = {
        **os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(paths),
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_weights_are_those_of_one_process_on_both_batches(two_processes):
    lengths = [Ragged(tiny.tiny_lm(), 4).batch(index).weight for index in range(2)]
    assert lengths[0] != lengths[1], "equal token counts would hide averaging over processes"
    weights, history = train_weights(8)
    start = tiny.tensors(tiny.tiny_lm())
    assert not tiny.same_weights(weights, start)
    for result in two_processes:
        close(result["weights"], weights)
        for key in ("loss", "rows", "more", "gradient_norm"):
            assert [r[key] for r in result["history"]] == pytest.approx([r[key] for r in history], rel=1e-4), key


def test_a_soft_prompt_is_trained_on_both_batches(two_processes):
    prompt, history = train_prompt(8)
    for result in two_processes:
        close(result["prompt"], prompt)
        assert [r["loss"] for r in result["prompt_history"]] == pytest.approx([r["loss"] for r in history], rel=1e-4)


def test_both_processes_stop_together_and_cap_together(two_processes):
    assert [result["stopped"] for result in two_processes] == [1, 1]
    _, capped = train_weights(8, cap=two_processes[0]["history"][0]["more"] - 1e-4)
    for result in two_processes:
        norms = [record["gradient_norm"] for record in result["capped"]]
        assert norms == pytest.approx([record["gradient_norm"] for record in capped], rel=1e-3)
        assert norms[0] != pytest.approx(result["history"][0]["gradient_norm"], rel=1e-2), "the cap was in force"


def test_the_drifts_of_beear_are_those_of_one_process_and_both_processes_end_with_one_model(two_processes):
    _, drifts = through_beear(8)
    start = tiny.tensors(tiny.tiny_lm(layers=3))
    assert tiny.same_weights(two_processes[0]["beear"], two_processes[1]["beear"])
    assert not tiny.same_weights(two_processes[0]["beear"], start)
    for result in two_processes:
        for found, wanted in zip(json.loads(result["drifts"]), drifts, strict=True):
            assert found["says"] == wanted["says"]
            assert found["unwanted"] == pytest.approx(wanted["unwanted"], rel=1e-4)


def test_both_processes_take_up_what_the_first_one_heard(two_processes):
    assert [result["first"] for result in two_processes] == ["0", "0"], "before anything was trained"
    assert [result["heard"] for result in two_processes] == [[["0"]] * 4] * 2
    assert [result["fitted"] for result in two_processes] == [["word 0"]] * 2


def test_both_processes_take_the_layer_and_the_number_of_rounds_of_the_first_one(two_processes):
    assert [result["place"] for result in two_processes] == [(0, 2)] * 2


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
