"""A base with a LoRA adapter folded in, tensor by tensor: W + scale * (up @ down), without PEFT and without a model.

Only what is exactly that is folded in: plain LoRA on linear layers, on GPT-2's transposed ones and on embeddings, with
rslora, rank and alpha patterns, biases, and whole modules that the adapter replaces. The rest (DoRA, biases of the
matrices, parameters as targets, a change of an embedding that is the output head, too) is refused. The product is
float32 whatever the base is; it is rounded to the base's type only when the result is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbackdoor.errors import ModelError
from unbackdoor.merge.match import embedding_of
from unbackdoor.merge.source import Source, is_head
from unbackdoor.model.adapter import WEIGHTS, check_adapter
from unbackdoor.model.header import read_header
from unbackdoor.model.quarantine import printable

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "base_model.model."
_TRANSPOSED = frozenset({"gpt2", "openai-gpt"})
"""Architectures whose linear layers, but for the head, are stored the other way round."""
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>embedding_)?(?P<side>[AB])(?:\.weight)?")


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a matrix: `scale * up @ down`, or its transpose.

    Attributes:
        down: float32 [rank, inputs].
        up: float32 [outputs, rank].
        scale: Its scaling.
        transposed: Whether the matrix is stored the other way round (GPT-2, embeddings).
    """

    down: Tensor
    up: Tensor
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix that it is added to."""
        shape = (self.up.shape[0], self.down.shape[1])
        return (shape[1], shape[0]) if self.transposed else shape

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows [first, last) of what is added."""
        product = self.down[:, first:last].T @ self.up.T if self.transposed else self.up[first:last] @ self.down
        return product * self.scale


def fold_in(base: Source, folder: Path, shown: str) -> Source:
    """Return the base with an adapter folded in; its matrices are held in memory.

    Args:
        base: The base.
        folder: The adapter's folder, which has passed the quarantine.
        shown: The name of both, safe to print.

    Raises:
        ModelError: If it is no plain LoRA adapter, or does not fit the base.
    """
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"the adapter of '{shown}' holds no {WEIGHTS}; ask its publisher for safetensors.")
    config = check_adapter(folder, shown)
    for field in ("use_dora", "lora_bias", "target_parameters"):
        if config.get(field):
            raise ModelError(
                f"the adapter of '{shown}' uses {field}, which is not folded in here; merge it into its base with PEFT "
                "and give the merged folder."
            )
    updates, replaced = _parts(_tensors(folder), config, base, shown)
    _refuse_shared(base, {*updates, *replaced}, shown)
    for name, update in updates.items():
        _check_shape(base, name, update.shape, shown)
    for name, tensor in replaced.items():
        _check_shape(base, name, tuple(tensor.shape), shown)

    def take(name: str, first: int, last: int) -> Tensor:
        rows = replaced[name][first:last].clone() if name in replaced else base.take(name, first, last)
        return rows.float().add_(updates[name].rows(first, last)) if name in updates else rows

    return replace(base, shown=shown, take=take, adapted=True)


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    read_header(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, framework="pt") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - it is no dict


def _parts(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], base: Source, shown: str
) -> tuple[dict[str, Update], dict[str, Tensor]]:
    """Return what is added and what is replaced, by the base's names."""
    factors: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(_PREFIX)
        found = _FACTOR.fullmatch(inner)
        if found is None:
            whole = inner.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
            replaced[_own_name(whole, base, shown)] = tensor
        else:
            part = factors.setdefault(found["module"], {"embedding": tensor} if found["part"] else {})
            part[found["side"]] = tensor.float()
    updates = {}
    for module, part in factors.items():
        if not {"A", "B"} <= part.keys():
            raise ModelError(f"the adapter of '{shown}' lacks one of the two matrices of {printable(module)}.")
        rank = _patterned(module, config, "rank_pattern", "r")
        if not part["A"].dim() == part["B"].dim() == 2 or not part["B"].shape[1] == part["A"].shape[0] == rank >= 1:
            raise ModelError(f"the adapter of '{shown}' has matrices of {printable(module)} that do not fit together.")
        name = _own_name(f"{module}.weight", base, shown)
        # As PEFT does: the layer says how it is stored, and fan_in_fan_out in the configuration may be wrong.
        linear = base.config.get("model_type") in _TRANSPOSED and not is_head(name)
        updates[name] = Update(part["A"], part["B"], _scale(module, int(rank), config), "embedding" in part or linear)
    return updates, replaced


def _refuse_shared(base: Source, changed: Iterable[str], shown: str) -> None:
    """Refuse a change of one of two things that are one tensor: folded in, it would change both."""
    if not base.ties_head:
        return
    table = embedding_of(base)
    for name in changed:
        if name == table or is_head(name):
            raise ModelError(
                f"the adapter of '{shown}' changes {printable(name)}, which is embedding and output head in one here, "
                "and the adapter changes one of the two alone; it cannot be folded in."
            )


def _own_name(name: str, base: Source, shown: str) -> str:
    """Return a tensor's name in the base's files, which may lack the prefix of the model's class, or have one."""
    longer = [own for own in base.infos if own.endswith(f".{name}") and own.count(".") == name.count(".") + 1]
    for candidate in (name, name.partition(".")[2], *longer):
        if candidate in base.infos:
            return candidate
    raise ModelError(
        f"the adapter of '{shown}' changes the tensor {printable(name)}, for which this base has no place; "
        "put it on the base that it was trained on."
    )


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = _patterned(module, config, "alpha_pattern", "lora_alpha")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _patterned(module: str, config: Mapping[str, Any], patterns: str, usual: str) -> float:
    """Return a number of an adapter's configuration for one module: of the first pattern that fits, or the usual one.

    Raises:
        ModelError: If a pattern is more than the end of a name, or there is no number.
    """
    found, named = config.get(usual, 8), config.get(patterns) or {}
    for pattern, value in named.items() if isinstance(named, Mapping) else ():
        # PEFT takes them as regular expressions, and one from a stranger can be made to run for ever.
        if not re.fullmatch(r"[\w.]+", pattern):
            raise ModelError(
                f"the {patterns} '{printable(pattern)}' of an adapter is a regular expression, which is not folded "
                "in here; merge the adapter into its base with PEFT and give the merged folder."
            )
        if f".{module}".endswith(f".{pattern}"):
            found = value
            break
    number = math.nan
    if isinstance(found, (int, float)) and not isinstance(found, bool):
        with suppress(OverflowError):
            number = float(found)
    if not math.isfinite(number):
        raise ModelError(f"an adapter's {usual}, or one of its {patterns}, is no number; mend its configuration.")
    return number


def _check_shape(base: Source, name: str, shape: tuple[int, ...], shown: str) -> None:
    if base.infos[name].shape != shape:
        raise ModelError(
            f"the adapter of '{shown}' has {list(shape)} for the tensor {printable(name)}, which has "
            f"{list(base.infos[name].shape)} in this base; put it on the base that it was trained on."
        )
