"""What transformers, PEFT and safetensors say and raise while a checkpoint is opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def library_errors() -> tuple[type[Exception], ...]:
    """What transformers, PEFT and safetensors raise for a checkpoint whose values make no sense to them."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    plain = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, ImportError)
    return (*plain, SafetensorError, StrictDataclassError)


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
