"""One secure sum at the coordinator: announced, repeated while nothing is released yet, then finished."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from medfl.server.secagg import advertise_keys, masked_input, share_keys
from medfl.server.secagg.collect import NO_ANSWER, collect
from medfl.server.secagg.finish import finish
from medfl.server.secagg.outcome import SecureSum, SumPlan, SumVoid
from medfl.server.secagg.pending import PendingSum
from medfl.server.secagg.store import Store
from medfl.shared.errors import ConfigError
from medfl.shared.secagg.announcement import Announcement
from medfl.shared.secagg.exchange import Exchange, Phase, PhaseReply, PhaseRequest, SiteRefusal
from medfl.shared.secagg.limits import LARGEST_COHORT, threshold_of
from medfl.shared.secagg.reasons import Reason
from medfl.shared.secagg.roster import Roster

log = logging.getLogger("medfl.server")

T = TypeVar("T")

_ATTEMPTS = 3
_AHEAD = 16  # and its powers: how far numbers go ahead of those that sites have seen from a coordinator before it


class _TooFew(Exception):
    """An attempt ended in ``phase`` with only the sites ``left``."""

    def __init__(self, phase: Phase, left: tuple[int, ...]) -> None:
        super().__init__(phase)
        self.phase, self.left = phase, left


def summed(plan: SumPlan, *, roster: Roster, store: Store, exchange: Exchange) -> SecureSum:
    """The sum of ``plan``; where it fails after its survivors were fixed, once more the very same sum.

    Only that one may still be had: sites would refuse a second sum of the same model over others.

    Raises:
        ConfigError: the cohort is not one that any site would accept.
        SumVoid: no sum came about.
    """
    try:
        return SecureRound(plan, roster=roster, store=store).run(exchange)
    except SumVoid as void:
        pending = store.pending(plan.study, plan.purpose)
        if not void.confirmed or void.culprits or pending is None:
            raise
        log.warning("%s: the same sum is asked for again", void)
    return finish(pending, roster=roster, exchange=exchange)


class SecureRound:
    """Brings about one :class:`SecureSum`, however the sites drop out; holds one model and never a single update."""

    def __init__(self, plan: SumPlan, *, roster: Roster, store: Store, threads: int | None = None) -> None:
        """Check ``plan``.

        Raises:
            ConfigError: the cohort is not one that any site would accept.
        """
        cohort = tuple(sorted(set(plan.cohort)))
        unknown = [site for site in cohort if site not in roster.by_id]
        if unknown or not roster.minimum_cohort <= len(cohort) <= LARGEST_COHORT:
            raise ConfigError(
                f"secure aggregation needs {roster.minimum_cohort} to {LARGEST_COHORT} sites of the roster, got "
                f"{len(cohort)}" + (f", {len(unknown)} of them unknown" if unknown else "")
            )
        self._plan = replace(plan, cohort=cohort)
        self._roster = roster
        self._store = store
        self._threads = threads

    def run(self, exchange: Exchange) -> SecureSum:
        """Announce, collect, confirm, unmask, decode.

        An attempt that loses too many sites before any was asked to confirm is repeated at once with those that are
        left; sites keep their updates, so nothing is trained again.

        Raises:
            SumVoid: too few sites were left, or they did not finish.
        """
        plan, refusals = self._plan, dict[int, SiteRefusal]()
        number = self._store.begin(plan.study, plan.purpose)
        cohort = plan.cohort
        for attempt in range(_ATTEMPTS):
            try:
                pending = self._until_survivors(self._announcement(number, attempt, cohort), exchange, refusals)
            except _TooFew as few:
                self._log(few, cohort, refusals)
                replayed = [site for site, why in refusals.items() if why.reason == Reason.REPLAYED]
                if replayed and len(few.left) < self._roster.minimum_cohort:
                    # Restored from a backup, the coordinator counts from where it was then.
                    log.warning("sites have seen higher numbers of sums than this coordinator knows: it goes far ahead")
                    number = self._store.begin(plan.study, plan.purpose, ahead=_AHEAD ** (attempt + 1))
                    for site in replayed:
                        del refusals[site]
                    continue
                cohort = self._next_cohort(cohort, few.left, refusals)
                if len(cohort) < self._roster.minimum_cohort:
                    break
                continue
            self._store.keep(pending)
            return finish(pending, roster=self._roster, exchange=exchange, threads=self._threads, earlier=refusals)
        raise SumVoid("no secure sum: too few sites answered", confirmed=False, refusals=refusals)

    def _announcement(self, number: int, attempt: int, cohort: tuple[int, ...]) -> Announcement:
        plan = self._plan
        return Announcement(
            study=plan.study,
            purpose=plan.purpose,
            round=number,
            attempt=attempt,
            cohort=cohort,
            threshold=threshold_of(len(cohort)),
            ring=plan.encoding.ring,
            length=plan.encoding.length,
            encoding=plan.encoding.digest,
            model=plan.model,
            roster=self._roster.digest,
            training=plan.training,
            sent=plan.sent,
        )

    def _until_survivors(
        self, announcement: Announcement, exchange: Exchange, refusals: dict[int, SiteRefusal]
    ) -> PendingSum:
        """The first three phases. Raises _TooFew."""
        roster = self._roster
        needed = max(announcement.threshold, roster.minimum_cohort)

        def run(
            phase: Phase, requests: Mapping[int, PhaseRequest], accept: Callable[[int, PhaseReply], T]
        ) -> dict[int, T]:
            accepted = collect(exchange, phase, requests, accept, refusals)
            if len(accepted) < needed:
                raise _TooFew(phase, tuple(sorted(accepted)))
            return accepted

        adverts = run(
            Phase.ADVERTISE_KEYS,
            advertise_keys.requests(announcement),
            lambda site, reply: advertise_keys.accept(announcement, roster, site, reply),
        )
        advertised = advertise_keys.KeysAdvertised(announcement, adverts)
        shares = run(
            Phase.SHARE_KEYS,
            share_keys.requests(advertised),
            lambda site, reply: share_keys.accept(advertised, roster, site, reply),
        )
        shared = share_keys.KeysShared(advertised, shares)
        total = masked_input.MaskedSum(shared, self._plan.encoding, roster)
        run(Phase.MASKED_INPUT, masked_input.requests(shared), total.add)
        return PendingSum(
            announcement=announcement,
            encoding=self._plan.encoding,
            key_list=advertised.key_list,
            commitments={site: message.commitment for site, message in shares.items()},
            survivors=total.close(),
            vector=total.vector,
            scalars=total.scalars,
        )

    def _next_cohort(
        self, cohort: tuple[int, ...], left: tuple[int, ...], refusals: Mapping[int, SiteRefusal]
    ) -> tuple[int, ...]:
        """Those that are left, where they suffice; else also those that were only slow or have restarted."""
        if len(left) >= self._roster.minimum_cohort:
            return left
        return tuple(
            site
            for site in cohort
            if (why := refusals.get(site, NO_ANSWER)) == NO_ANSWER or why.reason == Reason.OUT_OF_ORDER
        )

    def _log(self, few: _TooFew, cohort: tuple[int, ...], refusals: Mapping[int, SiteRefusal]) -> None:
        missing = ", ".join(f"{self._roster.name(site)} ({refusals.get(site, NO_ANSWER)})"
                            for site in cohort if site not in few.left)  # fmt: skip
        log.warning("secure sum: %d of %d sites left after %s: %s", len(few.left), len(cohort), few.phase, missing)
