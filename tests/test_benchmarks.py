"""The benchmarks compare equal results, and would notice unequal ones. Times are not judged here."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
TINY = ["--model", "config:tiny", "--repeats", "1", "--no-memory", "--json"]
SMALL = {
    "training_step": ["--batch", "3", "--prompt", "12", "--response", "6"],
    "parrot_step": ["--batch", "3", "--prompt", "12", "--response", "6", "--target", "2", "--parrot", "4"],
    "drift_step": [
        "--batch",
        "3",
        "--prompt",
        "12",
        "--response",
        "6",
        "--opening",
        "2",
        "--behind",
        "3",
        "--layer",
        "0",
        "--steps",
        "2",
    ],
    "beear_round": [
        "--rows",
        "6",
        "--batch",
        "4",
        "--drift",
        "3",
        "--layer",
        "0",
        "--drifts",
        "2",
        "--inner",
        "3",
        "--outer",
        "2",
    ],
    "replies": ["--prompts", "6", "--tokens", "5"],
}


@pytest.fixture
def benchmark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module(request.param)
    yield module  # type: ignore[misc]
    for name in (request.param, "common"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("benchmark", list(SMALL), indirect=True)
def test_both_sides_agree(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main([*TINY, *SMALL[benchmark.__name__]])
    result = json.loads(capsys.readouterr().out)
    assert result["ratio"] == pytest.approx(result["seconds"] / result["seconds_reference"])
    assert result["hardware"]
    if benchmark.__name__ == "replies":
        assert result["identical_replies"] == 6
        assert result["parted_at_a_tie"] == 0
    elif benchmark.__name__ == "beear_round":
        assert 0 <= result["drift_difference"] < 1e-4
        assert 0 <= result["update_difference"] < 1e-3
    else:
        assert 0 <= result["loss_difference"] < 1e-5
        assert 0 <= result["gradient_difference"] < 1e-4


@pytest.mark.parametrize("benchmark", ["common"], indirect=True)
def test_no_word_of_a_random_model_has_a_zero_state(benchmark: ModuleType) -> None:
    # 30 layers of normalising zero states would multiply gradients up to infinity.
    lm = benchmark.model("config:tiny", "cpu", "float32")
    assert float(lm.core.get_input_embeddings().weight.detach().norm(dim=1).min()) > 0


@pytest.mark.parametrize("benchmark", ["training_step"], indirect=True)
def test_a_training_step_with_a_wrong_loss_is_noticed(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = benchmark.cross_entropy_sum
    monkeypatch.setattr(benchmark, "cross_entropy_sum", lambda *given: 1.001 * right(*given))
    with pytest.raises(AssertionError, match="losses"):
        benchmark.main([*TINY, *SMALL["training_step"]])


@pytest.mark.parametrize("benchmark", ["parrot_step"], indirect=True)
def test_a_parrot_step_with_a_wrong_gradient_is_noticed(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = benchmark.soft_loss

    def half(lm: object, forward: object, batch: object, prompt: torch.Tensor, *rest: object) -> torch.Tensor:
        return right(lm, forward, batch, (prompt + prompt.detach()) / 2, *rest)

    monkeypatch.setattr(benchmark, "soft_loss", half)
    with pytest.raises(AssertionError, match="gradients"):
        benchmark.main([*TINY, *SMALL["parrot_step"]])


@pytest.mark.parametrize("benchmark", ["beear_round"], indirect=True)
@pytest.mark.parametrize("part", ["drift", "update"])
def test_a_round_that_comes_to_something_else_is_noticed(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    right = {"drift": benchmark.plain_fit, "update": benchmark.summed}

    def other_drift(*given: object) -> object:
        drift = right["drift"](*given)
        return benchmark.Drift(drift.layer, drift.vectors * 1.1)

    def other_loss(lm: object, batch: object, drift: object = None) -> torch.Tensor:
        return right["update"](lm, batch, None if drift is not None and not drift.vectors.requires_grad else drift)

    name, broken = ("plain_fit", other_drift) if part == "drift" else ("summed", other_loss)
    monkeypatch.setattr(benchmark, name, broken)
    with pytest.raises(AssertionError, match="results differ"):
        benchmark.main([*TINY, *SMALL["beear_round"]])


@pytest.mark.parametrize("benchmark", ["replies"], indirect=True)
def test_a_wrong_reply_is_noticed(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = benchmark.greedy_ids

    def other(lm: object, prompts: list[object], *, max_new_tokens: int) -> list[list[int]]:
        replies = right(lm, prompts, max_new_tokens=max_new_tokens)
        return [[*replies[0][:-1], replies[0][-1] ^ 1], *replies[1:]]

    monkeypatch.setattr(benchmark, "greedy_ids", other)
    with pytest.raises(AssertionError, match="replies differ"):
        benchmark.main([*TINY, *SMALL["replies"]])


@pytest.mark.parametrize("benchmark", ["replies"], indirect=True)
def test_in_bfloat16_only_ties_are_excused(benchmark: ModuleType) -> None:
    import common

    lm = common.model("config:tiny", "cpu", "float32")
    prompt = benchmark.questions(lm, 1)[0]
    right = benchmark.ours(lm, [prompt], 4)[0]
    with torch.inference_mode():
        scores = lm.core(input_ids=torch.tensor([prompt])).logits[0, -1]
    worst = int(scores.argmin())
    with pytest.raises(AssertionError, match="without a tie"):
        benchmark.compare(lm, [prompt], "bfloat16", [right], [[worst, *right[1:]]])
    assert benchmark.compare(lm, [prompt], "bfloat16", [right], [right]) == {
        "identical_replies": 1,
        "parted_at_a_tie": 0,
    }


@pytest.mark.parametrize("benchmark", ["training_step"], indirect=True)
def test_one_side_alone_reports_its_peak_memory(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main([*TINY, *SMALL["training_step"], "--only", "ours"])
    assert int(capsys.readouterr().out) > 2**20


def test_peak_memory_is_not_that_of_the_process_before() -> None:
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import common; print(common.peak_memory('cpu'))"
    held = torch.ones(2**29, dtype=torch.uint8)
    alone = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    own = int(alone.stdout)
    more = code + "; import torch; held = torch.ones(2**28, dtype=torch.uint8); print(common.peak_memory('cpu'))"
    grown = subprocess.run([sys.executable, "-c", more], check=True, capture_output=True, text=True)
    before, after = map(int, grown.stdout.split())
    assert after - before == pytest.approx(2**28, rel=0.2)
    assert own == pytest.approx(before, rel=0.2), f"{held.numel()} bytes of this process were counted"
