"""Where the passphrase of private keys comes from: systemd's credentials, a file, or whoever starts the command.

In this order: ``$CREDENTIALS_DIRECTORY/medfl-passphrase`` (``LoadCredential=`` of the unit), the file named by
``$MEDFL_PASSPHRASE_FILE``, and a prompt where there is a terminal. It is asked for once a process.
"""

from __future__ import annotations

import getpass
import os
import stat
import sys
import threading
from functools import cache
from pathlib import Path

from medfl.shared.errors import ConfigError

CREDENTIAL = "medfl-passphrase"
VARIABLE = "MEDFL_PASSPHRASE_FILE"


@cache
def passphrase() -> bytes:
    """The passphrase of this machine's keys.

    Raises:
        ConfigError: there is no file with it, and nobody to ask.
    """
    if (path := _file()) is not None:
        return _read(path)
    # A running service that came to need a key asks nobody: its terminal may be anyone's by then.
    if not sys.stdin.isatty() or threading.current_thread() is not threading.main_thread():
        raise ConfigError(
            f"a private key has a passphrase, and nobody is here to type it: name a file with it in {VARIABLE}, or "
            f"give systemd's unit LoadCredential={CREDENTIAL}:/path"
        )
    return getpass.getpass("passphrase of this machine's MedFL keys: ").encode()


def new_passphrase() -> bytes:
    """A passphrase for keys that are about to be made: from the same places; typed twice at a terminal."""
    if _file() is not None or not sys.stdin.isatty():
        return passphrase()
    first = getpass.getpass("new passphrase of this machine's MedFL keys: ").encode()
    if not first or getpass.getpass("the same again: ").encode() != first:
        raise ConfigError("the two passphrases differ, or are empty: nothing was made")
    return first


def _file() -> Path | None:
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    if credentials and (Path(credentials) / CREDENTIAL).is_file():
        return Path(credentials) / CREDENTIAL
    named = os.environ.get(VARIABLE)
    return Path(named) if named else None


def _read(path: Path) -> bytes:
    try:
        # systemd guards its own folder, and shows an access list as rights of the group
        if path.name != CREDENTIAL and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"{path}: can be read by others: run chmod 600 on it")
        content = path.read_bytes().rstrip(b"\r\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): it should hold the keys' passphrase") from None
    if not content:
        raise ConfigError(f"{path}: is empty: it should hold the keys' passphrase")
    return content
