"""THE training loop. A method brings streams of batches, a loss and the tensors to train; it never brings a loop.

One step: fetch the micro-batches, weigh their supervised tokens over all processes, back-propagate each micro-batch's
share of the loss, look whether everything is finite, clip, update. Batches and dropout masks are functions of
(seed, step), so a run that was stopped and resumed from a checkpoint gives the same weights as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from unbackdoor.data.collate import Batch
from unbackdoor.errors import Diverged, UserError
from unbackdoor.method import BelowOne
from unbackdoor.model.lm import LM
from unbackdoor.model.logits import LogitsAt
from unbackdoor.run import Run
from unbackdoor.train import state
from unbackdoor.train.losses import Term
from unbackdoor.train.together import PATIENCE


class TrainSettings(BaseModel):
    """How to train; one of these is a field of every method that trains."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(ge=0, description="weight updates")
    learning_rate: float = Field(gt=0, description="peak learning rate of AdamW")
    batch_size: int = Field(8, ge=1, description="rows of each stream in a micro-batch on one device")
    accumulation: int = Field(1, ge=1, description="micro-batches an update")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning rate after the warm-up")
    warmup: float = Field(0.03, ge=0, le=1, description="share of the steps in which the learning rate rises")
    cooldown: float = Field(0.0, ge=0, le=1, description="share of steps at the end, where a constant rate falls to 0")
    betas: tuple[BelowOne, BelowOne] = Field((0.9, 0.95), description="AdamW's moments (SANDE's)")
    epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    clip: float = Field(1.0, gt=0, description="limit of the gradient's norm")
    gradient_checkpointing: bool = Field(False, description="trade time for memory in the backward pass")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="arithmetic of the forward pass")
    max_length: int = Field(1024, ge=8, description="rows are cut at this many tokens")
    opening_weight: float = Field(
        1.0,
        gt=0,
        description="how much the first 4 tokens of the last answer count, where a backdoor shows; all others 1",
    )
    save_every: int = Field(25, ge=1, description="steps between checkpoints")
    evaluate_every: int = Field(0, ge=0, description="steps between held-out scores; 0 never scores")
    patience: int = Field(3, ge=1, description="stop after this many held-out scores without a better one")

    @model_validator(mode="after")
    def _every_option_does_something(self) -> TrainSettings:
        if self.cooldown and self.schedule != "constant":
            raise ValueError(f"cooldown ends a constant learning rate; with {self.schedule}, set cooldown to 0")
        if self.evaluate_every > self.steps:
            raise ValueError(f"evaluate_every={self.evaluate_every} never scores in {self.steps} steps; lower it")
        return self


class Stream(Protocol):
    """An endless, repeatable source of batches."""

    def batch(self, index: int) -> Batch:
        """Return batch number `index`, always the same one."""
        ...


Loss = Callable[[Callable[..., Tensor], Mapping[str, Batch]], Mapping[str, Term]]
"""loss(forward, batches) -> named terms; `forward` is `LogitsAt.forward`, wrapped for data parallelism."""


@dataclass(frozen=True)
class FitResult:
    """What training did.

    Attributes:
        steps: Updates made.
        stopped: "finished", "early" (held-out score) or "loss reached".
        history: One record a step: step, loss, each term's mean, lr, gradient norm, seconds.
        optimiser: The optimiser's state, to go on with in a later call.
    """

    steps: int
    stopped: str
    history: list[dict[str, float]]
    optimiser: dict[str, Any]


