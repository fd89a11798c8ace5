"""The tensors of one model by name, whatever it is: a folder, a base with an adapter, a model in memory.

Nothing is known of architectures. Headers are read by hand and checked before a byte of a tensor is (model/header.py),
folders pass the quarantine, and tensors are read straight from the file into memory of their own: a mapped file would
stay in memory as long as the process runs. A tensor can be had in blocks of rows, so that none need be held whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbackdoor.errors import ModelError
from unbackdoor.model.configuration import read_config
from unbackdoor.model.header import HeaderError, TensorEntry, read_header
from unbackdoor.model.load import local_folder
from unbackdoor.model.quarantine import inspect_folder, printable, refuse_dangerous
from unbackdoor.model.spec import ModelSpec, parse_spec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unbackdoor.model.lm import LM

FLOATS = ("F32", "BF16", "F16", "F64")
"""Types that are merged; others (masks, counters) are copied from the suspect."""


@dataclass(frozen=True)
class Info:
    """What a tensor is like: dtype as safetensors names it ("BF16"), and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """How many rows it can be had in; a single number is one row."""
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True)
class Source:
    """A model's tensors.

    Attributes:
        shown: The model's name, safe to print.
        infos: Name -> what it is like, in the order in which they lie in the files.
        take: Returns the rows [first, last) of a tensor in its own dtype, in memory of their own.
        config: Content of config.json.
        folder: Where its files are; None for a model in memory.
        files: Name -> the file that holds the tensor, where there are files.
        adapted: Whether an adapter is folded in on the way.
    """

    shown: str
    infos: Mapping[str, Info]
    take: Callable[[str, int, int], Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    adapted: bool = False

    def read(self, name: str) -> Tensor:
        """Return a whole tensor in its own dtype, in memory of its own."""
        return self.take(name, 0, self.infos[name].rows)

    @property
    def ties_head(self) -> bool:
        """Whether the output head is the embedding: config.json says so, or it lacks a head."""
        text = self.config.get("text_config")
        levels = [self.config, text if isinstance(text, Mapping) else {}]
        said = [level["tie_word_embeddings"] for level in levels if "tie_word_embeddings" in level]
        return bool(said[0]) if said else not any(is_head(name) for name in self.infos)


def open_source(spec: str | ModelSpec) -> Source:
    """Return the tensors of a model that a person named; of base + adapter those with the adapter folded in.

    Raises:
        ModelError: If the checkpoint is unsafe or broken, or holds no safetensors.
        UserError: If it cannot be had here.
    """
    parsed = parse_spec(spec) if isinstance(spec, str) else spec
    base = _open_folder(local_folder(parsed.base or parsed), printable(str(parsed.base or parsed)))
    if parsed.adapter is None:
        return base
    from unbackdoor.merge.adapted import fold_in

    folder = local_folder(parsed.adapter)
    refuse_dangerous(inspect_folder(folder, base=str(parsed.base)), str(parsed.adapter))
    return fold_in(base, folder, printable(str(parsed)))


def memory_source(lm: LM) -> Source:
    """Return the tensors of a model in memory, tied ones once; an adapter must have been merged.

    Raises:
        ModelError: If it carries an adapter.
    """
    if lm.is_adapter:
        raise ModelError(f"'{printable(lm.spec)}' carries an adapter; merge it into its base first.")
    return tensor_source(lm, lm.model.state_dict())


def tensor_source(lm: LM, state: Mapping[str, Tensor]) -> Source:
    """Return tensors of a model in memory, by the names that they are to have; tied ones once."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if place not in seen or not tensor.numel():
            tensors[name] = tensor.detach()
        seen.add(place)
    names = {dtype: name for name, dtype in torch_types().items()}
    infos = {name: Info(names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}

    def take(name: str, first: int, last: int) -> Tensor:
        rows = tensors[name][first:last] if infos[name].shape else tensors[name]
        return rows.to("cpu", copy=True)

    return Source(printable(lm.spec), infos, take, lm.core.config.to_dict())


def torch_types() -> dict[str, torch.dtype]:
    """Return the torch type for each of safetensors' names that torch can hold."""
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
        "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    }  # fmt: skip


def is_head(name: str) -> bool:
    """Tell whether a tensor is the output head's matrix, by its name."""
    from unbackdoor.model.changes import module_type

    return module_type(name) == "output head" and name.endswith("weight")


def _open_folder(folder: Path, shown: str) -> Source:
    refuse_dangerous(inspect_folder(folder), shown)
    config = _config(folder, shown)
    places: dict[str, tuple[Path, int, TensorEntry]] = {}
    for path in weight_files(folder, shown):
        try:
            entries = read_header(path)
        except HeaderError as problem:  # between the quarantine and now
            raise ModelError(f"'{shown}': {path.name} is not sound: {printable(str(problem))}") from problem
        start = 8 + int.from_bytes(_first_bytes(path), "little")
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            if name in places:
                raise ModelError(
                    f"'{shown}' holds the tensor {printable(name)} in two files; get it from its publisher again."
                )
            places[name] = (path, start + entry.start, entry)
    if wrong := sorted({entry.dtype for _, _, entry in places.values()} - set(torch_types())):
        raise ModelError(f"'{shown}' holds tensors of the type {wrong[0]}, which cannot be merged; use full precision.")
    infos = {name: Info(entry.dtype, entry.shape) for name, (_, _, entry) in places.items()}

    def take(name: str, first: int, last: int) -> Tensor:
        path, start, _ = places[name]
        return _read_rows(path, start, infos[name], first, last)

    files = {name: path.name for name, (path, _, _) in places.items()}
    return Source(shown, infos, take, config, folder, files)


def weight_files(folder: Path, shown: str) -> list[Path]:
    """Return the files of a model's weights that transformers would read, in the order of their names.

    Raises:
        ModelError: If there are none.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        # The quarantine has checked that these are names of files in the folder.
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        return [folder / Path(name).name for name in names]
    raise ModelError(f"'{shown}' holds no safetensors weights (model.safetensors); ask its publisher for them.")


def _config(folder: Path, shown: str) -> dict[str, Any]:
    config = read_config(folder, shown)
    if config.get("quantization_config"):
        raise ModelError(f"'{shown}' holds quantised weights, which cannot be merged; use the full-precision model.")
    return config


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as handle:
        return handle.read(8)


def _read_rows(path: Path, start: int, info: Info, first: int, last: int) -> Tensor:
    import torch

    dtype = torch_types()[info.dtype]
    shape = (last - first, *info.shape[1:]) if info.shape else ()
    found = torch.empty(shape, dtype=dtype)
    size = found.numel() * found.element_size()
    row = size // max(1, last - first)
    view = memoryview(found.view(-1).view(torch.uint8).numpy().data) if size else memoryview(b"")
    with open(path, "rb", buffering=0) as handle:
        handle.seek(start + first * row)
        done = 0
        while done < size:
            got = handle.readinto(view[done:])
            if not got:
                raise ModelError(f"'{printable(str(path))}' became shorter while it was read; merge again.")
            done += got
    return found


def renamed(source: Source, names: Mapping[str, str]) -> Source:
    """Return a source whose tensors have other names.

    Args:
        source: The source.
        names: New name -> its own; tensors that are not in here are left out.
    """
    infos = {new: source.infos[old] for new, old in names.items()}
    files = {new: source.files[old] for new, old in names.items() if old in source.files}
    return replace(source, infos=infos, files=files, take=lambda name, a, b: source.take(names[name], a, b))
