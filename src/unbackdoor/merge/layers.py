"""Which layer a tensor belongs to, read from its name alone: the first number in it counts layers.

`model.layers.3.mlp.experts.5.w1` and `transformer.h.3.attn.c_attn` are both of layer 3. Where a model has several rows
of layers (towers of a model that sees), the row with most tensors counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from unbackdoor.errors import ModelError


@dataclass(frozen=True)
class Layers:
    """A model's row of layers.

    Attributes:
        stem: What stands before the number: "model.layers".
        count: How many there are.
    """

    stem: str
    count: int

    def index(self, name: str) -> int | None:
        """Return the number of the layer that a tensor belongs to, None for one outside the layers."""
        found = _split(name)
        return found[1] if found is not None and found[0] == self.stem else None

    def moved(self, name: str, index: int) -> str:
        """Return the name of the same tensor in another layer."""
        found = _split(name)
        assert found is not None
        return f"{self.stem}.{index}.{found[2]}"


def stands_before(name: str) -> bool:
    """Tell whether a tensor outside the layers stands before them: embeddings do, the last norm and the head do not."""
    lower = name.lower()
    return any(part in lower for part in ("embed", "wte", "wpe")) and "embed_out" not in lower


def layers_of(names: Iterable[str], shown: str) -> Layers:
    """Return the row of layers of a model.

    Args:
        names: Of its tensors.
        shown: The model's name, safe to print.

    Raises:
        ModelError: If its layers are not numbered from 0 without a gap.
    """
    found = [split for name in names if (split := _split(name)) is not None]
    if not found:
        return Layers("", 0)
    (stem, _), *_ = Counter(stem for stem, _, _ in found).most_common(1)
    numbers = {number for other, number, _ in found if other == stem}
    if numbers != set(range(len(numbers))):
        raise ModelError(
            f"'{shown}' has {len(numbers)} layers with gaps between their numbers (up to {max(numbers)}); get it from "
            "its publisher again."
        )
    return Layers(stem, len(numbers))


def _split(name: str) -> tuple[str, int, str] | None:
    parts = name.split(".")
    for place, part in enumerate(parts):
        if 0 < place < len(parts) - 1 and part.isascii() and part.isdigit() and len(part) < 10:
            return ".".join(parts[:place]), int(part), ".".join(parts[place + 1 :])
    return None
