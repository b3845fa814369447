"""What a site does when asked: look at an offered study, train, evaluate; each only as its policy permits."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from medfl.client.approvals import Approvals, signed_offer
from medfl.client.audit import Price
from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData
from medfl.client.images import Images, LoadData
from medfl.client.notes import note_scores
from medfl.client.participant import Participant
from medfl.client.policy import Policy
from medfl.client.privacy.ledger import Ceilings
from medfl.client.records import Records
from medfl.client.releases import told
from medfl.client.trainer import Trainer
from medfl.client.training.evaluate import evaluate
from medfl.client.training.local import Given, TrainLocally, train_local
from medfl.client.work import Work
from medfl.client.workbench import Bench, Workbench
from medfl.shared.chain import Head
from medfl.shared.errors import PolicyRefusal, ProtocolError
from medfl.shared.initial_weights import digest_of
from medfl.shared.messages import (
    NO_INITIAL_WEIGHTS,
    UNKNOWN_STUDY,
    EvaluateReply,
    HeadsReply,
    HeadsRequest,
    Log,
    ModelRequest,
    OfferAccepted,
    Ready,
    SecureReply,
    SecureRequest,
    StudyOffer,
    TrainReply,
    WeightRequest,
)
from medfl.shared.privacy.settings import ClientLevel, NoPrivacy, Unit
from medfl.shared.secagg.exchange import PhaseRequest
from medfl.shared.signing import Signed
from medfl.shared.study import Study
from medfl.shared.weights import Flat, weights_digest

log = logging.getLogger("medfl.site")

STUDY_OVER = "study over"


def ceilings_of(policy: Policy) -> Ceilings:
    """What the ledger holds spending against."""
    return Ceilings(policy.max_epsilon_per_study, policy.max_epsilon_total, policy.max_delta, Unit(policy.unit))


def no_key_pinned(signed: Signed) -> bytes:
    """What a site without its consortium's key makes of any study."""
    raise PolicyRefusal(
        "this site has not pinned the key that its consortium signs studies with: join the consortium first",
        reason="no signing key",
    )


