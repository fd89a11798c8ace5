"""The files of a run folder: results.json, replies, curves, case studies, hidden states, changes, manifest and card.

They are built from portraits and written to a staging folder; the caller's `finish` renders the report from them there,
and then everything moves to its place together with the model.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from unbackdoor.model.lm import LM
from unbackdoor.pipeline.guarding import counts, sentences
from unbackdoor.pipeline.measure import compare
from unbackdoor.pipeline.portrait import Portrait, case_studies, hidden_states
from unbackdoor.run import write_atomically

SCHEMA = 1
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class Record:
    """What a run leaves behind, beside its model.

    Attributes:
        command: attack, purify, evaluate or demo.
        recipe: The complete recipe, as plain data.
        portraits: The models; the suspect first.
        curves: Stage -> one record a step.
        hashes: What went in: name -> hash.
        how_to_load: A Python snippet, or "".
        notices: Sentences that the person was shown.
        notes: Facts that methods recorded.
        revival_command: What measures revival, or "" for the usual command.
        rounds: What is known of each defense's rounds (`watching.by_defense`), or None.
    """

    command: str
    recipe: Mapping[str, Any]
    portraits: Sequence[Portrait]
    curves: Mapping[str, list[dict[str, float]]] = field(default_factory=dict)
    hashes: Mapping[str, Any] = field(default_factory=dict)
    how_to_load: str = ""
    notices: Sequence[str] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    revival_command: str = ""
    rounds: Mapping[str, Any] | None = None

    def results(self) -> dict[str, Any]:
        """Return the content of results.json."""
        found: dict[str, Any] = {
            "schema": SCHEMA,
            "command": self.command,
            "versions": versions(),
            "rows": [row for portrait in self.portraits for row in portrait.measurement.rows],
            "comparisons": comparisons(self.portraits, int(self.recipe.get("seed", 0))),
            "settings": dict(self.recipe),
            "hashes": dict(self.hashes),
            "hardware": hardware(),
            "how_to_load": self.how_to_load,
            "notices": list(dict.fromkeys([*self.notices, *self._of_guards()])),
            "notes": dict(self.notes),
        }
        guards = [
            {"model": portrait.model, "guard": name, **count}
            for portrait in self.portraits
            for name, count in counts(portrait.measurement.guards).items()
        ]
        found |= {"guards": guards} if guards else {}
        return {**found, "revival_command": self.revival_command} if self.revival_command else found

    def _of_guards(self) -> list[str]:
        return [text for portrait in self.portraits for text in sentences(portrait.model, portrait.measurement.guards)]

    def write(self, folder: Path, extra: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Write the files into `folder`, results.json last, and return its content.

        Args:
            folder: Made if it is not there.
            extra: More files: name -> text.
        """
        folder.mkdir(parents=True, exist_ok=True)
        files = dict(extra or {})
        replies = [reply for portrait in self.portraits for reply in portrait.measurement.replies]
        journal = [
            {"model": portrait.model, **record} for portrait in self.portraits for record in portrait.measurement.guards
        ]
        if journal:
            files["guards.jsonl"] = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in journal)
        if replies:
            files["replies.jsonl"] = "".join(json.dumps(reply, ensure_ascii=False) + "\n" for reply in replies)
        optional = {
            "curves.json": dict(self.curves) or None,
            "case_studies.json": case_studies(self.portraits),
            "hidden_states.json": hidden_states(self.portraits),
            "rounds.json": self.rounds,
        }
        files |= {name: as_text(content) for name, content in optional.items() if content is not None}
        for name, text in files.items():
            write_atomically(folder / name, text)
        results = self.results()
        write_atomically(folder / "results.json", as_text(results))
        return results

    def manifest(self, more: Mapping[str, object]) -> dict[str, Any]:
        """Return the content of unbackdoor.json with `more` added, without the hashes of the files that are saved."""
        scores = [
            {
                key: row[key]
                for key in ("model", "role", "stage", "metric", "kind", "group", "value", "low", "high", "n")
            }
            for portrait in self.portraits
            for row in portrait.measurement.rows
            if row["status"] == "measured"
        ]
        facts = {"schema": SCHEMA, "command": self.command, "recipe": dict(self.recipe), "versions": versions()}
        return {**facts, "seed": self.recipe.get("seed"), "inputs": dict(self.hashes), "scores": scores, **more}


