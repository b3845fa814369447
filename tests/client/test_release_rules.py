"""The policy is asked again when something is about to leave: hours pass and ceilings fall while a site trains."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict
from sites import NOON, evaluate, make_site, offer, policy_for, start, train
from tiny import classes_study

from medfl.client.privacy.ledger import Ceilings, Ledger
from medfl.client.records import FolderRecords
from medfl.client.site import Site
from medfl.client.training import plain
from medfl.shared.errors import OUTSIDE_HOURS, Code, PolicyRefusal
from medfl.shared.messages import Failure, OfferAccepted, SecureRequest, TrainReply
from medfl.shared.secagg.exchange import Phase, PhaseReply, PhaseRequest

MORNING = {"hours": ("08:00-12:30",), "time_zone": "UTC"}
HOUR = datetime.timedelta(hours=1)


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime.datetime:
        return self.now


def refused(content: RecordDict, reason: str) -> None:
    failure = Failure.parse(content)
    assert (failure.code, failure.reason) == (Code.REFUSED, reason)
    assert set(content) == {"config"}


def test_outside_its_hours_a_site_neither_accepts_nor_trains_nor_scores(tmp_path: Path) -> None:
    study, clock = classes_study(), Clock()
    site = make_site(study, tmp_path, policy=policy_for(study, **MORNING), now=clock)
    assert OfferAccepted.parse(offer(site, study)) == OfferAccepted()
    clock.now += HOUR
    for ask in (offer, train, evaluate):
        refused(ask(site, study), OUTSIDE_HOURS)
    clock.now -= HOUR
    assert TrainReply.parse(train(site, study)).examples == 8


def test_an_update_whose_training_ends_outside_the_hours_stays_and_leaves_when_they_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, clock = classes_study(), Clock()
    policy, records = policy_for(study, **MORNING), FolderRecords(tmp_path / "state")
    site = make_site(study, tmp_path, policy=policy, records=records, now=clock)
    offer(site, study)
    built = plain.build_loss

    def slow(loss: str) -> object:
        clock.now += HOUR  # training goes on into the afternoon
        return built(loss)

    with monkeypatch.context() as patch:
        patch.setattr(plain, "build_loss", slow)
        refused(train(site, study), OUTSIDE_HOURS)
    clock.now = NOON + 20 * HOUR
    monkeypatch.setattr(site._trainer, "_train_local", None)  # it need not be trained again
    assert np.abs(TrainReply.parse(train(site, study)).update).max() > 0


def test_a_ceiling_lowered_below_what_is_spent_keeps_the_update_here(tmp_path: Path) -> None:
    privacy = {"mode": "dp-sgd", "epsilon": 8, "delta": 1e-2, "noise_multiplier": 2.0, "expected_batch": 2}
    study = classes_study(privacy={**privacy, "steps_per_round": 3})

    def site(total: float) -> Site:
        rules = {"max_epsilon_per_study": 8, "max_epsilon_total": total, "max_delta": 1e-2}
        records = FolderRecords(tmp_path / "state")
        return make_site(study, tmp_path, policy=policy_for(study, **rules), records=records)

    first = site(8)
    offer(first, study)
    TrainReply.parse(train(first, study))
    first.close()
    with Ledger(tmp_path / "north" / "ledger.jsonl", cohort="north", ceilings=Ceilings(8, 8, 1e-2)) as ledger:
        spent = ledger.spent(study.digest).total
    for total, leaves in ((0.9 * spent, False), (1.1 * spent, True)):
        again = site(total)  # the same request gets the same update, without a new charge
        reply = train(again, study, start(study))
        again.close()
        if leaves:
            TrainReply.parse(reply)
        else:
            refused(reply, "budget")


class Recorder:
    """A secure site that only keeps how it is asked for permission."""

    def __init__(self) -> None:
        self.secure = self
        self.permit: Callable[[bytes], None] | None = None

    def answer(self, phase: Phase, request: PhaseRequest, *, permit: Callable[[bytes], None]) -> PhaseReply:
        self.permit = permit
        return PhaseReply(b"")


def test_masked_numbers_do_not_leave_outside_the_hours_either(tmp_path: Path) -> None:
    study, clock, recorder = classes_study(), Clock(), Recorder()
    site = make_site(study, tmp_path, policy=policy_for(study, **MORNING), now=clock)
    site._participant = recorder  # type: ignore[assignment]
    offer(site, study)
    site.secure_phase(SecureRequest(Phase.MASKED_INPUT, b""))
    assert recorder.permit is not None
    recorder.permit(bytes.fromhex(study.digest))
    clock.now += HOUR
    with pytest.raises(PolicyRefusal) as caught:
        recorder.permit(bytes.fromhex(study.digest))
    assert caught.value.reason == OUTSIDE_HOURS
