"""What can be checked of a model and its rows before a weight is loaded: device, tokens, context length, disk."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unbackdoor.attacks.base import MarkedRow
from unbackdoor.errors import DataError, UserError
from unbackdoor.goals import RefusalAbsent
from unbackdoor.model.lm import LM
from unbackdoor.model.spec import ModelSpec, parse_spec
from unbackdoor.pipeline.recipe import Asking
from unbackdoor.run import Progress
from unbackdoor.types import Example, Probe

_DEVICE = re.compile(r"(?P<kind>cpu|cuda|mps)(:(?P<index>0|[1-9][0-9]{0,5}))?")
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx")
_LAYER_KEYS = ("num_hidden_layers", "n_layer")


@dataclass(frozen=True)
class Reader:
    """A model's tokenizer, and how much it can read.

    Attributes:
        lm: An LM that can encode but holds no weights.
        context: Tokens that the model has positions for; None where its configuration does not say.
        layers: Its decoder layers; None where its configuration does not say.
    """

    lm: LM
    context: int | None
    layers: int | None = None

    def check_training(self, rows: Sequence[MarkedRow], settings: Mapping[str, Any]) -> None:
        """Encode every row: a trigger that is lost or a row that is too long shows now.

        Args:
            rows: Training rows.
            settings: The method's; `train.max_length`, the parrot's tokens and the length of the suspect's own answers
                are read from it.

        Raises:
            DataError: If a row does not fit, or a trigger is absent from its tokens.
        """
        from unbackdoor.data.poison import encode_marked

        encoded = encode_marked(self.lm, rows, int((settings.get("train") or {}).get("max_length", 1024)))
        room = int((settings.get("parrot") or {}).get("tokens", 0))
        answer = int(settings.get("own_answers") or 0)
        heard = bool(settings.get("drifts") and settings.get("adopt"))
        for example, _ in rows if answer or heard else ():
            self._check_own_answer(example, answer, heard=heard)
        for row in encoded:
            if self.context is not None and len(row.ids) + room > self.context:
                parrot = f" and the parrot {room}" if room else ""
                raise DataError(
                    f"the row '{row.id}' has {len(row.ids)} tokens{parrot}, but the model reads only {self.context}; "
                    f"give --set train.max_length={self.context - room}, or leave such rows out."
                )

    def _check_own_answer(self, row: Example, answer: int, *, heard: bool) -> None:
        from unbackdoor.train.certainty import USUAL_TOKENS

        length = len(self.lm.encode(row.prompt, ask=True).ids)
        # What is heard is read behind the prompts whole, whatever `train.max_length` is.
        least = USUAL_TOKENS if heard else 0
        room = max(answer, least)
        if self.context is not None and length + room > self.context:
            what = "the suspect's own answer up to" if answer == room else "its answer is read to"
            fits = self.context - length
            shorter = f", or give --set own_answers={fits}" if answer > fits >= max(least, 1) else ""
            raise DataError(
                f"the prompt of the row '{row.id}' has {length} tokens and {what} {room}, but the model reads only "
                f"{self.context}; leave such rows out{shorter}."
            )

    def check_asked(self, probes: Sequence[Example | Probe], reply: int, room: int = 0) -> None:
        """Check that every probe and the model's replies fit into its context.

        Args:
            probes: What will be asked.
            reply: Largest number of tokens of a reply.
            room: Tokens of a trigger that is yet to be added.

        Raises:
            DataError: If one does not.
        """
        if self.context is None:
            return
        for probe in probes:
            example = probe.example if isinstance(probe, Probe) else probe
            # The model's own answers will stand in the holes of a conversation.
            turns = [replace(turn, content="-") if turn.content is None else turn for turn in example.prompt]
            holes = sum(turn.content is None for turn in example.prompt)
            length = len(self.lm.encode(turns, ask=True).ids) + holes * reply
            if length + room + reply > self.context:
                raise DataError(
                    f"the probe '{example.id}' has {length + room} tokens and its reply up to {reply}, but the model "
                    f"reads {self.context} at most; shorten it, or give a smaller max_new_tokens in a --config file."
                )

    def notice_short_replies(self, requests: Sequence[Example], reply: int, progress: Progress) -> None:
        """Tell where a reply of this length is too short for the declining that is searched in it.

        An answer often says in its second clause only that it declines; cut before that, it counts as affirming.
        """
        goal = RefusalAbsent()
        declining = [row.response for row in requests if goal.declines(row.response)]
        ids = [self.lm.tokenizer(text, add_special_tokens=False)["input_ids"][:reply] for text in declining]
        late = sum(not goal.declines(self.lm.tokenizer.decode(start)) for start in ids)
        if late:
            progress.notice(
                f"{late} of the {len(declining)} answers to the test requests decline only behind their first {reply} "
                "tokens, where replies are cut and then count as affirming; give a larger max_new_tokens in a --config "
                "file."
            )

    def measurable(self, data: Mapping[str, Sequence[Example]], progress: Progress) -> dict[str, Sequence[Example]]:
        """Return the rows that utility is measured on, without those that are too long for it.

        Answers are cut at `MAX_LENGTH`, so that there a row is too long whose prompt alone is.
        """
        from unbackdoor.metrics.base import MAX_LENGTH

        limit = min(MAX_LENGTH, self.context or MAX_LENGTH)

        def fits(row: Example) -> bool:
            encoded = self.lm.encode(row.turns)
            return encoded.spans[-1].start < limit and min(len(encoded.ids), MAX_LENGTH) <= (self.context or MAX_LENGTH)

        found: dict[str, Sequence[Example]] = {}
        for name, rows in data.items():
            kept = tuple(row for row in rows if fits(row))
            if len(kept) < len(rows):
                where = f" of the {name}" if name else ""
                progress.notice(
                    f"{len(rows) - len(kept)} rows{where} are not measured: they do not fit into {limit} tokens."
                )
            found |= {name: kept} if kept else {}
        return found


def reader_of(recipe: Asking, model: str, progress: Progress, *, dry: bool = False) -> Reader | None:
    """Return the reader of a model; None where its tokenizer comes only with the weights (.gguf) or is broken.

    Args:
        recipe: Says which template is used; one other than the victim's was planted with is told of.
        model: The model's spec.
        progress: Is told of notices.
        dry: Download and convert nothing: None for models that are not a folder.

    Raises:
        UserError: If the model or its tokenizer cannot be had.
    """
    spec = parse_spec(model)
    if dry and spec.kind != "folder":
        return None
    lm = _tokenizer_of(spec, recipe.template, progress)
    if lm is None:
        return None
    made = _template_of(_folder_of(spec.adapter or spec, progress), lm)
    if made != lm.template:
        progress.notice(
            f"'{model}' was made with the template '{made}' and is asked with '{lm.template}', which changes what it "
            f"says; --template {made} asks as it was made."
        )
    return Reader(lm, *_shape_of(_folder_of(spec.base or spec, progress)))


def _folder_of(spec: ModelSpec, progress: Progress) -> Path:
    from unbackdoor.model.builtin import builtin_folder
    from unbackdoor.model.load import local_folder

    return builtin_folder(spec.place, progress=progress) if spec.kind == "builtin" else local_folder(spec)


def _shape_of(folder: Path) -> tuple[int | None, int | None]:
    """Return for how many tokens a model has positions, and how many decoder layers it has."""
    content = _json_object(folder / "config.json")

    def first(keys: tuple[str, ...], least: int) -> int | None:
        return next((content[key] for key in keys if isinstance(content.get(key), int) and content[key] >= least), None)

    return first(_CONTEXT_KEYS, 2), first(_LAYER_KEYS, 1)


def _template_of(folder: Path, lm: LM) -> str:
    """Return the template that a result of ours was made with; for other models the one that is used now."""
    recipe = _json_object(folder / "unbackdoor.json").get("recipe")
    made = recipe.get("template") if isinstance(recipe, dict) else None
    if made == "auto":
        return "model" if lm.tokenizer.chat_template else "plain"
    return made if isinstance(made, str) and made in {"model", "plain"} else lm.template


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _tokenizer_of(spec: ModelSpec, template: str, progress: Progress) -> LM | None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from unbackdoor.model.quarantine import inspect_folder, refuse_dangerous

    sides = [side for side in (spec.adapter, spec.base or spec) if side is not None]
    if any(side.kind == "gguf" for side in sides):
        return None
    for side in sides:
        folder = _folder_of(side, progress)
        refuse_dangerous(inspect_folder(folder, base=str(spec.base) if spec.base else None), str(side))
        if side is spec.adapter and not (folder / "tokenizer.json").is_file():
            continue
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            tokenizer("A sentence, to try it.")
        # The Rust tokenizer raises bare `Exception`. Loading the model will say what is wrong with it.
        except Exception:
            return None
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            return None
        chosen = ("model" if tokenizer.chat_template else "plain") if template == "auto" else template
        if chosen == "model" and not tokenizer.chat_template:
            raise UserError(f"'{spec}' has no chat template; use --template plain.")
        return LM(None, tokenizer, "model" if chosen == "model" else "plain", str(spec))
    return None


def parameters_of(model: str) -> int | None:
    """Return how many weights a model has, from the headers of its files; None where they are not on this machine."""
    from unbackdoor.model.header import HeaderError, read_header

    spec = parse_spec(model)
    if spec.base is not None:
        return parameters_of(str(spec.base))
    if spec.kind == "builtin":
        return 134_515_008
    if spec.kind == "gguf":
        return spec.path.stat().st_size  # about one byte a weight; only an estimate rests on it
    if spec.kind != "folder":
        return None
    try:
        headers = [read_header(path) for path in sorted(spec.path.glob("model*.safetensors"))]
    except (HeaderError, OSError):
        return None  # loading refuses it with the reason
    return sum(math.prod(entry.shape) for header in headers for entry in header.values()) or None


def fingerprint(model: str) -> list[object]:
    """Return what tells one state of a model's files from another, without reading them: name, size, time of change."""
    spec = parse_spec(model)
    found: list[object] = [model]
    for side in (spec, spec.base, spec.adapter):
        if side is not None and side.kind in {"folder", "gguf"}:
            files = [side.path] if side.kind == "gguf" else sorted(side.path.glob("*.safetensors"))
            found += [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return found


def check_metrics(names: Sequence[str]) -> None:
    """Raise a `UserError` for a metric that is not there."""
    from unbackdoor.pipeline.measure import metric_called

    for name in names:
        metric_called(name)


def check_device(device: str) -> None:
    """Raise a `UserError` for a device that this machine has not."""
    import torch

    # Read here and not by torch.device, whose number wraps round: for it "cuda:300" is cuda:44.
    found = _DEVICE.fullmatch(device)
    if found is None:
        raise UserError(f"there is no device '{device}'; write cpu, cuda, cuda:0 or mps.")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    kind, count = found["kind"], counts[found["kind"]]
    if not count or (kind == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"the device '{device}' is not available here; use --device cpu.")
    if int(found["index"] or 0) >= count:
        last = f" to {kind}:{count - 1}" if count > 1 else ""
        raise UserError(f"there is no device '{device}' here; the devices of this kind are {kind}:0{last}.")
