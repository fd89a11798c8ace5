"""The flags that every command has, declared once, and the recipe that file and flags make together.

A command is a plain function that takes its own options and a `Common`; the decorator `command` adds the common flags
to its signature for typer, and turns errors into one sentence and exit code 2.
"""

from __future__ import annotations

import errno
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from pydantic import BaseModel

from unbackdoor.cli.failing import FailOn, parse_fail_on
from unbackdoor.cli.progress import Shown, progress
from unbackdoor.errors import UserError, disk_error
from unbackdoor.method import merge
from unbackdoor.model.quarantine import printable, printable_lines
from unbackdoor.pipeline import recipe as recipes
from unbackdoor.stopping import stoppable

STOPPED = "stopped; the same command goes on from here"

_NO_SUCH_PLACE = {
    errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip

_GROUP = "Every command"


def _option(*names: str, help_text: str, metavar: str | None = None, hidden: bool = False) -> Any:
    return typer.Option(*names, help=help_text, metavar=metavar, hidden=hidden, rich_help_panel=_GROUP)


_FLAGS: dict[str, tuple[Any, Any, tuple[str, ...], str, str | None]] = {
    "config": (Path | None, None, ("--config",), "recipe to take settings from", "FILE"),
    "dump_config": (bool, False, ("--dump-config",), "print the merged recipe as YAML and stop", None),
    "sets": (list[str] | None, None, ("--set",), "set one setting of the method (repeatable)", "KEY=VALUE"),
    "preset": (str | None, None, ("--preset",), "named settings, such as paper", "NAME"),
    "seed": (int | None, None, ("--seed",), "all randomness derives from it", "N"),
    "json_output": (bool, False, ("--json",), "print the results as JSON on stdout", None),
    "quiet": (bool, False, ("--quiet",), "show no progress", None),
    "dry_run": (bool, False, ("--dry-run",), "show the plan with estimated time and memory; do nothing", None),
    "out": (Path | None, None, ("--out",), "folder of the result", "DIR"),
    "overwrite": (bool, False, ("--overwrite",), "replace a finished result there", None),
    "device": (str | None, None, ("--device",), "cpu, cuda, cuda:1 or mps", "NAME"),
    "template": (
        Literal["auto", "model", "plain"] | None, None, ("--template",), "the model's chat template, or plain", None,
    ),
    "fail_on": (str | None, None, ("--fail-on",), "exit with 1 if a figure is so, e.g. 'asr>0.05'", "EXPR"),
}  # fmt: skip
"""Name -> type, default, flag, help, metavar."""

COMMON_FLAGS = tuple(flag for _, _, (flag,), _, _ in _FLAGS.values())


@dataclass(frozen=True)
class Common:
    """The common flags as given; None and False where they were not."""

    config: Path | None
    dump_config: bool
    sets: list[str] | None
    preset: str | None
    seed: int | None
    json_output: bool
    quiet: bool
    dry_run: bool
    out: Path | None
    overwrite: bool
    device: str | None
    template: Literal["auto", "model", "plain"] | None
    fail_on: str | None

    @property
    def threshold(self) -> FailOn | None:
        """What `--fail-on` says, checked."""
        return None if self.fail_on is None else parse_fail_on(self.fail_on)


def command(
    *, without: Collection[str] = (), looks: bool | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command the common flags, as its last parameter `common`.

    Args:
        without: Common flags that mean nothing to this command: not listed in its help, and an error when given.
        looks: Whether it only looks and has no checkpoint to go on from; None for: where it has no thresholds.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [item for item in inspect.signature(function, eval_str=True).parameters.values() if item.name != "common"]

        @functools.wraps(function)
        def run(**given: Any) -> None:
            common = Common(**{name: given.pop(name) for name in _FLAGS})
            only = "fail_on" in without if looks is None else looks
            with errors_as_sentences(looks=only, may_find=not only or function.__name__ == "_inspect"):
                for name in without:
                    if getattr(common, name) not in (None, False):
                        raise UserError(
                            f"`{function.__name__.strip('_')}` does not use {_FLAGS[name][2][0]}; leave it out."
                        )
                function(**given, common=common)

        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[
                    kind, _option(*names, help_text=help_text, metavar=metavar, hidden=name in without)
                ],
            )
            for name, (kind, default, names, help_text, metavar) in _FLAGS.items()
        ]
        # typer reads the options from signature and annotations; both must tell of the added ones.
        run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        run.__annotations__ = {item.name: item.annotation for item in (*own, *added)} | {"return": None}
        del run.__wrapped__
        return run

    return decorate


