"""The site's side of all secure sums: what it holds, and one open sum for each purpose, led through five phases.

A phase that refuses changes nothing, and a phase that has answered is not answered again, but for the last two: they
repeat their bytes for the same survivors, so that a lost reply or a restarted coordinator can finish the round.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from threading import Lock

from medfl.client.secagg.advertise_keys import Advertised, advertise_keys
from medfl.client.secagg.confirm_survivors import confirm_survivors, sign_confirmation
from medfl.client.secagg.contribution import Contribution
from medfl.client.secagg.enrolment import Enrolment, Enrolments
from medfl.client.secagg.journal import Journal
from medfl.client.secagg.masked_input import masked_input
from medfl.client.secagg.open_round import OpenRound
from medfl.client.secagg.share_keys import Shared, share_keys
from medfl.client.secagg.unmask import unmask
from medfl.shared.chain import Head
from medfl.shared.errors import MedFLError, PolicyRefusal, ProtocolError
from medfl.shared.secagg.announcement import Announcement, Purpose
from medfl.shared.secagg.exchange import Phase, PhaseReply, PhaseRequest
from medfl.shared.secagg.hashing import DIGEST_BYTES, ids_to_bytes
from medfl.shared.secagg.messages import ConfirmationList, KeyList, ShareDelivery, SurvivorList
from medfl.shared.secagg.prg import usable_threads
from medfl.shared.secagg.reasons import Reason

log = logging.getLogger("medfl.site")

_State = Advertised | Shared | OpenRound
_Key = tuple[bytes, Purpose]  # study, purpose: of each, one sum at a time


class SecureSite:
    """Answers the coordinator's requests in any order they come; only the right order gets answers."""

    def __init__(self, enrolments: Enrolments, journal: Journal, *, threads: int | None = None) -> None:
        self._enrolments = enrolments
        self._journal = journal
        self._threads = usable_threads() if threads is None else threads
        self._held: dict[_Key, Contribution] = {}
        self._least: dict[_Key, int] = {}  # sites, which the noise in what is held may count on
        self._told = 0
        self._open: dict[_Key, tuple[bytes, _State]] = {}  # with the context
        self._marks: dict[bytes, Head] = {}  # by study: how far the journal was, as was noted elsewhere
        self._lock = Lock()

    @property
    def smallest_sum(self) -> int:
        """Least number of sites, this one included, whose sum this site helps to open."""
        self._told = self._enrolments.minimum_cohort
        return self._told

    def mark(self, study: bytes) -> Head:
        """How far the journal is in ``study``: to be noted elsewhere, for :meth:`expect`."""
        with self._lock:
            return self._journal.mark(study)

    def expect(self, marks: Mapping[bytes, Head]) -> None:
        """Answer no sum of these studies unless the journal is at the mark or beyond: an older copy answers twice."""
        with self._lock:
            self._marks = dict(marks)

    def compare(self, study: bytes, mark: Head) -> None:
        """Raise PolicyRefusal unless the journal is at ``mark`` or beyond."""
        now = self.mark(study)
        if now.digest != mark.digest or now.rows < mark.rows:
            raise _restored()

    def _check_journal(self, study: bytes) -> None:
        noted, now = self._marks.get(study), self._journal.mark(study)
        if noted is not None and (now.digest != noted.digest or now.rows < noted.rows):
            raise _restored()

    def hold(self, contribution: Contribution) -> None:
        """Keep ``contribution`` for the sums of its study and purpose, in place of the one before."""
        with self._lock:
            key = contribution.study, contribution.purpose
            self._held[key] = contribution
            self._least[key] = max(self._told, self._enrolments.minimum_cohort)

    def study_of(self, phase: Phase, request: PhaseRequest) -> bytes | None:
        """The study that ``request`` says or belongs to; None where no such sum is open here."""
        start = request.control[:DIGEST_BYTES]  # of the announcement the study, of all others the context
        if phase is Phase.ADVERTISE_KEYS:
            return start
        with self._lock:
            try:
                return self._state(start)[0][0]
            except MedFLError:
                return None

    def release(self, study: bytes) -> None:
        """Let go of everything held for ``study``; its open rounds cannot be finished any more."""
        with self._lock:
            self._open = {key: opened for key, opened in self._open.items() if key[0] != study}
            self._held = {key: held for key, held in self._held.items() if key[0] != study}
            self._journal.forget(study)

    def answer(
        self, phase: Phase, request: PhaseRequest, *, permit: Callable[[bytes], None] = lambda study: None
    ) -> PhaseReply:
        """Answer one request of the coordinator.

        ``permit`` is called with the study's digest before its numbers leave under their masks, and may raise. The
        phases after that only help to open the sum, and are answered whatever it would say by then.

        Raises:
            PolicyRefusal, ProtocolError, TrainingError, DataError: why not; the coordinator may know ``reason``.
        """
        with self._lock:
            match phase:
                case Phase.ADVERTISE_KEYS:
                    return self._advertise_keys(Announcement.parse(request.control))
                case Phase.SHARE_KEYS:
                    return self._share_keys(KeyList.parse(request.control))
                case Phase.MASKED_INPUT:
                    return self._masked_input(ShareDelivery.parse(request.control), permit)
                case Phase.CONFIRM_SURVIVORS:
                    return self._confirm_survivors(SurvivorList.parse(request.control))
                case Phase.UNMASK:
                    return self._unmask(ConfirmationList.parse(request.control))

    def _advertise_keys(self, announcement: Announcement) -> PhaseReply:
        key = announcement.study, announcement.purpose
        held = self._held.get(key)
        if held is None:
            raise ProtocolError(
                "a sum was announced for which nothing is held here: this site restarted, or was not asked to train",
                reason=Reason.NOTHING_HELD,
            )
        self._check_journal(announcement.study)
        enrolment = self._enrolment(key, announcement)
        epoch = enrolment.roster.epoch
        history = self._journal.history(announcement, epoch=epoch)
        state = advertise_keys(announcement, held, enrolment, history)
        self._journal.begin(announcement, weight=held.weight, epoch=epoch)
        self._open[key] = (state.context, state)
        missed = announcement.round - history.last_seen[0] - 1
        if missed > 0 and history.last_consumed >= 0 and held.scalars:  # numbers go with it, exact in their sum
            log.warning(
                "%d sums over other sites may have been formed since this site's last one: the coordinator can tell "
                "what this site adds to counts and scores from sums with and without it",
                missed,
            )
        return PhaseReply(state.advert.to_bytes())

    def _share_keys(self, request: KeyList) -> PhaseReply:
        key, state = self._state(request.context)
        if not isinstance(state, Advertised):
            raise _out_of_order()
        enrolment = self._enrolment(key, state.announcement)
        after, message = share_keys(state, request, enrolment)
        self._open[key] = (request.context, after)
        return PhaseReply(message.to_bytes())

    def _masked_input(self, request: ShareDelivery, permit: Callable[[bytes], None]) -> PhaseReply:
        key, state = self._state(request.context)
        if not isinstance(state, Shared):
            raise _out_of_order()
        permit(key[0])
        enrolment = self._enrolment(key, state.before.announcement)
        masked, reply = masked_input(state, request, enrolment, threads=self._threads)
        after = OpenRound(masked)
        self._open[key] = (request.context, after)  # before the disk: no second masking under the same keys
        self._journal.keep(masked.announcement, after.to_bytes())
        return reply

    def _confirm_survivors(self, request: SurvivorList) -> PhaseReply:
        key, state = self._state(request.context)
        if not isinstance(state, OpenRound):
            raise _out_of_order()
        enrolment = self._enrolment(key, state.masked.announcement, finishing=True)
        if (before := state.confirmed) is not None:
            if before.survivors != request.survivors:
                raise ProtocolError(
                    "another list of survivors was signed here: one sum of this round is all there is",
                    reason=Reason.BAD_SURVIVORS,
                )
            return PhaseReply(sign_confirmation(before, enrolment).to_bytes())
        confirmed, message = confirm_survivors(state.masked, request, enrolment)
        after = OpenRound(state.masked, confirmed.survivors)
        self._journal.consume(
            state.masked.announcement,
            survivors=ids_to_bytes(confirmed.survivors),
            contribution=state.masked.contribution,
            secret=after.to_bytes(),
        )
        self._open[key] = (request.context, after)
        return PhaseReply(message.to_bytes())

    def _unmask(self, request: ConfirmationList) -> PhaseReply:
        key, state = self._state(request.context)
        if not isinstance(state, OpenRound) or (confirmed := state.confirmed) is None:
            raise _out_of_order()
        if state.reveal is not None:
            return PhaseReply(state.reveal)
        enrolment = self._enrolment(key, state.masked.announcement, finishing=True)
        reveal = unmask(confirmed, request, enrolment).to_bytes()
        after = state.revealed(reveal)
        self._journal.keep(state.masked.announcement, after.to_bytes())
        self._open[key] = (request.context, after)
        log.info("a masked sum over %d sites is complete", len(confirmed.survivors))
        return PhaseReply(reveal)

    def _enrolment(self, key: _Key, announcement: Announcement, *, finishing: bool = False) -> Enrolment:
        """The enrolment under the announced roster, which may since have come to ask for fewer sites."""
        found = self._enrolments.under(announcement.roster, finishing=finishing)
        least = max(found.rules.minimum_cohort, self._least.get(key, 0))
        return replace(found, rules=replace(found.rules, minimum_cohort=least))

    def _state(self, context: bytes) -> tuple[_Key, _State]:
        """Key and state of the open sum of ``context``, from the journal where this process has just started."""
        for key, (known, state) in self._open.items():
            if known == context:
                return key, state
        kept = self._journal.kept(context)
        if kept is None:
            raise _out_of_order()
        restored = OpenRound.from_bytes(kept)
        announcement = restored.masked.announcement
        self._enrolments.under(announcement.roster, finishing=True)
        self._check_journal(announcement.study)
        key = announcement.study, announcement.purpose
        self._open[key] = (context, restored)
        return key, restored


def _restored() -> PolicyRefusal:
    return PolicyRefusal(
        "the journal of secure sums is older than what this site has answered in this study (a restored backup?): "
        "restore the newest one. Where it is lost, this site takes no part in secure sums of this study any more: a "
        "round that it has forgotten could be opened twice",
        reason=Reason.JOURNAL_RESTORED,
    )


def _out_of_order() -> ProtocolError:
    return ProtocolError(
        "a message belongs to no sum that is open here, or comes out of order: the coordinator announces a new attempt",
        reason=Reason.OUT_OF_ORDER,
    )
