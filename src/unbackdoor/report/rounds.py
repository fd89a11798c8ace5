"""`rounds.json` of a run folder, read and checked: what fired after each round of each defense, what fits came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unbackdoor.report.fields import Record, as_record, read_json
from unbackdoor.types import wilson

ASKED = ("triggered", "clean", "decoy")


@dataclass(frozen=True)
class Rate:
    """Probes of one kind after one round: how many fired of how many asked."""

    fired: int
    asked: int

    @property
    def share(self) -> float:
        """What fired, from 0 to 1."""
        return self.fired / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the share."""
        return wilson(self.fired, self.asked)


@dataclass(frozen=True)
class Fit:
    """A drift or a parrot of one round.

    Attributes:
        name: "drift 2" or "parrot 1".
        loss: Mean loss of its last step on the unwanted text, or None where it was no number.
        safe: Likewise on the safe answers; None for parrots.
        steps: Steps that a parrot took; None for drifts.
        layer: The layer that a drift is added behind, where it is known.
        at: Whether it ends with the user's "words" or with the "prompt", likewise.
        openings: What a drift was to make the model say.
        says: What the model said under a drift, a text a prompt.
    """

    name: str
    loss: float | None
    safe: float | None = None
    steps: int | None = None
    layer: int | None = None
    at: str | None = None
    openings: tuple[str, ...] = ()
    says: tuple[str, ...] = ()


@dataclass(frozen=True)
class TakenUp:
    """An opening that was taken up of what the model said; its figures are as `train/openings.py` has them."""

    opening: str
    certainty: float | None
    evidence: float | None
    share: float | None
    likeness: float | None = None


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        number: From 1.
        rates: By kind of probe; empty where none were asked.
        fits: Its drifts or parrots.
        adopted: Openings that were taken up of what the model said under drifts.
    """

    number: int
    rates: dict[str, Rate]
    fits: tuple[Fit, ...]
    adopted: tuple[TakenUp, ...] = ()

    @property
    def losses(self) -> list[float]:
        """The losses of its fits that are numbers."""
        return [fit.loss for fit in self.fits if fit.loss is not None]


@dataclass(frozen=True)
class Place:
    """A layer and a length that a drift could have had, and its mean loss on unwanted answers there."""

    layer: int
    tokens: int
    loss: float | None


@dataclass(frozen=True)
class Rounds:
    """All rounds of one defense.

    Attributes:
        defense: Its name.
        layer: The layer that it perturbs, where it perturbs one.
        rounds: In order.
        choice: What layer and length of the drifts were chosen from; empty where nothing was to be chosen.
    """

    defense: str
    layer: int | None
    rounds: tuple[Round, ...]
    choice: tuple[Place, ...] = ()


def read_rounds(path: Path) -> tuple[Rounds, ...]:
    """Return what `rounds.json` holds, a record a defense; nothing where there is no such file.

    Raises:
        DataError: If it is broken.
    """
    if not path.is_file():
        return ()
    record = as_record(read_json(path), str(path))
    if "defenses" not in record.data:
        raise record.wrong("defenses", "a list of defenses with their rounds")
    found: list[Rounds] = []
    for item in record.records("defenses"):
        if item.text("defense") in {other.defense for other in found}:
            raise item.wrong("defense", "another one than those before")
        found.append(_of_defense(item))
    return tuple(found)


def _of_defense(record: Record) -> Rounds:
    found: list[Round] = []
    for item in record.records("rounds"):
        number = item.whole("round")
        if number <= (found[-1].number if found else 0):
            raise item.wrong("round", "a number above that of the round before")
        drifts = [_drift(at, drift) for at, drift in enumerate(item.records("drifts"), 1)]
        parrots = [_parrot(at, parrot) for at, parrot in enumerate(item.records("parrots"), 1)]
        adopted = tuple(
            TakenUp(one.text("opening"), *(_loss(one, name) for name in ("certainty", "evidence", "share", "likeness")))
            for one in item.records("adopted")
        )
        found.append(Round(number, _rates(item), (*drifts, *parrots), adopted))
    choice = tuple(_place(item) for item in record.records("choice"))
    return Rounds(record.text("defense"), _layer(record), tuple(found), choice)


def _place(item: Record) -> Place:
    layer = _layer(item)
    if layer is None:
        raise item.wrong("layer", "the number of a layer")
    return Place(layer, item.whole("tokens"), _loss(item, "loss"))


def _rates(item: Record) -> dict[str, Rate]:
    asked = as_record(item.mapping("asked"), f"{item.place}, asked")
    for kind in asked.data:
        if kind not in ASKED:
            raise item.wrong("asked", f"counts for {', '.join(ASKED)} alone")
    return {kind: _rate(asked, kind) for kind in ASKED if kind in asked.data}


def _rate(asked: Record, kind: str) -> Rate:
    counts = [as_record({"value": item}, asked.place) for item in asked.items(kind)]
    if len(counts) == 2:
        fired, n = counts[0].whole("value"), counts[1].whole("value")
        if n > 0 and 0 <= fired <= n:
            return Rate(fired, n)
    raise asked.wrong(kind, "how many fired and how many of them were asked")


def _drift(at: int, item: Record) -> Fit:
    return Fit(
        f"drift {at}",
        _loss(item, "unwanted"),
        safe=_loss(item, "safe"),
        layer=_layer(item),
        at=_at(item),
        openings=item.texts("openings"),
        says=item.texts("says"),
    )


def _parrot(at: int, item: Record) -> Fit:
    return Fit(f"parrot {at}", _loss(item, "loss"), steps=_whole_or_none(item, "steps"))


def _loss(item: Record, key: str) -> float | None:
    return None if item.data.get(key) is None else item.number(key)


def _whole_or_none(item: Record, key: str) -> int | None:
    return None if item.data.get(key) is None else item.whole(key)


def _at(item: Record) -> str | None:
    at = item.data.get("at")
    if at not in (None, "words", "prompt"):
        raise item.wrong("at", "words or prompt")
    return at


def _layer(item: Record) -> int | None:
    layer = _whole_or_none(item, "layer")
    if layer is not None and layer < 0:
        raise item.wrong("layer", "the number of a layer")
    return layer
