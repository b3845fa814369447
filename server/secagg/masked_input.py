"""Phase 3 at the coordinator: hand out the shares, add the masked vectors as they arrive; one model in memory."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.server.secagg.share_keys import KeysShared
from medfl.shared.errors import ProtocolError
from medfl.shared.secagg.encoding import Encoding
from medfl.shared.secagg.exchange import PhaseReply, PhaseRequest
from medfl.shared.secagg.messages import MaskedHeader, ShareDelivery
from medfl.shared.secagg.roster import Roster


def requests(state: KeysShared) -> dict[int, PhaseRequest]:
    """For every site of U2 what the others encrypted for it."""
    context = state.before.context
    deliveries: dict[int, list[tuple[int, bytes]]] = {site: [] for site in state.sharers}
    for sender in state.sharers:
        for receiver, sealed in state.shares[sender].sealed:
            if receiver in deliveries:
                deliveries[receiver].append((sender, sealed))
    return {site: PhaseRequest(ShareDelivery(context, tuple(sealed)).to_bytes()) for site, sealed in deliveries.items()}


class MaskedSum:
    """Adds verified masked vectors. Closed once its survivors are fixed: what comes later is not even read."""

    def __init__(self, state: KeysShared, encoding: Encoding, roster: Roster) -> None:
        self._state = state
        self._encoding = encoding
        self._roster = roster
        self._closed = False
        self._sites: set[int] = set()
        self.vector: NDArray[Any] = np.zeros(encoding.length, encoding.ring.dtype)
        self.scalars: NDArray[np.uint64] = np.zeros(encoding.slots, np.uint64)

    def add(self, site: int, reply: PhaseReply) -> None:
        """Add one reply.

        Raises:
            ProtocolError: late, repeated, of a wrong size, over other sharers, or not signed; nothing is added then.
        """
        if self._closed or site in self._sites:
            raise ProtocolError("a masked vector came after the survivors were fixed, or twice: it is thrown away")
        vector, scalars = reply.vector, reply.scalars
        header = MaskedHeader.parse(reply.control)
        if vector is None or scalars is None or header.site != site or header.sharers != self._state.sharers:
            raise ProtocolError("a masked input lacks its arrays, or names other sharers than it was sent")
        self._encoding.ring.check_wire(vector, self._encoding.length)
        if scalars.dtype != np.uint64 or scalars.shape != (self._encoding.slots,):
            raise ProtocolError(f"masked scalars must be uint64[{self._encoding.slots}]")
        before = self._state.before
        digest = hashlib.sha256(vector.data).digest()
        payload = header.signed(before.context, before.key_list_digest, digest, scalars.tobytes())
        self._roster.check_signature(site, header.signature, payload)
        self._encoding.ring.add_wire(self.vector, vector)
        np.add(self.scalars, scalars, out=self.scalars)
        self._sites.add(site)

    def close(self) -> tuple[int, ...]:
        """Fix the survivors (U3, ascending)."""
        self._closed = True
        return tuple(sorted(self._sites))
