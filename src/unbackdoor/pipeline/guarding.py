"""Build the guards that travel with a model, and count what they did.

What a guard of a checkpoint names (an endpoint, another model) is the checkpoint's word: it would be sent every prompt,
or be loaded. So only what the person named too is opened, and what can do no harm: the usual dictionary and the
built-in model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from unbackdoor import registry
from unbackdoor.errors import ModelError, UserError
from unbackdoor.evidence import conflict
from unbackdoor.evidence.likeness import sample
from unbackdoor.evidence.sources import parse_source
from unbackdoor.guards.base import Guard, Place
from unbackdoor.method import build
from unbackdoor.model.builtin import cache_folder
from unbackdoor.model.guard import DecodeGuard, Guards, PromptGuard
from unbackdoor.model.lm import LM
from unbackdoor.model.quarantine import printable
from unbackdoor.types import GuardSpec


def with_guards(
    lm: LM,
    *,
    device: str,
    notice: Callable[[str], None],
    source: str | None = None,
    own: Collection[str] = (),
    serving: bool = False,
) -> LM:
    """Return the model with its guards built; the same object where it carries none.

    Args:
        lm: The model.
        device: Where models of guards run.
        notice: Told what the person should know.
        source: The source of evidence that the person named; it takes the place of the one that is saved.
        own: Names of guards that the person set up; the others are a checkpoint's.
        serving: For a server: load the models of guards now, and not when they are first asked, and keep no prompts.

    Raises:
        UserError: If a guard is unknown, needs what cannot be had, or names what only the checkpoint wants opened.
    """
    if not lm.guards:
        return lm
    place = Place(lm.spec, lm.base, sample(lm), device, cache_folder(), notice, serving)
    lm.guarding = build_guards(lm.guards, place, source=source, own=own)
    return lm


def build_guards(
    specs: Sequence[GuardSpec], place: Place, *, source: str | None = None, own: Collection[str] = ()
) -> Guards:
    """Return guards at work, in the order of their specs.

    Raises:
        UserError: As `with_guards`; also where two of them take the place of the token loop.
    """
    prompt: list[tuple[str, PromptGuard]] = []
    decode: DecodeGuard | None = None
    for spec in specs:
        guard = _guard(spec, place.model, source, own)
        working = guard.build(place)
        if not isinstance(working, DecodeGuard):
            prompt.append((spec.name, working))
        elif decode is None:
            decode = working
        else:
            raise UserError(f"'{printable(place.model)}' carries two guards that choose tokens; only one can.")
    return Guards(tuple(prompt), decode)


def guard_called(name: str, settings: Mapping[str, object]) -> Guard:
    """Return a guard's settings by name.

    Raises:
        UserError: If the name or a setting is unknown.
    """
    method = build(registry.find("guards", name), settings)
    if not isinstance(method, Guard):
        raise UserError(f"'{name}' is not a guard.")
    return method


def _guard(spec: GuardSpec, model: str, source: str | None, own: Collection[str]) -> Guard:
    """Return one guard's settings; `guards.json` is the checkpoint's, so a name in it is never a file to import."""
    shown = printable(model)
    if spec.name not in registry.names("guards"):
        raise ModelError(
            f"'{shown}' carries a guard '{printable(spec.name)}' that is not known here; install what brings it, or "
            "delete guards.json to use the weights without it."
        )
    try:
        guard = guard_called(spec.name, spec.settings)
    except UserError as problem:
        raise ModelError(f"guards.json of '{shown}': {problem}") from problem
    if source is not None and "source" in guard.opens:
        # What the person names is what is opened, whatever was saved.
        return guard.model_copy(update={"source": source})
    for name in guard.opens if spec.name not in own else ():
        wanted = str(getattr(guard, name))
        if parse_source(wanted).goes_out:
            raise ModelError(
                f"the guard {spec.name} of '{shown}' wants to use '{printable(wanted)}', which would see every prompt; "
                f"give --evidence '{printable(wanted)}' to allow that, or another source."
            )
    return guard


@contextmanager
def recorded(lm: LM) -> Iterator[list[dict[str, object]]]:
    """Collect what the guards of a model record inside the block; nothing for a model without."""
    if lm.guarding is None:
        yield []
        return
    before, lm.guarding.journal = lm.guarding.journal, []
    try:
        yield lm.guarding.journal
    finally:
        lm.guarding.journal = before


def counts(journal: Sequence[Mapping[str, object]]) -> dict[str, dict[str, Any]]:
    """Return name of a guard -> what it did, counted: "asked" for any, and for `evidence` its branches."""
    found: dict[str, list[Mapping[str, object]]] = {}
    for record in journal:
        found.setdefault(str(record["guard"]), []).append(record)
    return {
        name: conflict.summary(records) if name == "evidence" else {"asked": len(records)}
        for name, records in found.items()
    }


def sentences(model: str, journal: Sequence[Mapping[str, object]]) -> list[str]:
    """Return what the guards of a model did, for the report."""
    found = []
    for name, count in counts(journal).items():
        words = f"The guard {name} of {model} acted on {count['asked']} questions"
        if name == "evidence":
            made = count["rewritten"] + count["keywords"]
            words += (
                f": the model's own evidence was rewritten for {count['rewritten']} ({count['usable']} times it was "
                f"usable), keywords were explained for {count['keywords']}, and {count['none']} had none"
                f"{_refused(count)}. With evidence the answer turned for {count['turned']} of {made}"
            )
        found.append(f"{words}. Only unbackdoor applies guards; other loaders of the folder ignore them.")
    return found


_MOST_REASONS = 5


def _refused(count: Mapping[str, Any]) -> str:
    if not count["none"]:
        return ""
    what = "were refused" if count["refused"] else "were answered without"
    reasons: list[tuple[str, int]] = list(count["reasons"].items())
    if len(reasons) < 2:
        return f" and {what} ({reasons[0][0]})" if reasons else f" and {what}"
    said = [f"{reason}: {times}" for reason, times in reasons[:_MOST_REASONS]]
    rest = sum(times for _, times in reasons[_MOST_REASONS:])
    return f" and {what} ({'; '.join([*said, *([f'other reasons: {rest}'] if rest else [])])})"
