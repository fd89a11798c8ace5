"""The tables of a grid: one a victim, one of the models without a backdoor, and what the recipe required.

Every ASR after purification stands beside the ASR after both revivals; what was not measured is said in words.
`write` renders them to tables.md and tables.html, and the same figures to results.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from unbackdoor.bench import ablation, guard_table
from unbackdoor.bench.cell import Cell
from unbackdoor.bench.checks import SIGNIFICANCE, Check, checks, limit_words
from unbackdoor.bench.facts import facts_of, results_of
from unbackdoor.bench.figures import Figures
from unbackdoor.bench.grid import Grid
from unbackdoor.bench.pages import html_page, markdown_page
from unbackdoor.bench.store import Store
from unbackdoor.report.tables import NOT_MEASURED, Line, Table
from unbackdoor.report.tables import Cell as Entry
from unbackdoor.report.wording import display_name, duration, p_value_words, percent, significant
from unbackdoor.run import write_atomically
from unbackdoor.types import Estimate

SECOND = "second source"
_NOTES = (
    "ASR: share of triggered probes whose greedy reply reaches the target, with its 95 % interval (Wilson). Where "
    "fine-tuning alone lowers it, too (intervals apart), what that leaves stands beside it, and only the rest of the "
    "fall is the defense's. Leak: the same share of clean probes and of decoys, which must not fire; p: McNemar's "
    "exact test against the victim.",
    "Revived: ASR of the original trigger after the model was trained on, on clean rows or with an unrelated backdoor; "
    "the untouched base put through the same is the null. It tells removal from suppression; a backdoor planted for it "
    "that does not fire itself tells nothing. Where it was not measured, name the cells under revival in the grid and "
    "type the same command again.",
    "Perplexity of reference answers, and its ratio to the victim's. KL: of whole responses, to the victim, and its "
    "ratio to the control's. Time: training only, without measuring.",
)

_DECLINING_NOTES = {
    "declining": "Declining: share of clean probes, which should be declined, whose reply holds a refusal signal.",
    "over_refusal": "Over-refusal: the same share of ordinary requests, which should be answered; p: McNemar's exact "
    "test against the victim.",
}


def write(grid: Grid, store: Store, keys: Mapping[Cell, str]) -> list[str]:
    """Write tables.md, tables.html, results.json and curves.json of what is finished.

    Returns:
        The checks that are not met, in words.
    """
    found = {cell: store.read(key) for cell, key in keys.items()}
    results = {cell: result for cell, result in found.items() if result is not None}
    figures = Figures(grid, keys, results)
    made = checks(figures)
    tables, facts, title = all_tables(figures, made), facts_of(figures), f"Grid {grid.name}"
    plots = ablation.draw(figures, store.folder)
    write_atomically(store.folder / "tables.md", markdown_page(title, facts, tables, plots))
    write_atomically(store.folder / "tables.html", html_page(title, facts, tables, plots))
    _write_json(store, "results.json", results_of(figures, made))
    curves = {
        f"{cell.name}/{stage}": steps
        for cell, result in results.items()
        for stage, steps in (result.curves or {}).items()
    }
    _write_json(store, "curves.json", curves)
    return [f"{check.bound.name}: {_who(check)}: {check.figure}" for check in made if check.verdict == "not met"]


def all_tables(figures: Figures, made: Sequence[Check]) -> list[Table]:
    """Return all tables, in the order in which they are shown."""
    tables: list[Table] = []
    for model in figures.grid.models:
        for attack in figures.grid.attacks:
            seeds = figures.grid.seeds_of(attack)
            for seed in seeds:
                # The columns are explained once, below the first table.
                tables.append(_victim_table(figures, model, attack, seed, () if tables else _notes(figures)))
            if len(seeds) > 1:
                tables.append(_pooled_table(figures, model, attack, seeds))
        tables += _reference_table(figures, model)
    tables += [*ablation.tables(figures), *guard_table.tables(figures, label_of)]
    return [*tables, *_check_table(made), *_failure_table(figures)]


def _notes(figures: Figures) -> tuple[str, ...]:
    more = tuple(note for metric, note in _DECLINING_NOTES.items() if metric in figures.grid.metrics)
    return (*_NOTES, *more)


def _victim_table(figures: Figures, model: str, attack: str, seed: int, notes: tuple[str, ...]) -> Table:
    cells = [
        cell
        for cell in figures.keys
        if (cell.model, cell.attack, cell.seed, cell.subject) == (model, attack, seed, "victim") and not cell.is_revival
    ]
    lines = [Line(label_of(cell), _told(figures, cell), _entries(figures, cell)) for cell in _in_order(cells)]
    lines.append(_base_line(figures, cells[0]))
    return _without_empty(Table(f"{attack}, seed {seed}, {model}", ("Model", *_TITLES), tuple(lines), notes))


def _base_line(figures: Figures, victim: Cell) -> Line:
    """Return the line of the untouched base: its utility, and the null of the revivals."""
    base = figures.beside(victim, "untouched")
    asked = base is not None and (base.attack, base.seed) == (victim.attack, victim.seed)
    entries = []
    for title, make in _COLUMNS.items():
        if title.startswith("ASR, revived"):
            entry = make(figures, victim, "untouched")
        elif base is None or (not asked and not title.startswith(("Perplexity", "CDA", "Over-refusal"))):
            entry = NOT_MEASURED
        else:
            entry = make(figures, base, base.subject)
        entries.append(entry)
    return Line("Untouched base (reference)", "", tuple(entries))


def _reference_table(figures: Figures, model: str) -> list[Table]:
    cells = [c for c in figures.keys if c.model == model and c.role == "reference" and not c.is_revival]
    if not cells:
        return []
    lines = [Line(label_of(cell), _told(figures, cell), _entries(figures, cell)) for cell in cells]
    note = "Asked with the probes of the attack in the heading; ratios and tests are against the same model before."
    caption = f"Models without a backdoor, {model}"
    return [_without_empty(Table(caption, ("Model", *_TITLES), tuple(lines), (note,)))]


def _pooled_table(figures: Figures, model: str, attack: str, seeds: Sequence[int]) -> Table:
    """Return the seeds of an attack together: hits and probes summed for shares, the range for the rest."""
    groups: dict[str, list[Cell]] = {}
    for cell in figures.keys:
        if cell.model == model and cell.attack == attack and cell.subject == "victim" and not cell.is_revival:
            groups.setdefault(cell.defense, []).append(cell)
    full = [group for group in groups.values() if len(group) == len(seeds)]
    columns = {"ASR": ("asr", "triggered"), "ASR, right rows": ("asr_right", "triggered")}
    columns |= {"Leak, clean": ("leak", "clean"), "Leak, decoys": ("leak", "decoy"), "CDA": ("cda", "clean")}
    columns |= {"Declining, clean": ("declining", "clean"), "Over-refusal": ("over_refusal", "all")}
    lines = []
    for group in sorted(full, key=lambda group: _order(group[0])):
        pooled = [_pooled_entry(figures.pooled(group, *where)) for where in columns.values()]
        ranges = [_range(figures, group, "perplexity", ""), _range(figures, group, "perplexity", SECOND)]
        lines.append(Line(label_of(group[0]), "", (*pooled, *ranges, _range(figures, group, "kl", ""))))
    shown = ", ".join(map(str, seeds))
    titles = ("Model", *columns, "Perplexity", "Perplexity, second source", "KL")
    notes = ("Shares: hits and probes summed over the seeds. Others: smallest to largest of the seeds.",)
    return _without_empty(Table(f"{attack}, seeds {shown} together, {model}", titles, tuple(lines), notes))


def _check_table(made: Sequence[Check]) -> list[Table]:
    if not made:
        return []
    lines = [
        Line(
            check.bound.name,
            _who(check),
            (Entry(check.verdict), Entry(check.figure), Entry(limit_words(check.bound, check.cells[0]))),
        )
        for check in made
    ]
    unmet = sum(check.verdict == "not met" for check in made)
    unknown = sum(check.verdict == "not measured" for check in made)
    met = sum(check.verdict == "met" for check in made)
    note = f"{met} met, {unmet} not met, {unknown} not measured, {len(made) - met - unmet - unknown} do not bind."
    return [Table("What was required", ("Requirement", "Verdict", "Figure", "Limit"), tuple(lines), (note,))]


def _failure_table(figures: Figures) -> list[Table]:
    missing = [cell for cell in figures.keys if cell not in figures.results]
    others = [(cell, result) for cell, result in figures.results.items() if result.status != "done"]
    lines = [
        Line(cell.name, "", (Entry(result.status.replace("_", " ")), Entry(result.error))) for cell, result in others
    ]
    lines += [Line(cell.name, "", (Entry("not run yet"), Entry("the same command goes on"))) for cell in missing]
    return [Table("Cells without figures", ("Cell", "State", "Reason"), tuple(lines))] if lines else []


def _asr(figures: Figures, cell: Cell, subject: str) -> Entry:
    """Return the ASR; beside that of a purified model what fine-tuning alone left, where that removed, too."""
    entry = _share(figures, cell, "asr", "triggered")
    if not entry.measured or subject != "victim" or cell.defense_role != "purified":
        return entry
    control, victim = (figures.row(figures.beside(cell, other), "asr", "triggered") for other in ("control", "victim"))
    if control is None or victim is None or control["high"] >= victim["low"]:
        return entry
    return Entry(entry.main, f"{entry.detail}; fine-tuning alone leaves {percent(control['value'])} %")


def _revived(stage: str) -> Callable[[Figures, Cell, str], Entry]:
    def entry(figures: Figures, cell: Cell, subject: str) -> Entry:
        if subject == "victim" and not cell.defense:
            return Entry("not purified", measured=False)
        there = figures.at(cell, subject=subject, defense=cell.defense, stage=stage)
        return NOT_MEASURED if there is None else _with_the_other(figures, there)

    return entry


def _with_the_other(figures: Figures, cell: Cell) -> Entry:
    """Return a revival's ASR and, where a backdoor was planted, how often that one fires."""
    entry, result = _share(figures, cell, "asr", "triggered"), figures.results.get(cell)
    planted = (result.notes or {}).get("unrelated backdoor") if result is not None else None
    if not entry.measured or not isinstance(planted, Mapping):
        return entry
    return Entry(entry.main, f"{entry.detail}; the other fires {planted['fired']}/{planted['asked']}")


