"""A consortium in one process for tests: real sites, real journals, and an exchange that can lose or alter anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medfl.client.secagg.contribution import Contribution
from medfl.client.secagg.enrolment import Enrolment, Rules
from medfl.client.secagg.journal import Journal
from medfl.client.secagg.session import SecureSite
from medfl.server.secagg.outcome import SecureSum, SumPlan
from medfl.server.secagg.pending import PendingSum
from medfl.server.secagg.round import SecureRound
from medfl.server.secagg.store import MemoryStore, Store
from medfl.shared.errors import MedFLError
from medfl.shared.secagg.announcement import Announcement, Purpose
from medfl.shared.secagg.encoding import Encoding, Segment, decode_mean
from medfl.shared.secagg.exchange import Phase, PhaseReply, PhaseRequest, SiteRefusal
from medfl.shared.secagg.limits import threshold_of
from medfl.shared.secagg.messages import (
    Advert,
    Confirmation,
    ConfirmationList,
    KeyList,
    MaskedHeader,
    Reveal,
    SealedShares,
    ShareDelivery,
    SurvivorList,
)
from medfl.shared.secagg.rings import Ring
from medfl.shared.secagg.roster import Member, Roster, make_roster

STUDY, MODEL = b"\x11" * 32, b"\x22" * 32
PHASES = tuple(Phase)
Hook = Callable[[Phase, int, Any], Any]


class Consortium:
    """``n`` sites with ids 1..n (or ``ids``), weights 10, 20, ..., and random updates in [-1, 1]."""

    def __init__(
        self,
        n: int = 5,
        *,
        length: int = 40,
        ring: Ring = Ring.BITS_32,
        minimum: int | None = 3,
        folder: Path | None = None,
        scalars: tuple[str, ...] = ("loss",),
        ids: tuple[int, ...] | None = None,
        rules: Rules | None = None,
        seed: int = 0,
    ) -> None:
        self.ids = ids or tuple(range(1, n + 1))
        self.keys = {site: Ed25519PrivateKey.generate() for site in self.ids}
        self.roster = make_roster(
            "lungs",
            1,
            [Member(site, f"hospital-{site}", key.public_key().public_bytes_raw()) for site, key in self.keys.items()],
            minimum_cohort=minimum,
        )
        self.folder, self.rules = folder, rules or Rules()
        rng = np.random.default_rng(seed)
        weights = {site: 10 * (place + 1) for place, site in enumerate(self.ids)}
        segments = (Segment(length, 1.0),) if length else ()
        self.encoding = Encoding(ring, segments, sum(weights.values()), scalars)
        self.held = {
            site: Contribution(
                study=STUDY,
                purpose=Purpose.TRAIN,
                model=MODEL,
                encoding=self.encoding,
                weight=weights[site],
                vector=rng.uniform(-1, 1, length).astype(np.float32),
                scalars={name: float(site) for name in scalars},
            )
            for site in self.ids
        }
        self.journals: dict[int, Journal] = {}
        self.sites: dict[int, SecureSite] = {}
        for site in self.ids:
            self.start(site)
        self.log: list[tuple[Phase, int, Any]] = []  # every reply that left a site

    def start(self, site: int, *, roster: Roster | None = None) -> None:
        """Start ``site``, or start it again with what its journal knows."""
        if site in self.journals:
            if self.folder is not None:
                self.journals[site].close()
                self.journals[site] = self._journal(site)
        else:
            self.journals[site] = self._journal(site)
        enrolment = Enrolment(site, self.keys[site], roster or self.roster, self.rules)
        self.sites[site] = SecureSite(enrolment, self.journals[site], threads=1)
        self.sites[site].hold(self.held[site])

    def _journal(self, site: int) -> Journal:
        return Journal(None if self.folder is None else self.folder / f"site-{site}")

    def hold(self, **changes: Any) -> None:
        """Give every site its contribution again, with ``changes``."""
        for site in self.ids:
            self.held[site] = replace(self.held[site], **changes)
            self.sites[site].hold(self.held[site])

    def announcement(self, **changes: Any) -> Announcement:
        """The announcement an honest coordinator would make first."""
        honest = Announcement(
            study=STUDY,
            purpose=Purpose.TRAIN,
            round=1,
            attempt=0,
            cohort=self.ids,
            threshold=threshold_of(len(self.ids)),
            ring=self.encoding.ring,
            length=self.encoding.length,
            encoding=self.encoding.digest,
            model=MODEL,
            roster=self.roster.digest,
        )
        return replace(honest, **changes)

    def plan(self, **changes: Any) -> SumPlan:
        return replace(SumPlan(STUDY, Purpose.TRAIN, self.ids, self.encoding, MODEL), **changes)

    def round(self, store: Store | None = None, **changes: Any) -> SecureRound:
        return SecureRound(self.plan(**changes), roster=self.roster, store=store or MemoryStore(), threads=1)

    def ask(self, site: int, phase: Phase, control: Any) -> PhaseReply:
        """One request to one site; ``control`` is bytes or a message."""
        data = control if isinstance(control, bytes) else control.to_bytes()
        return self.sites[site].answer(phase, PhaseRequest(data))

    def exchange(
        self,
        *,
        lose: Mapping[int, Phase] | None = None,
        after: bool = False,
        request: Hook = lambda phase, site, control: control,
        reply: Hook = lambda phase, site, reply: reply,
    ) -> Callable[[Phase, Mapping[int, PhaseRequest]], Iterator[tuple[int, PhaseReply | SiteRefusal]]]:
        """An exchange with these sites. ``lose``: from that phase on the site is gone (``after`` doing its work once).

        ``request`` and ``reply`` see everything and return what is passed on; None loses it.
        """
        gone: set[int] = set()
        lose = lose or {}

        def run(phase: Phase, requests: Mapping[int, PhaseRequest]) -> Iterator[tuple[int, PhaseReply | SiteRefusal]]:
            for site, message in requests.items():
                leaves = lose.get(site) is phase
                if site in gone or (leaves and not after):
                    gone.add(site)
                    continue
                control = request(phase, site, message.control)
                if control is None:
                    continue
                answer: Any
                try:
                    answer = self.sites[site].answer(phase, PhaseRequest(control))
                except MedFLError as error:
                    answer = SiteRefusal.of(error)
                if leaves:
                    gone.add(site)
                    continue
                self.log.append((phase, site, answer))
                if (answer := reply(phase, site, answer)) is not None:
                    yield site, answer

        return run

    def expected_mean(self, survivors: tuple[int, ...]) -> Any:
        """The mean that plain integer addition of the encoded updates gives: must be met bit for bit."""
        total = np.zeros(self.encoding.length, self.encoding.ring.dtype)
        for site in survivors:
            total += self.held[site].encode().vector
        weight = sum(self.held[site].weight for site in survivors)
        return decode_mean(total, self.encoding, weight=weight, terms=len(survivors))

    def check(self, result: SecureSum) -> None:
        """The sum is exactly that of the survivors."""
        assert np.array_equal(result.mean, self.expected_mean(result.survivors))
        assert result.weight == sum(self.held[site].weight for site in result.survivors)
        for name in self.encoding.scalars:
            assert result.scalars[name] == sum(self.held[site].scalars[name] for site in result.survivors)


class Stage:
    """A consortium taken by hand through the phases, all sites alive, up to and including ``last``."""

    def __init__(self, world: Consortium, last: Phase | None, **announced: Any) -> None:
        self.world = world
        self.announcement = world.announcement(**announced)
        self.context = self.announcement.context()
        steps = PHASES.index(last) + 1 if last else 0
        everyone = self.announcement.cohort
        if steps >= 1:
            self.adverts = {s: Advert.parse(world.ask(s, PHASES[0], self.announcement).control) for s in everyone}
            self.key_list = KeyList(self.context, tuple(self.adverts[s] for s in everyone))
        if steps >= 2:
            self.shares = {s: SealedShares.parse(world.ask(s, PHASES[1], self.key_list).control) for s in everyone}
            self.deliveries = {
                s: ShareDelivery(
                    self.context,
                    tuple((k, dict(self.shares[k].sealed)[s]) for k in everyone if k != s),
                )
                for s in everyone
            }
        if steps >= 3:
            self.masked = {s: world.ask(s, PHASES[2], self.deliveries[s]) for s in everyone}
            self.headers = {s: MaskedHeader.parse(self.masked[s].control) for s in everyone}
            self.survivor_list = SurvivorList(self.context, everyone)
        if steps >= 4:
            self.confirmations = {
                s: Confirmation.parse(world.ask(s, PHASES[3], self.survivor_list).control) for s in everyone
            }
            self.confirmation_list = ConfirmationList(self.context, tuple(self.confirmations.values()))
        if steps >= 5:
            self.reveals = {s: Reveal.parse(world.ask(s, PHASES[4], self.confirmation_list).control) for s in everyone}


def pending_sum() -> PendingSum:
    """A sum of three sites whose survivors are fixed: the vector 0..39, the scalars 5, 2^63 and 7."""
    world = Consortium(3)
    announcement = world.announcement()
    adverts = tuple(Advert(site, bytes([site]) * 32, bytes([site + 9]) * 32, bytes(64)) for site in world.ids)
    return PendingSum(
        announcement,
        world.encoding,
        KeyList(announcement.context(), adverts),
        {site: bytes([site]) * 32 for site in world.ids},
        (1, 2, 3),
        np.arange(40, dtype=np.uint32),
        np.array([5, 2**63, 7], np.uint64),
    )
