r"""Make text of models, probes and checkpoints safe to look at, keeping its line breaks.

HTML escaping is the template's work (autoescape) and Markdown's that of `markdown.py`. This is the step before both:
control characters, terminal escapes, bidirectional overrides and zero-width characters become visible `\xNN` forms, so
that a reply cannot hide or reorder what a reader sees.
"""

from __future__ import annotations

from unbackdoor.model.quarantine import printable
from unbackdoor.model.quarantine import printable_lines as shown

__all__ = ["shown", "shown_line"]


def shown_line(text: str, limit: int = 200) -> str:
    """Return `text` on one line, line breaks escaped as well, cut after `limit` characters."""
    return printable(text, limit)
