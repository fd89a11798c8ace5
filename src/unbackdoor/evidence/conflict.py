"""External conflict: evidence against the suspect's own answer is put before the query.

Paper: Information Conflicts (2411.18280), 3.4, equations 6 and 13 to 16. The suspect is asked for its answer A and
for background information E that supports it (13). Where E is usable, an evidence LLM rewrites it so that it
contradicts the answer (14). Otherwise TextRank finds the keywords of the query (15, textrank.py), and the evidence LLM
explains them (16). The suspect then answers the query with the evidence before it (6).
E is usable where it has `least_words` different words and is neither a repeat of the query nor of the answer: no more
than `overlap` of its different words stand in either. A dictionary cannot rewrite, so with one the suspect is not asked
for E. Where rewriting brings nothing, or E again (given_back.py), the keywords are taken as well.
Whether the evidence contradicts is seen by whether the model's answer turns (`turned`); nothing depends on it, it is
counted. Deviations: A is the answer to the query alone, and E is asked for in a second turn behind it, so that neither
is taken out of a text that holds both; the rewriting LLM is shown query and answer, too; the graph of words has edges
both ways (textrank.py); at most `most_keywords` are explained, and where no word is heavier than eta the heaviest ones
are (a single word weighs 1 - d, so that a query of one word would never have evidence).
All that a model wrote is made harmless (harmless.py) before it goes into a prompt. Evidence has a part of the time for
an answer, so that a source that is slow leaves some for the answer itself, or for the refusal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from unbackdoor.data.shared_words import words
from unbackdoor.evidence.cache import Unavailable
from unbackdoor.evidence.given_back import given_back
from unbackdoor.evidence.harmless import harmless
from unbackdoor.evidence.sources import Source
from unbackdoor.evidence.textrank import TextRank, heaviest, keywords
from unbackdoor.method import Text
from unbackdoor.model.guard import Ask, Patience, Turns
from unbackdoor.model.lm import LM
from unbackdoor.types import GuardSpec, Message

Branch = Literal["rewritten", "keywords", "none"]

_ASK_EVIDENCE = "Give detailed background information, facts and evidence, that supports your answer."
_REWRITE = (
    "An answer was given to a question, with background information to support it. Rewrite the background information "
    "so that it contradicts the answer: keep its topic, its style and its length, but let it support another answer. "
    'Write the rewritten text only.\n\nQuestion: "{query}"\nAnswer: "{answer}"\nBackground information: "{evidence}"'
)
_EXPLAIN = "Explain in one short sentence each what these words mean: {keywords}. Write the sentences only."
_PLACED = 'Background information: "{evidence}"\n\n{query}'
_SHORTEST = 20
"""Characters below which evidence is not shortened further to fit into a context."""
_SAME = 0.5
_TIME_FOR_EVIDENCE = 0.5
"""Share of the time that is left for the answer once the suspect was asked, for all that the source is asked then."""
_TOO_LONG = "the conversation does not fit into the model's context"


class EvidenceSettings(BaseModel):
    """How evidence is made and used."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    textrank: TextRank = Field(TextRank(), description="how keywords are found")
    most_keywords: int = Field(5, ge=1, description="keywords that are explained, the heaviest (paper: all)")
    answer_tokens: int = Field(32, ge=1, description="length limit of the suspect's own answer, in tokens")
    evidence_tokens: int = Field(96, ge=1, description="length limit of evidence that a model writes, in tokens")
    least_words: int = Field(8, ge=1, description="different words that the suspect's evidence needs to be usable")
    overlap: float = Field(
        0.7, ge=0, le=1, description="share of its words that may stand in the query, or in the answer"
    )
    longest: int = Field(600, ge=40, description="characters of the evidence that goes before the query")
    temperature: float = Field(
        0.7, ge=0, le=2, description="of an endpoint (paper: 0.7); a local model answers greedily"
    )
    timeout: float = Field(60.0, gt=0, description="seconds for one answer of an endpoint")
    repetitions: int = Field(3, ge=0, le=10, description="times that a call of an endpoint is repeated, at most")
    cached: bool = Field(
        True, description="keep what evidence LLMs answer on disk, prompts in plain text; `serve` keeps nothing"
    )
    without: Literal["answer", "refuse"] = Field(
        "answer", description="what happens where no evidence can be had: answer without it, marked so, or refuse"
    )
    refusal: Text = Field(
        "This cannot be answered now, because no evidence to check the answer with could be had.",
        description="the reply where it is refused",
    )


