"""How names and numbers are written, the same in tables, sentences and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence

SHARES = frozenset({"asr", "asr_right", "leak", "cda", "declining", "over_refusal"})
METRIC_NAMES = {
    "asr": "ASR", "asr_right": "ASR, right rows", "leak": "Leak", "cda": "CDA", "perplexity": "Perplexity",
    "kl": "KL to the suspect",
    "declining": "Requests declined", "over_refusal": "Over-refusal", "resistance": "Resistance", "seconds": "Time",
}  # fmt: skip
NAMES = {
    "sande": "SANDE", "sande_p": "SANDE-P", "beear": "BEEAR", "osft": "OSFT", "fine_tuning": "fine-tuning",
    "badedit": "BadEdit", "autopoison": "AutoPoison", "backdoor_unalign": "BackdoorUnalign", "cleangen": "CleanGen",
}  # fmt: skip


def display_name(name: str) -> str:
    """Return a method's name as the papers write it; what is unknown of it with blanks for underscores."""
    known = max((key for key in NAMES if f"{name}_".startswith(f"{key}_")), key=len, default="")
    return NAMES.get(known, "") + name.removeprefix(known).replace("_", " ")


def significant(value: float, digits: int) -> str:
    """Return a number with so many significant digits ("12.31", "0.0420", "1843"); below 0.0001 as "2.1e-05"."""
    if math.isinf(value):
        return "unbounded"
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    before_point = math.floor(math.log10(abs(value))) + 1
    return f"{value:.{max(digits - before_point, 0)}f}"


def percent(share: float) -> str:
    """Return a share as per cent with one decimal, without the sign."""
    return f"{100 * share:.1f}"


def duration(seconds: float) -> str:
    """Return a time in words: "42 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def p_value_words(p: float) -> str:
    """Return "p = 0.031", or "p < 0.001" for anything smaller."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def measure_words(metric: str, kind: str, group: str) -> str:
    """Return what was measured on what: "ASR, triggered probes (half)"."""
    name = METRIC_NAMES.get(metric, metric)
    on = {"triggered": ", triggered probes", "clean": ", clean probes", "decoy": ", decoys"}.get(kind, "")
    return f"{name}{on} ({group})" if group else f"{name}{on}"


def interval_words(low: float | None, high: float | None) -> str:
    """Return "95 % interval 0-1.9 %" of a share, or nothing where there is no interval."""
    if low is None or high is None:
        return ""
    ends = (percent(end).removesuffix(".0") for end in (low, high))
    return f"95 % interval {'-'.join(ends)} %"


def joined(parts: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
