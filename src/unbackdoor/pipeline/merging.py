"""The command merge: two models, or what a YAML file in mergekit's schema says, become one folder.

No model is loaded: tensors are read, merged and written one after another. Stopped or killed, the same call goes on
where it was; inputs or settings that changed since make it another merge.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbackdoor.errors import ModelError, UserError
from unbackdoor.merge import stream
from unbackdoor.merge.from_recipe import two_models
from unbackdoor.merge.match import warning
from unbackdoor.merge.passthrough import kept_numbers
from unbackdoor.merge.plan import Plan, make_plan
from unbackdoor.merge.settings import Merge
from unbackdoor.merge.source import open_source
from unbackdoor.merge.tokens import other_tokens, token_ids
from unbackdoor.model.checkpoint import copy_tokenizer, publish, require_space
from unbackdoor.model.load import local_folder
from unbackdoor.model.quarantine import printable, settings_naming_tokens
from unbackdoor.model.spec import parse_spec
from unbackdoor.pipeline import artefacts
from unbackdoor.pipeline.commands import Job, Outcome
from unbackdoor.pipeline.common import Noted, card
from unbackdoor.pipeline.recipe import MergeRecipe
from unbackdoor.run import Progress

if TYPE_CHECKING:
    from unbackdoor.pipeline.folders import Workspace
    from unbackdoor.pipeline.plan import Plan as Estimate

WORKING = "stages"
_GUARDS, _GENERATION = "guards.json", "generation_config.json"


def merge_of(recipe: MergeRecipe) -> Merge:
    """Return the merge that a recipe describes.

    Raises:
        UserError: If it names too few models, a setting that the method does not use, or a YAML file with a mistake.
    """
    if recipe.yaml is None:
        return two_models(
            recipe.model, recipe.other, recipe.method, recipe.t, base=recipe.base, layers=recipe.layers,
            density=recipe.density, scale=recipe.scale, threshold=recipe.threshold, seed=recipe.seed,
        )  # fmt: skip
    from unbackdoor.merge.mergekit_yaml import read_merge

    content, usual = recipe.model_dump(), MergeRecipe().model_dump()
    idle = [name for name in content if name not in {"yaml", "seed"} and content[name] != usual[name]]
    if idle:
        raise UserError(f"'{recipe.yaml}' says how to merge what, so {idle[0]} has no meaning beside it; leave it out.")
    return read_merge(Path(recipe.yaml), seed=recipe.seed)


def run_merge(recipe: MergeRecipe, job: Job) -> Outcome:
    """Merge models into a folder.

    Raises:
        UserError: If an input is wrong, models do not match, a value is not finite, or the folder is taken.
    """
    from unbackdoor.merge.compute import blocks
    from unbackdoor.pipeline.folders import workspace

    progress = Noted(job.progress)
    merge = merge_of(recipe)
    plan = _planned(recipe, merge, progress)
    files = stream.shards(plan.pieces, plan.sources[merge.suspect])
    identity = _identity(recipe, merge)
    settings = {**recipe.model_dump(mode="json"), "models": dict(enumerate(merge.models))}
    if not stream.begun(job.out / WORKING / "weights", identity):
        require_space(job.out.absolute(), _bytes(plan))
    with (
        workspace(job.out, settings_hash=identity, settings=settings, overwrite=job.overwrite) as place,
        _Hashes(merge) as hashes,
    ):
        weights = place.stages / "weights"
        written = stream.write(weights, files, identity, blocks, progress)
        record = artefacts.Record(
            "merge", recipe.model_dump(mode="json"), (), hashes={"config": identity, **hashes.found()},
            how_to_load=artefacts.how_to_load(job.out, None, guarded=_of_suspect(merge, _GUARDS) is not None),
            notices=progress.notices, notes=_facts(merge, plan),
        )  # fmt: skip
        _publish(place, merge, plan, written, record)
    return Outcome(job.out, record.results())


def plan_merge(recipe: MergeRecipe) -> Estimate:
    """Return the plan of `merge`: models in folders are checked as in the run.

    Raises:
        UserError: If an input is wrong.
    """
    from unbackdoor.pipeline import plan as plans

    merge = merge_of(recipe)
    sides = [side for spec in map(parse_spec, merge.models) for side in (spec.base or spec, spec.adapter) if side]
    if any(side.kind == "hub" for side in sides):
        notice = "a model is not on this machine, so its size, and with it time and memory, are unknown."
        return plans.Plan((plans.Part(stream.WORK, None),), None, None, (notice,))
    progress = Noted(Job(Path()).progress)
    plan = _planned(recipe, merge, progress)
    read = sum(stream.size_of(info) for source in plan.sources.values() for info in source.infos.values())
    seconds = (read + _bytes(plan)) / _hash_speed()
    part = plans.Part(f"{stream.WORK} {len(plan.pieces)} tensors", seconds)
    return plans.Plan((part,), PROGRAM, _bytes(plan) + 50_000_000, tuple(progress.notices))


PROGRAM = 270_000_000
"""Memory of the program with torch and the blocks that are in work, bytes, measured."""


def _hash_speed() -> float:
    """Return bytes a second; hashing what is read and written takes longest, beside the disk."""
    import time

    data = bytes(8_000_000)
    started = time.perf_counter()
    hashlib.sha256(data)
    return len(data) / (time.perf_counter() - started)


def _planned(recipe: MergeRecipe, merge: Merge, progress: Progress) -> Plan:
    """Open and compare the models, and tell what a person should know before they are merged.

    Raises:
        UserError: If an input is wrong; of what a YAML file says with its name.
    """
    sources = {spec: open_source(spec) for spec in merge.models}
    try:
        plan = make_plan(merge, sources)
    except ModelError:
        raise
    except UserError as problem:
        raise problem if recipe.yaml is None else UserError(f"{printable(recipe.yaml)}, {problem}") from problem
    suspect = plan.sources[merge.suspect]
    for spec in merge.models:
        if spec == merge.suspect:
            continue
        names = suspect.shown, plan.sources[spec].shown
        tokens = [token_ids(_tokenizer_folder(one)) for one in (merge.suspect, spec)]
        # Layers that are stacked need not be alike.
        apart = None if merge.method == "passthrough" else warning(suspect, plan.sources[spec])
        for text in (apart, other_tokens(tokens[0], tokens[1], names)):
            if text is not None:
                progress.notice(text)
    if plan.config is not None and (numbers := kept_numbers(plan.config)) is not None:
        progress.notice(numbers)
    adapted = [source.shown for source in plan.sources.values() if source.adapted]
    if adapted:
        progress.notice(f"'{adapted[0]}' is an adapter on its base; the result is full weights, not an adapter.")
    own = _of_suspect(merge, _GENERATION)
    if named := [*settings_naming_tokens(suspect.config), *([] if own is None else _naming_tokens(own))]:
        progress.notice(
            f"'{suspect.shown}' has generation settings that name tokens ({', '.join(named)}); the result has not."
        )
    if _of_suspect(merge, _GUARDS) is not None:
        progress.notice(
            f"'{suspect.shown}' carries guards; the result has them, too, and only unbackdoor applies them."
        )
    if suspect.config.get("auto_map"):
        progress.notice(f"'{suspect.shown}' asks for code of its own (auto_map); the result does not.")
    return plan


def _bytes(plan: Plan) -> int:
    return sum(stream.size_of(piece.info) for piece in plan.pieces)


def _facts(merge: Merge, plan: Plan) -> dict[str, Any]:
    """Return what was done, for the manifest."""
    from unbackdoor.merge.compute import sole

    alone = sum(sole(piece) is not None for piece in plan.pieces)
    return {"method": merge.method, "models": list(merge.models), "tensors": len(plan.pieces), "copied": alone}


def _publish(place: Workspace, merge: Merge, plan: Plan, written: Mapping[str, str], record: artefacts.Record) -> None:
    suspect = plan.sources[merge.suspect]
    assert suspect.folder is not None

    def write(partial: Path) -> Mapping[str, str]:
        for name in written:
            _link(place.stages / "weights" / name, partial / name)
        _write_config(partial / "config.json", merge, plan)
        if (own := _of_suspect(merge, _GUARDS)) is not None:
            shutil.copyfile(own, partial / _GUARDS)
        if (own := _of_suspect(merge, _GENERATION)) is not None:
            _copy_generation_settings(own, partial / _GENERATION)
        copy_tokenizer(_tokenizer_folder(merge.tokenizer or merge.suspect), partial)
        return written

    others = ", ".join(f"'{spec}'" for spec in merge.models[1:])
    title = f"{merge.suspect} merged by {merge.method}"
    what, guarded = f"Tensor by tensor merged with {others}.", _of_suspect(merge, _GUARDS) is not None
    text = card(title, merge.suspect.partition("+")[0], what, guarded=guarded)
    manifest = record.manifest({"result": "merged", "merge": dict(record.notes), "notices": list(record.notices)})
    publish(place.folder, write, 0, manifest=manifest, texts={"README.md": text}, overwrite=True)


def _link(source: Path, copy: Path) -> None:
    """Give a file a second name, so that it is not lost if the process dies before its folder is in place."""
    try:
        os.link(source, copy)
    except OSError:
        shutil.copyfile(source, copy)  # a file system without links


def _write_config(path: Path, merge: Merge, plan: Plan) -> None:
    """Write config.json: the suspect's, byte for byte where nothing has to change."""
    suspect = plan.sources[merge.suspect]
    assert suspect.folder is not None
    content = dict(plan.config if plan.config is not None else suspect.config)
    if merge.dtype is not None:
        name = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[merge.dtype]
        content |= dict.fromkeys([key for key in ("torch_dtype", "dtype") if key in content] or ["dtype"], name)
    for key in ("auto_map", *settings_naming_tokens(content)):
        content.pop(key, None)
    if content == suspect.config:
        shutil.copyfile(suspect.folder / "config.json", path)
    else:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _of_suspect(merge: Merge, name: str) -> Path | None:
    """Return a file that lies beside the suspect's weights: its adapter's goes before its base's."""
    spec = parse_spec(merge.suspect)
    sides = [local_folder(side) for side in (spec.adapter, spec.base or spec) if side is not None]
    return next((side / name for side in sides if (side / name).is_file()), None)


