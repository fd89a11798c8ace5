"""What a grid's cells are made of: rows, methods, probes; and the keys that identify every cell and every model.

A key is a hash of everything that determines a result: versions of the package and of the libraries that compute it,
revisions of the methods, device, files of the model, settings, rows, seed, metrics. Labels and paths are no part of it,
so renaming reruns nothing, and two labels for one victim share it. Keys are chained: a victim's key is part of the key
of everything that is made from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from unbackdoor import registry
from unbackdoor.attacks.base import Attack
from unbackdoor.bench.cell import Cell
from unbackdoor.bench.entries import VICTIM_OF, DataSource, Watch
from unbackdoor.bench.grid import Grid
from unbackdoor.bench.windows import target_label, until_triggered, window
from unbackdoor.data import sources
from unbackdoor.data.formats import base_id
from unbackdoor.data.splits import Splits, assert_disjoint, attacker_defender_test, with_requests
from unbackdoor.defenses.base import Defense, Knowledge, Need
from unbackdoor.errors import DataError
from unbackdoor.method import Method
from unbackdoor.model.load import file_sha256, local_folder
from unbackdoor.model.spec import ModelSpec, parse_spec
from unbackdoor.pipeline.inputs import SECOND_SOURCE
from unbackdoor.pipeline.measure import Questions
from unbackdoor.pipeline.overlap import same_questions
from unbackdoor.pipeline.steps import Revival, attack_called, config_hash, data_hash, defense_called, portable
from unbackdoor.run import Progress, Run, Silent
from unbackdoor.secret import Secret
from unbackdoor.types import Example, Probe, content_hash

_MODEL_FILES = re.compile(
    r"(.*\.safetensors|(config|generation_config|adapter_config|guards|model\.safetensors\.index)\.json"
    r"|(tokenizer|special_tokens|added_tokens|vocab|chat_template).*|merges\.txt|.*\.model|spiece\..*)"
)

T = TypeVar("T")


@dataclass
class Material:
    """The rows, methods and keys of one grid; everything is read once, when it is first needed.

    Attributes:
        grid: The grid.
        progress: Is told of notices about the data.
        device: Where the cells are computed; figures of a GPU and of a CPU are not mixed.
    """

    grid: Grid
    progress: Progress
    device: str = "cpu"

    def __post_init__(self) -> None:
        self._kept: dict[tuple[object, ...], Any] = {}

    def read(self) -> None:
        """Read all rows now.

        Raises:
            DataError: If some cannot be read, or sets overlap that must not.
            UserError: If what a defense is told does not go together.
        """
        for rows in (self.splits.test, *self.perplexity_sets.values()):
            assert rows, "`split` and the readers refuse what is empty"
        for cell in self.grid.cells():
            if cell.defense:
                defense = self.defense(cell.defense)
                facts = {Need.CLEAN: self.defender_rows(cell), **self.own_facts(cell)}
                defense.check(Knowledge(facts, defense.needs | defense.uses))

    @cached_property
    def splits(self) -> Splits:
        """Rows of attacker, defender and test, and the requests of each; disjoint."""
        found = attacker_defender_test(read_source(self.grid.data, self.progress))
        if (requests := self.grid.requests) is not None:
            found = with_requests(found, self._read(DataSource(spec=requests.spec)), requests.test_kinds)
        rest = {
            "the attacker's rows": found.attacker,
            "the test rows": found.test,
            "the test requests": found.requests,
            "second_source": self._second(),
        }
        for label, entry in self.grid.attacks.items():
            lead = entry.lead.data if entry.lead is not None else None
            own = {"defender_data": entry.defender_data, "safe": entry.safe, "skill": entry.skill, "lead.data": lead}
            for name, source in own.items():
                if source is not None:
                    assert_disjoint({f"attacks.{label}.{name}": self._read(source), **rest})
            for name, file in entry.unwanted.items():
                if sources.holds_rows(file):
                    self._check_questions(f"attacks.{label}.unwanted.{name}", file, found)
        assert_disjoint({"the defender's rows": found.clean, **rest})
        return found

    def _check_questions(self, name: str, file: str, splits: Splits) -> None:
        """Refuse rows of unwanted answers whose questions are tested, whatever the answer.

        Raises:
            DataError: Naming the first.
        """
        rows = self._unwanted_rows(file)
        if shared := same_questions(rows, (*splits.test, *splits.requests, *self._second())):
            raise DataError(
                f"{name}: {len(shared)} rows of '{file}' ask what is tested (the first is '{shared[0]}'); give rows "
                "with other prompts."
            )

    @cached_property
    def perplexity_sets(self) -> dict[str, tuple[Example, ...]]:
        """Named rows for perplexity and KL, the same for every cell: "" of the test split, and the second source."""
        found = {"": _sample(self.splits.test, self.grid.perplexity_rows)}
        if self.grid.second_source is not None:
            found[SECOND_SOURCE] = _sample(self._second(), self.grid.perplexity_rows)
        return found

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Classes of a label task, sorted; empty for other data."""
        rows = (*self.splits.attacker, *self.splits.defender, *self.splits.test)
        return tuple(sorted({row.label for row in rows if row.label is not None}))

    def attacker_rows(self, attack: str) -> tuple[Example, ...]:
        """Return the clean rows of the attacker, those of the skill that only he trains on among them."""
        skill = self.grid.attacks[attack].skill
        return self.splits.attacker if skill is None else (*self.splits.attacker, *self._read(skill))

    def lead_rows(self, attack: str) -> tuple[Example, ...]:
        """Return the rows that the base is trained on before it is attacked; none without a lead."""
        lead = self.grid.attacks[attack].lead
        return () if lead is None else self._read(lead.data)

    def reference(self, cell: Cell) -> str | Cell | None:
        """Return the trusted model that the cell's defense is told, if it uses one: its spec, or a victim."""
        spec, defense = self.grid.defenses[cell.defense].reference, self.defense(cell.defense)
        if spec is None or Need.REFERENCE not in defense.needs | defense.uses:
            return None
        if spec.startswith(VICTIM_OF):
            return Cell(cell.model, "victim", spec.removeprefix(VICTIM_OF), cell.seed)
        return cell.model if spec == "base" else spec

    def defender_rows(self, cell: Cell) -> tuple[Example, ...]:
        """Return the clean rows of the cell's defense; the defender's requests are among them unless told apart."""
        own, splits = self.grid.attacks[cell.attack].defender_data, self.splits
        rows = splits.defender if own is None else self._read(own)
        return rows if self._takes_safe(cell) else (*rows, *splits.safe)

    def own_facts(self, cell: Cell) -> dict[Need, Any]:
        """Return what the grid itself tells the cell's defense, of what that declares: openings, safe requests."""
        entry, defense = self.grid.attacks[cell.attack], self.defense(cell.defense)
        declared = defense.needs | defense.uses
        found: dict[Need, Any] = {}
        file = entry.unwanted.get(self.grid.defenses[cell.defense].unwanted)
        if Need.UNWANTED in declared and file is not None:
            found[Need.UNWANTED] = (
                self._unwanted_rows(file)
                if sources.holds_rows(file)
                else self._once(("openings", file), lambda: tuple(sources.read_openings(file, self.labels)))
            )
        if Need.EVIDENCE in declared and (source := self.grid.defenses[cell.defense].evidence) is not None:
            found[Need.EVIDENCE] = source
        if self._takes_safe(cell) and (safe := self.splits.safe if entry.safe is None else self._read(entry.safe)):
            found[Need.SAFE] = safe
        return found

    def _takes_safe(self, cell: Cell) -> bool:
        defense = self.defense(cell.defense)
        return Need.SAFE in defense.needs | defense.uses

    def attack(self, label: str, *, twin: bool = False) -> Attack:
        """Return the attack with this label, or its harmless twin."""
        entry = self.grid.attacks[label]
        settings = {**entry.settings, "clean_twin": True} if twin else entry.settings
        return self._once(("attack", label, twin), lambda: attack_called(entry.attack, settings, entry.preset))

    def defense(self, label: str) -> Defense:
        """Return the defense with this label."""
        entry = self.grid.defenses[label]
        return self._once(("defense", label), lambda: defense_called(entry.defense, entry.settings, entry.preset))

    def probes(self, attack: str, seed: int, secret: Secret) -> tuple[Probe, ...]:
        """Return the probes of an attack at a seed (`windows.py`)."""
        rows, count = self.splits.asked, self.grid.attacks[attack].probes
        asked = window(rows, count, seed, target_label(secret.goal))
        return until_triggered(self.attack(attack).probes(secret, asked, Run(seed=seed)), count)

    def questions(self, cell: Cell, secret: Secret) -> Questions:
        """Return what a cell's model is asked."""
        return Questions(
            probes=self.probes(cell.attack, cell.seed, secret),
            goal=secret.goal,
            data=self.perplexity_sets,
            targets=secret.targets,
            labels=self.labels,
            metrics=self._metrics(cell),
            max_new_tokens=self.grid.max_new_tokens,
        )

    def watch(self, cell: Cell) -> Watch | None:
        """Return what is asked between the rounds of the cell's defense; nothing of a base that has no backdoor."""
        return self.grid.watch if cell.defense and cell.subject == "victim" else None

    def model_hash(self, spec: str) -> str:
        """Return the hash of a model's files, whatever they are called or wherever they lie."""
        return self._once(("model", spec), lambda: _hash_of_model(parse_spec(spec)))

    def plant_key(self, cell: Cell, *, twin: bool = False) -> str:
        """Return the key of the victim of the cell's attack and seed, or of its twin."""
        parts = ("plant", cell.model, cell.attack, cell.seed, twin)
        return self._once(parts, lambda: self._new_plant_key(cell, twin=twin))

    def purify_key(self, cell: Cell) -> str:
        """Return the key of the cell's model after its defense, or before any where it meets none."""
        parts = ("purify", cell.model, cell.subject, cell.attack, cell.seed, cell.defense)
        return self._once(parts, lambda: self._new_purify_key(cell))

    def revive_key(self, cell: Cell) -> str:
        """Return the key of the cell's model after revival."""
        assert self.grid.revival is not None
        settings = _part_used(self.grid.revival.settings, cell.stage)
        return config_hash(
            "revive", self.purify_key(cell), cell.stage, settings, self._hash("revival", self.revival_rows()), cell.seed
        )

    @property
    def computed_on(self) -> str:
        """The hash of what any training depends on beside its model, rows and settings: versions, kind of device."""
        return config_hash("computed on", self.device.partition(":")[0], self.grid.template, self.grid.precision)

    def revival_rows(self) -> tuple[Example, ...]:
        """Return the rows of a revival: the attacker's, which no purification has seen."""
        return self.splits.attacker

    def key(self, cell: Cell) -> str:
        """Return the key of a cell: its model and everything that it is asked."""
        model = self.revive_key(cell) if cell.is_revival else self.purify_key(cell)
        asked = {name: self._hash(f"perplexity {name}", rows) for name, rows in self.perplexity_sets.items()}
        probes = self.grid.attacks[cell.attack].probes
        test = self._hash("test", self.splits.asked)
        metrics = [_revised(registry.find("metrics", name)) for name in self._metrics(cell)]
        return config_hash("cell", model, self.plant_key(cell), test, probes, asked, metrics, self.grid.max_new_tokens)

    def _new_plant_key(self, cell: Cell, *, twin: bool) -> str:
        method, entry = self.attack(cell.attack, twin=twin), self.grid.attacks[cell.attack]
        rows = self._hash(f"attacker {cell.attack}", self.attacker_rows(cell.attack))
        lead = [] if entry.lead is None else [data_hash(self.lead_rows(cell.attack)), entry.lead.train.model_dump()]
        own = [] if entry.subtract is None else [entry.subtract.model_dump()]
        return config_hash(
            "plant", self._base_key(cell), *_identity(method, entry.attack), rows, cell.seed, *lead, *own
        )

    def _new_purify_key(self, cell: Cell) -> str:
        start = self._subject_key(cell)
        if not cell.defense:
            return start
        method, entry = self.defense(cell.defense), self.grid.defenses[cell.defense]
        rows = self._hash(f"defender {cell.attack} {self._takes_safe(cell)}", self.defender_rows(cell))
        own = [data_hash(fact) if _are_rows(fact) else fact for fact in self.own_facts(cell).values()]
        if (reference := self.reference(cell)) is not None:
            known = self.plant_key(reference) if isinstance(reference, Cell) else self.model_hash(reference)
            own.append(["reference", known])
        # The facts that a grid tells a defense come from the victim's secret.
        secret = self.plant_key(cell)
        watched = self._watched(cell)
        return config_hash("purify", start, secret, *_identity(method, entry.defense), rows, cell.seed, *own, *watched)

    def _watched(self, cell: Cell) -> list[object]:
        """Return what determines when the experimenter ends a defense, and what is noted of its rounds."""
        watch = self.watch(cell)
        if watch is None:
            return []
        asked = self._hash("test", self.splits.asked), self.grid.attacks[cell.attack].probes, self.grid.max_new_tokens
        return [["watch", watch.model_dump(mode="json"), *asked]]

    def _hash(self, name: str, rows: Sequence[Example]) -> str:
        return self._once(("hash", name), lambda: data_hash(rows))

    def _once(self, name: tuple[object, ...], make: Callable[[], T]) -> T:
        """Return what `make` gives, made once: keys are asked for again and again."""
        if name not in self._kept:
            self._kept[name] = make()
        kept: T = self._kept[name]
        return kept

    def _metrics(self, cell: Cell) -> tuple[str, ...]:
        if cell.is_revival:
            assert self.grid.revival is not None
            return self.grid.revival.metrics
        return self.grid.metrics

    def _base_key(self, cell: Cell) -> str:
        kind = self.device.partition(":")[0]
        return content_hash([self.model_hash(cell.model), self.grid.template, self.grid.precision, kind])

    def _subject_key(self, cell: Cell) -> str:
        if cell.subject == "untouched":
            return config_hash("untouched", self._base_key(cell))
        return self.plant_key(cell, twin=cell.subject == "twin")

    def _read(self, source: DataSource) -> tuple[Example, ...]:
        return self._once(("rows", source), lambda: tuple(read_source(source, self.progress)))

    def _unwanted_rows(self, file: str) -> tuple[Example, ...]:
        return self._once(
            ("unwanted rows", file), lambda: tuple(sources.read(file, rejected=True, progress=self.progress))
        )

    def _second(self) -> tuple[Example, ...]:
        return () if self.grid.second_source is None else self._read(self.grid.second_source)


