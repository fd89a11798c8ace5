"""Run one cell: get the model it starts from, purify, revive, ask.

Models that other cells need (victims, purified models that will be revived) are made once, saved, and always used from
the folder, so that a cell gives the same figures whether its victim was planted a moment or a week ago.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unbackdoor.bench.cell import Cell
from unbackdoor.bench.material import Material
from unbackdoor.bench.store import ENDED, ROUNDS, Result, Store
from unbackdoor.data.probes import write_probes
from unbackdoor.data.shared_words import shared_words
from unbackdoor.data.splits import assert_trained_apart
from unbackdoor.defenses.base import Defense, Need, unwanted_texts
from unbackdoor.errors import FULL, READ_ONLY, ModelError, NotApplicable, UserError, disk_error
from unbackdoor.model import checkpoint
from unbackdoor.model.lm import LM
from unbackdoor.model.load import load
from unbackdoor.model.output import MANIFEST
from unbackdoor.model.spec import parse_spec
from unbackdoor.pipeline.artefacts import hardware, versions
from unbackdoor.pipeline.guarding import with_guards
from unbackdoor.pipeline.measure import Label, measure, peak_memory
from unbackdoor.pipeline.steps import facts_from_secret, purify_model, revive
from unbackdoor.pipeline.watching import Ended, watched
from unbackdoor.run import Progress, Run
from unbackdoor.secret import Secret
from unbackdoor.stopping import Stop
from unbackdoor.train import conflict, overwrite

SECRET, PROBES, WATCHED = "secret.json", "probes.jsonl", "watched.json"


class Busy(Exception):
    """Another process is making a model that this cell needs; the cell is tried again later."""


class CannotWrite(UserError):
    """The folder of the grid cannot take a model: no fault of the cell, so the whole grid stops."""


@dataclass
class Workshop:
    """What running a cell needs beside the cell.

    Attributes:
        material: Rows, methods and keys.
        store: The folder.
        device: Where models are.
        progress: Where to report.
        wanted: Keys of the purified models that unfinished revivals need; filled by the caller.
        stop: Whether the process was told to stop: an error after that says nothing about the cell.
    """

    material: Material
    store: Store
    device: str
    progress: Progress
    wanted: set[str] = field(default_factory=set)
    stop: Stop = field(default_factory=Stop)


@dataclass
class _Made:
    """What making a model recorded."""

    seconds: float = 0.0
    curves: Mapping[str, list[dict[str, float]]] = field(default_factory=dict)
    notes: Mapping[str, object] = field(default_factory=dict)
    knowledge: tuple[str, ...] = ()


def execute(cell: Cell, shop: Workshop) -> Result:
    """Run a cell and return its result; an error of the cell is raised.

    What its training can go on from stays in `work` until the caller has written the result (`finished`).

    Raises:
        Busy: If another process is making a model that is needed here.
        NotApplicable: If the defense needs what the attack has not.
    """
    started = time.perf_counter()
    victim = _victim_folder(cell, shop)
    secret = Secret.model_validate_json((victim / SECRET).read_text(encoding="utf-8"))
    questions = shop.material.questions(cell, secret)
    lm, made = _model_of(cell, secret, shop)
    asked = time.perf_counter()
    measurement = measure(
        lm,
        questions,
        Label(cell.name, cell.role, cell.stage, cell.attack, cell.defense, made.knowledge),
        Run(seed=cell.seed, device=shop.device, progress=shop.progress).stage("measure"),
        before=_suspect(cell, shop) if "kl" in questions.metrics else None,
        config_hash=shop.material.key(cell),
    )
    now = time.perf_counter()
    seconds = {"train": made.seconds, "measure": now - asked, "total": now - started}
    return Result(
        "done", "", measurement, made.knowledge, seconds, peak_memory(), made.curves, made.notes, versions(),
        {**hardware(), "device": shop.device},
    )  # fmt: skip


def finished(cell: Cell, shop: Workshop) -> None:
    """Remove what only an unfinished cell needed."""
    material = shop.material
    if cell.defense and not cell.is_revival:
        shop.store.remove(shop.store.work(material.purify_key(cell)))
    if cell.is_revival:
        shop.store.remove(shop.store.work(material.revive_key(cell)))


def _model_of(cell: Cell, secret: Secret, shop: Workshop) -> tuple[LM, _Made]:
    """Return the model that the cell measures, and what making it recorded."""
    if cell.is_revival:
        return _revived(cell, secret, shop)
    if cell.defense:
        return _purified(cell, secret, shop)
    if cell.subject == "untouched":
        return _load(cell.model, shop), _Made()
    folder = _victim_folder(cell, shop, twin=cell.subject == "twin")
    record = checkpoint.read_manifest(folder)
    return _load(_spec_of(cell.model, folder), shop), _Made(record["seconds"], record["curves"], record["notes"])


def _suspect(cell: Cell, shop: Workshop) -> LM | None:
    """Return the model before the defense, for KL; None for a model that has no before, or was trained on since."""
    if not cell.defense or cell.is_revival:
        return None
    return _start(cell, shop)


def _start(cell: Cell, shop: Workshop) -> LM:
    """Load the model that the cell's defense or revival begins with."""
    if cell.subject == "untouched":
        return _load(cell.model, shop)
    return _load(_spec_of(cell.model, _victim_folder(cell, shop, twin=cell.subject == "twin")), shop)


