"""What transformers, PEFT and safetensors say and raise while a checkpoint is opened."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager


def library_errors() -> tuple[type[Exception], ...]:
    """What transformers, PEFT and safetensors raise for a checkpoint whose values make no sense to them."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    plain = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, ImportError)
    # torch asserts what it is given, and the reader of GGUF unpacks bytes that may not be there.
    return (*plain, AssertionError, struct.error, SafetensorError, StrictDataclassError)


def reason(problem: BaseException) -> str:
    """Return what an error of a library says, in words where it says only a key or nothing."""
    if isinstance(problem, KeyError) and problem.args:
        return f"its files lack the field or value {problem.args[0]!r}, or it is unknown here; get them again."
    return str(problem).strip() or f"its files make no sense ({type(problem).__name__}); get them again."


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' bars and notices off the terminal inside the block; the command line has its own."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