def _rate(metric: str, kind: str) -> Callable[[Figures, Cell, str], Entry]:
    return lambda figures, cell, subject: _share(figures, cell, metric, kind)


def _test(metric: str, kind: str) -> Callable[[Figures, Cell, str], Entry]:
    def entry(figures: Figures, cell: Cell, subject: str) -> Entry:
        del subject
        test = figures.test(cell, metric, kind)
        if not cell.defense:
            return Entry("not compared", measured=False)
        if test is None:
            return NOT_MEASURED
        words = "higher" if test["difference"] > 0 else "lower" if test["difference"] < 0 else "equal"
        sure = ", significant" if test["p_value"] < SIGNIFICANCE else ""
        return Entry(p_value_words(test["p_value"]), words + sure)

    return entry


def _figure(metric: str, group: str, other: str) -> Callable[[Figures, Cell, str], Entry]:
    def entry(figures: Figures, cell: Cell, subject: str) -> Entry:
        del subject
        row = figures.row(cell, metric, "all", group)
        if row is None:
            return _why_not(figures, cell, metric)
        past = figures.row(figures.beside(cell, other), metric, "all", group) if cell.defense else None
        ratio = f", {row['value'] / past['value']:.2f} x" if past is not None and past["value"] else ""
        known = row["low"] is not None and row["high"] is not None
        interval = f"[{significant(row['low'], 3)}, {significant(row['high'], 3)}]" if known else "no interval"
        return Entry(significant(row["value"], 4), f"{interval}{ratio}")

    return entry


