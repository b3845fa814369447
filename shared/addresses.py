"""Hosts and ports as they are written: an IPv6 address stands in brackets where a port follows it, and only there."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

ADDRESS = r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}$"
"""How host:port is written."""
PORTS = range(1, 65536)
"""What can be dialled."""


def address(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address.

    >>> address("::1", 9443)
    '[::1]:9443'
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def without_brackets(host: str) -> str:
    """``host``, as sockets take it, also where an IPv6 address was written in brackets.

    >>> without_brackets("[::1]")
    '::1'
    """
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def dialled(written: str) -> str:
    """``written``, when it is an address that can be dialled.

    Raises:
        ValueError: it is none, in words for a person.
    """
    if not re.fullmatch(ADDRESS, written) or int(written.rsplit(":", 1)[1]) not in PORTS:
        raise ValueError("write host:port, for example fl.example.org:9443, with a port from 1 to 65535")
    return written


Address = Annotated[str, AfterValidator(dialled)]
"""``host:port``."""
