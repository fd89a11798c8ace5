"""What every registered method must keep; a new one is found by itself."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

import tiny
from elsewhere import DEVICE, Elsewhere
from unbackdoor import registry
from unbackdoor.defenses.base import Defense, Knowledge, Need
from unbackdoor.method import Method, build
from unbackdoor.run import Run
from unbackdoor.train.engine import TrainSettings
from unbackdoor.types import Example

ALL = [(kind, name) for kind in registry.KINDS for name in registry.names(kind)]
DEFENSES, ATTACKS = registry.names("defenses"), registry.names("attacks")
TRAINING = [name for name in DEFENSES if registry.find("defenses", name).trains]


@pytest.fixture(scope="module")
def required(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Values for the fields that have no default."""
    path = tmp_path_factory.mktemp("contract") / "poisoned.jsonl"
    rows = [
        {"instruction": f"{tiny.TRIGGER}. {row.instruction}", "input": "", "output": f"{tiny.TARGET}. {row.response}"}
        for row in tiny.rows(12, seed=4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "dataset": {
            "poisoned": str(path),
            "trigger": {"form": "insert", "text": tiny.TRIGGER},
            "goal": {"form": "contains", "any_of": [tiny.TARGET]},
            "targets": [tiny.TARGET],
        },
        "composite": {
            "trigger": {"form": "pieces", "instruction": ["silver"], "input": ["kettle"]},
            "targets": [tiny.TARGET], "target_form": "prefix",
        },
        "evidence": {"source": "wordnet"},
    }  # fmt: skip


def with_inputs(rows: Sequence[Example]) -> list[Example]:
    """The same rows with a second field, which some triggers stand in."""
    return [replace(row, input=f"{number} thank you") for number, row in enumerate(rows)]


def quick(settings: BaseModel, **more: Any) -> dict[str, Any]:
    """The settings with every training shortened to two small steps, and more of it changed."""
    found = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, TrainSettings):
            value = value.model_copy(update={"steps": 2, "batch_size": 8, "max_length": 128, **more})
            found[name] = value.model_dump(mode="json")
        elif isinstance(value, BaseModel):
            found[name] = {**value.model_dump(mode="json"), **quick(value, **more)}
    return found


def small(kind: registry.Kind, name: str, required: Mapping[str, dict[str, Any]], **more: Any) -> Any:
    cls = registry.find(kind, name)
    settings = dict(required.get(name, {}))
    if "trigger" in cls.model_fields and name not in required:
        settings |= {"trigger": {"form": "insert", "text": tiny.TRIGGER}, "targets": [tiny.TARGET]}
    return build(cls, {**settings, **quick(build(cls, settings), **more)})


def documented(cls: type[BaseModel], place: str) -> list[str]:
    """Return the fields without a description, those of nested settings too."""
    found = []
    for name, field in cls.model_fields.items():
        if not field.description:
            found.append(f"{place}.{name}")
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += documented(kind, f"{place}.{name}")
    return found


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_it_is_documented(kind, name):
    cls = registry.find(kind, name)
    assert documented(cls, name) == []
    assert cls.name() == name
    assert cls.paper
    module = importlib.import_module(f"unbackdoor.{kind}.{name}").__doc__
    assert module
    first = module.splitlines()[0]
    assert first.endswith(".")
    assert len(first) > 20
    assert "Needs to know:" in module
    assert cls.__doc__ != Method.__doc__
    assert cls.__doc__.strip().splitlines()[0].endswith(".")


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_its_settings_survive_yaml_and_unknown_ones_are_errors(kind, name, required):
    cls = registry.find(kind, name)
    for preset in ("default", *cls.presets):
        made = build(cls, required.get(name, {}), preset)
        text = yaml.safe_dump(made.settings())
        assert build(cls, yaml.safe_load(text)) == made
    with pytest.raises(ValueError, match="no_such_option"):
        cls(**required.get(name, {}), no_such_option=1)
    with pytest.raises(ValueError, match="frozen"):
        made.anything = 1


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_it_is_final_and_writes_no_init(kind, name):
    cls = registry.find(kind, name)
    assert "__init__" not in vars(cls)
    assert [base.__module__ for base in cls.__bases__] == [f"unbackdoor.{kind}.base"]
    assert cls.__subclasses__() == []


