"""Write a model so that a reader sees all of it or none, and say what an output folder holds.

A result is an ordinary Hugging Face folder with `unbackdoor.json` (how it was made, and the SHA-256 of every file). It
is built in a hidden sibling `.NAME.partial-PID` and renamed. When it replaces an older result, that one is moved to
`.NAME.old-PID` for the moment between two renames; `recover` puts it back if the process died just there. Nothing is
ever deleted that does not carry this package's mark.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from unbackdoor.errors import UserError, disk_error
from unbackdoor.model.builtin import public_name
from unbackdoor.model.libraries import quiet_transformers
from unbackdoor.model.load import file_sha256
from unbackdoor.model.output import MANIFEST, RESULTS, RUN, is_empty, is_ours, read_object, taken
from unbackdoor.model.quarantine import printable
from unbackdoor.run import write_atomically

if TYPE_CHECKING:
    from unbackdoor.model.lm import LM

_MARGIN_BYTES = 50_000_000
_TOKENIZER_FILES = (
    "tokenizer*.json", "tokenizer*.model", "*.tiktoken", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece*.model", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
_READ_BY_LOADERS = {".safetensors", ".json", ".jinja", ".model", ".txt", ".bin", ".py"}


def save(
    lm: LM,
    folder: Path,
    *,
    manifest: Mapping[str, object],
    card: str,
    extra_files: Mapping[str, str] | None = None,
    overwrite: bool = False,
    free_bytes: Callable[[Path], int] | None = None,
) -> None:
    """Save a model with its tokenizer, guards, manifest and card.

    Full weights are saved in their own dtype, tied weights once. An adapter is saved alone; its base is named, never
    copied. Tokenizer files are byte-identical copies where the tokenizer came from a folder that still exists.

    Args:
        lm: The model; not changed.
        folder: Where it goes: missing, empty, or with `overwrite` an older result or unfinished run of ours.
        manifest: JSON types; `files` is added to it.
        card: Text of README.md.
        extra_files: More text files, by name.
        overwrite: Replace what is there, as a whole: also its stages, reports and replies.
        free_bytes: Free space at a folder, in bytes; for tests.

    Raises:
        UserError: If the folder is taken or the disk is too small.
    """

    def write(partial: Path) -> dict[str, str]:
        _write_weights(lm, partial)
        _write_tokenizer(lm, partial)
        if lm.guards:
            guards = [{"name": guard.name, "settings": dict(guard.settings)} for guard in lm.guards]
            _write_json(partial / "guards.json", guards)
        return {}

    texts = {**(extra_files or {}), "README.md": card}
    publish(folder, write, _bytes_of(lm), manifest=manifest, texts=texts, overwrite=overwrite, free_bytes=free_bytes)


def publish(
    folder: Path,
    write: Callable[[Path], Mapping[str, str]],
    tensor_bytes: int,
    *,
    manifest: Mapping[str, object],
    texts: Mapping[str, str],
    overwrite: bool = False,
    free_bytes: Callable[[Path], int] | None = None,
) -> None:
    """Make a result's folder beside its place and put it there as a whole.

    Args:
        folder: Where it goes, as in `save`.
        write: Writes the model into an empty folder; returns the SHA-256 of files that it knows, by name.
        tensor_bytes: Disk that the tensors need.
        manifest: JSON types; `files` is added to it.
        texts: More files, name -> text.
        overwrite: As in `save`.
        free_bytes: As in `save`.

    Raises:
        UserError: If the folder is taken or the disk is too small.
    """
    folder = folder.absolute()
    recover(folder)
    if folder.exists() and not is_empty(folder) and not (overwrite and is_ours(folder)):
        raise UserError(taken(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    require_space(folder, tensor_bytes, free_bytes)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    with _space_errors(folder, tensor_bytes), _removed_on_error(partial):
        partial.mkdir()
        known = write(partial)
        for name, text in texts.items():
            assert PurePosixPath(name).name == name, "an extra file is a plain name"
            assert name != MANIFEST
            (partial / name).write_text(text, encoding="utf-8")
        _write_json(partial / MANIFEST, {**manifest, "files": _hashes(partial, known)})
        _flush(partial)
        _put_in_place(partial, folder)


def recover(folder: Path) -> None:
    """Tidy up after a process that died while it was saving to `folder`: put back a result that had been moved aside.

    Partial folders and moved-aside results of processes that still run are left alone.
    """
    folder = folder.absolute()
    for aside in _siblings(folder, "old"):
        if folder.exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, folder)
    for partial in _siblings(folder, "partial"):
        shutil.rmtree(partial)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the content of `unbackdoor.json`.

    Raises:
        UserError: If there is none, or it is not a JSON object.
    """
    manifest = read_object(folder / MANIFEST)
    if manifest is None:
        raise UserError(f"'{printable(str(folder))}' holds no readable {MANIFEST}; it is no result of unbackdoor.")
    return manifest


