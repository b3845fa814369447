"""Phase 1 at the coordinator: announce the sum, collect everybody's fresh keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from medfl.shared.errors import ProtocolError
from medfl.shared.secagg.announcement import Announcement
from medfl.shared.secagg.exchange import PhaseReply, PhaseRequest
from medfl.shared.secagg.messages import Advert, KeyList
from medfl.shared.secagg.roster import Roster


@dataclass(frozen=True)
class KeysAdvertised:
    """After phase 1: the keys of every site that answered (U1)."""

    announcement: Announcement
    adverts: Mapping[int, Advert]

    @cached_property
    def context(self) -> bytes:
        """The announcement's context hash."""
        return self.announcement.context()

    @cached_property
    def key_list(self) -> KeyList:
        """What every site of U1 is shown."""
        return KeyList(self.context, tuple(advert for _, advert in sorted(self.adverts.items())))

    @cached_property
    def key_list_digest(self) -> bytes:
        """In every later signature."""
        return self.key_list.digest


def requests(announcement: Announcement) -> dict[int, PhaseRequest]:
    """The same announcement for every site of the cohort."""
    return dict.fromkeys(announcement.cohort, PhaseRequest(announcement.to_bytes()))


def accept(announcement: Announcement, roster: Roster, site: int, reply: PhaseReply) -> Advert:
    """The keys in ``reply``. Raises ProtocolError when they are not signed by ``site`` for this attempt."""
    advert = Advert.parse(reply.control)
    if advert.site != site:
        raise ProtocolError("a site answered in another's name")
    roster.check_signature(site, advert.signature, advert.signed(announcement.context()))
    return advert
