"""Withdrawing: training ends within a batch, nothing more leaves, the cache's key is gone, and what remains is told."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import pytest
import signer
from signer import offer_of, signature_of
from sites import call, evaluate, make_site, offer, start, train
from tiny import classes_study, site_data
from torch import Tensor

from medfl.client.approvals import Approvals, Decision
from medfl.client.audit import Audit
from medfl.client.data.tensors import SiteData
from medfl.client.decisions import Approval, Decisions, Withdrawal
from medfl.client.policy import Policy
from medfl.client.records import CACHE_KEY, FolderRecords
from medfl.client.remains import remains_of
from medfl.client.site import Site, no_key_pinned
from medfl.client.training import plain
from medfl.shared.audit_log import audit_file
from medfl.shared.chain import inspect
from medfl.shared.errors import Code, PolicyRefusal
from medfl.shared.losses import StudyLoss
from medfl.shared.messages import Failure, Kind, OfferAccepted, StudyOffer, TrainReply
from medfl.shared.study import Loss, Study
from medfl.shared.weights import weights_digest

STUDY = classes_study(training={"steps": 40}, rounds={"count": 3})
OPEN = Policy(allow_no_privacy=True, require_secure_aggregation=False)
WHO = "Dr A. Example"


class World:
    """A site with its decisions, as the running node holds them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.approvals = Approvals(OPEN, folder)
        self.records = FolderRecords(folder)
        self.site: Site = make_site(
            STUDY, folder, policy=OPEN, approvals=self.approvals, records=self.records, data=site_data(STUDY)
        )
        self.rejoined = 0
        self.audit = Audit(audit_file(folder))
        self.decisions = Decisions(
            self.approvals, self.audit, forget=self.site.forget, take_up=self.site.take_up, changed=self._rejoin
        )

    def _rejoin(self) -> None:
        self.rejoined += 1

    def approve(self) -> None:
        self.decisions.approve(Approval(study=STUDY.digest, by=WHO, ethics="2027-12"))

    def withdraw(self) -> None:
        self.decisions.withdraw(Withdrawal(study=STUDY.digest, by=WHO))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def reason(content: object) -> tuple[Code, str]:
    failure = Failure.parse(content)  # type: ignore[arg-type]
    return failure.code, failure.reason


def test_an_approval_counts_in_the_running_node_and_makes_it_join_again(world: World) -> None:
    assert reason(offer(world.site, STUDY)) == (Code.REFUSED, "study not approved")
    world.approve()
    assert world.rejoined == 1
    OfferAccepted.parse(offer(world.site, STUDY))
    TrainReply.parse(train(world.site, STUDY))


def test_both_decisions_are_in_the_audit_log_with_who_decided(world: World) -> None:
    world.approve()
    world.withdraw()
    world.audit.close()
    rows = [{k: row[k] for k in ("event", "study", "by")} for row in inspect(audit_file(world.folder)).rows]
    assert rows == [
        {"event": "study approved", "study": STUDY.digest, "by": WHO},
        {"event": "study withdrawn", "study": STUDY.digest, "by": WHO},
    ]


def test_an_approval_that_the_audit_log_cannot_take_is_none(world: World) -> None:
    world.audit.close()
    with pytest.raises(PolicyRefusal):
        world.approve()
    assert not world.approvals.standing(STUDY.digest).runs


def test_a_withdrawal_counts_even_where_the_audit_log_cannot_take_it(world: World) -> None:
    world.approve()
    offer(world.site, STUDY)
    world.audit.close()
    with pytest.raises(PolicyRefusal):
        world.withdraw()
    assert reason(train(world.site, STUDY)) == (Code.REFUSED, "study withdrawn")
    assert not world.approvals.standing(STUDY.digest).runs


def test_a_training_in_progress_ends_within_a_batch_and_nothing_of_it_is_kept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.approve()
    offer(world.site, STUDY)
    steps = at_step(5, world.withdraw, monkeypatch)
    assert reason(train(world.site, STUDY)) == (Code.REFUSED, "study withdrawn")
    assert len(steps) == 5
    kept = {path.name for path in (world.folder / "studies" / STUDY.digest).iterdir()}
    assert kept == {"offer.signed", "decision.json", "study.json"}


def test_a_training_whose_study_is_over_for_the_coordinator_ends_within_a_batch_and_may_be_asked_for_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.approve()
    offer(world.site, STUDY)

    def give_up() -> None:
        work = world.site.work
        assert work is not None
        assert work.study == STUDY.digest
        work.given_up = True

    with monkeypatch.context() as patched:
        steps = at_step(5, give_up, patched)
        assert reason(train(world.site, STUDY)) == (Code.PROTOCOL, "study over")
        assert len(steps) == 5
    assert world.site.work is None
    TrainReply.parse(train(world.site, STUDY))


