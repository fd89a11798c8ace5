"""Whether two models were made of each other, seen by their weights, under whatever names and in however many files.

Training moves weights by little: a model and its base, or two descendants of one base, have nearly parallel matrices;
those of strangers of the same shapes are at right angles. A few hundred values of each matrix show which it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from unbackdoor.model.lm import LM

Sample = Mapping[tuple[str, tuple[int, ...]], "torch.Tensor"]
"""Name and shape of a matrix -> some of its values, float32 [at most `VALUES`]."""

VALUES = 512
_ALIKE = 0.5
"""Least cosine of two samples that are no accident: that of strangers is 0 with a spread of 1 / sqrt(VALUES)."""


def sample(lm: LM) -> dict[tuple[str, tuple[int, ...]], torch.Tensor]:
    """Return values of each matrix of a model, evenly spread over it, on the CPU; of an adapter, those of its base."""
    found = {}
    for name, parameter in lm.core.named_parameters():
        # Scales and biases are alike in models that have nothing to do with each other.
        if parameter.ndim < 2 or ".lora_" in name:
            continue
        flat = parameter.detach().flatten()
        values = flat[:: max(1, len(flat) // VALUES)][:VALUES].float().cpu()
        found[name.replace(".base_layer.", "."), tuple(parameter.shape)] = values
    return found


def alike(first: Sample, second: Sample) -> bool:
    """Tell whether at least half of the matrices that both models have, by name and shape, are nearly parallel."""
    from torch.nn.functional import cosine_similarity

    shared = first.keys() & second.keys()
    parallel = sum(float(cosine_similarity(first[key], second[key], dim=0)) >= _ALIKE for key in shared)
    return bool(shared) and 2 * parallel >= len(shared)