def update_hashes(folder: Path, names: Sequence[str]) -> None:
    """Write the hashes of files that were made anew into a result's manifest; a folder without one is left alone."""
    manifest = read_object(folder / MANIFEST)
    if manifest is not None and isinstance(manifest.get("files"), dict):
        manifest["files"] |= {name: file_sha256(folder / name) for name in names if name in manifest["files"]}
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def verify(folder: Path) -> list[str]:
    """Return the names of files that are not as they were saved, sorted; empty where all are.

    Files that differ, that are missing, and files that were added and that a loader would read. A name in the manifest
    that leads out of the folder is reported and not opened.

    Raises:
        UserError: If there is no manifest.
    """
    listed = read_manifest(folder).get("files")
    if not isinstance(listed, dict):
        return [MANIFEST]
    differing = [name for name, digest in listed.items() if not _is_as_saved(folder, name, digest)]
    added = [
        path.name
        for path in folder.iterdir()
        if path.suffix in _READ_BY_LOADERS and path.name not in listed and path.name not in {MANIFEST, RUN, RESULTS}
    ]
    return sorted({printable(name) for name in (*differing, *added)})


def require_space(folder: Path, tensor_bytes: int, free_bytes: Callable[[Path], int] | None = None) -> None:
    """Raise a `UserError` unless the disk of `folder` has room for tensors of this size and their small files."""
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = free_bytes(place) if free_bytes is not None else shutil.disk_usage(place).free
    if free < _needed(tensor_bytes):
        raise _no_space(folder, tensor_bytes, free)


def _needed(tensor_bytes: int) -> int:
    return int(tensor_bytes * 1.05) + _MARGIN_BYTES


def _no_space(folder: Path, tensor_bytes: int, free: int | None = None) -> UserError:
    have = "the disk is full" if free is None else f"{free / 1e9:.2f} GB are free"
    return UserError(
        f"saving to '{printable(str(folder))}' needs {_needed(tensor_bytes) / 1e9:.2f} GB and {have}; "
        "make room there or choose another --out."
    )


def _bytes_of(lm: LM) -> int:
    """Bytes of the tensors that will be written, tied ones once."""
    if lm.is_adapter:
        return sum(tensor.numel() * tensor.element_size() for tensor in _adapter_tensors(lm).values())
    sizes = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in lm.model.state_dict().values()}
    return sum(sizes.values())


@contextmanager
def _space_errors(folder: Path, tensor_bytes: int) -> Iterator[None]:
    """Turn "no space left" into the sentence of `require_space`."""
    try:
        yield
    except Exception as problem:
        if disk_error(problem) is None:
            raise
        raise _no_space(folder, tensor_bytes) from problem