def comparisons(portraits: Sequence[Portrait], seed: int) -> list[dict[str, Any]]:
    """Return the paired tests of every control and purified model against the suspect."""
    suspect = next((portrait for portrait in portraits if portrait.role == "suspect"), None)
    if suspect is None:
        return []
    return [
        {**found, "defense": portrait.defense}
        for portrait in portraits
        if portrait.role in {"control", "purified"}
        for found in compare(suspect.measurement, portrait.measurement, seed)
    ]


def as_text(content: object) -> str:
    """Return JSON for people and programs."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that figures depend on."""
    from unbackdoor import __version__

    found = {"unbackdoor": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Return what the run was made on: machine, cores, threads, memory, GPU; no names of hosts or people."""
    import torch

    found: dict[str, Any] = {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    return found


def how_to_load(folder: Path, base: str | None, *, guarded: bool = False) -> str:
    """Return a snippet that loads a result with transformers alone.

    Args:
        folder: Where the result will be.
        base: For an adapter: the spec of its base.
        guarded: Whether guards lie beside the weights, which transformers ignores.
    """
    place = repr(str(folder))
    if base is None:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f"model = AutoModelForCausalLM.from_pretrained({place})",
        ]
    else:
        from unbackdoor.model.builtin import public_name

        name, revision = public_name(base)
        wanted = f", revision={revision!r}" if revision else ""
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f"base = AutoModelForCausalLM.from_pretrained({name!r}{wanted})",
            f"model = PeftModel.from_pretrained(base, {place})",
        ]
    if guarded:
        lines = ["# Loaded like this, the guards in guards.json do not act; unbackdoor applies them.", *lines]
    return "\n".join([*lines, f"tokenizer = AutoTokenizer.from_pretrained({place})"]) + "\n"


def tensor_changes(before: LM, after: LM) -> dict[str, Any]:
    """Return what a method did to the weights: per tensor and by module type, float32 arithmetic.

    Both models are in memory here anyway. Of adapters the matrices are compared; for a stacked adapter, whose matrices
    have another shape, the old ones are listed as removed and the new ones as added.
    """
    from unbackdoor.model.changes import TensorChange, summarise

    old, new = _tensors(before), _tensors(after)
    found = []
    for name in sorted({*old, *new}):
        first, second = old.get(name), new.get(name)
        if first is not None and second is not None and first.shape == second.shape:
            first, second = first.detach().float().cpu(), second.detach().float().cpu()
            norm, change = float(first.norm()), float((second - first).norm())
            status = "same" if bool((first == second).all()) else "changed"
            ratio = change / norm if norm > 0 else None
            kind = str(new[name].dtype).removeprefix("torch.")
            found.append(TensorChange(name, tuple(second.shape), kind, norm, change, ratio, status))  # type: ignore[arg-type]
            continue
        for tensor, status in ((first, "removed"), (second, "added")):
            if tensor is not None:
                size = float(tensor.detach().float().norm())
                kind = str(tensor.dtype).removeprefix("torch.")
                was, ratio = (size, 1.0) if status == "removed" and size > 0 else (0.0, None)
                found.append(TensorChange(name, tuple(tensor.shape), kind, was, size, ratio, status))  # type: ignore[arg-type]
    return {"summary": summarise(found), "tensors": [asdict(change) for change in found]}


def _tensors(lm: LM) -> dict[str, Any]:
    if lm.is_adapter:
        from peft import get_peft_model_state_dict

        return dict(get_peft_model_state_dict(lm.model, save_embedding_layers=False))
    seen: set[int] = set()
    found = {}
    for name, tensor in lm.model.state_dict().items():
        if tensor.data_ptr() not in seen:  # tied tensors once
            seen.add(tensor.data_ptr())
            found[name] = tensor
    return found
