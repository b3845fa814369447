"""Commands are given as the account that the folder belongs to: what root leaves there, the service cannot write."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from medfl.shared.errors import ConfigError


def check_owner(folder: Path) -> None:
    """Return when this process may leave files in ``folder``, or in the nearest one above it that is there.

    Raises:
        ConfigError: this is root and the folder is another account's, or this account cannot write there.
    """
    here = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    owner, me = here.stat().st_uid, os.geteuid()
    if owner == me:
        return
    name = _name(owner)
    if me == 0:
        raise ConfigError(
            f"{here}: this folder belongs to {name}: give the command as that account (sudo -u {name} ...). What root "
            "writes there would keep the service from starting"
        )
    if not os.access(here, os.W_OK):
        raise ConfigError(
            f"{here}: this folder belongs to {name}, and {_name(me)} cannot write there: give the command as that "
            f"account (sudo -u {name} ...), or the folder to this one (chown -R {_name(me)} {here})"
        )


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # a container's user may have no name
        return f"#{uid}"  # as sudo -u takes it