@contextmanager
def _removed_on_error(partial: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:  # an interrupt too must not leave half a model behind
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_weights(lm: LM, partial: Path) -> None:
    if lm.is_adapter:
        _write_adapter(lm, partial)
        return
    from transformers import GenerationConfig

    # The checkpoint's own generation settings could sample or force tokens; only the ids of its special tokens stay.
    own = lm.model.generation_config
    ids = {name: getattr(own, name, None) for name in ("bos_token_id", "pad_token_id")}
    ids["eos_token_id"] = list(lm.stop_ids) or None
    lm.model.generation_config = GenerationConfig(**ids)
    try:
        with quiet_transformers():
            lm.model.save_pretrained(partial, max_shard_size="2GB")
    finally:
        lm.model.generation_config = own
    _drop_keys(partial / "config.json", ("auto_map", "_name_or_path"))


def _adapter_tensors(lm: LM) -> dict[str, Any]:
    from peft import get_peft_model_state_dict

    tensors: dict[str, Any] = get_peft_model_state_dict(lm.model, save_embedding_layers=False)
    return tensors


def _write_adapter(lm: LM, partial: Path) -> None:
    """Write PEFT's two files directly: PEFT's own saving asks the hub about the base and writes a card."""
    from safetensors.torch import save_file

    assert lm.base is not None, "an adapter's LM names its base"
    assert len(lm.model.peft_config) == 1, "one adapter at a time"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _adapter_tensors(lm).items()}
    save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    (config,) = lm.model.peft_config.values()
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    name, revision = public_name(lm.base)
    content |= {"base_model_name_or_path": name, "revision": revision}
    content |= {"inference_mode": True, "auto_mapping": None}
    _write_json(partial / "adapter_config.json", content)


def copy_tokenizer(source: Path, partial: Path) -> None:
    """Copy a tokenizer's files, chat templates included, byte by byte unless they name code to run."""
    for path in sorted({path for pattern in _TOKENIZER_FILES for path in source.glob(pattern)}):
        if not path.is_file():
            continue
        copy = partial / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        # Links (the hub's cache is made of them) are followed; the quarantine has checked where they lead.
        shutil.copyfile(path, copy)
    settings = partial / "tokenizer_config.json"
    if (read_object(settings) or {}).get("auto_map"):
        _drop_keys(settings, ("auto_map",))


def _write_tokenizer(lm: LM, partial: Path) -> None:
    source = Path(str(lm.tokenizer.name_or_path or ""))
    if (source / "tokenizer.json").is_file() or (source / "tokenizer_config.json").is_file():
        copy_tokenizer(source, partial)
    else:
        lm.tokenizer.save_pretrained(partial)
        # These two say how this process found the tokenizer.
        _drop_keys(partial / "tokenizer_config.json", ("is_local", "local_files_only", "name_or_path"))


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _drop_keys(path: Path, keys: tuple[str, ...]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    _write_json(path, {key: value for key, value in content.items() if key not in keys})


def _hashes(folder: Path, known: Mapping[str, str]) -> dict[str, str]:
    names = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())
    return {name: known.get(name) or file_sha256(path) for name, path in names}


def _flush(folder: Path) -> None:
    """Bring the files to the disk before the rename makes them visible, so that a power cut cannot empty them."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put_in_place(partial: Path, folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    replaced = folder.exists()
    if replaced:
        os.rename(folder, aside)
    try:
        os.rename(partial, folder)
    except OSError:
        if replaced:
            os.rename(aside, folder)
        raise
    if replaced:
        shutil.rmtree(aside)


def _siblings(folder: Path, mark: str) -> list[Path]:
    """Hidden siblings that a process left behind which does not run any more."""
    prefix = f".{folder.name}.{mark}-"
    if not folder.parent.is_dir():
        return []
    found = sorted(path for path in folder.parent.iterdir() if path.name.startswith(prefix) and path.is_dir())
    numbers = [path.name.removeprefix(prefix) for path in found]
    return [path for path, number in zip(found, numbers, strict=True) if number.isdigit() and not _runs(int(number))]


def _runs(process: int) -> bool:
    if process == os.getpid():
        return False  # ours, left by an earlier save of this process
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _is_as_saved(folder: Path, name: str, digest: object) -> bool:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name:
        return False
    path = folder / relative
    return path.is_file() and file_sha256(path) == digest