def at_step(number: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Call ``act`` in that step of the next training; the list of steps taken, which grows."""
    steps: list[int] = []
    build_loss = plain.build_loss

    def counted(loss: Loss) -> StudyLoss:
        real = build_loss(loss)

        def one(logits: Tensor, labels: Tensor) -> Tensor:
            steps.append(1)
            if len(steps) == number:
                act()
            return real(logits, labels)

        return StudyLoss(one, real.each)

    monkeypatch.setattr(plain, "build_loss", counted)
    return steps


def test_after_a_withdrawal_nothing_is_answered_and_nothing_evaluated(world: World) -> None:
    world.approve()
    offer(world.site, STUDY)
    TrainReply.parse(train(world.site, STUDY))
    world.withdraw()
    for ask in (train, evaluate):
        assert reason(ask(world.site, STUDY)) == (Code.REFUSED, "study withdrawn")
    assert reason(offer(world.site, STUDY)) == (Code.REFUSED, "study withdrawn")


def test_a_withdrawal_deletes_what_was_made_of_patients_and_the_caches_key(world: World) -> None:
    world.approve()
    offer(world.site, STUDY)
    TrainReply.parse(train(world.site, STUDY))
    folder = world.folder / "studies" / STUDY.digest
    key = world.records.cache_key(STUDY.digest)
    assert (folder / "answer.safetensors").exists()
    world.withdraw()
    assert not (folder / CACHE_KEY).exists()
    assert not (folder / "answer.safetensors").exists()
    with pytest.raises(PolicyRefusal, match="withdrawn"):
        world.records.cache_key(STUDY.digest)
    world.records.keep_answer(STUDY.digest, "late", TrainReply(start(STUDY), 1))  # a training that ended just then
    assert not (folder / "answer.safetensors").exists()
    world.approve()
    OfferAccepted.parse(offer(world.site, STUDY))
    assert world.records.cache_key(STUDY.digest) != key  # what was cached before stays unreadable


def test_a_study_that_is_approved_again_reads_its_images_anew_in_the_running_node(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = world.site._images._load

    def cached(study: Study) -> SiteData:
        world.records.cache_key(study.digest)  # as a node opens its cache
        return load(study)

    monkeypatch.setattr(world.site._images, "_load", cached)
    world.approve()
    OfferAccepted.parse(offer(world.site, STUDY))
    world.withdraw()
    assert reason(offer(world.site, STUDY)) == (Code.REFUSED, "study withdrawn")
    world.approve()
    OfferAccepted.parse(offer(world.site, STUDY))
    TrainReply.parse(train(world.site, STUDY))


def test_what_remains_is_told_by_round_and_model(world: World) -> None:
    world.approve()
    offer(world.site, STUDY)
    assert "has trained no round" in remains_of(world.folder, STUDY.digest).lines()[0]
    first = start(STUDY)
    later = first + 1
    train(world.site, STUDY, first, 1)
    evaluate(world.site, STUDY, later, 1)
    train(world.site, STUDY, later, 2)
    remains = remains_of(world.folder, STUDY.digest)
    assert remains.rounds == (1, 2)
    assert remains.models == ((1, weights_digest(later)),)  # the one it began from holds nothing of this site
    said = " ".join(remains.lines())
    assert "2 of its rounds (1-2)" in said
    assert weights_digest(later) in said
    assert "cannot be taken out" in said


def test_a_study_that_is_not_signed_with_the_pinned_key_is_not_even_kept(world: World) -> None:
    forged = StudyOffer(STUDY.digest, STUDY.canonical(), bytes(64))
    assert reason(call(world.site, Kind.OFFER, forged.record())) == (Code.REFUSED, "bad signature")
    of_another = StudyOffer(STUDY.digest, STUDY.canonical(), signature_of(classes_study(seed=9)))
    assert reason(call(world.site, Kind.OFFER, of_another.record())) == (Code.REFUSED, "bad signature")
    assert world.approvals.offered() == []


def test_a_site_without_a_pinned_key_refuses_every_study(tmp_path: Path) -> None:
    approved = Approvals(OPEN)
    approved.decide(STUDY.digest, Decision(approved=True, by=WHO, at=datetime.datetime.now(datetime.UTC)))
    site = make_site(STUDY, tmp_path, policy=OPEN, approvals=approved, verify=no_key_pinned)
    assert reason(call(site, Kind.OFFER, offer_of(STUDY).record())) == (Code.REFUSED, "no signing key")
    pinned = make_site(STUDY, tmp_path, policy=OPEN, approvals=approved, verify=signer.verify)
    OfferAccepted.parse(call(pinned, Kind.OFFER, offer_of(STUDY).record()))
