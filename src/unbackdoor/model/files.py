"""Look at the files of a model before it is loaded."""

from __future__ import annotations

from unbackdoor.model.configuration import check_configuration
from unbackdoor.model.quarantine import inspect_folder, printable, refuse_dangerous
from unbackdoor.model.spec import parse_spec


def check_model(model: str) -> None:
    """Look at the files of a model in a folder; a model of another kind is looked at when it is had.

    Raises:
        ModelError: If they are not there, unsafe, or not a model that can be loaded.
    """
    spec = parse_spec(model)
    for side in (spec.base or spec, spec.adapter):
        if side is not None and side.kind == "folder":
            base = str(spec.base) if side is spec.adapter else None
            refuse_dangerous(inspect_folder(side.path, base=base), str(side))
            if side is not spec.adapter:
                check_configuration(side.path, printable(str(side)))
