"""What a layer hands on, and that nothing behind it is run for it."""

from __future__ import annotations

import pytest
import torch

import tiny
from unbackdoor.model.anatomy import decoder_layers
from unbackdoor.model.hooks import hidden_of, output_of


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_output_of_a_layer_is_that_of_the_whole_pass_and_what_is_behind_is_not_run(architecture):
    lm = tiny.tiny_lm(architecture, layers=3)
    ids = torch.randint(4, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with torch.no_grad():
        wanted = lm.core.base_model(**given, output_hidden_states=True).hidden_states[2]
        # transformers leaves hooks of its own behind.
        hooks = [len(module._forward_hooks) for module in decoder_layers(lm.core)]
        ran = []
        handle = decoder_layers(lm.core)[2].register_forward_pre_hook(lambda module, inputs: ran.append(module))
        found = hidden_of(output_of(lm.core, 1, given))
        handle.remove()
        again = lm.core.base_model(**given, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    torch.testing.assert_close(again, wanted, rtol=0, atol=0)
    assert ran == []
    assert [len(module._forward_hooks) for module in decoder_layers(lm.core)] == hooks
