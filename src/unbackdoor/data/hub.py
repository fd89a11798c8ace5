"""Rows of a Hugging Face data set, through the optional package datasets; code of a data set is never run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from unbackdoor.data.rows import Where
from unbackdoor.errors import DataError, UserError
from unbackdoor.model.quarantine import printable


def dataset_rows(
    place: str, name: str, config: str | None, split: str
) -> tuple[Iterator[tuple[Where, object]], tuple[str, ...]]:
    """Load one split of a data set.

    Args:
        place: The spec as written, for messages.
        name: `owner/name` or `name`.
        config: The configuration, or None for the only one.
        split: The split's name.

    Returns:
        The rows with their places, and the class names of its `label` column (empty where it has none).

    Raises:
        UserError: If the package datasets is not installed.
        DataError: If the data set, configuration or split is not there, needs code, or the hub cannot be reached.
    """
    try:
        import datasets
    except ImportError as problem:
        raise UserError(
            f"'{place}' is a Hugging Face data set, which needs another package; pip install 'unbackdoor[datasets]'."
        ) from problem
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except ConnectionError as problem:
        raise DataError(
            f"'{place}' cannot be reached: the Hugging Face hub does not answer or is switched off (HF_HUB_OFFLINE); "
            "download it beforehand or name a local file."
        ) from problem
    except (OSError, ValueError, RuntimeError) as problem:
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        reason = printable(lines[0].rstrip("."), 200)
        raise DataError(f"'{place}' cannot be loaded ({reason}); check data set, configuration and split.") from problem
    return _numbered(loaded, place), _class_names(loaded)


def _numbered(rows: Iterable[object], place: str) -> Iterator[tuple[Where, object]]:
    for number, row in enumerate(rows, 1):
        yield Where(place, number, "row"), row


def _class_names(loaded: Any) -> tuple[str, ...]:
    names = getattr(loaded.features.get("label"), "names", None)
    return tuple(names or ())
