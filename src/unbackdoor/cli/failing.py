"""`--fail-on`: a condition on the figures, such as `asr>0.05` or `leak.decoy>=0.02`, that makes the exit code 1."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from unbackdoor import registry
from unbackdoor.errors import UserError, did_you_mean
from unbackdoor.report.wording import SHARES

_FORM = re.compile(
    r"\s*(?P<metric>[a-z_]+)(\.(?P<kind>[a-z]+))?\s*(?P<sign>>=|<=|>|<)\s*(?P<bound>[0-9.eE+-]+)\s*(?P<percent>%?)\s*"
)
_SIGNS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le,
}  # fmt: skip
_JUDGED = ("before", "after")
_KINDS = ("triggered", "clean", "decoy", "all")


@dataclass(frozen=True)
class FailOn:
    """A condition under which a command fails.

    Attributes:
        text: As written.
        metric: The metric.
        kind: The kind of probes, or "" for the metric's own.
        sign: The comparison.
        bound: What is compared with.
    """

    text: str
    metric: str
    kind: str
    sign: str
    bound: float

    def check(self, figures: Set[str]) -> None:
        """Refuse a condition on a figure that the run will not have, before it is run.

        Args:
            figures: What will be measured: a metric's name, or with its kind after a dot.

        Raises:
            UserError: If it is not among them.
        """
        of_metric = {name for name in figures if name.partition(".")[0] == self.metric}
        if not of_metric or (self.kind and self.metric not in figures and f"{self.metric}.{self.kind}" not in figures):
            known = ", ".join(sorted(figures)) or "nothing"
            raise UserError(f"--fail-on '{self.text}': that will not be measured here; what will is {known}.")

    def missed(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return a sentence for every result that meets the condition: purified models, else controls, else suspects.

        Raises:
            UserError: If the figure was not measured: a threshold that cannot be looked at is not passed.
        """
        # A revival says something about the method, not about the model that came out.
        own = [row for row in rows if row["metric"] == self.metric and row["group"] == "" and row["stage"] in _JUDGED]
        roles = {row["role"] for row in rows}
        judge = next((role for role in ("purified", "control") if role in roles), "suspect")
        judged = [row for row in own if row["role"] == judge]
        kinds = {row["kind"] for row in judged}
        kind = self.kind or ("all" if "all" in kinds else next(iter(sorted(kinds)), ""))
        found = [row for row in judged if row["kind"] == kind and row["value"] is not None]
        if not found:
            raise UserError(f"--fail-on '{self.text}': {self.metric} was not measured, so the threshold means nothing.")
        compare = _SIGNS[self.sign]
        return [
            f"--fail-on: {self.metric} of {_who(row)} is {row['value']:.4g}, and '{self.text}' was asked for."
            for row in found
            if compare(float(row["value"]), self.bound)
        ]


def _who(row: Mapping[str, Any]) -> str:
    more = [row["attack"], row["defense"] and f"after {row['defense']}", f"seed {row['seed']}"]
    return f"'{row['model']}' ({', '.join(part for part in more if part)})"


def parse_fail_on(text: str) -> FailOn:
    """Read METRIC[.KIND] SIGN NUMBER; the number may be in per cent.

    Raises:
        UserError: If it is not understood, or there is no such metric.
    """
    found = _FORM.fullmatch(text)
    try:
        bound = float(found["bound"]) if found else 0.0
    except ValueError:
        found = None
    if found is None:
        raise UserError(f"--fail-on '{text}' is not understood; write it as asr>0.05 or leak.decoy>2%.")
    known = [*registry.names("metrics"), "seconds"]
    if found["metric"] not in known:
        hint = did_you_mean(found["metric"], known)
        raise UserError(f"--fail-on: there is no metric '{found['metric']}'.{hint} Metrics: {', '.join(known)}.")
    if found["kind"] and found["kind"] not in _KINDS:
        raise UserError(f"--fail-on: there is no kind '{found['kind']}'; kinds are {', '.join(_KINDS)}.")
    bound /= 100 if found["percent"] else 1
    if not math.isfinite(bound):
        raise UserError(f"--fail-on '{text}': the bound is no finite number; write it as asr>0.05 or leak.decoy>2%.")
    if found["metric"] in SHARES and not 0 <= bound <= 1:
        words = f"{found['metric']}{found['sign']}"
        raise UserError(
            f"--fail-on '{text}': {found['metric']} is a share from 0 to 1, and {bound:g} is not; "
            f"write {words}0.05 or {words}5%."
        )
    return FailOn(text, found["metric"], found["kind"] or "", found["sign"], bound)