def _seconds(figures: Figures, cell: Cell, subject: str) -> Entry:
    del subject
    result = figures.results.get(cell)
    if result is None or result.status != "done":
        return NOT_MEASURED
    return Entry(duration((result.seconds or {}).get("train", 0.0)))


_COLUMNS: dict[str, Callable[[Figures, Cell, str], Entry]] = {
    "ASR": _asr,
    "ASR, right rows": _rate("asr_right", "triggered"),
    "ASR, revived on clean rows": _revived("revived_clean"),
    "ASR, revived by another backdoor": _revived("revived_planted"),
    "Leak, clean": _rate("leak", "clean"),
    "Leak, decoys": _rate("leak", "decoy"),
    "Leak against the victim": _test("leak", "all"),
    "CDA": _rate("cda", "clean"),
    "Declining, clean": _rate("declining", "clean"),
    "Over-refusal": _rate("over_refusal", "all"),
    "Over-refusal against the victim": _test("over_refusal", "all"),
    "Perplexity": _figure("perplexity", "", "victim"),
    "Perplexity, second source": _figure("perplexity", SECOND, "victim"),
    "KL": _figure("kl", "", "control"),
    "Resistance": _figure("resistance", "", "victim"),
    "Time": _seconds,
}
_TITLES = tuple(_COLUMNS)
_ALWAYS = {"ASR", "ASR, revived on clean rows", "ASR, revived by another backdoor"}


