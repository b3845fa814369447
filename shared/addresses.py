"""Hosts and ports as they are written: an IPv6 address stands in brackets where a port follows it, and only there."""

from __future__ import annotations


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