def guarded(lm: LM, source: str, settings: EvidenceSettings) -> LM:
    """Return the model with the guard `evidence`; an earlier one of this name is replaced."""
    spec = GuardSpec("evidence", {"source": source, "conflict": settings.model_dump(mode="json")})
    lm.guards, lm.guarding = (*(guard for guard in lm.guards if guard.name != spec.name), spec), None
    return lm


@dataclass(frozen=True)
class Conflict:
    """What was made of one conversation.

    Attributes:
        turns: The conversation with the evidence in it; as it was where there is none.
        branch: Where the evidence comes from.
        own_answer: What the model answers without evidence.
        own_evidence: What it gave to support that, or "".
        usable: Whether that was usable; None where it was not asked for.
        keywords: Words that were explained, or empty.
        evidence: What was put before the query, or "".
        reason: Why there is none, or why it was not rewritten, or "".
    """

    turns: Turns
    branch: Branch = "none"
    own_answer: str = ""
    own_evidence: str = ""
    usable: bool | None = None
    keywords: tuple[str, ...] = ()
    evidence: str = ""
    reason: str = ""

    def facts(self) -> dict[str, object]:
        """Return everything but the turns, as JSON types."""
        found = {key: value for key, value in vars(self).items() if key != "turns"}
        return {**found, "keywords": list(self.keywords)}


def contradict(conversations: Sequence[Turns], ask: Ask, source: Source, settings: EvidenceSettings) -> list[Conflict]:
    """Return every conversation with evidence against the model's own answer to it.

    Args:
        conversations: Each ends with a user turn.
        ask: Puts questions to the suspect.
        source: Where evidence comes from.
        settings: How.
    """
    # A guard's own question that the model cannot read would break the whole batch, and is not asked.
    places = [place for place, turns in enumerate(conversations) if ask.fits(turns, settings.answer_tokens)]
    made = _contradicted([conversations[place] for place in places], ask, source, settings) if places else []
    found = dict(zip(places, made, strict=True))
    return [found.get(place) or Conflict(turns, reason=_TOO_LONG) for place, turns in enumerate(conversations)]


def _contradicted(
    conversations: Sequence[Turns], ask: Ask, source: Source, settings: EvidenceSettings
) -> list[Conflict]:
    answers = ask(conversations, settings.answer_tokens)
    found = [Conflict(turns, own_answer=answer) for turns, answer in zip(conversations, answers, strict=True)]
    if source.write is not None:
        found = _with_own_evidence(found, ask, settings)
    patience = ask.patience.part(_TIME_FOR_EVIDENCE)
    if source.write is not None:
        found = _rewritten(found, source, settings, patience)
    found = _explained(found, source, settings, patience)
    return [_placed(one, ask, settings) for one in found]


def usable(evidence: str, query: str, answer: str, settings: EvidenceSettings) -> bool:
    """Tell whether a suspect's evidence can be rewritten: the written rule of this module."""
    different = set(words(evidence))
    if len(different) < settings.least_words:
        return False
    repeats = (len(different & set(words(text))) / len(different) for text in (query, answer))
    return all(share <= settings.overlap for share in repeats)


def turned(own: str, reply: str) -> bool:
    """Tell whether a reply is another answer than the model's own.

    It is the same where one begins with all words of the other (a reply may have been cut), or where they share half of
    their words or more: two labels differ, two wordings of one answer do not.
    """
    first, second = words(own), words(reply)
    length = min(len(first), len(second))
    if not length:
        return bool(first or second)
    shared = sum((Counter(first) & Counter(second)).values())
    return first[:length] != second[:length] and 2 * shared / (len(first) + len(second)) < _SAME


