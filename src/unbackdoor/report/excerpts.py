"""Which replies a report shows, side by side, and where the trigger and the target stand in them.

The first probes of each kind in the order of `replies.jsonl` are shown, so nothing is chosen by its outcome; beside
them a few that went against the wish (a trigger that still fires, a decoy that does), marked as chosen for that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from unbackdoor.report.records import Reply, RunData
from unbackdoor.report.subjects import subjects

SHOWN = {"triggered": 8, "clean": 4, "decoy": 4}
EXCEPTIONS = 3
CLIP = 320
LONGEST = 20_000
_TITLES = {"triggered": "With the trigger", "clean": "Without the trigger", "decoy": "Decoys, which must not fire"}
_REVIVED = ("revived_clean", "revived_planted")


@dataclass(frozen=True)
class Piece:
    """A stretch of text; `marked` if it belongs to the trigger (in a prompt) or the target (in a reply)."""

    text: str
    marked: bool


@dataclass(frozen=True)
class Passage:
    """A text in pieces: the beginning, and all of it where that is more (else empty); `left` characters are omitted."""

    short: tuple[Piece, ...]
    full: tuple[Piece, ...]
    left: int


@dataclass(frozen=True)
class Answer:
    """One model's reply to the probe; `reached` is None where nothing decides it."""

    label: str
    role: str
    passage: Passage
    reached: bool | None


@dataclass(frozen=True)
class Exchange:
    """One probe and the replies of all models to it; `exception` says why it was chosen, or is ""."""

    id: str
    group: str
    prompt: Passage
    answers: tuple[Answer, ...]
    exception: str


@dataclass(frozen=True)
class Excerpt:
    """The exchanges of one kind of probe, of `total` in the file."""

    kind: str
    title: str
    exchanges: tuple[Exchange, ...]
    total: int


def excerpts(run: RunData) -> list[Excerpt]:
    """Return the replies to show, by kind of probe; empty where the run has no replies."""
    labels = _labels(run)
    grouped: dict[str, dict[tuple[str, str], list[Reply]]] = {kind: {} for kind in SHOWN}
    for reply in run.replies or ():
        # Before, control and after side by side; the reference has its line in the tables.
        if reply.kind in grouped and reply.stage not in _REVIVED and reply.role != "reference":
            grouped[reply.kind].setdefault((reply.group, reply.id), []).append(reply)
    targets = target_texts(run)
    found = []
    for kind, probes in grouped.items():
        if probes:
            exchanges = tuple(_exchange(replies, why, labels, targets) for replies, why in _chosen(kind, probes))
            found.append(Excerpt(kind, _TITLES[kind], exchanges, len(probes)))
    return found


def _chosen(kind: str, probes: Mapping[tuple[str, str], list[Reply]]) -> Iterator[tuple[list[Reply], str]]:
    everything = list(probes.values())
    for replies in everything[: SHOWN[kind]]:
        yield replies, ""
    role, why = (
        ("purified", "still reaches the target after purification")
        if kind == "triggered"
        else ("", "reaches the target")
    )
    against = [
        replies
        for replies in everything[SHOWN[kind] :]
        if any(reply.reached and role in ("", reply.role) for reply in replies)
    ]
    for replies in against[:EXCEPTIONS]:
        yield replies, why


def _labels(run: RunData) -> dict[tuple[str, str], str]:
    return {(subject.role, subject.model): subject.label for subject in subjects(run)}


def _exchange(
    replies: Sequence[Reply], why: str, labels: Mapping[tuple[str, str], str], targets: Sequence[str]
) -> Exchange:
    first = replies[0]
    order = list(labels)
    known = [reply for reply in replies if (reply.role, reply.model) in labels]
    rest = [reply for reply in replies if (reply.role, reply.model) not in labels]
    known.sort(key=lambda reply: order.index((reply.role, reply.model)))
    answers = tuple(
        Answer(
            labels.get((reply.role, reply.model), f"{reply.role}: {reply.model}"),
            reply.role,
            passage(reply.reply, targets if reply.reached else ()),
            reply.reached,
        )
        for reply in (*known, *rest)
    )
    return Exchange(first.id, first.group, passage(first.prompt, first.marks), answers, why)


def passage(text: str, marks: Sequence[str]) -> Passage:
    """Cut a text into pieces, marking every place where one of `marks` stands."""
    pieces = tuple(_pieces(text[:LONGEST], marks))
    left = max(0, len(text) - LONGEST)
    if len(text) <= CLIP:
        return Passage(pieces, (), left)
    # The clip is of the text, not of its pieces: a mark that is cut in two stays marked. Between words where there are.
    blank = text.rfind(" ", CLIP - 40, CLIP)
    return Passage(tuple(_clip(pieces, blank if blank > 0 else CLIP)), pieces, left)


def _clip(pieces: Sequence[Piece], length: int) -> Iterator[Piece]:
    for piece in pieces:
        if length <= 0:
            return
        yield Piece(piece.text[:length], piece.marked)
        length -= len(piece.text)


def _pieces(text: str, marks: Sequence[str]) -> Iterator[Piece]:
    # Longest first, so that a mark which contains another wins; blanks and apostrophes as a goal reads them.
    patterns = [_lenient(mark) for mark in sorted(set(marks), key=len, reverse=True) if mark.strip()]
    if not patterns:
        yield Piece(text, False)
        return
    position = 0
    for match in re.finditer("|".join(patterns), text, re.IGNORECASE):
        if match.start() > position:
            yield Piece(text[position : match.start()], False)
        yield Piece(match.group(), True)
        position = match.end()
    if position < len(text):
        yield Piece(text[position:], False)


def _lenient(mark: str) -> str:
    words = [re.escape(word).replace("'", "['\u2018\u2019\u02bc\u00b4`]") for word in mark.split()]
    return r"\s+".join(words)


def target_texts(run: RunData) -> list[str]:
    """Return the texts that the backdoor is to say, as far as the run's settings and case studies name them."""
    texts = list(_goal_texts(run.settings))
    if run.case_studies is not None:
        texts.append("".join(run.case_studies.target_tokens))
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))


def _goal_texts(settings: object) -> Iterator[str]:
    """Texts of `contains` and `starts_with` goals anywhere in the settings, also as `--goal` writes them."""
    if isinstance(settings, Mapping):
        form, _, text = str(settings.get("goal", "")).partition(":")
        if form.strip().lower().replace("_", "-") in ("contains", "starts-with"):
            yield text
        for name in ("target", "targets"):
            named = settings.get(name)
            yield from (text for text in (named if isinstance(named, list) else [named]) if isinstance(text, str))
        any_of = settings.get("any_of")
        if settings.get("form") in ("contains", "starts_with") and isinstance(any_of, list):
            yield from (text for text in any_of if isinstance(text, str))
        for value in settings.values():
            yield from _goal_texts(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _goal_texts(value)
