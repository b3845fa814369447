"""What the coordinator has signed of this site's audit log, kept beside it: so a log that was cut shows here too."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from medfl.client.audit import Audit
from medfl.client.pin import joined, load_pin
from medfl.shared.chain import Inspection
from medfl.shared.errors import PolicyRefusal, ProtocolError
from medfl.shared.files import write_whole
from medfl.shared.receipt import Receipt, read_receipt
from medfl.shared.signing import SignatureRefused

log = logging.getLogger("medfl.site")

Read = Callable[[bytes], Receipt]
"""Checks a receipt's signature with the key of the consortium that this site has pinned. Raises SignatureRefused."""


def reader_of(keys: Path) -> Read | None:
    """Checks receipts with the consortium's key that is pinned in the site's folder of keys; None before it has joined.

    Raises:
        ConfigError: what is pinned cannot be read.
    """
    return partial(read_receipt, key=load_pin(keys).key) if joined(keys) else None


def receipt_file(audit: Path) -> Path:
    """Where the latest receipt for an audit log is."""
    return audit.with_name(audit.name + ".receipt")


class Receipts:
    """The latest receipt for one audit log; it covers all rows before the one it names."""

    def __init__(self, audit: Path, read: Read | None, *, site: str) -> None:
        """``read`` is None where this site has pinned no key yet: nothing is kept then."""
        self._path, self._read, self._site = receipt_file(audit), read, site
        self._told = False

    def keep(self, signed: bytes, audit: Audit) -> None:
        """Keep a receipt that has come from the coordinator, durably, where ``audit`` holds its row.

        Raises:
            PolicyRefusal: it is not signed with the pinned key, or is another site's. ProtocolError: malformed.
        """
        if self._read is None:
            if not self._told:
                log.warning("receipts for the audit log are not kept: this site has not pinned its consortium's key")
            self._told = True
            return
        receipt = self._read(signed)
        if receipt.site != self._site:
            raise PolicyRefusal("a receipt for another site's audit log", reason="bad receipt")
        if audit.holds(receipt.head):  # of one that is not held the last good receipt is the better evidence
            write_whole(self._path, signed)


def check_receipt(audit: Path, found: Inspection, read: Read | None) -> str:
    """What the receipt beside the log at ``audit``, whose rows are ``found``, says, as one line.

    Raises:
        PolicyRefusal: the row it names is not in the log, or it is not signed by the consortium.
    """
    path = receipt_file(audit)
    try:
        signed = path.read_bytes()
    except FileNotFoundError:
        return "no receipt of the coordinator is kept here: rows cut from the end would not show"
    if read is None:
        return "a receipt is kept here and cannot be checked: this site has not pinned its consortium's key"
    try:
        receipt = read(signed)
    except (ProtocolError, SignatureRefused):
        raise PolicyRefusal(
            f"{path} is not a receipt signed with the consortium's key: it was damaged or put there by somebody else. "
            "Keep it; the coordinator can tell which rows it has seen",
            reason="audit log damaged",
        ) from None
    rows = found.rows
    if receipt.rows > len(rows) or (receipt.rows and rows[receipt.rows - 1]["hash"] != receipt.digest):
        raise PolicyRefusal(
            f"{audit} has {len(rows)} rows, and the coordinator has signed at {receipt.time} that it saw row "
            f"{receipt.rows} with the hash {receipt.digest}: the log was cut or written anew. Keep all files, they are "
            "evidence",
            reason="audit log cut",
        )
    return f"row {receipt.rows} was countersigned by {_about(receipt)}: nothing before it was cut or changed"


def _about(receipt: Receipt) -> str:
    return f"{receipt.consortium} at {receipt.time} (round {receipt.round} of study {receipt.study[:16]})"