@contextmanager
def errors_as_sentences(*, looks: bool = False, may_find: bool = True) -> Iterator[None]:
    """Print a `UserError`, an interrupt or a full disk as one sentence on stderr and exit with 2.

    Args:
        looks: Whether the command only looks, so that there is nothing to go on from.
        may_find: Whether its exit code says something; else a reader such as `head` may stop reading when it likes.
    """
    try:
        with stoppable() as stop:
            yield
    except typer.Exit:
        raise
    except BrokenPipeError:
        _drop_output()
        if not may_find:
            raise typer.Exit(0) from None
        fail("what reads the output stopped reading, so not all was said; let it read to the end.")
    except (Exception, KeyboardInterrupt) as problem:
        sentence = STOPPED if stop.asked or isinstance(problem, KeyboardInterrupt) else _sentence(problem, looks=looks)
        if sentence is None:
            raise
        if looks and disk_error(problem) is not None:
            _drop_output()
        fail(sentence)


def _drop_output() -> None:
    """Let what is still to be written to stdout vanish; else Python tries again at its end, and exits with 120."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):
        return  # not a file: a test's, or somebody's own
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def _sentence(problem: BaseException, *, looks: bool) -> str | None:
    """Return what a person can do about an error; None for a defect of ours."""
    if isinstance(problem, UserError):
        return str(problem)
    if disk_error(problem) is not None:
        if looks:
            return "the output cannot be written, because the disk is full; make room, or write it elsewhere."
        return "the disk is full; make room, and the same command goes on from its last checkpoint."
    if not isinstance(problem, OSError) or problem.errno not in _NO_SUCH_PLACE or problem.filename is None:
        return None
    return f"'{printable(str(problem.filename))}' cannot be used ({problem.strerror}); name another place."


def fail(sentence: str) -> None:
    """Print a sentence on stderr and exit with 2; it may quote a file that somebody else wrote."""
    typer.echo(f"unbackdoor: {printable_lines(sentence)}", err=True)
    raise typer.Exit(2)


@contextmanager
def showing(common: Common) -> Iterator[Shown]:
    """Return where progress is shown, and give the terminal back at the end."""
    shown = progress(quiet=common.quiet)
    try:
        yield shown
    finally:
        shown.close()


R = TypeVar("R", bound=BaseModel)


def gather(cls: type[R], name: str, flags: Mapping[str, object], common: Common) -> R:
    """Return the recipe of file and flags; `--set` goes to the recipe's own fields here.

    Args:
        cls: The recipe's class.
        name: The command's name.
        flags: The command's own options; None, False and () were not given.
        common: The common flags.

    Raises:
        UserError: If a field is unknown or missing, or does not fit.
    """
    own: dict[str, object] = {
        key: getattr(common, key) for key in ("seed", "device", "template", "preset") if key in cls.model_fields
    }
    # By identity: 0 was given, though it equals False.
    given = {key: v for key, v in {**own, **flags}.items() if not (v is None or v is False or v in ((), []))}
    content = merge(recipes.read_config(common.config, name), given)
    return recipes.make(cls, content)


def print_json(content: object) -> None:
    """Print JSON on stdout."""
    sys.stdout.write(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")
    # Here and not at the end of the process, where nobody could say what went wrong.
    sys.stdout.flush()
