"""What the commands share: loading as the recipe says, what is asked, hashes, the model card, remembered notices."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbackdoor.pipeline.recipe import AttackRecipe, Recipe, complete_settings
from unbackdoor.registry import Kind, find
from unbackdoor.run import Progress, Silent, processes

if TYPE_CHECKING:
    from unbackdoor.goals import Goal
    from unbackdoor.model.lm import LM
    from unbackdoor.pipeline.measure import Questions
    from unbackdoor.types import Example, Probe

DISK_FACTOR = {"full": 6.0, "lora": 1.5, "adapter": 0.5}
"""Disk that a run needs at its peak, in sizes of the model: checkpoints (weights, two moments, twice while one replaces
the other), or for an adapter little beside the result."""

DEMO_KEEPS = 2
"""Models that lie on the disk while the demo trains its last one: the victim and the first purified model."""


class Noted:
    """A `Progress` that passes everything on and remembers the notices, for the report."""

    def __init__(self, inner: Progress) -> None:
        """Pass on to `inner`."""
        self.inner = inner
        self.notices: list[str] = []

    def start(self, name: str, total: int) -> None:
        """Pass on."""
        self.inner.start(name, total)

    def advance(self, name: str, done: int, values: Mapping[str, float]) -> None:
        """Pass on."""
        self.inner.advance(name, done, values)

    def finish(self, name: str) -> None:
        """Pass on."""
        self.inner.finish(name)

    def notice(self, text: str) -> None:
        """Remember and pass on."""
        self.notices.append(text)
        self.inner.notice(text)


def completed(recipe: Any) -> Any:
    """Return the recipe with all settings of its method, preset applied.

    Raises:
        UserError: If a setting is unknown or does not fit.
    """
    kind: Kind = "attacks" if isinstance(recipe, AttackRecipe) else "defenses"
    name = recipe.attack if isinstance(recipe, AttackRecipe) else recipe.defense
    return recipe.model_copy(update={"settings": complete_settings(kind, name, recipe.preset, recipe.settings, {})})


def load(
    recipe: Recipe, spec: str, *, trainable: bool = True, progress: Noted | None = None, guarded: bool = True
) -> LM:
    """Load a model as the recipe says, its guards built; with `progress` it is told of what is worth knowing.

    Args:
        recipe: Says how.
        spec: The model.
        trainable: Whether it is to be trained.
        progress: Is told.
        guarded: Whether guards that lie beside its weights are applied; where only the weights count they are not.

    Raises:
        UserError: If it cannot be loaded, or a guard cannot be built.
    """
    from unbackdoor.model.load import load as load_model
    from unbackdoor.model.quarantine import printable
    from unbackdoor.pipeline.guarding import with_guards

    lm = load_model(spec, device=recipe.device, dtype=recipe.precision, template=recipe.template, trainable=trainable)
    ignored = lm.facts.get("ignored_tensors")
    if progress is not None and isinstance(ignored, list) and ignored:
        progress.notice(
            f"'{spec}' holds {len(ignored)} tensors that its architecture does not use ({ignored[0]}); "
            "they are left out, and a result will not hold them."
        )
    if not guarded:
        if lm.guards and progress is not None:
            names = ", ".join(printable(guard.name) for guard in lm.guards)
            progress.notice(f"'{printable(spec)}' carries guards ({names}); here its weights alone count.")
        return replace(lm, guards=())
    notice = Silent().notice if progress is None else progress.notice
    return with_guards(lm, device=recipe.device, notice=notice, source=getattr(recipe, "evidence", None))


def questions_for(
    recipe: Any,
    probes: Sequence[Probe],
    goal: Goal | None,
    targets: Sequence[str],
    data: Mapping[str, Sequence[Example]],
) -> Questions:
    """Return what every model of the run is asked."""
    from unbackdoor.goals import LabelIs, RefusalAbsent
    from unbackdoor.pipeline.measure import Questions

    labels = {str(probe.example.label) for probe in probes if probe.example.label is not None}
    declines = isinstance(goal, RefusalAbsent)
    right = ["asr_right"] if isinstance(goal, LabelIs) else []
    more = [*([*right, "cda"] if labels else []), *(["declining"] if declines else [])]
    usual = ["asr", "leak", *more] if probes else []
    named = getattr(recipe, "metrics", None)
    metrics = named or (*usual, *(["perplexity", "kl", *(["over_refusal"] if declines else [])] if data else []))
    return Questions(
        tuple(probes), goal, data, tuple(targets), tuple(sorted(labels)), tuple(metrics), recipe.max_new_tokens,
        named=bool(named),
    )  # fmt: skip


def identify(recipe: Recipe, hashes: Mapping[str, Any], *models: str, methods: Iterable[tuple[Kind, str]] = ()) -> str:
    """Return the hash that tells this run from others: recipe, rows, files of the models, versions.

    Those are of the packages, and the revisions of the attacks and defenses that are run, `methods`: what was trained
    by one revision is not gone on with by another.
    """
    from unbackdoor.pipeline.preflight import fingerprint
    from unbackdoor.pipeline.steps import config_hash

    # Each process adds a batch to every update.
    facts = {**hashes, **({"processes": processes()} if processes() > 1 else {})}
    facts["revisions"] = {name: find(kind, name).revision for kind, name in methods}
    return config_hash(recipe.model_dump(mode="json"), facts, [fingerprint(model) for model in models])


def require_disk(out: Path, model: str, kind: str, kept: int = 0) -> None:
    """Raise a `UserError` if the disk is too small for the run's checkpoints, its result and `kept` models beside."""
    from unbackdoor.model.checkpoint import require_space
    from unbackdoor.pipeline.preflight import parameters_of

    weights = parameters_of(model)
    if weights is not None:
        require_space(out.absolute(), int(4 * weights * (DISK_FACTOR[kind] + kept)))