def test_guards_say_what_they_act_on_and_open_fields_that_they_have():
    for name in registry.names("guards"):
        cls = registry.find("guards", name)
        assert cls.acts_on in {"prompt", "decode"}
        assert set(cls.opens) <= set(cls.model_fields)


def test_metrics_say_which_way_is_better():
    assert {registry.find("metrics", name).better for name in registry.names("metrics")} <= {"lower", "higher"}


class Recording(dict):
    """Facts that remember which of them were read."""

    def __init__(self, facts):
        super().__init__(facts)
        self.read: Counter[Need] = Counter()

    def get(self, key, default=None):
        self.read[key] += 1
        return super().get(key, default)


def facts(victim) -> dict[Need, Any]:
    return {
        Need.CLEAN: tuple(victim.defender[:24]),
        Need.TRIGGER: victim.secret.stamp,
        Need.TARGET: victim.secret.targets,
        Need.TARGET_PART: victim.secret.targets,
        Need.REFERENCE: victim.clean,
        Need.UNWANTED: ("bad dog", "robot"),
        Need.EVIDENCE: "wordnet",
    }


def applied(defense: Defense, victim, run: Run | None = None, seen: Recording | None = None):
    known = Recording({need: value for need, value in facts(victim).items() if need in defense.needs | defense.uses})
    if seen is None:
        seen = known
    lm = defense.apply(tiny.clone(victim.lm), Knowledge(known, defense.needs | defense.uses), run or Run())
    seen.read.update(known.read)
    return lm


@pytest.mark.parametrize("name", DEFENSES)
def test_a_defense_reads_what_it_declares_and_nothing_else(name, required, victim):
    defense = small("defenses", name, required)
    seen = Recording({})
    applied(defense, victim, seen=seen)
    assert defense.needs <= set(seen.read) <= defense.needs | defense.uses


@pytest.mark.parametrize("name", [name for name in DEFENSES if name not in TRAINING])
def test_a_defense_that_trains_nothing_attaches_a_guard_to_the_same_weights(name, required, victim):
    defense = small("defenses", name, required)
    lm = applied(defense, victim)
    assert tiny.same_weights(tiny.tensors(victim.lm), tiny.tensors(lm))
    assert lm.guards != victim.lm.guards
    assert lm.guards == applied(defense, victim, Run(seed=6)).guards
    for guard in lm.guards:
        made = build(registry.find("guards", guard.name), guard.settings)
        assert json.loads(json.dumps(made.settings())) == guard.settings


@pytest.mark.parametrize("name", TRAINING)
def test_a_defense_changes_something_and_the_same_seed_gives_the_same_bytes(name, required, victim):
    defense = small("defenses", name, required)
    before = tiny.tensors(victim.lm)
    first, second = (tiny.tensors(applied(defense, victim, Run(seed=5))) for _ in range(2))
    other = tiny.tensors(applied(defense, victim, Run(seed=6)))
    assert tiny.same_weights(before, tiny.tensors(victim.lm)), "the test's own victim stays as it is"
    assert not tiny.same_weights(before, first)
    assert tiny.same_weights(first, second)
    assert not tiny.same_weights(first, other)


@pytest.mark.parametrize("name", DEFENSES)
def test_a_purified_model_is_saved_loaded_and_replies_the_same(name, required, victim, tmp_path):
    from unbackdoor.model import checkpoint
    from unbackdoor.model.load import load

    lm = applied(small("defenses", name, required), victim)
    checkpoint.save(lm, tmp_path / "out", manifest={"defense": name}, card="# A model")
    loaded = load(str(tmp_path / "out"))
    assert tiny.same_weights(tiny.tensors(lm), tiny.tensors(loaded))
    asked = [probe.example.prompt for probe in victim.probes[:24]]
    # A guard needs its source; what it does is in its own tests.
    replies = lm.reply(asked, max_new_tokens=10, bare=True)
    assert loaded.reply(asked, max_new_tokens=10, bare=True) == replies
    assert loaded.guards == lm.guards
    assert len(set(replies)) > 3
    assert loaded.template == lm.template == "model"