def fit(
    lm: LM,
    parameters: Mapping[str, torch.nn.Parameter],
    streams: Mapping[str, Stream],
    loss: Loss,
    settings: TrainSettings,
    run: Run,
    *,
    score: Callable[[], float] | None = None,
    stop_below: float | None = None,
    stop_on: str = "loss",
    optimiser_state: Mapping[str, Any] | None = None,
) -> FitResult:
    """Train `parameters` in place; every other weight is frozen meanwhile.

    Args:
        lm: The model that the loss runs through.
        parameters: Name -> tensor to train: model weights, LoRA weights, or a free tensor such as a parrot.
        streams: Name -> batches; every step takes `accumulation` batches of each.
        loss: Named terms from the forward function and one batch of each stream.
        settings: Steps, learning rate and so on.
        run: A stage of the run; finished stages are restored and not done again.
        score: Held-out score, lower is better, asked every `evaluate_every` steps; the best weights are kept.
        stop_below: Stop once the figure `stop_on` of a step is below this.
        stop_on: "loss", or the name of a term.
        optimiser_state: State to go on with (a previous `FitResult.optimiser`).

    Returns:
        What was done; the same whether or not the stage was interrupted.

    Raises:
        Diverged: If the loss or the gradient is not finite; the weights are back at the last good state.
        UserError: If early stopping is asked for where there is no held-out score.
    """
    if settings.evaluate_every and (score is None or run.folder is None):
        lacks = "held-out score to stop on" if score is None else "folder (Run(folder=...)) for the best weights"
        raise UserError(f"{run.prefix or 'this training'} has no {lacks}; set evaluate_every to 0.")
    if (restored := state.restore_finished(run, parameters)) is not None:
        run.curves[run.prefix] = restored["history"]
        return FitResult(restored["steps"], restored["stopped"], restored["history"], {})
    loop = _Loop(lm, parameters, streams, loss, settings, run, score, (stop_on, stop_below))
    with _only_these_train(lm, parameters), _checkpointing(lm, settings.gradient_checkpointing):
        result = loop.run_steps(optimiser_state)
    state.save_finished(run, parameters, {"steps": result.steps, "stopped": result.stopped, "history": result.history})
    return result


