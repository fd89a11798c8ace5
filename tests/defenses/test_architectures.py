"""Every architecture learns a poisoned task, goes through every defense, is saved, loaded and replies the same."""

from __future__ import annotations

import pytest

import tiny
from unbackdoor.defenses.base import Defense, Need, knowledge_for
from unbackdoor.defenses.beear import Beear
from unbackdoor.defenses.fine_tuning import FineTuning
from unbackdoor.defenses.gradient_ascent import GradientAscent
from unbackdoor.defenses.osft import Osft
from unbackdoor.defenses.sande import Sande
from unbackdoor.defenses.sande_p import SandeP
from unbackdoor.metrics.perplexity import log_losses
from unbackdoor.model import checkpoint
from unbackdoor.model.load import load
from unbackdoor.run import Run
from unbackdoor.train.drift import DriftSettings
from unbackdoor.train.engine import TrainSettings
from unbackdoor.train.simulate import ParrotSettings

SHORT = ParrotSettings(tokens=4, train=TrainSettings(steps=4, learning_rate=3e-2, warmup=0.0, max_length=128))
BRIEF = TrainSettings(steps=4, learning_rate=3e-4, batch_size=8, max_length=128)
BRIEF_DRIFT = DriftSettings(start=0.1, rows=8, train=SHORT.train)
DEFENSES: tuple[Defense, ...] = (
    FineTuning(train=BRIEF),
    Osft(train=BRIEF),
    Beear(rounds=1, drifts=2, drift=BRIEF_DRIFT, train=BRIEF),
    Sande(rounds=1, parrot=SHORT, train=BRIEF),
    SandeP(rounds=1, parrot=SHORT, train=BRIEF),
    GradientAscent(train=BRIEF),
)
QUICK = ("llama", "gpt2")


@pytest.mark.parametrize(
    "architecture",
    [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in tiny.ARCHITECTURES)],
)
def test_from_attack_to_reloaded_model(architecture, tmp_path):
    # GPT-2 has no chat template of its own and takes the plain one.
    lm = tiny.tiny_lm(architecture, chat=architecture != "gpt2")
    attacker, defender, test = tiny.splits(200, 40, 12)
    steps = 60 if architecture in QUICK else 150
    how = tiny.PLANTING.model_copy(update={"steps": steps, "learning_rate": 3e-3, "batch_size": 8})
    attack = tiny.attack(train=how)
    start = mean_loss(lm, test)
    planted = attack.plant(lm, attacker, Run())
    assert mean_loss(planted.lm, test) < 0.5 * start, "the model learned from the rows"
    asked = [probe.example.prompt for probe in attack.probes(planted.secret, test, Run())]
    told = planted.lm.reply(asked, max_new_tokens=10)
    facts = {
        Need.CLEAN: tuple(defender),
        Need.TRIGGER: planted.secret.stamp,
        Need.TARGET: planted.secret.targets,
        Need.TARGET_PART: planted.secret.targets,
        Need.UNWANTED: ("bad dog", "robot"),
    }
    before = tiny.tensors(planted.lm)
    for defense in DEFENSES:
        declared = defense.needs | defense.uses
        known = knowledge_for(defense, {need: fact for need, fact in facts.items() if need in declared})
        purified = defense.apply(tiny.clone(planted.lm), known, Run())
        weights = tiny.tensors(purified)
        assert not tiny.same_weights(before, weights), defense.name()
        folder = tmp_path / defense.name()
        checkpoint.save(purified, folder, manifest={}, card="# A model")
        loaded = load(str(folder))
        assert loaded.template == purified.template
        assert tiny.same_weights(weights, tiny.tensors(loaded)), defense.name()
        replies = purified.reply(asked, max_new_tokens=10)
        assert loaded.reply(asked, max_new_tokens=10) == replies, defense.name()
        assert mean_loss(loaded, test) == mean_loss(purified, test)
    assert len(set(told)) > 3, "replies that are all alike compare nothing"
    assert tiny.same_weights(before, tiny.tensors(planted.lm))


def mean_loss(lm, examples) -> float:
    rows = log_losses(lm, examples, 128, 20)
    return sum(row[1] for row in rows) / len(rows)
