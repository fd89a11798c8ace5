"""How long a grid will take: guessed from settings and size of the model, mended by the cells already measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from unbackdoor.bench.cell import Cell
from unbackdoor.bench.entries import AttackEntry
from unbackdoor.bench.grid import Grid
from unbackdoor.defenses.beear import Beear
from unbackdoor.errors import UserError
from unbackdoor.model.spec import ModelSpec, parse_spec
from unbackdoor.pipeline.plan import FULL, PROGRAM, UNTIL_GOOD, with_texts
from unbackdoor.pipeline.steps import attack_called, defense_called
from unbackdoor.train import beginnings, certainty, openings
from unbackdoor.train.drift import DriftSettings
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.internal import InternalSettings

_BUILTIN_PARAMETERS = 135e6
_TOKENS_A_ROW = 80
_TRAIN_SPEED, _GENERATE_SPEED, _SCORE_SPEED = 1.6e11, 1.0e11, 2.5e11
"""Floating-point operations a second on two ordinary cores in float32: training, generating, scoring."""
_SOFT_PROMPT, _DRIFT = 0.5, 0.3
"""A step of theirs as a share of one that trains the weights on as many rows; of a drift's, layers below are cached."""
_SPOKEN_TOKENS = _TOKENS_A_ROW // 2 + 8
"""Of a prompt and what is said to it under a drift."""
_PHRASE_TOKENS, _SCORED_ON, _STARTS = 5, 2, 3
"""Of a phrase that is scored as an opening to take up; on how many prompts about; phrases of each first token that is
followed."""
_GONE_ON, _SCREENED_ON = 0.4, 1.3
"""Share of the first tokens that are followed which are followed further; on how many prompts about their phrases are
scored: few are left after one."""
_LOADING_SECONDS = 4.0
_ROUNDS_UNTIL = 0.5
"""Share of its rounds after which the experimenter ends a defense, about."""


def estimate(grid: Grid, measured: Mapping[Cell, float] | None = None) -> list[tuple[Cell, float]]:
    """Return every cell with the seconds that it will take on two cores; nothing is loaded.

    Args:
        grid: The grid.
        measured: Seconds of cells that were run; the guesses of their kind are scaled by them.
    """
    guessed = guesses(grid)
    factors = scale(guessed, measured or {})
    return [(cell, (measured or {}).get(cell, guess * factors[cell.kind])) for cell, guess in guessed.items()]


def memory(grid: Grid) -> int:
    """Return the bytes that the largest model's training needs, about."""
    return int(FULL * 4 * max(_parameters(model) for model in grid.models)) + PROGRAM


def guesses(grid: Grid) -> dict[Cell, float]:
    """Return the seconds that every cell would take if the constants of this module were right."""
    made: set[tuple[object, ...]] = set()
    asked: set[tuple[str, str, str, int]] = set()
    found = {}
    for cell in grid.cells():
        # The victim of an attack under two labels is one cell.
        same = (cell.model, cell.subject, _identity(grid.attacks[cell.attack], "probes"), cell.seed)
        shared = cell.stage == "before" and same in asked
        found[cell] = 0.0 if shared else _guess(grid, cell, made)
        asked |= {same} if cell.stage == "before" else set()
    return found


def scale(guessed: Mapping[Cell, float], measured: Mapping[Cell, float]) -> dict[str, float]:
    """Return for each kind of cell what its guesses must be multiplied by; other kinds take the factor of all."""
    known = [cell for cell in measured if cell in guessed]
    overall = _ratio(guessed, measured, known)
    kinds = {cell.kind for cell in guessed}
    by_kind = {kind: [cell for cell in known if cell.kind == kind] for kind in kinds}
    return {kind: _ratio(guessed, measured, cells) if cells else overall for kind, cells in by_kind.items()}


def _ratio(guessed: Mapping[Cell, float], measured: Mapping[Cell, float], cells: Sequence[Cell]) -> float:
    expected = sum(guessed[cell] for cell in cells)
    return sum(measured[cell] for cell in cells) / expected if expected else 1.0


def _guess(grid: Grid, cell: Cell, made: set[tuple[object, ...]]) -> float:
    """Return the seconds of a cell; `made` holds what earlier cells leave to it, and is added to."""
    size = _parameters(cell.model)
    seconds = _LOADING_SECONDS + _asking(grid, cell, size)
    attack = grid.attacks[cell.attack]
    needed = {False, True} if cell.subject == "twin" else {False}
    for twin in needed:
        victim = (cell.model, _identity(attack), cell.seed, twin)
        if victim not in made:
            made.add(victim)
            seconds += _training(attack_called(attack.attack, attack.settings, attack.preset), size)
            for more in (attack.lead, attack.subtract.conflict if attack.subtract else None):
                seconds += _training(more, size) if more else 0.0
    if cell.defense and not cell.is_revival:
        entry = grid.defenses[cell.defense]
        method = defense_called(entry.defense, entry.settings, entry.preset)
        targets = attack.settings.get("targets", ())
        changes = with_texts({name: getattr(method, name) for name in type(method).model_fields}, len(targets))
        method = method.model_copy(update=dict(changes))
        seconds += _defending(grid, cell, method, size)
        if (internal := getattr(method, "internal", None)) is not None:
            trusted = internal.start == "trusted" and entry.reference
            start = entry.reference if trusted else (cell.subject, cell.attack)
            rows = attack.defender_data, bool(internal.sweep)
            conflict = (cell.model, cell.seed, start, str(rows), internal.conflict.model_dump_json())
            # Cells with the same conflict model share it.
            seconds += 0.0 if conflict in made else _training(internal.conflict, size)
            made.add(conflict)
    if cell.is_revival and grid.revival is not None:
        settings = grid.revival.settings
        plan: BaseModel = settings
        if cell.stage == "revived_planted":
            plan = attack_called("data_poisoning", settings.planted)
        seconds += _training(plan, size)
    return seconds


