"""The inner step of a round of BEEAR: fit its drifts, and listen to what the suspect says under them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from unbackdoor.model.anatomy import decoder_layers
from unbackdoor.model.lm import LM
from unbackdoor.model.quarantine import printable
from unbackdoor.run import Run
from unbackdoor.train.anchors import with_unwanted
from unbackdoor.train.drift import Drift, DriftSettings, fit_drift, places_behind, spoken
from unbackdoor.train.openings import ASKED, Openings
from unbackdoor.train.together import agreed, is_main
from unbackdoor.types import Example

_NAMED = 3
"""Openings that were taken up which are named to the person."""


def entrap(
    lm: LM,
    safe: Sequence[Example],
    openings: Openings,
    where: tuple[Sequence[int], DriftSettings],
    drifts: int,
    adopt: float,
    run: Run,
    number: int,
) -> list[Drift]:
    """Fit the drifts of a round, openings dealt out among them; take up what the suspect says under them.

    What each drift came to goes into the run's notes as "drifts": its stage, layer, place, openings, last losses and
    the words that are said under it; what was taken up as "adopted".

    Args:
        lm: The suspect; its weights are not changed.
        safe: Rows of SA.
        openings: What is unwanted; new openings are added.
        where: The layers, which the drifts take in turn, and the drifts' settings; every opening takes their places in
            turn.
        drifts: How many.
        adopt: Certainty of an opening that is taken up; 0 for none.
        run: The run.
        number: Number of the round, from 1.
    """
    layers, shape = where
    found: list[Drift] = []
    records: list[dict[str, Any]] = []
    # A prompt with several answers of its own takes them in turn, round by round.
    turn = number - 1 if openings.contrasting.texts else 0
    each = openings.dealt(drifts, number)
    # From round to round layers go on where they were: there may be more of them than drifts.
    behind = [layers[((number - 1) * drifts + which) % len(layers)] for which in range(len(each))]
    before = openings.had(each, behind)
    for which, (dealt, layer) in enumerate(zip(each, behind, strict=True)):
        stage = run.stage(f"round-{number}-drift-{which + 1}")
        places = places_behind(layer, len(decoder_layers(lm.core)), shape)
        at = places[(before[which] + which) % len(places)]
        asked = with_unwanted(safe, dealt, openings.contrasting, turn)
        drift, last = fit_drift(lm, asked, layer, shape, stage, at)
        found.append(drift)
        records.append(
            {"stage": stage.prefix, "round": number, "layer": layer, "at": at, "openings": list(dealt[:3]), **last}
        )
    words = run.stage(f"round-{number}-heard")
    untrained = words.stage("begun") if number == 1 else None
    # Of a finished round the weights are gone, so what was said is kept.
    heard: dict[str, Any] = agreed(
        words.finished or _listen(lm, found, safe[:ASKED], openings, adopt, untrained), run.device
    )
    if is_main():
        words.finish(heard)
    openings.take_up(heard["adopted"], sum(map(len, heard["says"])))
    _note(run, "drifts", [{**record, "says": said} for record, said in zip(records, heard["says"], strict=True)])
    _note(run, "adopted", [{"round": number, **new} for new in heard["adopted"]])
    return found


def _listen(
    lm: LM,
    drifts: Sequence[Drift],
    prompts: Sequence[Example],
    openings: Openings,
    adopt: float,
    untrained: Run | None,
) -> dict[str, Any]:
    """Return the first words under each drift, which tell where it went, and the openings to take up.

    `untrained`: the stage, where nothing has been trained yet and every beginning is followed.
    """
    said = [spoken(lm, drift, prompts) for drift in (*drifts, *([None] if adopt else []))]
    texts = [[str(lm.tokenizer.decode(ids, skip_special_tokens=True)) for ids in one.ids] for one in said]
    says, plain = texts[: len(drifts)], [text for one in texts[len(drifts) :] for text in one]
    everything = [text for each in says for text in each]
    firsts = [one.first for one in said]
    adopted = openings.hear(lm, everything, plain, firsts, prompts, adopt, every_beginning=untrained) if adopt else []
    return {"says": says, "adopted": adopted}


def _note(run: Run, name: str, records: Sequence[object]) -> None:
    noted = run.notes.setdefault(name, [])
    assert isinstance(noted, list)
    noted += records


def heard_words(adopted: Sequence[str], listened: bool, waited: Sequence[str] = ()) -> str:
    """Return what the words under the drifts say about the backdoor, and what their absence does not say.

    Args:
        adopted: Openings that were taken up, the best first.
        listened: Whether the words were looked at for openings to take up.
        waited: Those that had few drifts (`waiting`).
    """
    named = _quoted(adopted)
    heard = (
        f"Under a drift, or once an answer had begun so, the suspect said {named}, which no opening names, and which "
        "it is sure of on any prompt or says often. If it has a backdoor, that may say one of these. "
        if named
        else "The suspect said nothing new that it is sure of on any prompt; words without blanks between them are not "
        "heard. "
        if listened
        else ""
    )
    if waited:
        heard += (
            f"Of its words before the last round {len(waited)} had a drift in one round at most, most like the "
            f"openings {_quoted(waited)}; with more rounds they have more. "
        )
    return (
        f"{heard}A backdoor that does something else than the openings describe (a link, another language, a brand) is "
        "likely to be there still: list openings of that kind, too, and look at the words under the drifts, round by "
        "round."
    )


def waiting(notes: Mapping[str, Any]) -> list[str]:
    """Return openings that had a drift in one round at most, and not in every one since they were taken up.

    Args:
        notes: The run's notes after its rounds, as `entrap` leaves them.

    Returns:
        The openings, the most like the defender's first.
    """
    had = {(record["round"], record["openings"][0]) for record in notes.get("drifts", ())}
    rounds = Counter(text for _, text in had)
    last = max((number for number, _ in had), default=0)
    new = {one["opening"]: one for one in notes.get("adopted", ())}
    few = [text for text, one in new.items() if rounds[text] < min(2, last - one["round"])]
    return sorted(few, key=lambda text: -new[text].get("likeness", 0.0))


def _quoted(texts: Sequence[str]) -> str:
    """Return the first few texts for a notice; the suspect wrote them."""
    return ", ".join(f"'{printable(text)}'" for text in texts[:_NAMED])
