"""What stands around the figures of a report: knowledge of each method, settings and hashes, absent parts, limits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from unbackdoor.report.records import RunData
from unbackdoor.report.subjects import Subject, subjects
from unbackdoor.report.tables import Cell, Line, Table, revival_command
from unbackdoor.report.wording import display_name, joined, percent

_KNOWLEDGE = {
    "clean": "clean rows of the defender's own",
    "trigger": "the trigger itself",
    "target": "the target text",
    "target-part": "a part of the target text",
    "unwanted": "openings of unwanted replies, in the defender's words",
    "safe": "requests with safe replies",
    "reference": "a trusted model of the same architecture",
    "evidence": "a source of evidence",
    "preferences": "preference pairs",
}
ABSENT = {
    "comparisons": "No paired test was made in this run.",
    "replies": "There are no replies to show, because this run wrote no replies.jsonl.",
    "case_studies": "Target probabilities were not recorded, because this run wrote no case_studies.json.",
    "curves": "There are no training curves, because this run wrote no curves.json.",
    "rounds": "Nothing is known round by round, because this run wrote no rounds.json.",
    "hidden_states": "Hidden states were not recorded, because this run wrote no hidden_states.json.",
    "how_to_load": "This run left no model to load.",
}


def title(run: RunData) -> str:
    """Return the heading of a run's report."""
    for role in ("purified", "control"):
        treated = [subject.defense for subject in subjects(run) if subject.role == role and subject.defense]
        if treated:
            return f"Before and after {joined(list(dict.fromkeys(map(display_name, treated))))}"
    return f"Measurements of run {run.name}"


def facts(run: RunData) -> list[tuple[str, str]]:
    """Return the few facts that stand under the heading."""

    def values(found: Iterator[str]) -> str:
        return ", ".join(dict.fromkeys(value for value in found if value))

    pairs = [
        ("Run", run.name),
        ("Command", f"unbackdoor {run.command}" if run.command else ""),
        ("Attack", values(display_name(row.attack) for row in run.rows)),
        ("Suspect", values(row.model for row in run.rows if row.role == "suspect")),
        ("Chat template", values(row.template for row in run.rows)),
        ("Seed", values(str(row.seed) for row in run.rows if row.seed is not None)),
    ]
    return [(name, value) for name, value in pairs if value]


def knowledge_table(run: RunData) -> Table | None:
    """Return what each method had to know, or None where no method was applied."""
    lines: dict[str, Line] = {}
    for subject in subjects(run):
        if subject.role in ("control", "purified"):
            known = list(dict.fromkeys(fact for row in subject.rows for fact in row.knowledge))
            words = "; ".join(_KNOWLEDGE.get(fact.lower().replace("_", "-"), fact) for fact in known)
            lines[subject.label] = Line(subject.label, "", (Cell(words or "nothing"),))
    if not lines:
        return None
    note = "A method cannot read a fact that it did not declare."
    return Table("What each method had to know", ("Method", "Knowledge"), tuple(lines.values()), (note,))


def settings_table(values: Mapping[str, object], caption: str) -> Table | None:
    """Return nested plain data as a table of dotted names and values, or None where there is nothing."""
    lines = tuple(Line(name, "", (Cell(value),)) for name, value in _flat(values, ""))
    return Table(caption, ("Name", "Value"), lines) if lines else None


def _flat(value: object, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def limits(run: RunData) -> list[str]:
    """Return what was not measured and what the figures cannot carry, then the run's own notices."""
    found = subjects(run)
    purified = [subject for subject in found if subject.role == "purified"]
    sentences = [*_missing_subjects(found, bool(purified)), *_missing_measures(run, purified), *_sizes(run)]
    for row in run.rows:
        if row.status != "measured" and row.reason:
            word = "does not apply" if row.status == "not_applicable" else "failed"
            sentences.append(f"{row.metric} of {row.model} {word}: {row.reason.rstrip('.')}.")
    return list(dict.fromkeys([*sentences, *run.notices]))


def _missing_subjects(found: list[Subject], treated: bool) -> Iterator[str]:
    roles = {subject.role for subject in found}
    if "suspect" not in roles:
        yield "The suspect itself was not measured, so there is nothing to compare with."
    if treated and "control" not in roles:
        yield "Plain fine-tuning at the same budget, the control, was not run."
    if "reference" not in roles:
        yield "The model before the attack was not measured, so the floor of the ASR on these probes is not known."
    seeds = {subject.seed for subject in found if subject.seed is not None}
    if len(seeds) == 1:
        yield "One seed: the intervals cover the choice of probes, not that of the training run."


def _missing_measures(run: RunData, purified: list[Subject]) -> Iterator[str]:
    probes = {row.kind for row in run.rows if row.metric in ("asr", "leak") and row.value is not None}
    if "triggered" not in probes:
        yield "There were no triggered probes, so nothing is known about the ASR."
    if "clean" not in probes:
        yield "Leak on clean probes was not measured."
    if "decoy" not in probes:
        yield "Leak on decoys was not measured, so an over-wide trigger would go unseen."
    measured = {row.metric for row in run.rows if row.value is not None}
    for metric, words in (("perplexity", "Perplexity"), ("kl", "KL to the suspect"), ("cda", "CDA")):
        if metric not in measured:
            yield f"{words} was not measured."
    if "perplexity" in measured and not any(row.group == "second source" for row in run.rows):
        yield "Perplexity on a second source was not measured."
    stages = {row.stage for row in run.rows if row.metric == "asr" and row.value is not None}
    missing = [
        words
        for stage, words in (("revived_clean", "more clean data"), ("revived_planted", "an unrelated backdoor"))
        if stage not in stages
    ]
    if purified and missing:
        yield (
            f"Revival by training on {' or '.join(missing)} was not measured: an ASR of 0 may be suppression, not "
            f"removal; `{revival_command(run)}` measures it on a victim of its own."
        )


def _sizes(run: RunData) -> Iterator[str]:
    rows = [row for row in run.rows if row.metric == "asr" and row.kind == "triggered" and row.n]
    if rows:
        fewest = min(row.n or 0 for row in rows)
        # Rule of Wilson's interval at zero successes: z^2 / (n + z^2).
        bound = 3.841458820694124 / (fewest + 3.841458820694124)
        yield f"With {fewest} triggered probes, even 0 successes leave a rate of up to {percent(bound)} % possible."