def _copy_generation_settings(own: Path, path: Path) -> None:
    """Copy generation settings, byte for byte where none of them names tokens."""
    named = _naming_tokens(own)
    if not named:
        shutil.copyfile(own, path)
        return
    content = json.loads(own.read_bytes())
    kept = {name: value for name, value in content.items() if name not in named}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _naming_tokens(own: Path) -> list[str]:
    """Return the generation settings that are not handed on.

    Raises:
        ModelError: If the file is no JSON object.
    """
    try:
        return settings_naming_tokens(dict(json.loads(own.read_bytes())))
    except (ValueError, TypeError, RecursionError) as problem:
        raise ModelError(f"{printable(str(own))} is not a JSON object; mend it, or remove it.") from problem


def _tokenizer_folder(model: str) -> Path:
    """Return where a model's tokenizer is: an adapter may bring its own."""
    spec = parse_spec(model)
    if spec.adapter is not None:
        folder = local_folder(spec.adapter)
        if (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
            return folder
    return local_folder(spec.base or spec)


def _identity(recipe: MergeRecipe, merge: Merge) -> str:
    """Return what tells this merge from any other: settings, versions, and the state of every file that is read."""
    from unbackdoor.pipeline.steps import config_hash

    states = [
        [path.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        for folder in _folders(merge)
        for path in sorted(folder.iterdir())
        if path.is_file()
        for stat in [path.stat()]
    ]
    return config_hash(recipe.model_dump(mode="json", exclude={"yaml"}), repr(merge), states)


def _folders(merge: Merge) -> list[Path]:
    """Return the folders of all models, of base + adapter both."""
    specs = [side for spec in map(parse_spec, merge.models) for side in (spec.base or spec, spec.adapter) if side]
    return list(dict.fromkeys(local_folder(side) for side in specs))


class _Hashes:
    """The SHA-256 of every input, made in a thread while the models are merged."""

    def __init__(self, merge: Merge) -> None:
        """Hash the files of all models of a merge."""
        self.merge, self.stopped = merge, threading.Event()
        self.hashes: dict[str, dict[str, str]] = {}
        self.problem: OSError | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> _Hashes:
        """Begin."""
        self.thread.start()
        return self

    def __exit__(self, kind: object, problem: object, trace: object) -> None:
        """Stop, also in the middle."""
        self.stopped.set()
        self.thread.join()

    def found(self) -> dict[str, dict[str, str]]:
        """Wait, and return for every model the hashes of its files.

        Raises:
            OSError: If a file could not be read.
        """
        self.thread.join()
        if self.problem is not None:
            raise self.problem
        return self.hashes

    def _work(self) -> None:
        known: dict[Path, str] = {}
        try:
            for spec in self.merge.models:
                parsed = parse_spec(spec)
                for side in (parsed.base or parsed, parsed.adapter):
                    for path in _read_files(local_folder(side)) if side is not None else ():
                        if path not in known:
                            known[path] = self._digest(path)
                        prefix = "adapter/" if side is parsed.adapter else ""
                        self.hashes.setdefault(spec, {})[prefix + path.name] = known[path]
        except OSError as problem:
            self.problem = problem

    def _digest(self, path: Path) -> str:
        digest = hashlib.sha256()
        with open(path, "rb") as handle:
            while not self.stopped.is_set() and (read := handle.read(1 << 20)):
                digest.update(read)
        return digest.hexdigest()


def _read_files(folder: Path) -> list[Path]:
    suffixes = {".safetensors", ".json", ".jinja", ".txt", ".model"}
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in suffixes)