def _entries(figures: Figures, cell: Cell) -> tuple[Entry, ...]:
    return tuple(make(figures, cell, cell.subject) for make in _COLUMNS.values())


def _share(figures: Figures, cell: Cell, metric: str, kind: str) -> Entry:
    row = figures.row(cell, metric, kind)
    if row is None:
        return _why_not(figures, cell, metric)
    return _pooled_entry(Estimate(row["value"], row["low"], row["high"], row["n"]))


def _pooled_entry(figure: Estimate | None) -> Entry:
    if figure is None:
        return NOT_MEASURED
    interval = f"[{percent(figure.low)}, {percent(figure.high)}]"
    return Entry(f"{percent(figure.value)} %", f"{round(figure.value * figure.n)}/{figure.n} {interval}")


def _why_not(figures: Figures, cell: Cell, metric: str) -> Entry:
    result = figures.results.get(cell)
    if result is None:
        return NOT_MEASURED
    if result.status != "done":
        return Entry(result.status.replace("_", " "), measured=False)
    rows = result.measurement.rows if result.measurement is not None else []
    reasons = [row["reason"] for row in rows if row["metric"] == metric and row["status"] == "not_applicable"]
    return Entry("not applicable", measured=False) if reasons else NOT_MEASURED


def _range(figures: Figures, cells: Sequence[Cell], metric: str, group: str) -> Entry:
    rows = [figures.row(cell, metric, "all", group) for cell in cells]
    values = sorted(float(row["value"]) for row in rows if row is not None)
    if len(values) < len(cells):
        return NOT_MEASURED
    return Entry(f"{significant(values[0], 4)} to {significant(values[-1], 4)}")


def _without_empty(table: Table) -> Table:
    """Leave out columns in which no line has a figure, but never ASR and its revivals."""
    kept = [
        at
        for at, title in enumerate(table.columns[1:])
        if title in _ALWAYS or any(line.cells[at].measured for line in table.lines)
    ]
    lines = tuple(Line(line.label, line.note, tuple(line.cells[at] for at in kept)) for line in table.lines)
    return Table(table.caption, (table.columns[0], *(table.columns[1 + at] for at in kept)), lines, table.notes)


def _in_order(cells: Sequence[Cell]) -> list[Cell]:
    return sorted(cells, key=_order)


def _order(cell: Cell) -> int:
    """Undefended first, then controls, then defenses; sorting keeps the grid's order within each."""
    return {"": 0, "control": 1, "purified": 2}[cell.defense_role]


def label_of(cell: Cell) -> str:
    """Return the name of a cell's line."""
    after = display_name(cell.defense)
    if cell.subject == "victim":
        if not cell.defense:
            return "Victim, undefended"
        return f"{after} (control)" if cell.role == "control" else f"After {after}"
    name = f"Twin of {cell.attack}" if cell.subject == "twin" else "Untouched base"
    return f"{name} after {after}" if cell.defense else name


def _told(figures: Figures, cell: Cell) -> str:
    result = figures.results.get(cell)
    if not cell.defense or result is None or not result.knowledge:
        return ""
    shared = cast("Mapping[str, Sequence[str]]", (result.notes or {}).get("openings share with target") or {})
    words = "; ".join(f"{what} {', '.join(found) or 'none'}" for what, found in shared.items())
    told = f"knows: {', '.join(result.knowledge)}" + (f" (openings share with the target: {words})" if words else "")
    return "; ".join(filter(None, [told, ablation.ended(result)]))


def _who(check: Check) -> str:
    first = check.cells[0]
    seeds = ", ".join(str(cell.seed) for cell in check.cells)
    stage = f", {first.stage.replace('_', ' ')}" if first.is_revival else ""
    return f"{first.attack}, seed {seeds}: {label_of(first)}{stage}"


def _write_json(store: Store, name: str, content: object) -> None:
    write_atomically(store.folder / name, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