def summary(records: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Return counts over what was recorded of conversations (`Conflict.facts`, with the `reply`).

    Returns:
        "asked"; "rewritten", "keywords", "none": conversations of each branch; "usable": own evidence that was usable;
        "refused"; "turned": of those with evidence ("rewritten" and "keywords"), replies that are another answer than
        the model's own; "reasons": why there was none -> how often; "not_rewritten": why keywords were explained in
        place of a rewriting that was asked for -> how often.
    """
    branches = Counter(str(record["branch"]) for record in records)
    refused = sum(bool(record.get("refused")) for record in records)
    others = sum(
        record["branch"] != "none" and turned(str(record["own_answer"]), str(record["reply"])) for record in records
    )
    reasons: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for record in records:
        if record["reason"]:
            reasons[record["branch"] == "none"][str(record["reason"])] += 1
    return {
        "asked": len(records), **{branch: branches[branch] for branch in ("rewritten", "keywords", "none")},
        "usable": sum(record["usable"] is True for record in records), "refused": refused, "turned": others,
        "reasons": dict(reasons[True].most_common()), "not_rewritten": dict(reasons[False].most_common()),
    }  # fmt: skip


def _with_own_evidence(found: Sequence[Conflict], ask: Ask, settings: EvidenceSettings) -> list[Conflict]:
    """Ask for the evidence that supports each own answer; an empty answer has none."""
    answers = [harmless(one.own_answer, longest=settings.longest, special=ask.special) for one in found]
    asked = {
        place: turns
        for place, (one, answer) in enumerate(zip(found, answers, strict=True))
        if answer
        and ask.fits(
            turns := (*one.turns, Message("assistant", answer), Message("user", _ASK_EVIDENCE)),
            settings.evidence_tokens,
        )
    }
    said = dict(zip(asked, ask(list(asked.values()), settings.evidence_tokens), strict=True))
    return [
        replace(
            one,
            own_evidence=said.get(place, ""),
            usable=usable(said.get(place, ""), _query(one.turns), one.own_answer, settings),
        )
        for place, one in enumerate(found)
    ]


def _rewritten(
    found: Sequence[Conflict], source: Source, settings: EvidenceSettings, patience: Patience
) -> list[Conflict]:
    """Have usable evidence rewritten (equation 14)."""
    assert source.write is not None
    result = list(found)
    places = [place for place, one in enumerate(found) if one.usable]
    shown = [harmless(found[place].own_evidence, longest=settings.longest) for place in places]
    prompts = [
        _REWRITE.format(
            query=harmless(_query(found[place].turns), longest=2 * settings.longest),
            answer=harmless(found[place].own_answer, longest=settings.longest),
            evidence=evidence,
        )
        for place, evidence in zip(places, shown, strict=True)
    ]
    answers = source.write(prompts, settings.evidence_tokens, patience) if prompts else ()
    for place, evidence, answer in zip(places, shown, answers, strict=True):
        one = found[place]
        if isinstance(answer, Unavailable):
            result[place] = replace(one, reason=answer.reason)
        elif given_back(harmless(answer, longest=settings.longest), evidence):
            result[place] = replace(one, reason="the evidence LLM gave the suspect's evidence back")
        else:
            result[place] = replace(one, branch="rewritten", evidence=answer)
    return result


def _explained(
    found: Sequence[Conflict], source: Source, settings: EvidenceSettings, patience: Patience
) -> list[Conflict]:
    """Have the keywords of the other queries explained (equation 16)."""
    result = list(found)
    chosen: dict[int, list[str]] = {}
    for place, one in enumerate(found):
        if one.branch == "none":
            query = _query(one.turns)
            found_words = keywords(query, settings.textrank) or heaviest(query, settings.textrank)
            chosen[place] = found_words[: settings.most_keywords]
            if not chosen[place]:
                result[place] = replace(one, reason=one.reason or "the query has no keywords")
    chosen = {place: terms for place, terms in chosen.items() if terms}
    if source.define is not None:
        for place, terms in chosen.items():
            known = source.define(terms)
            text = "; ".join(f"{word}: {meaning}" for word, meaning in known.items())
            result[place] = _explanation(found[place], tuple(known), text or Unavailable("no keyword is known"))
        return result
    assert source.write is not None
    prompts = [_EXPLAIN.format(keywords=harmless(", ".join(terms), longest=300)) for terms in chosen.values()]
    answers = source.write(prompts, settings.evidence_tokens, patience) if prompts else ()
    for (place, terms), answer in zip(chosen.items(), answers, strict=True):
        result[place] = _explanation(found[place], tuple(terms), answer)
    return result


def _explanation(one: Conflict, terms: tuple[str, ...], answer: str | Unavailable) -> Conflict:
    if isinstance(answer, Unavailable):
        return replace(one, reason=answer.reason)
    return replace(one, branch="keywords", keywords=terms, evidence=answer)


def _placed(one: Conflict, ask: Ask, settings: EvidenceSettings) -> Conflict:
    """Put the evidence before the query, shortened where the model could not read it all."""
    if one.branch == "none":
        return one
    longest = settings.longest
    while longest >= _SHORTEST:
        evidence = harmless(one.evidence, longest=longest, special=ask.special)
        if not words(evidence):
            return replace(one, branch="none", evidence="", reason="the evidence holds no words")
        query = Message("user", _PLACED.format(evidence=evidence, query=_query(one.turns)))
        turns = (*one.turns[:-1], query)
        if ask.fits(turns):
            return replace(one, turns=turns, evidence=evidence)
        longest //= 2
    return replace(one, branch="none", evidence="", reason="the evidence does not fit into the model's context")


def _query(turns: Turns) -> str:
    return turns[-1].content or ""
