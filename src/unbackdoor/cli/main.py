"""The command line's entry point: `unbackdoor COMMAND ...`. It parses, calls the pipeline and prints; no torch here.

Exit codes: 0 done and nothing found, 1 a finding of `inspect` or a figure that `--fail-on` names, 2 could not run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from unbackdoor import __version__
from unbackdoor.cli import looking, merging, running, serving
from unbackdoor.cli.options import STOPPED
from unbackdoor.model.quarantine import printable

app = typer.Typer(
    name="unbackdoor",
    help="Remove backdoors from large language models, and show evidence of it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
running.register(app)
merging.register(app)
looking.register(app)
serving.register(app)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"unbackdoor {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_version, is_eager=True)
    ] = False,
) -> None:
    del version


# typer brings its own copy of click or uses the package, by version; both make this error of its base class.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


def _is_utf8(text: str) -> bool:
    """Whether a text can be written down: an argument's bytes that are not UTF-8 come as halves of surrogate pairs."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # Bars of libraries would run through our own; stderr carries what `cli/progress.py` shows and nothing else.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Activations come and go with every step; in huge pages (Linux) that costs fewer page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if foreign := [text for text in given if not _is_utf8(text)]:
        sys.stderr.write(f"unbackdoor: the argument '{printable(foreign[0])}' is not UTF-8; write or rename it so.\n")
        return 2
    try:
        code = app(args=given, standalone_mode=False)
    except _UsageError as problem:
        show = getattr(problem, "format_message", problem.__str__)
        message = str(show())
        if not message.strip():
            return 2  # without a command: the help was printed
        sys.stderr.write(f"unbackdoor: {message} `unbackdoor --help` shows what there is.\n")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write(f"unbackdoor: {STOPPED}\n")
        return 2
    # 130 is what typer makes of an interrupt outside a command's own handling; the contract knows 0, 1 and 2.
    return {0: 0, 1: 1}.get(int(code or 0), 2)


if __name__ == "__main__":
    sys.exit(main())
