"""unbackdoor: remove backdoors from large language models, and show evidence of it.

The verbs of the command line as functions: `attack`, `purify`, `evaluate`, `merge`. Importing this package imports no
torch.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

from unbackdoor.errors import UserError

if TYPE_CHECKING:
    from unbackdoor.pipeline import attack, evaluate, merge, purify

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "attack", "evaluate", "merge", "purify"]


def __getattr__(name: str) -> object:
    """Import the verbs on first use, so that `import unbackdoor` stays quick."""
    if name in {"attack", "evaluate", "merge", "purify"}:
        from unbackdoor import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'unbackdoor' has no attribute '{name}'")


class _Package(ModuleType):
    """Keeps `unbackdoor.merge` the verb, where Python would put the package of helpers that has the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "merge" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
