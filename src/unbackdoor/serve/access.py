"""Keys, and the address of the upstream: what is wrong with them shows before anything starts."""

from __future__ import annotations

import os

from unbackdoor.errors import UserError
from unbackdoor.evidence.endpoint import check_url, key_in, key_to

UPSTREAM_KEY = "UNBACKDOOR_UPSTREAM_KEY"


def client_key(variable: str, *, named: bool) -> str | None:
    """Return the key that clients must give, from an environment variable; None where the usual one is not set.

    Args:
        variable: The variable.
        named: Whether somebody named it.

    Raises:
        UserError: If it can be no key. One of blanks only is none, too: the server would ask for no key. So would it
            where a variable that somebody named is not set.
    """
    key = key_in(variable)
    if named and not os.environ.get(variable):
        raise UserError(f"key_from names {variable}, which is not set; set it to the key, or leave key_from out.")
    if key is None and os.environ.get(variable):
        raise UserError(f"{variable} holds blanks only, which is no key; set it again, or unset it.")
    return key


def upstream_key(url: str) -> str | None:
    """Look at an upstream's URL, and return the key that is sent there, or None.

    Raises:
        UserError: If nothing can be asked there, or the key would be sent unencrypted to another machine, or is none.
    """
    check_url(url, example="--upstream http://HOST/v1", key=UPSTREAM_KEY)
    return key_to(url, UPSTREAM_KEY)
