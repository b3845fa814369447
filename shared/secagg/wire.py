"""Reading bytes that a stranger wrote: every read is checked, and nothing may be left over."""

from __future__ import annotations

import struct
from itertools import pairwise

from medfl.shared.errors import ProtocolError


class Reader:
    """Takes fixed-size fields from the front of ``data``; little endian."""

    def __init__(self, data: bytes, what: str) -> None:
        self._data = data
        self._at = 0
        self._what = what

    @property
    def left(self) -> int:
        """Number of bytes not yet taken."""
        return len(self._data) - self._at

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes. Raises ProtocolError when there are fewer."""
        if size > self.left:
            raise self.error("is too short")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, form: str) -> int:
        """The next number in the ``struct`` format ``form`` (B, H, I or Q)."""
        value: int = struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]
        return value

    def real(self) -> float:
        """The next float64."""
        value: float = struct.unpack("<d", self.take(8))[0]
        return value

    def end(self) -> None:
        """Raise ProtocolError unless everything has been taken."""
        if self.left:
            raise self.error("is too long")

    def error(self, problem: str) -> ProtocolError:
        """An error about these bytes; names what they should be, never what they hold."""
        return ProtocolError(f"{self._what} {problem}: the other side runs another release or is faulty")


def ascending(ids: tuple[int, ...]) -> bool:
    """True when ``ids`` are distinct site ids (1 to 65534) in rising order."""
    inside = all(1 <= site <= 65534 for site in ids)
    return inside and all(left < right for left, right in pairwise(ids))