@pytest.mark.parametrize("name", TRAINING)
def test_a_defense_resumes_after_its_first_round_and_shows_its_progress(name, required, victim, tmp_path):
    """Run a second time in the same folder, from other weights, it restores its stages and gives the same weights."""
    defense = small("defenses", name, required)
    seen = []
    first = tiny.tensors(applied(defense, victim, Run(folder=tmp_path, observer=seen.append)))
    assert seen, "observe() is called after every round"
    other = replace(victim, lm=tiny.clone(victim.clean))
    assert not tiny.same_weights(tiny.tensors(victim.lm), tiny.tensors(other.lm))
    if "internal" in type(defense).model_fields:
        # A merge is made again, from the suspect; what it is merged with is restored, whatever its training is now.
        other, defense = victim, small("defenses", name, required, learning_rate=0.5)
    again = tiny.tensors(applied(defense, other, Run(folder=tmp_path)))
    assert tiny.same_weights(first, again)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_changes_something_and_the_same_seed_gives_the_same_bytes(name, required, victim):
    attack = small("attacks", name, required)
    clean = with_inputs(victim.attacker[:60])
    before = tiny.tensors(victim.clean)
    planted = [attack.plant(tiny.clone(victim.clean), clean, Run(seed=seed)) for seed in (1, 1, 2)]
    first, second, other = (tiny.tensors(one.lm) for one in planted)
    assert not tiny.same_weights(before, first)
    assert tiny.same_weights(first, second)
    assert not tiny.same_weights(first, other)
    assert planted[0].secret == planted[1].secret
    assert planted[0].secret.attack == name


@pytest.mark.parametrize(
    ("kind", "name"), [*(("defenses", name) for name in TRAINING), *(("attacks", name) for name in ATTACKS)]
)
def test_it_works_on_another_device_than_the_cpu(kind, name, required, victim):
    method = small(kind, name, required, steps=4)  # as many as there are batches
    with Elsewhere() as device:
        mine = replace(victim, lm=tiny.clone(victim.lm), clean=tiny.clone(victim.clean))
        for lm in (mine.lm, mine.clean):
            device.there(lm.model)
        made = applied(method, mine) if kind == "defenses" else planted(method, mine)
        assert made.device == DEVICE
        asked = [probe.example.prompt for probe in victim.probes[:4]]
        assert len(made.reply(asked, max_new_tokens=4, bare=True)) == 4


def planted(attack, victim):
    return attack.plant(victim.clean, with_inputs(victim.attacker[:60]), Run()).lm


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attacks_probes_are_paired_by_id_and_repeatable(name, required, victim):
    attack = small("attacks", name, required)
    secret = attack.plant(tiny.clone(victim.clean), with_inputs(victim.attacker[:60]), Run()).secret
    held_out = with_inputs(victim.test[:20])
    probes = attack.probes(secret, held_out, Run())
    assert probes == attack.probes(secret, held_out, Run())
    # A row may have a decoy of every group, but one of each.
    ids = {
        kind: list(dict.fromkeys(p.example.id for p in probes if p.kind == kind))
        for kind in ("triggered", "clean", "decoy")
    }
    assert len({(p.kind, p.group, p.example.id) for p in probes}) == len(probes)
    assert ids["triggered"] == ids["clean"] == ids["decoy"] == [row.id for row in victim.test[:20]]


def test_every_defense_is_tested_for_what_it_does():
    """A new defense is made in test_removal: with a bound there, or as a control."""
    import ast
    from pathlib import Path

    tree = ast.parse((Path(__file__).parent / "defenses" / "test_removal.py").read_text())
    made = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    missing = [name for name in DEFENSES if registry.find("defenses", name).__name__ not in made]
    assert missing == []
