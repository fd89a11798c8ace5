"""The exceptions that a person is meant to read.

Only a `UserError` is printed by the command line without a traceback: one sentence that says what is wrong and one
that says what to do. Everything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Set

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
READ_ONLY = frozenset({errno.EROFS})


class UserError(Exception):
    """A mistake that the person at the keyboard can mend; the message names the place and the fix."""


class DataError(UserError):
    """A row, file or split that cannot be used; the message names file, line and field."""


class ModelError(UserError):
    """A model spec or checkpoint that cannot be loaded or saved safely."""


class Diverged(UserError):
    """Training met a loss or gradient that is not finite; the weights are back at the last good state."""


class NotApplicable(Exception):
    """A measurement or defense that has no meaning for this case; a table shows the reason instead of a number."""


def disk_error(problem: BaseException, numbers: Set[int] = FULL) -> BaseException | None:
    """Return the error in a chain of errors that says that the disk is full (or another of `numbers`), or None.

    safetensors has an error of its own for it, which holds the number in its text.
    """
    link: BaseException | None = problem
    while link is not None:
        number = link.errno if isinstance(link, OSError) else None
        if number in numbers or any(f"(os error {code})" in str(link) for code in numbers):
            return link
        link = link.__cause__ or link.__context__
    return None


def did_you_mean(name: str, known: list[str]) -> str:
    """Return `" Did you mean X?"` for the closest known name, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
