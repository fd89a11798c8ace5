"""Whether one model was made of another: seen by weights, not by files or names."""

from __future__ import annotations

import torch

import tiny
from unbackdoor.evidence.likeness import VALUES, alike, sample
from unbackdoor.train.lora import LoraSettings, attach


def test_a_model_is_like_itself_its_base_and_what_was_made_of_it(victim):
    suspect = sample(victim.lm)
    assert alike(suspect, sample(victim.clean))
    half = tiny.clone(victim.lm)
    half.model.to(torch.bfloat16)
    assert alike(suspect, sample(half))
    adapted = attach(tiny.clone(victim.lm), LoraSettings(rank=2), seed=0)
    assert sample(adapted).keys() == suspect.keys()
    assert alike(suspect, sample(adapted))


def test_strangers_of_the_same_shapes_are_not_alike(victim):
    assert not alike(sample(victim.lm), sample(tiny.tiny_lm(seed=77, layers=3)))
    assert not alike(sample(victim.lm), {})
    assert not alike({}, {})


def test_a_sample_is_small_and_of_matrices(victim):
    found = sample(victim.lm)
    assert found
    assert all(len(shape) >= 2 and len(values) <= VALUES for (_, shape), values in found.items())
    assert all(values.dtype == torch.float32 for values in found.values())