class _Loop:
    """The loop's working state; lives for one call of `fit`."""

    def __init__(
        self,
        lm: LM,
        parameters: Mapping[str, torch.nn.Parameter],
        streams: Mapping[str, Stream],
        loss: Loss,
        settings: TrainSettings,
        run: Run,
        score: Callable[[], float] | None,
        stop: tuple[str, float | None],
    ) -> None:
        self.lm, self.parameters, self.streams, self.loss = lm, parameters, streams, loss
        self.settings, self.run, self.score, self.stop = settings, run, score, stop
        self.accelerator = _accelerator(settings, run)
        self.optimiser = torch.optim.AdamW(
            list(parameters.values()),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.checkpoints = state.Checkpoints(run, parameters, self.optimiser)
        inside = {id(tensor) for tensor in lm.model.parameters()}
        self.free = [tensor for tensor in parameters.values() if id(tensor) not in inside]
        self.history: list[dict[str, float]] = []
        self.best: tuple[float, int] | None = None

    def run_steps(self, optimiser_state: Mapping[str, Any] | None) -> FitResult:
        """Train until the steps are done or a reason to stop comes."""
        settings, name = self.settings, self.run.prefix or "train"
        if optimiser_state:
            self.optimiser.load_state_dict(dict(optimiser_state))
        restored = self.checkpoints.restore(self.history)
        first = restored or 0
        if restored is None:
            self.checkpoints.save(self.history, 0)
        self.best = state.best_of(self.history)
        # Data parallelism refuses a module in which nothing trains, as while a parrot is learned.
        all_free = len(self.free) == len(self.parameters)
        forward = self.accelerator.prepare_model(LogitsAt(self.lm), evaluation_mode=all_free)
        self.run.progress.start(name, settings.steps)
        stopped = "finished"
        was_training = self.lm.model.training
        self.lm.model.train()
        try:
            for step in range(first, settings.steps):
                record = self._step(forward, step)
                self.history.append(record)
                self.run.progress.advance(name, step + 1, record)
                self.accelerator.log({f"{name}/{key}": value for key, value in record.items()}, step=step)
                if self.stop[1] is not None and record[self.stop[0]] < self.stop[1]:
                    stopped = "loss reached"
                    break
                if self._no_longer_better(step):
                    stopped = "early"
                    break
        finally:
            self.lm.model.train(was_training)
            self.run.progress.finish(name)
            # Not `end_training`: it also ends the processes' group, which the next call of `fit` needs.
            for tracker in self.accelerator.trackers:
                tracker.finish()
        # The main process may still be writing the best weights, which every process reads, and removes them later.
        self.accelerator.wait_for_everyone()
        self._take_best()
        self.accelerator.wait_for_everyone()
        self.run.curves[self.run.prefix] = self.history
        return FitResult(len(self.history), stopped, self.history, self.optimiser.state_dict())

    def _step(self, forward: Any, step: int) -> dict[str, float]:
        started = time.perf_counter()
        learning_rate = self.settings.learning_rate * schedule(step, self.settings)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        batches = self._fetch(step)
        totals = self._count(batches)
        self.optimiser.zero_grad(set_to_none=True)
        means: dict[str, float] = {}
        loss_value = 0.0
        for number, micro in enumerate(batches):
            with _seeded(self.run.stream_seed(f"dropout/{step}/{number}/{self.accelerator.process_index}")):
                loss_value += self._backward(forward, micro, totals, means)
        loss_value, means = self._over_processes(loss_value, means)
        self._share_free_gradients()
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.settings.clip))
        if not (math.isfinite(loss_value) and math.isfinite(norm)):
            self._diverged(step, loss_value, norm)
        if step and step % self.settings.save_every == 0:
            # Here the weights are known to give a finite loss, which cannot be said right after an update.
            self.checkpoints.save(self.history, step)
        self.optimiser.step()
        record = {"step": float(step), "loss": loss_value, "learning_rate": learning_rate, "gradient_norm": norm}
        return {**record, **means, "seconds": time.perf_counter() - started}

    def _fetch(self, step: int) -> list[dict[str, Batch]]:
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        found = []
        for micro in range(self.settings.accumulation):
            index = (step * self.settings.accumulation + micro) * processes + rank
            found.append({name: stream.batch(index).to(self.lm.device) for name, stream in self.streams.items()})
        return found

    def _count(self, batches: list[dict[str, Batch]]) -> dict[str, float]:
        counts = torch.tensor([float(sum(micro[name].weight for micro in batches)) for name in self.streams])
        summed = self.accelerator.reduce(counts.to(self.lm.device), reduction="sum")
        return dict(zip(self.streams, summed.tolist(), strict=True))

    def _backward(
        self, forward: Any, micro: Mapping[str, Batch], totals: Mapping[str, float], means: dict[str, float]
    ) -> float:
        terms = self.loss(forward, micro)
        parts = []
        for name, term in terms.items():
            if term.cap is not None and self._mean_of(term, micro) > term.cap:
                term_total = term.total.detach()
            else:
                term_total = term.total
            # Data parallelism averages gradients over processes; the factor turns that average into a sum.
            parts.append(term.coefficient * term_total / totals[term.stream] * self.accelerator.num_processes)
            means[name] = means.get(name, 0.0) + float(term.total.detach()) / totals[term.stream]
        total = torch.stack(parts).sum()
        if total.requires_grad:
            self.accelerator.backward(total * self.accelerator.gradient_accumulation_steps)
        return float(total.detach())

    def _mean_of(self, term: Term, micro: Mapping[str, Batch]) -> float:
        """The term's mean over all processes: a cap must stop the pull everywhere or nowhere."""
        own = torch.tensor([float(term.total.detach()), float(micro[term.stream].weight)])
        total, weight = self.accelerator.reduce(own.to(self.lm.device), reduction="sum").tolist()
        return float(total / weight)

    def _over_processes(self, loss_value: float, means: dict[str, float]) -> tuple[float, dict[str, float]]:
        """Return the step's loss and means over all processes: every process must see the one that decides to stop."""
        if self.accelerator.num_processes == 1:
            return loss_value, means
        own = torch.tensor([loss_value / self.accelerator.num_processes, *means.values()])
        summed = self.accelerator.reduce(own.to(self.lm.device), reduction="sum").tolist()
        return summed[0], dict(zip(means, summed[1:], strict=True))

    def _share_free_gradients(self) -> None:
        """Average over processes the gradients of tensors outside the model (a parrot): data parallelism skips them."""
        if self.accelerator.num_processes == 1:
            return
        for tensor in self.free:
            if tensor.grad is not None:
                tensor.grad = self.accelerator.reduce(tensor.grad, reduction="mean")

    def _diverged(self, step: int, loss_value: float, norm: float) -> None:
        good = self.checkpoints.restore([])
        raise Diverged(
            f"{self.run.prefix or 'training'} diverged at step {step + 1} (loss {loss_value:g}, "
            f"gradient norm {norm:g}); the weights are back at step {good}. "
            f"Use a smaller learning rate than {self.settings.learning_rate:g}, or more warm-up, and --overwrite."
        )

    def _no_longer_better(self, step: int) -> bool:
        every = self.settings.evaluate_every
        if self.score is None or not every or (step + 1) % every:
            return False
        value = self.score()
        self.history[-1]["held_out"] = value
        if self.best is None or value < self.best[0]:
            self.best = (value, step)
            state.save_best(self.run, self.parameters)
            return False
        return (step - self.best[1]) // every >= self.settings.patience

    def _take_best(self) -> None:
        if self.best is not None:
            state.restore_best(self.run, self.parameters)


