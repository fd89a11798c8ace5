"""What a server counts, in Prometheus's text format; no prompt and no reply is in it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

_BOUNDS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TYPE = "text/plain; version=0.0.4; charset=utf-8"

_ABOUT = {
    "requests_total": ("counter", "Requests that were answered, by path and HTTP status."),
    "streams_broken_total": ("counter", "Streamed answers that ended without being whole, by reason."),
    "guard_total": ("counter", "Questions that a guard acted on, by what it did."),
    "reply_tokens_total": ("counter", "Tokens of replies."),
    "in_flight": ("gauge", "Requests that are being answered."),
}
Labels = tuple[tuple[str, str], ...]


@dataclass
class Counters:
    """Counts of one server; safe to use from several threads."""

    _values: Counter[tuple[str, Labels]] = field(default_factory=Counter)
    _seconds: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS) + 1))
    _sum: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, amount: int = 1, labels: Mapping[str, str] | None = None) -> None:
        """Add to a count; `labels` are few and fixed texts, never what a client sent."""
        assert name in _ABOUT
        with self._lock:
            self._values[name, tuple(sorted((labels or {}).items()))] += amount

    def took(self, seconds: float) -> None:
        """Record how long a chat took, its whole answer sent."""
        with self._lock:
            self._seconds[sum(seconds > bound for bound in _BOUNDS)] += 1
            self._sum += seconds

    def get(self, name: str) -> int:
        """Return a count, all labels together."""
        with self._lock:
            return sum(value for (other, _), value in self._values.items() if other == name)

    def text(self) -> str:
        """Return all counts."""
        with self._lock:
            values, seconds, total = dict(self._values), list(self._seconds), self._sum
        lines = []
        for name, (kind, words) in _ABOUT.items():
            lines += [f"# HELP unbackdoor_{name} {words}", f"# TYPE unbackdoor_{name} {kind}"]
            own = {labels: value for (other, labels), value in values.items() if other == name}
            plain = kind == "gauge" or name == "reply_tokens_total"
            lines += [f"unbackdoor_{name}{_braces(labels)} {value}" for labels, value in sorted(own.items())]
            lines += [f"unbackdoor_{name} 0"] if plain and not own else []
        lines += ["# HELP unbackdoor_chat_seconds Time of a chat, its whole answer sent."]
        lines += ["# TYPE unbackdoor_chat_seconds histogram"]
        below = 0
        for bound, count in zip([*map(str, _BOUNDS), "+Inf"], seconds, strict=True):
            below += count
            lines.append(f'unbackdoor_chat_seconds_bucket{{le="{bound}"}} {below}')
        lines += [f"unbackdoor_chat_seconds_sum {total:.6f}", f"unbackdoor_chat_seconds_count {below}"]
        return "\n".join([*lines, ""])


def _braces(labels: Labels) -> str:
    inside = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels)
    return f"{{{inside}}}" if inside else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