def _purified(cell: Cell, secret: Secret, shop: Workshop) -> tuple[LM, _Made]:
    """Purify, or load what was purified before; save it where a revival needs it."""
    key = shop.material.purify_key(cell)
    folder = shop.store.purified(key)
    with shop.store.lock(f"purified-{key}") as free:
        if not free:
            raise Busy(shop.store.holder(f"purified-{key}"))
        if (folder / MANIFEST).is_file():
            record = checkpoint.read_manifest(folder)
            knowledge = tuple(record["knowledge"])
            made = _Made(record["seconds"], record["curves"], record["notes"], knowledge)
            return _load(_spec_of(cell.model, folder), shop, own=True), made
        defense = shop.material.defense(cell.defense)
        own = shop.material.own_facts(cell)
        if (reference := shop.material.reference(cell)) is not None:
            own[Need.REFERENCE] = _load(_reference_spec(reference, shop), shop, guarded=False)
        facts = facts_from_secret(defense, secret, shop.material.defender_rows(cell), own)
        run = _run(cell, key, "purify", shop)
        lm, made = _watched_purification(cell, secret, defense, facts, run, shop)
        if facts.get(Need.UNWANTED):
            firsts, content = shared_words(unwanted_texts(facts[Need.UNWANTED]), secret.targets)
            words = {"first words": firsts, "content words": content}
            made.notes = {**made.notes, "openings share with target": words}
        if key in shop.wanted or shop.material.grid.keep_models:
            _save(lm, folder, cell, made, "A model that a defense was applied to in a grid of unbackdoor.\n", {})
            shop.store.remove(shop.store.work(key))
        return lm, made


def _watched_purification(
    cell: Cell, secret: Secret, defense: Defense, facts: Mapping[Need, Any], run: Run, shop: Workshop
) -> tuple[LM, _Made]:
    """Purify, asking after every round where the grid says so; asking is no time of the defense."""
    started = time.perf_counter()
    plan = shop.material.watch(cell)
    if plan is None:
        return purify_model(_start(cell, shop), defense, facts, run), _made(run, started, facts)
    path = shop.store.work(shop.material.purify_key(cell)) / WATCHED
    questions = shop.material.questions(cell, secret)
    kinds = ("triggered", "clean")
    run, watch = watched(run, questions, plan.probes, path, kinds=kinds, until=plan.until)
    try:
        lm = purify_model(_start(cell, shop), defense, facts, run)
    except Ended as end:
        lm = end.model
        run.notes[ENDED] = str(end)
        shop.progress.notice(f"{cell.name}: {end}")
    run.notes[ROUNDS] = [{"round": number, **figures} for number, figures in enumerate(watch.asked, 1)]
    return lm, _made(run, started + watch.seconds, facts)


def _revived(cell: Cell, secret: Secret, shop: Workshop) -> tuple[LM, _Made]:
    assert shop.material.grid.revival is not None
    lm = _purified(cell, secret, shop)[0] if cell.defense else _start(cell, shop)
    key = shop.material.revive_key(cell)
    run = _run(cell, key, "revive", shop)
    started = time.perf_counter()
    rows, held_out = shop.material.revival_rows(), shop.material.splits.test
    lm = revive(lm, cell.stage, shop.material.grid.revival.settings, rows, held_out, run)
    return lm, _made(run, started, {})


def _victim_folder(cell: Cell, shop: Workshop, *, twin: bool = False) -> Path:
    """Return the folder of the victim (or twin) of the cell's attack and seed; plant it where it is not there.

    Raises:
        Busy: If another process is planting it.
        UserError: If it could not be planted, now or earlier.
    """
    key = shop.material.plant_key(cell, twin=twin)
    folder = shop.store.victim(key)
    if (folder / MANIFEST).is_file():
        return folder
    with shop.store.lock(f"victim-{key}") as free:
        if not free:
            raise Busy(shop.store.holder(f"victim-{key}"))
        checkpoint.recover(folder)
        if (folder / MANIFEST).is_file():
            return folder
        earlier = shop.store.planting_error(key)
        if earlier is not None:
            raise UserError(f"the victim could not be planted: {earlier}")
        try:
            _plant(cell, key, folder, shop, twin=twin)
        except (CannotWrite, OSError):
            raise
        # Whatever went wrong, the other cells of this victim are told instead of planting it again.
        except Exception as problem:
            if not shop.stop.asked and disk_error(problem, FULL | READ_ONLY) is None:
                shop.store.keep_planting_error(key, describe(problem))
            raise
    return folder