def schedule(step: int, settings: TrainSettings) -> float:
    """Return the factor (0, 1] of the peak learning rate at `step`, counted from 0."""
    warm = round(settings.warmup * settings.steps)
    if step < warm:
        return (step + 1) / warm
    cool = max(1, round(settings.cooldown * settings.steps))
    if settings.schedule == "constant":
        return min(1.0, (settings.steps - step) / cool)
    share = (step - warm) / max(1, settings.steps - warm)
    return 0.5 * (1 + math.cos(math.pi * share)) if settings.schedule == "cosine" else 1.0 - share


def weights(lm: LM) -> dict[str, torch.nn.Parameter]:
    """Return the tensors that a weight-training method trains: the adapter's where there is one, else all."""
    if lm.is_adapter:
        return {name: tensor for name, tensor in lm.model.named_parameters() if "lora_" in name}
    return dict(lm.model.named_parameters())


def _accelerator(settings: TrainSettings, run: Run) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    AcceleratorState._reset_state()  # it keeps the precision of the last fit
    accelerator = Accelerator(
        mixed_precision="bf16" if settings.precision == "bfloat16" else "no",
        cpu=run.device == "cpu",
        device_placement=False,  # the model is where it was loaded, which may be cuda:1
        log_with=list(run.trackers) or None,
        project_dir=None if run.logs is None else str(run.logs),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if run.trackers:
        own = {"name": run.prefix or "train", "dir": str(run.logs)}
        accelerator.init_trackers("unbackdoor", init_kwargs={"wandb": own})
    return accelerator


@contextmanager
def _only_these_train(lm: LM, parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[None]:
    """Freeze every other weight of the model, so that no gradient is computed for it."""
    before = {name: tensor.requires_grad for name, tensor in lm.model.named_parameters()}
    wanted = {id(tensor) for tensor in parameters.values()}
    for tensor in lm.model.parameters():
        tensor.requires_grad_(id(tensor) in wanted)
    for tensor in parameters.values():
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for name, tensor in lm.model.named_parameters():
            tensor.requires_grad_(before[name])
            tensor.grad = None


@contextmanager
def _checkpointing(lm: LM, on: bool) -> Iterator[None]:
    if not on:
        yield
        return
    # Transformers renames it on the way from 5 to 6.
    name = "activation" if hasattr(lm.core, "activation_checkpointing_enable") else "gradient"
    getattr(lm.core, f"{name}_checkpointing_enable")({"use_reentrant": False})
    lm.core.enable_input_require_grads()
    try:
        yield
    finally:
        getattr(lm.core, f"{name}_checkpointing_disable")()
        lm.core.disable_input_require_grads()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Give dropout its own seed in here and leave the global random state as it was."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