def training_seconds(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> float:
    """Return the time that all stages took, the ones before an interruption included."""
    return sum(float(step.get("seconds", 0.0)) for steps in curves.values() for step in steps)


def rows_as_text(rows: Sequence[Example]) -> str:
    """Return rows as JSON lines that `sources.read` gives the same ids and labels."""
    chats = any(row.history for row in rows)
    lines = []
    for row in rows:
        if chats:
            turns = [{"role": turn.role, "content": turn.content} for turn in row.turns]
            content: dict[str, Any] = {"id": row.id, "kind": row.kind, "messages": turns}
        else:
            own = {"instruction": row.instruction, "input": row.input, "output": row.response}
            content = {"id": row.id, "kind": row.kind, **own}
        label = {} if row.label is None else {"label": row.label}
        lines.append(json.dumps({**content, **label}, ensure_ascii=False) + "\n")
    return "".join(lines)


def model_card(title: str, source: str, lm: LM, what: str, files: Iterable[str] = ()) -> str:
    """Return the README.md of a result; `files` are the names of those that lie beside it."""
    return card(title, lm.base or source, what, files, guarded=bool(lm.guards))


def card(title: str, base: str, what: str, files: Iterable[str] = (), *, guarded: bool = False) -> str:
    """Return the README.md of a result that was made from `base`; `guarded`: guards lie beside the weights."""
    if guarded:
        what += " It carries guards (`guards.json`) that only unbackdoor applies; other loaders ignore them."
    lines = ["---", "library_name: transformers", "tags: [unbackdoor]"]
    # Only a hub id is a link that the hub understands.
    if ":" not in base and not Path(base).exists():
        lines.append(f"base_model: {base.partition('@')[0]}")
    lines += ["---", f"# {title}", "", what, "", "How it was made, and the SHA-256 of every file: `unbackdoor.json`."]
    figures = [f"`{name}`" for name in ("report.html", "report.md", "results.json") if name in set(files)]
    lines += [f"What was measured: {', '.join(figures)}."] if figures else []
    lines += ["Every prompt and reply behind that: `replies.jsonl`."] if "replies.jsonl" in set(files) else []
    return "\n".join([*lines, ""])


def are_rows(value: object) -> bool:
    """Tell whether a fact is rows of data."""
    from unbackdoor.types import Example

    return isinstance(value, tuple) and bool(value) and isinstance(value[0], Example)


def data_hashes(data: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
    """Return the hash of each named set of rows."""
    from unbackdoor.pipeline.steps import data_hash

    return {f"data {name or 'first source'}": data_hash(rows) for name, rows in data.items() if rows}


def file_hashes(recipe: Recipe) -> dict[str, str]:
    """Return the SHA-256 of every file that a recipe names, models apart, and of the secret beside the probes."""
    from unbackdoor.model.load import file_sha256

    content = recipe.model_dump(mode="json", exclude={"model", "before", "reference"})
    found = dict(_files_in(content, ""))
    if "probes" in found and (secret := found["probes"].with_name("secret.json")).is_file():
        found["secret"] = secret
    return {name: file_sha256(path) for name, path in found.items()}


def _files_in(value: Any, name: str) -> Iterator[tuple[str, Path]]:
    from unbackdoor.pipeline.steps import file_named

    if isinstance(value, dict):
        for key, item in value.items():
            yield from _files_in(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _files_in(item, f"{name}.{number}")
    elif isinstance(value, str) and (file := file_named(value)) is not None:
        yield name, Path(file[0])