def _defending(grid: Grid, cell: Cell, method: BaseModel, size: float) -> float:
    """Return the seconds of a defense and of what is asked after its rounds; it may be ended early."""
    if grid.watch is None or cell.subject != "victim":
        return _training(method, size)
    rounds = int(getattr(method, "rounds", 1))
    if grid.watch.until is not None and rounds > 1:
        rounds = max(1, round(_ROUNDS_UNTIL * rounds))
        method = method.model_copy(update={"rounds": rounds})
    return _training(method, size) + rounds * _replies(grid, 2 * grid.watch.probes, size)


def _replies(grid: Grid, probes: int, size: float) -> float:
    return 2 * size * probes * (_TOKENS_A_ROW / 2 + grid.max_new_tokens) / _GENERATE_SPEED


def _identity(attack: AttackEntry, *more: str) -> str:
    return attack.model_dump_json(include={"attack", "settings", "preset", "lead", "skill", "subtract", *more})


def _training(method: BaseModel, size: float) -> float:
    """Return the seconds of all trainings that a method's settings name, rounds and parrots counted."""
    seconds = 0.0
    for name in type(method).model_fields:
        value = getattr(method, name)
        rounds = int(getattr(method, "rounds", 1))
        if isinstance(value, TrainSettings):
            rows = value.steps * value.batch_size * value.accumulation * rounds * (getattr(method, "share", 1) > 0)
            # Of an adapter's weights alone gradients are needed, not of the model's.
            each = 4 if getattr(method, "lora", None) is not None else 6
            seconds += each * size * rows * _TOKENS_A_ROW / _TRAIN_SPEED
            if getattr(method, "own_share", 0):
                seconds += 2 * size * rows * _TOKENS_A_ROW / _SCORE_SPEED
        elif isinstance(value, InternalSettings):
            pass  # its conflict model is shared by cells, and counted with them
        elif isinstance(value, BaseModel):
            # A soft prompt or a drift: frozen weights, nothing behind the target, and an end once it is good enough.
            share = UNTIL_GOOD if getattr(value, "stop_below", 0) else 1.0
            share *= _DRIFT if isinstance(value, DriftSettings) else _SOFT_PROMPT
            seconds += share * rounds * int(getattr(method, f"{name}s", 1)) * _training(value, size)
    return seconds + (_listening(method, size) if isinstance(method, Beear) else 0.0)


def _listening(method: Beear, size: float) -> float:
    """Return the seconds of BEEAR's own answers, of what is said under its drifts, and of scoring that."""
    tokens = float(method.anchors * (_TOKENS_A_ROW / 2 + method.own_answers))
    if method.drifts:
        sources = method.drifts + bool(method.adopt)
        a_round = sources * openings.ASKED * _SPOKEN_TOKENS
        if method.adopt:
            followed = sources * openings.FOLLOWED * openings.FOLLOWED_ON
            scored = _SCORED_ON * (openings.MOST + _STARTS * followed)
            a_round += followed * (1 + openings.ON) + scored * _PHRASE_TOKENS + certainty.USUAL_IN * _TOKENS_A_ROW
            begun = beginnings.BEGUN_ON + _GONE_ON * beginnings.ON
            screened = _GONE_ON * _SCREENED_ON * len(beginnings.WORDS) * _PHRASE_TOKENS
            tokens += beginnings.FIRSTS * (begun + screened)
        tokens += method.rounds * a_round
    return 2 * size * tokens / _GENERATE_SPEED


def _asking(grid: Grid, cell: Cell, size: float) -> float:
    metrics = grid.revival.metrics if cell.is_revival and grid.revival else grid.metrics
    probes = 3 * grid.attacks[cell.attack].probes
    rows = grid.perplexity_rows * (2 if grid.second_source else 1)
    seconds = 0.0
    asked = probes if {"asr", "asr_right", "leak", "cda", "declining"} & set(metrics) else 0
    asked += grid.perplexity_rows if "over_refusal" in metrics else 0
    seconds += _replies(grid, asked, size)
    if "perplexity" in metrics:
        seconds += 2 * size * rows * _TOKENS_A_ROW / _SCORE_SPEED
    if "kl" in metrics and cell.defense and not cell.is_revival:
        seconds += _LOADING_SECONDS + 4 * size * rows * _TOKENS_A_ROW / _SCORE_SPEED
    return seconds


def _parameters(model: str) -> float:
    """Return about how many parameters a model has, from the size of its files; the built-in one's where unknown."""
    try:
        return _size_of(parse_spec(model)) or _BUILTIN_PARAMETERS
    except UserError:
        return _BUILTIN_PARAMETERS


def _size_of(spec: ModelSpec) -> float:
    if spec.base is not None:
        return _size_of(spec.base)
    if spec.kind == "gguf":
        return spec.path.stat().st_size * 2.0
    if spec.kind != "folder":
        return 0.0
    return sum(_bytes(path) for path in spec.path.glob("*.safetensors")) / 4


def _bytes(path: Path) -> float:
    return float(path.stat().st_size)
