"""unbackdoor: remove backdoors from large language models, and show evidence of it.

The verbs of the command line as functions: `attack`, `purify`, `evaluate`. Importing this package imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unbackdoor.errors import UserError

if TYPE_CHECKING:
    from unbackdoor.pipeline import attack, evaluate, purify

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "attack", "evaluate", "purify"]


def __getattr__(name: str) -> object:
    """Import the verbs on first use, so that `import unbackdoor` stays quick."""
    if name in {"attack", "evaluate", "purify"}:
        from unbackdoor import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'unbackdoor' has no attribute '{name}'")
