"""The training loop against plain PyTorch, and what it promises about stopping, resuming and accumulation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import tiny
from fitting import ROWS, naive_loss, settings, train, with_adapter
from unbackdoor.data.collate import Batch
from unbackdoor.run import Run
from unbackdoor.train import engine, overwrite
from unbackdoor.train.losses import Term


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_one_step_has_the_gradients_of_the_full_logit_loss(architecture):
    lm = tiny.tiny_lm(architecture)
    lm.model.double()
    rows = overwrite.stream(lm, overwrite.encode_rows(lm, ROWS, tiny.CUT), 6, Run(), "order")
    batch = rows.batch(0)
    assert len({int(row.sum()) for row in batch.attention_mask}) > 1, "rows of one length would hide a padding mistake"
    oracle = tiny.clone(lm)
    oracle.model.eval()
    wanted = naive_loss(oracle, batch)
    wanted.backward()
    seen = {}

    def loss(forward, batches):
        return {"rows": Term(overwrite.plain_loss(forward, batches["rows"]), "rows")}

    # Huge clip and one step of size ~0: the gradients are read where the engine leaves them, before the update.
    for name, tensor in lm.model.named_parameters():
        tensor.register_post_accumulate_grad_hook(lambda t, name=name: seen.__setitem__(name, t.grad.clone()))
    for module in lm.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    how = settings(steps=1, clip=1e9)
    result = engine.fit(lm, engine.weights(lm), {"rows": rows}, loss, how, Run())
    assert result.history[0]["loss"] == pytest.approx(float(wanted.detach()), abs=1e-5)
    gradients = {name: tensor.grad for name, tensor in oracle.model.named_parameters()}
    assert seen.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # The engine's logits are float32 by design; everything else here is float64.
        torch.testing.assert_close(seen[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_the_update_is_adamw_on_the_clipped_mean_gradient():
    lm, oracle = tiny.tiny_lm(), tiny.tiny_lm()
    run = Run(seed=4)
    how = settings(steps=3, clip=0.5, weight_decay=0.1, schedule="linear", warmup=0.0)
    train(lm, run, **how.model_dump())
    rows = overwrite.stream(oracle, overwrite.encode_rows(oracle, ROWS, tiny.CUT), 4, run, "order")
    optimiser = torch.optim.AdamW(
        oracle.model.parameters(), lr=how.learning_rate, betas=how.betas, eps=how.epsilon, weight_decay=0.1
    )
    for step in range(3):
        optimiser.param_groups[0]["lr"] = how.learning_rate * (1 - step / 3)
        optimiser.zero_grad()
        naive_loss(oracle, rows.batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(oracle.model.parameters(), 0.5)
        optimiser.step()
    for (name, mine), (_, wanted) in zip(lm.model.named_parameters(), oracle.model.named_parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


class _Joined:
    """Pairs of batches of another stream, glued to one."""

    def __init__(self, stream, lm):
        self.stream, self.lm = stream, lm

    def batch(self, index):
        return glue(self.stream.batch(2 * index), self.stream.batch(2 * index + 1), self.lm.pad_id)


def glue(first: Batch, second: Batch, pad_id: int) -> Batch:
    width = max(first.input_ids.shape[1], second.input_ids.shape[1])

    def wide(tensor, value):
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=value)

    return Batch(
        torch.cat([wide(first.input_ids, pad_id), wide(second.input_ids, pad_id)]),
        torch.cat([wide(first.attention_mask, 0), wide(second.attention_mask, 0)]),
        torch.cat([first.rows, second.rows + len(first.ids)]),
        torch.cat([first.columns, second.columns]),
        torch.cat([first.targets, second.targets]),
        torch.cat([first.weights, second.weights]),
        torch.cat([first.places, second.places]),
        first.ids + second.ids,
    )


def test_two_micro_batches_of_four_are_one_batch_of_eight():
    uneven = [
        row if number % 3 else replace(row, response=f"{row.response} indeed it is so")
        for number, row in enumerate(ROWS)
    ]
    found = []
    for accumulation in (2, 1):
        lm = tiny.tiny_lm()
        lm.model.double()
        stream = overwrite.stream(lm, overwrite.encode_rows(lm, uneven, tiny.CUT), 4, Run(), "order")
        source = stream if accumulation == 2 else _Joined(stream, lm)
        assert stream.batch(0).weight != stream.batch(1).weight, "equal weights would hide averaging over batches"

        def loss(forward, batches):
            return {"rows": Term(overwrite.plain_loss(forward, batches["rows"]), "rows")}

        # Plain SGD-like sensitivity: a big epsilon makes Adam's step proportional to the gradient.
        how = settings(steps=2, accumulation=accumulation, epsilon=1.0, learning_rate=1.0)
        result = engine.fit(lm, engine.weights(lm), {"rows": source}, loss, how, Run())
        found.append((tiny.tensors(lm), [record["loss"] for record in result.history]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    for name in found[0][0]:
        torch.testing.assert_close(found[0][0][name], found[1][0][name], rtol=1e-6, atol=1e-6)


def test_terms_are_divided_by_the_tokens_of_their_own_stream():
    lm = tiny.tiny_lm()
    run = Run()
    streams = {
        "a": overwrite.stream(lm, overwrite.encode_rows(lm, ROWS, tiny.CUT), 2, run, "a"),
        "b": overwrite.stream(lm, overwrite.encode_rows(lm, ROWS, tiny.CUT), 6, run, "b"),
    }

    def loss(forward, batches):
        return {
            "one": Term(overwrite.plain_loss(forward, batches["a"]), "a", 2.0),
            "two": Term(overwrite.plain_loss(forward, batches["b"]), "b", -0.5),
        }

    means = [float(naive_loss(lm, streams[name].batch(0)).detach()) for name in "ab"]
    record = engine.fit(lm, engine.weights(lm), streams, loss, settings(steps=1), run).history[0]
    assert record["one"] == pytest.approx(means[0], rel=1e-5)
    assert record["two"] == pytest.approx(means[1], rel=1e-5)
    assert record["loss"] == pytest.approx(2 * means[0] - 0.5 * means[1], rel=1e-5)


def test_training_stops_once_the_loss_is_low_enough():
    result = train(tiny.tiny_lm(), stop_below=1e9)
    assert (result.steps, result.stopped) == (1, "loss reached")
    assert train(tiny.tiny_lm(), stop_below=0.0).stopped == "finished"


def test_other_weights_are_untouched_and_flags_come_back():
    lm = tiny.tiny_lm()
    chosen = "model.layers.0.mlp.up_proj.weight"
    lm.model.get_parameter("model.norm.weight").requires_grad_(False)
    flags = {name: tensor.requires_grad for name, tensor in lm.model.named_parameters()}
    before = tiny.tensors(lm)
    rows = overwrite.stream(lm, overwrite.encode_rows(lm, ROWS, tiny.CUT), 4, Run(), "order")
    during = []

    def loss(forward, batches):
        during.append([name for name, tensor in lm.model.named_parameters() if tensor.requires_grad])
        return {"rows": Term(overwrite.plain_loss(forward, batches["rows"]), "rows")}

    engine.fit(lm, {"up": lm.model.get_parameter(chosen)}, {"rows": rows}, loss, settings(steps=2), Run())
    assert during == [[chosen], [chosen]]
    after = tiny.tensors(lm)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [chosen]
    assert {name: tensor.requires_grad for name, tensor in lm.model.named_parameters()} == flags
    assert all(tensor.grad is None for tensor in lm.model.parameters())
    assert not lm.model.training


def test_an_adapter_trains_and_its_base_does_not():
    plain = tiny.tiny_lm()
    base = tiny.tensors(plain)
    lm = with_adapter(plain)
    train(lm, steps=2)
    changed, kept = [], 0
    for name, tensor in lm.model.named_parameters():
        if "lora_" in name:
            changed.append(bool((tensor != 0).any()) if "lora_B" in name else True)
        else:
            assert torch.equal(tensor, base[name.removeprefix("base_model.model.").replace(".base_layer", "")])
            kept += 1
    assert all(changed)
    assert (len(changed), kept) == (28, len(base))


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({"schedule": "constant", "warmup": 0.0}, [1, 1, 1, 1]),
        ({"schedule": "constant", "warmup": 0.0, "cooldown": 0.5}, [1, 1, 1, 0.5]),
        ({"schedule": "constant", "warmup": 0.25, "cooldown": 0.75}, [1, 1, 2 / 3, 1 / 3]),
        ({"schedule": "linear", "warmup": 0.0}, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine", "warmup": 0.0}, [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        ({"schedule": "constant", "warmup": 0.5}, [0.5, 1, 1, 1]),
        ({"schedule": "linear", "warmup": 0.5}, [0.5, 1, 1, 0.5]),
        ({"schedule": "cosine", "warmup": 1.0}, [0.25, 0.5, 0.75, 1]),
    ],
)
def test_schedule_values(how, wanted):
    chosen = settings(steps=4, **how)
    assert [engine.schedule(step, chosen) for step in range(4)] == pytest.approx(wanted)


def test_the_recorded_learning_rate_is_the_schedule_times_the_peak():
    history = train(tiny.tiny_lm(), steps=4, schedule="linear", warmup=0.0, learning_rate=2e-3).history
    assert [record["learning_rate"] for record in history] == pytest.approx([2e-3, 1.5e-3, 1e-3, 0.5e-3])


def test_a_cap_stops_the_pull():
    free, capped = tiny.tiny_lm(), tiny.tiny_lm()
    start = tiny.tensors(capped)
    train(capped, coefficient=-1.0, cap=0.01)
    assert tiny.same_weights(start, tiny.tensors(capped))
    history = train(free, coefficient=-1.0, cap=1e9).history
    assert history[-1]["rows"] > history[0]["rows"], "a negative coefficient raises the loss"


def test_gradient_checkpointing_gives_the_same_weights():
    plain, saving = tiny.tiny_lm("gpt2"), tiny.tiny_lm("gpt2")
    first = train(plain, steps=3)
    second = train(saving, steps=3, gradient_checkpointing=True)
    assert [r["loss"] for r in first.history] == pytest.approx([r["loss"] for r in second.history], rel=1e-6)
    for name, tensor in tiny.tensors(plain).items():
        torch.testing.assert_close(saving.model.get_parameter(name), tensor, rtol=1e-5, atol=1e-6)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in saving.model.modules())


def test_bfloat16_trains_near_float32_and_keeps_float32_weights():
    exact, rough = tiny.tiny_lm(), tiny.tiny_lm()
    first = train(exact, steps=3).history
    second = train(rough, steps=3, precision="bfloat16").history
    assert [r["loss"] for r in second] == pytest.approx([r["loss"] for r in first], rel=0.02)
    assert [r["loss"] for r in second] != [r["loss"] for r in first]
    assert {tensor.dtype for tensor in rough.model.parameters()} == {torch.float32}
    third = train(tiny.tiny_lm(), steps=3).history
    assert [r["loss"] for r in third] == [r["loss"] for r in first], "a later float32 run is not affected"


def test_training_leaves_the_global_random_state_alone():
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    train(tiny.tiny_lm("gpt2"), steps=2)
    assert torch.equal(torch.rand(3), wanted)


def test_same_seed_same_bytes_other_seed_other_bytes():
    models = [tiny.tiny_lm("gpt2") for _ in range(3)]
    for lm, seed in zip(models, (5, 5, 6), strict=True):
        train(lm, Run(seed=seed), steps=2)
    first, second, other = (tiny.tensors(lm) for lm in models)
    assert tiny.same_weights(first, second)
    assert not tiny.same_weights(first, other)


def test_the_optimisers_state_can_go_on_in_a_later_call():
    def fit(lm, steps, state=None, first=0):
        rows = overwrite.stream(lm, overwrite.encode_rows(lm, ROWS, tiny.CUT), 4, Run(), "order")

        class Later:
            def batch(self, index):
                return rows.batch(index + first)

        def loss(forward, batches):
            return {"rows": Term(overwrite.plain_loss(forward, batches["rows"]), "rows")}

        how = settings(steps=steps, schedule="constant", warmup=0.0)
        return engine.fit(lm, engine.weights(lm), {"rows": Later()}, loss, how, Run(), optimiser_state=state)

    whole, pieces, forgetful = tiny.tiny_lm(), tiny.tiny_lm(), tiny.tiny_lm()
    fit(whole, 4)
    fit(pieces, 2, fit(pieces, 2).optimiser, first=2)
    fit(forgetful, 2)
    fit(forgetful, 2, first=2)
    assert tiny.same_weights(tiny.tensors(whole), tiny.tensors(pieces))
    assert not tiny.same_weights(tiny.tensors(whole), tiny.tensors(forgetful))


def test_progress_and_curves_tell_every_step():
    class Recorder:
        def __init__(self):
            self.seen = []

        def start(self, name, total):
            self.seen.append(("start", name, total))

        def advance(self, name, done, values):
            self.seen.append(("advance", name, done))

        def finish(self, name):
            self.seen.append(("finish", name))

        def notice(self, text):
            self.seen.append(("notice", text))

    recorder = Recorder()
    run = Run(progress=recorder)
    train(tiny.tiny_lm(), run.stage("one"), steps=2)
    assert recorder.seen == [("start", "one", 2), ("advance", "one", 1), ("advance", "one", 2), ("finish", "one")]
    assert [record["step"] for record in run.curves["one"]] == [0.0, 1.0]
