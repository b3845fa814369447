"""The site's opt-out list: which patients are left out, and how many of its entries name nobody here."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from medfl.client.data.secret import SiteKey
from medfl.client.data.settings import BidsSettings, DataSettings
from medfl.shared.errors import DataError

_COMMENT = re.compile(r"(^|\s)#.*")
_AROUND = " \t;,\"'“”„‘’«»"  # what lists have around an identifier

log = logging.getLogger("medfl.site")


class OptOuts:
    """Who has opted out, and which entries were found to be somebody's.

    An entry counts as it is written, and also without a comment, quotes and separators around it: in doubt somebody is
    left out.
    """

    def __init__(self, text: str, key: SiteKey, *, subjects: bool = False) -> None:
        """``text``: one patient identifier a line. ``subjects``: one without ``sub-`` before it is meant with it."""
        self._digest, self._key = _digest(text), key
        self._entries = [
            frozenset(
                key.pseudonym(prefix + name) for name in names for prefix in (("", "sub-") if subjects else ("",))
            )
            for names in _entries(text)
        ]
        self._listed = frozenset().union(*self._entries)
        self.met: set[str] = set()  # pseudonyms of patients here who have opted out

    def __call__(self, pseudonym: str) -> bool:
        """Whether the patient of that pseudonym has opted out; who has is remembered."""
        if pseudonym not in self._listed:
            return False
        self.met.add(pseudonym)
        return True

    @property
    def entries(self) -> int:
        """How many the list has."""
        return len(self._entries)

    @property
    def unknown(self) -> int:
        """Entries that are no patient's who was asked about."""
        return sum(entry.isdisjoint(self.met) for entry in self._entries)

    def is_of(self, text: str) -> bool:
        """Whether the list said ``text``."""
        return self._digest == _digest(text)

    def is_by(self, key: SiteKey) -> bool:
        """Whether its pseudonyms come from ``key``."""
        return self._key == key

    def warn(self) -> None:
        """Say how many entries match nobody; which ones is not for a log."""
        if self.unknown:
            log.warning(
                "%d of %d entries of the opt-out list match no patient here: compare how they are written with the "
                "identifiers of the images (data.opt_out)",
                self.unknown,
                self.entries,
            )


def read_list(path: Path | None) -> str:
    """The opt-out list's text; empty where the site has none.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return "" if path is None else path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise DataError(
            f"{path}: the opt-out list cannot be read (data.opt_out): nothing is loaded without it"
        ) from None


def opt_outs(text: str, settings: DataSettings, key: SiteKey) -> OptOuts:
    """Who has opted out by the list ``text``, in the way that patients are called in the source."""
    return OptOuts(text, key, subjects=isinstance(settings, BidsSettings))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _entries(text: str) -> Iterator[set[str]]:
    r"""What each entry may stand for; comments and lines without any identifier are none.

    >>> [sorted(names) for names in _entries("# since 2025\nP05\nP06; # moved away")]
    [['P05'], ['P06', 'P06; # moved away']]
    """
    for line in text.splitlines():
        if name := _COMMENT.sub("", line).strip(_AROUND):
            yield {name, line.strip(_AROUND), line.strip()}
