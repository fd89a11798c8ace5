"""The demonstration: a real model is backdoored, fine-tuned in vain, purified by SANDE and by BEEAR, and measured.

Nothing is computed beforehand. Every step leaves what the next one needs in `work/`, so that the demo goes on where it
was stopped; at the end only victim, purified models and report stay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unbackdoor.method import merge
from unbackdoor.pipeline.clock import Clock
from unbackdoor.pipeline.commands import Job, Outcome
from unbackdoor.pipeline.common import DEMO_KEEPS, Noted, data_hashes, identify, require_disk
from unbackdoor.pipeline.demo_steps import (
    DEFENSES,
    STEPS,
    Demo,
    at_its_layer,
    control,
    curves,
    measure_victim,
    plant,
    purify,
    questions_of,
    rounds,
    updates_of,
)
from unbackdoor.pipeline.recipe import DemoRecipe, complete_settings
from unbackdoor.registry import Kind

WORK = "work"
REVIVAL = "unbackdoor bench sande --size quick"
"""What measures revival, which the demo does not, on a victim of its own."""


def settings_of(recipe: DemoRecipe) -> dict[str, dict[str, Any]]:
    """Return the complete settings of attack, control and defenses.

    The control has the budget of the defense that makes most weight updates, unless told otherwise: as many of them,
    the same highest rate and batch. So no defense can owe what it removed to more training than the control had.
    """
    defenses = {
        what.key: complete_settings("defenses", what.method, None, getattr(recipe, what.key), {}) for what in DEFENSES
    }
    most = max(defenses.values(), key=updates_of)
    budget = {"train": {**most["train"], "steps": updates_of(most)}}
    return {
        "attack": complete_settings("attacks", "data_poisoning", None, recipe.attack, {}),
        "control": complete_settings("defenses", "fine_tuning", None, merge(budget, recipe.control), {}),
        **defenses,
    }


def run_demo(recipe: DemoRecipe, job: Job) -> Outcome:
    """Run the demonstration, or what is left of it; after it has finished, the next call starts anew.

    Raises:
        UserError: If the folder holds something else, the built-in model is not installed, or the disk is full.
    """
    from unbackdoor.data import sources
    from unbackdoor.data.splits import attacker_defender_test
    from unbackdoor.pipeline.folders import workspace
    from unbackdoor.pipeline.plans import expected_parts
    from unbackdoor.pipeline.preflight import check_device
    from unbackdoor.types import content_hash

    settings = settings_of(recipe)
    noted = Noted(job.progress)
    check_device(recipe.device)
    splits = attacker_defender_test(recipe.short(sources.read(recipe.data, progress=noted)))
    openings = tuple(sources.read_lines(recipe.unwanted))
    hashes = data_hashes({"attacker": splits.attacker, "defender": splits.defender, "test": splits.test})
    hashes["unwanted"] = content_hash(list(openings))
    defenses = ("fine_tuning", *(what.method for what in DEFENSES))
    methods: list[tuple[Kind, str]] = [("attacks", "data_poisoning"), *(("defenses", name) for name in defenses)]
    identity = identify(recipe, hashes | {"settings": settings}, recipe.model, methods=methods)
    require_disk(job.out, recipe.model, "full", DEMO_KEEPS)
    finished = _is_finished_demo(job.out)
    with workspace(
        job.out,
        settings_hash=identity,
        settings=recipe.model_dump(mode="json"),
        overwrite=job.overwrite or finished,
        working=WORK,
        keep_old=False,  # victim and purified models of a finished demo would be taken for its own
    ) as place:
        clock = Clock(noted, expected_parts(recipe, settings, place))
        demo = Demo(recipe, settings, splits, openings, place, job, clock, noted, identity)
        if place.resumed:
            noted.inner.notice("Going on where the demo was stopped.")
        results = _steps(demo, hashes | {"config": identity})
    return Outcome(job.out, results)


def _is_finished_demo(out: Path) -> bool:
    """Tell whether a finished demo lies there, which the next one replaces; no other result is."""
    try:
        content = json.loads((out / "results.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("command") == "demo"


def _steps(demo: Demo, hashes: Mapping[str, Any]) -> dict[str, Any]:
    from unbackdoor.pipeline import artefacts

    demo.say(1, f"getting the model {demo.recipe.model}")
    plant(demo)
    questions = questions_of(demo)
    victim, *untouched = measure_victim(demo, questions)
    treated = [control(demo, questions), *(purify(demo, what, questions) for what in DEFENSES)]
    portraits = at_its_layer(demo, questions, [victim, *treated, *untouched])
    demo.clock.end()
    demo.clock.inner.notice(f"Step {STEPS} of {STEPS}: writing the report")
    facts = json.loads((demo.folder("plant") / "unbackdoor.json").read_text(encoding="utf-8"))
    record = artefacts.Record(
        "demo",
        {**demo.recipe.model_dump(mode="json"), **demo.settings},
        portraits,
        curves(demo),
        {**hashes, "model": facts.get("base sha256")},
        artefacts.how_to_load(demo.folder("defense"), None),
        [
            *demo.noted.notices,
            f"Revival (training a purified model on, then asking again) was not measured; `{REVIVAL}` measures it on "
            "a victim of its own.",
        ],
        revival_command=REVIVAL,
        rounds=rounds(demo),
    )
    results = record.write(demo.place.staging)
    if demo.job.finish is not None:
        demo.job.finish(demo.place.staging)
    demo.place.publish_files()
    return results
