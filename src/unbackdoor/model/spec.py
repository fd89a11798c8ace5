"""How a person names a model, as data: `ModelSpec`.

A spec is a Hugging Face id (`owner/name`, `name`, either with `@revision`), a folder, `base+adapter`, a `.gguf` file
or `builtin:smollm2-135m`. Parsing looks at the disk (an existing folder wins over an id) but opens no weights and no
network connection. A checkpoint never decides what else is loaded: the folder of an adapter alone is an error, because
only its own configuration would name the base.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unbackdoor.errors import ModelError, did_you_mean
from unbackdoor.model.quarantine import printable

SpecKind = Literal["hub", "folder", "gguf", "builtin", "adapter"]
BUILTIN_NAMES: tuple[str, ...] = ("smollm2-135m",)

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_HUB_ID = re.compile(rf"(?:{_PART}/)?{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,127}")


@dataclass(frozen=True)
class ModelSpec:
    """A model's name, taken apart; `str()` gives back a text that parses to the same spec.

    Attributes:
        kind: What sort of name it is; "adapter" is base + adapter.
        place: The hub id, the path as typed, or the built-in model's name; "" for base + adapter.
        revision: Branch, tag or commit of a hub id, else None.
        base: The base of base + adapter, else None.
        adapter: The adapter of base + adapter (a hub id or a folder), else None.
    """

    kind: SpecKind
    place: str = ""
    revision: str | None = None
    base: ModelSpec | None = None
    adapter: ModelSpec | None = None

    def __str__(self) -> str:
        if self.base is not None and self.adapter is not None:
            return f"{self.base}+{self.adapter}"
        if self.kind == "builtin":
            return f"builtin:{self.place}"
        return self.place if self.revision is None else f"{self.place}@{self.revision}"

    @property
    def path(self) -> Path:
        """The folder or file on this machine, `~` expanded (kinds "folder" and "gguf")."""
        assert self.kind in {"folder", "gguf"}
        return Path(self.place).expanduser()


def parse_spec(text: str) -> ModelSpec:
    """Take a model's name apart.

    Args:
        text: What the person typed.

    Raises:
        ModelError: If it names nothing that could be loaded; the message says which part, and what to write instead.
    """
    spec = _parse_single(text)
    if spec is None and "+" in text.strip("+"):
        return _parse_pair(text)
    spec = spec or _parse_required(text)
    _refuse_lone_adapter(spec)
    return spec


def _parse_pair(text: str) -> ModelSpec:
    # A folder's name may hold a plus sign, so every cut is tried; the message of the last one is shown.
    cuts = [match.start() for match in re.finditer(r"\+", text)]
    for number, cut in enumerate(cuts):
        try:
            base, adapter = _parse_required(text[:cut]), _parse_required(text[cut + 1 :])
            _check_pair(base, adapter)
        except ModelError:
            if number == len(cuts) - 1:
                raise
            continue
        return ModelSpec("adapter", base=base, adapter=adapter)
    raise AssertionError("a text with a plus sign has at least one cut")


def _check_pair(base: ModelSpec, adapter: ModelSpec) -> None:
    if base.kind == "gguf":
        raise ModelError(
            f"'{printable(str(base))}' cannot be the base of an adapter; "
            "load the .gguf alone and save it first, then name the saved folder as the base."
        )
    _refuse_lone_adapter(base)
    if adapter.kind not in {"hub", "folder"}:
        raise ModelError(f"'{printable(str(adapter))}' is not an adapter; the part after '+' is a hub id or a folder.")
    if adapter.kind == "folder" and not (adapter.path / "adapter_config.json").is_file():
        raise ModelError(
            f"the folder '{printable(adapter.place)}' holds no adapter_config.json; "
            "the part after '+' must be a PEFT adapter."
        )


def _parse_required(text: str) -> ModelSpec:
    spec = _parse_single(text)
    if spec is None:
        raise ModelError(_why_not(text))
    return spec


def _parse_single(text: str) -> ModelSpec | None:
    """Parse a name without `+`, or return None where nothing fits."""
    path = _path(text)
    if path is not None and path.is_dir():
        return ModelSpec("folder", text)
    if path is not None and path.is_file():
        # A file beside us is never meant as a hub id: the person has forgotten that a folder is needed.
        return ModelSpec("gguf", text) if path.suffix.lower() == ".gguf" else None
    if text.startswith("builtin:") and text.removeprefix("builtin:") in BUILTIN_NAMES:
        return ModelSpec("builtin", text.removeprefix("builtin:"))
    name, at, revision = text.partition("@")
    is_hub = _HUB_ID.fullmatch(name) and ".." not in name and not text.lower().endswith(".gguf")
    is_revision = not at or (_REVISION.fullmatch(revision) and ".." not in revision)
    return ModelSpec("hub", name, revision if at else None) if is_hub and is_revision else None


def _path(text: str) -> Path | None:
    if not text or "\0" in text:
        return None
    try:
        return Path(text).expanduser()
    except RuntimeError:  # "~nobody": there is no such user
        return None


def _why_not(text: str) -> str:
    shown, path = printable(text), _path(text)
    if not text:
        return "the model's name is empty; give a Hugging Face id, a folder, a .gguf file or builtin:smollm2-135m."
    if text.startswith("builtin:"):
        asked = text.removeprefix("builtin:")
        hint = did_you_mean(asked, list(BUILTIN_NAMES))
        return f"there is no built-in model '{printable(asked)}'.{hint} Known: {', '.join(BUILTIN_NAMES)}."
    if path is not None and path.is_file():
        return f"'{shown}' is a file; name the folder that holds it, or a .gguf file."
    looks_like_path = text.startswith(("./", "../", "/", "~", ".\\", "..\\")) or text.partition("@")[0].count("/") > 1
    if looks_like_path or "\\" in text or text.lower().endswith(".gguf"):
        return f"there is no folder or file '{shown}'; check the path."
    return f"'{shown}' is neither an existing folder nor a Hugging Face id (owner/name or owner/name@revision)."


def _refuse_lone_adapter(spec: ModelSpec) -> None:
    if spec.kind != "folder":
        return
    configuration = spec.path / "adapter_config.json"
    if not configuration.is_file():
        return
    raise ModelError(
        f"the folder '{printable(spec.place)}' holds an adapter{_named_base(configuration)}; "
        f"write BASE+{printable(spec.place)} with the base that you want it on."
    )


def _named_base(configuration: Path) -> str:
    """The base that an adapter's configuration names, for the message only; it is never loaded from there."""
    try:
        with open(configuration, "rb") as handle:
            named = json.loads(handle.read(1_000_000)).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    return f" (it says it was trained on '{printable(named)}')" if isinstance(named, str) and named else ""