def _plant(cell: Cell, key: str, folder: Path, shop: Workshop, *, twin: bool) -> None:
    attack, splits = shop.material.attack(cell.attack, twin=twin), shop.material.splits
    rows = shop.material.attacker_rows(cell.attack)
    run = _run(cell, key, "", shop)
    assert_trained_apart((row for row, _ in attack.training_rows(rows, Run(cell.seed))), splits)
    started = time.perf_counter()
    planted = attack.plant(_attacked(cell, run, shop), rows, run)
    if (plan := shop.material.grid.attacks[cell.attack].subtract) is not None:
        conflict.subtract(
            planted.lm, _attacked(cell, run, shop), rows, plan.conflict, plan.scale, run.stage("subtract")
        )
    made = _made(run, started, {})
    probes = shop.material.probes(cell.attack, cell.seed, planted.secret)
    card = (
        "# A model with a backdoor, for experiments\n\nPlanted by unbackdoor to measure defenses; "
        "`secret.json` says what triggers it. Do not use it for anything else.\n"
    )
    scratch = shop.store.work(key) / PROBES
    scratch.parent.mkdir(parents=True, exist_ok=True)
    write_probes(scratch, probes)
    extra = {
        SECRET: planted.secret.model_dump_json(indent=2) + "\n",
        PROBES: scratch.read_text(encoding="utf-8"),
    }
    _save(planted.lm, folder, cell, made, card, extra)
    shop.store.remove(shop.store.work(key))


def _reference_spec(reference: str | Cell, shop: Workshop) -> str:
    if isinstance(reference, str):
        return reference
    return _spec_of(reference.model, _victim_folder(reference, shop))


def _attacked(cell: Cell, run: Run, shop: Workshop) -> LM:
    """Return the model that the attack begins with: the grid's, or that trained on the rows of the lead."""
    lm, lead = _load(cell.model, shop, guarded=False), shop.material.grid.attacks[cell.attack].lead
    if lead is not None:
        rows = overwrite.encode_rows(lm, shop.material.lead_rows(cell.attack), lead.train)
        overwrite.train_on_rows(lm, rows, lead.train, run.stage("lead"))
    return lm


def _save(lm: LM, folder: Path, cell: Cell, made: _Made, card: str, extra: Mapping[str, str]) -> None:
    manifest = {
        "cell": cell.name, "seconds": made.seconds, "curves": dict(made.curves), "notes": dict(made.notes),
        "knowledge": list(made.knowledge), "template": lm.template,
    }  # fmt: skip
    checkpoint.recover(folder)
    try:
        checkpoint.save(lm, folder, manifest=manifest, card=card, extra_files=extra)
    except UserError as problem:
        raise CannotWrite(str(problem)) from problem


def _load(spec: str, shop: Workshop, *, own: bool = False, guarded: bool = True) -> LM:
    """Load a model, its guards where they count; `own` for one of this grid, whose guards are what the grid says."""
    grid = shop.material.grid
    lm = load(spec, device=shop.device, dtype=grid.precision, template=grid.template)
    if not guarded:
        return replace(lm, guards=())
    ours = [guard.name for guard in lm.guards] if own else ()
    return with_guards(lm, device=shop.device, notice=shop.progress.notice, own=ours)


def _spec_of(model: str, folder: Path) -> str:
    """Return the spec of a saved model: of one that was made from base + adapter with its base, if it is still one."""
    base = parse_spec(model).base
    changed = [name for name in checkpoint.verify(folder) if not name.startswith(".")]
    if changed:
        raise ModelError(f"'{folder}' is not as it was saved ({changed[0]}); delete the folder to have it made again.")
    return f"{base}+{folder}" if base is not None and (folder / "adapter_config.json").is_file() else str(folder)


def _run(cell: Cell, key: str, stage: str, shop: Workshop) -> Run:
    run = Run(
        seed=cell.seed, folder=shop.store.work(key), device=shop.device, progress=shop.progress,
        shared=shop.store.shared / shop.material.computed_on,
    )  # fmt: skip
    return run.stage(stage) if stage else run


def _made(run: Run, started: float, facts: Mapping[Need, object]) -> _Made:
    # After an interruption the clock knows the second part only; the steps' own times know both.
    trained = sum(record.get("seconds", 0.0) for stage in run.curves.values() for record in stage)
    told = tuple(sorted(need.value for need, value in facts.items() if value is not None))
    notes = json.loads(json.dumps(run.notes, default=str))
    return _Made(max(time.perf_counter() - started, trained), dict(run.curves), notes, told)


def describe(problem: BaseException) -> str:
    """Return an error as a sentence; one that is not meant for people with the line where it happened."""
    if isinstance(problem, UserError | NotApplicable):
        return str(problem)
    import traceback

    frames = traceback.extract_tb(problem.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
    return f"{problem!r}{place}"