class Site:
    """One hospital: its name, rules, data and memory around the process's one network.

    ``verify`` returns the content of a study that the consortium has signed, and raises PolicyRefusal for any other.
    ``approvals`` says which studies may run here; absent: those that the policy allows by itself.
    """

    def __init__(
        self,
        name: str,
        *,
        policy: Policy,
        load_data: LoadData,
        workbench: Workbench,
        records: Records,
        ledger: Path,
        participant: Participant | None = None,
        approvals: Approvals | None = None,
        verify: Callable[[Signed], bytes] = no_key_pinned,
        current: Callable[[SiteData], SiteData] = lambda data: data,
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
        device_free: Callable[[], None] = lambda: None,
        progress: Callable[[int, int], None] | None = None,
        train_locally: TrainLocally = train_local,
    ) -> None:
        self.name = name
        self._policy = policy
        self._approvals = approvals or Approvals(policy)
        self._verify = verify
        self._images = Images(load_data, current)
        self._workbench = workbench
        self._records = records
        self._participant = participant
        self._now = now
        self._device_free = device_free  # raises PolicyRefusal while no training may begin
        self._progress = progress  # called between batches; may take its time
        self._trainer = Trainer(
            name,
            records,
            ledger,
            ceilings=ceilings_of(policy),
            train_locally=train_locally,
        )
        self.work: Work | None = None  # the training in progress, for other threads

    def consider(self, offer: StudyOffer) -> OfferAccepted:
        """Accept ``offer`` when the policy permits it, the network can be built and the data are there.

        Raises:
            PolicyRefusal, ProtocolError, DataError: why not.
        """
        signed = signed_offer(offer.canonical, offer.signature)
        study = Study.from_canonical(self._verify(signed), digest=offer.digest)
        self._approvals.offer(study, signed)
        self._permit(study)
        if study.secure_aggregation.mode != "none":
            self._require_participant()
        self._take_initial(study, offer)
        bench = self._bench(study)
        data = self._images.split(study, Split.TRAIN)
        self._trainer.plan(study, bench, data, survivors=self._survivors(study))
        self._records.remember(study)
        if log.isEnabledFor(logging.INFO):
            log.info("study %s accepted; what leaves: %s", study.name, told(study, self._policy))
        return OfferAccepted()

    def train(self, request: ModelRequest) -> TrainReply | Ready:
        """Train one round from the request's weights and return the update, or hold it for a secure sum.

        The very same request again gets the very same answer, without training: so a lost reply or a restarted
        coordinator costs neither time nor privacy.

        Raises:
            PolicyRefusal, ProtocolError, DataError, TrainingError: why not; nothing has left then.
        """
        study, bench = self._open(request)
        beside = study.demands.beside
        weights, shared = bench.parts(request.weights, beside.down(bench.layout.length))
        survivors, sent = self._survivors(study), weights_digest(request.weights)
        asked = f"{request.round}/{sent}"
        if survivors:  # an answer with noise for more of them than are sure now is none
            asked += f"/{survivors}"
        result = self._records.answer(study.digest, asked)
        if result is None:
            self._device_free()
            self._policy.permit_upload(4 * (bench.layout.length + beside.up(bench.layout.length)))
            given = Given(weights, shared, self._kept(study, asked, request.counted))
            bench.load(weights, given.kept if bench.personal.tensors else None)
            data = self._images.split(study, Split.TRAIN)
            self.work = Work(study.digest)
            try:
                look = self._between_batches(study, self.work)
                result, kept = self._trainer.train(study, bench, data, request, given, look, survivors=survivors)
            finally:
                self.work = None
            if kept is not None:
                self._records.keep_personal(study.digest, kept, asked=asked, counted=request.counted)
            self._records.keep_answer(study.digest, asked, result)
        self._permit_release(study)
        if study.secure_aggregation.mode != "none":
            model = replace(request, weights=weights)
            return self._require_participant().hold_update(study, model, result, sent=sent)
        return result if self._releases(study) else replace(result, tally={})

    def _between_batches(self, study: Study, work: Work) -> Callable[[int, int], None]:
        """Ends a training whose study was withdrawn meanwhile (PolicyRefusal), or is over for the coordinator
        (ProtocolError); else what this machine wants.
        """
        approvals, progress, seen = self._approvals, self._progress, -1

        def look(step: int, steps: int) -> None:
            nonlocal seen
            if (changes := approvals.changes) != seen:
                approvals.require(study.digest, study)
                seen = changes
            if work.given_up:
                raise ProtocolError(f"study {study.name} is over: its training was given up", reason=STUDY_OVER)
            if progress is not None:
                progress(step, steps)

        return look

    def forget(self, digest: str) -> None:
        """Let go of what is kept of a withdrawn study; from any thread. A training of it ends by itself."""
        self._records.forget(digest)
        self._images.forget()

    def take_up(self, digest: str) -> None:
        """A withdrawn study is approved again; from any thread. Its images are read anew."""
        self._records.take_up(digest)

    def hold_weight(self, request: WeightRequest) -> Ready:
        """Hold this site's weight, the number of its training images, for the secure sum of all weights.

        Raises:
            PolicyRefusal, ProtocolError, DataError: why not.
        """
        study = self._approved(request.study)
        if not isinstance(study.privacy, NoPrivacy):
            raise PolicyRefusal(
                "the number of images was asked for, and under differential privacy every site weighs the same",
                reason="weight is private",
            )
        examples = len(self._images.split(study, Split.TRAIN).labels)
        return self._require_participant().hold_weight(study, request.encoding, examples)

    def compare_heads(self, request: HeadsRequest) -> HeadsReply:
        """Check that ledger and journal still hold what the coordinator has recorded of them; their heads now.

        Raises:
            PolicyRefusal: reasons ``ledger restored``, ``journal restored``: something is missing that was there; this
                site then takes no part until its newest copy is back. ProtocolError: an unknown study.
        """
        study = self._approved(request.study)
        heads: dict[Log, Head] = {}
        if not isinstance(study.privacy, NoPrivacy):
            ledger = self._trainer.ledger
            if (recorded := request.recorded.get(Log.LEDGER)) is not None:
                ledger.countersign(recorded)
            heads[Log.LEDGER] = ledger.head
        if self._participant is not None and study.secure_aggregation.mode != "none":
            secure, digest = self._participant.secure, bytes.fromhex(study.digest)
            if (recorded := request.recorded.get(Log.JOURNAL)) is not None:
                secure.compare(digest, recorded)
            heads[Log.JOURNAL] = secure.mark(digest)
        return HeadsReply(heads)

    def journal_mark(self, digest: str) -> Head | None:
        """How far the journal of secure sums is in a study; None where this site has none."""
        return None if self._participant is None or not digest else self._participant.secure.mark(bytes.fromhex(digest))

    def expect_journal(self, marks: Mapping[str, Head]) -> None:
        """By study, how far the journal was when this site last answered: nothing is answered with an older one."""
        if self._participant is not None:
            self._participant.secure.expect({bytes.fromhex(study): mark for study, mark in marks.items()})

    def study_of(self, request: SecureRequest) -> str:
        """Digest of the study whose secure sum ``request`` belongs to; empty where no such sum is known here."""
        if self._participant is None:
            return ""
        return (self._participant.secure.study_of(request.phase, PhaseRequest(request.control)) or b"").hex()

    def price(self, digest: str) -> Price | None:
        """What is spent by now, when results of a study leave; None of a study without differential privacy.

        Raises:
            PolicyRefusal: the ledger cannot be read.
        """
        study = self._records.study(digest)
        if study is None or isinstance(study.privacy, NoPrivacy):
            return None
        spent = self._trainer.ledger.spent(digest)
        return Price(spent.study, spent.total)

    def secure_phase(self, request: SecureRequest) -> SecureReply:
        """Answer one phase of a secure sum over what is held.

        Raises:
            PolicyRefusal, ProtocolError, DataError, TrainingError: why not.
        """

        def permit(digest: bytes) -> None:
            self._permit_release(self._approved(digest.hex()))

        secure = self._require_participant().secure
        return SecureReply(secure.answer(request.phase, PhaseRequest(request.control), permit=permit))

    def evaluate(self, request: ModelRequest) -> EvaluateReply | Ready:
        """Score the request's weights on the site's held-out patients; what leaves is for the policy to say.

        Raises:
            PolicyRefusal, ProtocolError, DataError: why not.
        """
        study, bench = self._open(request)
        kept = self._kept(study)
        bench.load_for_patients(study, request.weights, kept)
        started = time.monotonic()
        tally = evaluate(bench.network, self._images.split(study, Split.VALIDATION), study)
        note_scores(self._records, study, request, "validation", tally, time.monotonic() - started)
        self._permit(study)
        if study.secure_aggregation.mode != "none" and isinstance(study.privacy, NoPrivacy):
            return self._require_participant().hold_scores(study, request, tally)
        return EvaluateReply(tally if self._releases(study) else {})

    def _survivors(self, study: Study) -> int:
        """Least number of sites whose sum is opened with this one; 0 where no noise is sized for it. PolicyRefusal."""
        return self._require_participant().smallest_sum if isinstance(study.privacy, ClientLevel) else 0

    def _releases(self, study: Study) -> bool:
        """Whether this site's own numbers may leave. Under differential privacy never, whatever the policy says."""
        return self._policy.release_site_metrics and isinstance(study.privacy, NoPrivacy)

    def _require_participant(self) -> Participant:
        if self._participant is None:
            raise PolicyRefusal(
                "a secure sum was asked for, and this site has no roster: name one under secure_aggregation",
                reason="no roster here",
            )
        return self._participant

    def _approved(self, digest: str) -> Study:
        study = self._records.study(digest)
        if study is None:
            raise ProtocolError("asked about a study that was never offered here", reason=UNKNOWN_STUDY)
        self._permit(study)
        return study

    def _permit(self, study: Study) -> None:
        """Everything the site's people and policy have to say on ``study`` at this hour. Raises PolicyRefusal."""
        now = self._now()
        self._approvals.permit(study, today=self._policy.local(now).date())
        self._policy.permit_hour(now)

    def _permit_release(self, study: Study) -> None:
        """The policy once more, now that the update is about to leave: hours pass, and rules change. PolicyRefusal."""
        self._permit(study)
        if not isinstance(study.privacy, NoPrivacy):
            self._trainer.ledger.permit_release(study.digest)

    def _open(self, request: ModelRequest) -> tuple[Study, Bench]:
        study = self._approved(request.study)
        if request.round > study.rounds.count:
            raise ProtocolError(f"round {request.round} is beyond the study's {study.rounds.count}")
        return study, self._bench(study)

    def _bench(self, study: Study) -> Bench:
        return self._workbench.open(study, lambda: self._initial(study))

    def _initial(self, study: Study) -> bytes | None:
        """The file that ``study`` begins with. Raises ProtocolError, so that it is sent again, when it is gone."""
        kept = self._records.initial(study.digest)
        if study.initial_weights is not None and (kept is None or digest_of(kept) != study.initial_weights):
            raise ProtocolError("the study's initial weights are not here any more", reason=UNKNOWN_STUDY)
        return kept

    def _take_initial(self, study: Study, offer: StudyOffer) -> None:
        """Keep the weights that ``study`` begins with: the file its digest names, and no other. ProtocolError."""
        wanted, kept = study.initial_weights, self._records.initial(study.digest)
        if wanted is None or (kept is not None and digest_of(kept) == wanted):
            return
        if digest_of(offer.initial) != wanted:
            raise ProtocolError(
                f"study {study.name} begins with weights that are not here yet: they are asked for",
                reason=NO_INITIAL_WEIGHTS,
            )
        self._records.keep_initial(study.digest, offer.initial)

    def _kept(self, study: Study, asked: str = "", counted: int | None = None) -> Flat | None:
        """What the site has kept of the study's earlier rounds; None for strategies without memory at sites."""
        if not study.demands.site_state:
            return None
        return self._records.personal(study.digest, asked=asked, counted=counted)

    def check_ledger(self) -> None:
        """Open the ledger, where this site has one: damage is to be known at the start, not when a round begins.

        Raises:
            PolicyRefusal: it is damaged, older than what was countersigned, or another process has it.
        """
        self._trainer.check_ledger()

    def close(self) -> None:
        """Let go of the ledger."""
        self._trainer.close()
