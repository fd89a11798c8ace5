"""Building methods from settings, and what a wrong setting is told."""

from __future__ import annotations

import pytest
from pydantic import Field

from unbackdoor.errors import UserError
from unbackdoor.method import Method, build


class Sample(Method):
    presets = {"paper": {"rate": 0.5}}  # noqa: RUF012

    rate: float = Field(0.1, ge=0, le=1, description="a share")
    steps: int = Field(3, description="a count")


def test_defaults_presets_and_settings_in_this_order():
    assert build(Sample, {}).settings() == {"rate": 0.1, "steps": 3}
    assert build(Sample, {}, "default").rate == 0.1
    assert build(Sample, {"steps": 4}, "paper").settings() == {"rate": 0.5, "steps": 4}
    assert build(Sample, {"rate": 0.9}, "paper").rate == 0.9


def test_a_nested_setting_leaves_the_rest_of_its_group_as_default_and_preset_have_it():
    from unbackdoor.attacks.data_poisoning import DataPoisoning
    from unbackdoor.defenses.sande import Sande
    from unbackdoor.pipeline.recipe import complete_settings

    given = {"parrot": {"tokens": 5}, "train": {"steps": 7}}
    paper = build(Sande, given, "paper")
    assert (paper.parrot.tokens, paper.train.steps) == (5, 7)
    assert paper.parrot == build(Sande, {}, "paper").parrot.model_copy(update={"tokens": 5})
    assert paper.settings() == complete_settings("defenses", "sande", "paper", given, {})
    attack = build(DataPoisoning, {"train": {"steps": 9}})
    assert attack.train == DataPoisoning().train.model_copy(update={"steps": 9})


@pytest.mark.parametrize(
    ("settings", "preset", "message"),
    [
        ({"rates": 1}, None, r"test_method has no option 'rates'\. Did you mean 'rate'\?.*explain test_method"),
        ({}, "papers", r"no preset 'papers'\. Did you mean 'paper'\? Presets: default, paper\."),
        ({"rate": 2}, None, r"'rate' = 2: Input should be less than or equal to 1"),
        ({"rate": "x", "steps": "y"}, None, r"'rate' = 'x': .*; 'steps' = 'y': "),
    ],
)
def test_wrong_settings_are_named(settings, preset, message):
    with pytest.raises(UserError, match=message):
        build(Sample, settings, preset)


def test_settings_that_do_not_fit_together_are_not_printed_as_a_whole():
    from unbackdoor.defenses.osft import Osft

    with pytest.raises(UserError) as refused:
        build(Osft, {"train": {"cooldown": 0.5}})
    said = "osft: 'train': cooldown ends a constant learning rate; with cosine, set cooldown to 0; "
    assert str(refused.value).startswith(said)
    with pytest.raises(UserError, match=r"'train.betas.0' = 2.*less than 1"):
        build(Osft, {"train": {"betas": [2, 3]}})


def test_a_method_is_frozen_and_named_after_its_file():
    from unbackdoor.defenses.sande_p import SandeP

    assert SandeP.name() == "sande_p"
    with pytest.raises(ValueError, match="frozen"):
        SandeP().rounds = 2
