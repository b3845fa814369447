"""A coordinator that drops, repeats, reorders, swaps, mixes and truncates messages, played by hypothesis.

Whatever it does, each site: signs one list of survivors per context, gives one share per owner, masks once, lets an
update into sums over one set of sites only, and fails only with typed refusals.
"""

from collections import defaultdict
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from secagg_world import Consortium

from medfl.shared.errors import PolicyRefusal, ProtocolError
from medfl.shared.secagg.announcement import Announcement
from medfl.shared.secagg.exchange import Phase, PhaseReply, PhaseRequest
from medfl.shared.secagg.limits import threshold_of
from medfl.shared.secagg.messages import (
    Advert,
    Confirmation,
    ConfirmationList,
    KeyList,
    Reveal,
    SealedShares,
    ShareDelivery,
    SurvivorList,
)

SITES = (1, 2, 3, 4, 5)
subsets = st.sets(st.sampled_from(SITES), min_size=1).map(lambda chosen: tuple(sorted(chosen)))
everyone_mostly = st.one_of(st.just(SITES), st.just(SITES), subsets)
a_site = st.sampled_from(SITES)
mostly_latest = st.sampled_from((0, 0, 0, 1, 2))


class LyingCoordinator(RuleBasedStateMachine):
    """Knows every message that any site has sent, in any attempt."""

    @initialize(phases=st.integers(1, 5))
    def start(self, phases: int) -> None:
        self.world = Consortium(5, length=4)
        self.announced: dict[bytes, Announcement] = {}
        self.adverts: dict[bytes, dict[int, Advert]] = defaultdict(dict)
        self.lists: dict[bytes, set[bytes]] = defaultdict(set)
        self.shares: dict[bytes, dict[int, SealedShares]] = defaultdict(dict)
        self.masked: set[tuple[bytes, int]] = set()
        self.signed: dict[tuple[bytes, int], tuple[int, ...]] = {}
        self.confirmations: dict[bytes, dict[int, Confirmation]] = defaultdict(dict)
        self.given: dict[tuple[bytes, int], Reveal] = {}
        self.requests: list[tuple[Phase, bytes]] = []
        self.behave(1, 0, SITES, phases)

    def ask(self, site: int, phase: Phase, message: Any, *, remember: bool = True) -> PhaseReply | None:
        data = message if isinstance(message, bytes) else message.to_bytes()
        if remember:
            self.requests.append((phase, data))
        try:
            return self.world.sites[site].answer(phase, PhaseRequest(data))
        except (PolicyRefusal, ProtocolError):
            return None

    def pick(self, place: int, having: Any) -> bytes:
        """One of the contexts for which there is something in ``having``."""
        contexts = [context for context in self.announced if having.get(context)] or [bytes(32)]
        return contexts[-1 - place % len(contexts)]

    @rule(
        number=st.integers(1, 3),
        attempt=st.integers(0, 2),
        cohort=everyone_mostly,
        lower=st.sampled_from((0, 0, 0, 1, 2)),
        told=everyone_mostly,
    )
    def announce(self, number: int, attempt: int, cohort: tuple[int, ...], lower: int, told: tuple[int, ...]) -> None:
        announcement = self.world.announcement(
            round=number, attempt=attempt, cohort=cohort, threshold=max(0, threshold_of(len(cohort)) - lower)
        )
        context = announcement.context()
        self.announced[context] = announcement
        for site in told:
            if reply := self.ask(site, Phase.ADVERTISE_KEYS, announcement):
                assert len(cohort) >= 3
                assert lower == 0
                assert site not in self.adverts[context]  # one answer for an attempt
                self.adverts[context][site] = Advert.parse(reply.control)

    @rule(number=st.integers(1, 6), attempt=st.integers(0, 2), cohort=everyone_mostly, phases=st.integers(2, 5))
    def behave(self, number: int, attempt: int, cohort: tuple[int, ...], phases: int) -> None:
        """An honest attempt that stops after some phases."""
        self.announce(number, attempt, cohort, 0, cohort)
        for step, show in enumerate((self.show_keys, self.deliver), start=2):
            if phases >= step:
                show(0, 0, cohort, cohort)
        if phases >= 4:
            self.show_survivors(0, cohort, cohort)
        if phases >= 5:
            self.show_confirmations(0, cohort, cohort)

    @precondition(lambda self: any(self.adverts.values()))
    @rule(place=mostly_latest, other=mostly_latest, told=everyone_mostly, shown=everyone_mostly)
    def show_keys(self, place: int, other: int, told: tuple[int, ...], shown: tuple[int, ...]) -> None:
        context = self.pick(place, self.adverts)
        known = dict(self.adverts[context])
        known |= dict(list(self.adverts[self.pick(other, self.adverts)].items())[:1])  # perhaps of another attempt
        message = KeyList(context, tuple(known[site] for site in sorted(known) if site in shown))
        for site in told:
            if reply := self.ask(site, Phase.SHARE_KEYS, message):
                assert site not in self.shares[context]  # nonce zero is used once
                assert len(message.adverts) >= self.announced[context].threshold
                self.shares[context][site] = SealedShares.parse(reply.control)

    @precondition(lambda self: any(self.shares.values()))
    @rule(place=mostly_latest, second=mostly_latest, told=everyone_mostly, senders=everyone_mostly)
    def deliver(self, place: int, second: int, told: tuple[int, ...], senders: tuple[int, ...]) -> None:
        context, other = self.pick(place, self.shares), self.pick(second, self.shares)
        for site in told:
            sealed = []
            for sender in senders:
                source = other if sender == senders[0] else context
                message = self.shares[source].get(sender)
                if message and sender != site and site in dict(message.sealed):
                    sealed.append((sender, dict(message.sealed)[site]))
            if reply := self.ask(site, Phase.MASKED_INPUT, ShareDelivery(context, tuple(sealed))):
                assert (context, site) not in self.masked  # masked once
                assert other == context or senders[0] == site or senders[0] not in dict(sealed)
                assert reply.vector is not None
                assert not np.array_equal(reply.vector, self.world.held[site].encode().vector)
                self.masked.add((context, site))

    @precondition(lambda self: self.masked)
    @rule(place=mostly_latest, told=everyone_mostly, survivors=everyone_mostly)
    def show_survivors(self, place: int, told: tuple[int, ...], survivors: tuple[int, ...]) -> None:
        context = self.pick(place, {context: True for context, _ in self.masked})
        for site in told:
            if reply := self.ask(site, Phase.CONFIRM_SURVIVORS, SurvivorList(context, survivors)):
                assert site in survivors
                assert len(survivors) >= self.announced[context].threshold
                assert self.signed.setdefault((context, site), survivors) == survivors  # one list for ever
                earlier = {s for (_, signer), s in self.signed.items() if signer == site}
                assert earlier == {survivors}  # one update, one set of sites, in whatever round
                self.confirmations[context][site] = Confirmation.parse(reply.control)

    @precondition(lambda self: any(self.confirmations.values()))
    @rule(place=mostly_latest, told=everyone_mostly, shown=everyone_mostly)
    def show_confirmations(self, place: int, told: tuple[int, ...], shown: tuple[int, ...]) -> None:
        context = self.pick(place, self.confirmations)
        known = self.confirmations[context]
        message = ConfirmationList(context, tuple(known[site] for site in sorted(known) if site in shown))
        for site in told:
            if reply := self.ask(site, Phase.UNMASK, message):
                reveal = Reveal.parse(reply.control)
                assert self.given.setdefault((context, site), reveal) == reveal  # never another share of anyone
                same = [s for (c, _), s in self.signed.items() if c == context and s == self.signed[context, site]]
                assert len(same) >= self.announced[context].threshold

    @rule(site=a_site)
    def restart(self, site: int) -> None:
        self.world.start(site)

    @precondition(lambda self: self.requests)
    @rule(
        back=st.integers(1, 8),
        site=a_site,
        how=st.sampled_from(("truncated", "longer", "changed")),
        where=st.integers(0, 999),
        bit=st.integers(0, 7),
    )
    def spoil_an_old_request(self, back: int, site: int, how: str, where: int, bit: int) -> None:
        phase, old = self.requests[-min(back, len(self.requests))]
        at = where * len(old) // 1000
        match how:
            case "truncated":
                message = old[:at]
            case "longer":
                message = old + b"\0"
            case _:
                message = old[:at] + bytes([old[at] ^ (1 << bit)]) + old[at + 1 :]
        if how == "changed" and phase not in (Phase.SHARE_KEYS, Phase.MASKED_INPUT):
            return  # another announcement or list of survivors may be a good one
        assert self.ask(site, phase, message, remember=False) is None


TestLyingCoordinator = LyingCoordinator.TestCase
TestLyingCoordinator.settings = settings(
    max_examples=100, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