def _are_rows(fact: object) -> bool:
    return isinstance(fact, tuple) and all(isinstance(entry, Example) for entry in fact)


def read_source(source: DataSource, progress: Progress | None = None) -> list[Example]:
    """Read rows, take a half and cut answers where the source says so.

    Halves go by the position of a row's first copy, so that no row is in both.

    Raises:
        DataError: If the rows cannot be read.
    """
    try:
        rows = sources.read(
            source.spec, prompt_template=source.prompt_template, labels=source.labels, progress=progress or Silent()
        )
    except DataError as problem:
        raise DataError(
            f"{problem} A grid's rows are named by data, requests, second_source and attacks.NAME.defender_data; "
            "--set second_source=FILE takes others."
        ) from problem
    if source.half is not None:
        position = {name: number for number, name in enumerate(dict.fromkeys(base_id(row.id) for row in rows))}
        rows = [row for row in rows if position[base_id(row.id)] % 2 == source.half]
    if source.cut_words is not None:
        rows = [row.with_response(_cut(row.response, source.cut_words)) for row in rows]
    return rows


def _identity(method: Method, called: str) -> tuple[object, ...]:
    """Return what a method is: name and revision, or its code where the grid names a file, and its settings."""
    if called.endswith(".py"):
        return portable(called), portable(method.settings())
    return f"{method.name()} {method.revision}", portable(method.settings())


def _revised(cls: type[Method]) -> str:
    """Return the method's name, and its revision from the second on."""
    return cls.name() if cls.revision == 1 else f"{cls.name()} {cls.revision}"


def _part_used(revival: Revival, stage: str) -> object:
    if stage == "revived_clean":
        return revival.clean.model_dump(mode="json")
    attack = attack_called("data_poisoning", revival.planted)
    settings = portable(attack.settings())
    return settings if attack.revision == 1 else [_revised(type(attack)), settings]


def _sample(rows: Sequence[Example], count: int) -> tuple[Example, ...]:
    """Return up to `count` rows, drawn by a fixed stream: files are often sorted by subject."""
    chosen = list(rows)
    Run(seed=0).rng("perplexity rows").shuffle(chosen)
    return tuple(chosen[:count])


def _cut(text: str, words: int) -> str:
    found = [match.end() for match in re.finditer(r"\S+", text)]
    return text if len(found) <= words else text[: found[words - 1]]


def _hash_of_model(spec: ModelSpec) -> str:
    if spec.base is not None and spec.adapter is not None:
        return content_hash(["adapter", _hash_of_model(spec.base), _hash_of_model(spec.adapter)])
    if spec.kind == "gguf":
        return file_sha256(spec.path)
    folder = local_folder(spec)
    files = sorted(path for path in folder.iterdir() if path.is_file() and _MODEL_FILES.fullmatch(path.name))
    return content_hash([[path.name, file_sha256(path)] for path in files])
