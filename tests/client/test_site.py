"""A site through its ClientApp: what it answers, what it refuses, and what never leaves it."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from signer import signature_of
from sites import NOON, call, evaluate, make_site, offer, policy_for, start, train
from tiny import classes_study, labels_study, masks_study, site_data

from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData, TensorSet
from medfl.client.policy import Policy
from medfl.client.records import FolderRecords, MemoryRecords
from medfl.client.site import Site
from medfl.client.training import plain
from medfl.shared.algorithms.travel import build_study_network
from medfl.shared.errors import Code, DataError
from medfl.shared.initial_weights import digest_of
from medfl.shared.messages import (
    NO_INITIAL_WEIGHTS,
    UNKNOWN_STUDY,
    EvaluateReply,
    Failure,
    Kind,
    ModelRequest,
    OfferAccepted,
    StudyOffer,
    TrainReply,
)
from medfl.shared.study import Study

PATIENT = "MUSTERMANN^ERIKA"
FEDBN: dict[str, Any] = {
    "strategy": {"name": "fedbn"},
    "model": {"name": "unet", "channels": [4, 8], "residual_units": 0, "norm": "batch"},
}


@pytest.fixture
def study() -> Study:
    return classes_study()


def everything_in(content: Any) -> str:
    """All text of a reply."""
    return repr({name: dict(record) for name, record in content.items()})


def test_a_study_is_accepted_trained_and_scored(study: Study, tmp_path: Path) -> None:
    site = make_site(study, tmp_path)
    assert OfferAccepted.parse(offer(site, study)) == OfferAccepted()
    reply = TrainReply.parse(train(site, study))
    assert reply.examples == len(site_data(study).splits[Split.TRAIN])
    assert np.abs(reply.update).max() > 0
    assert EvaluateReply.parse(evaluate(site, study)).tally == {}


def test_the_update_is_local_minus_global_weights(tmp_path: Path) -> None:
    # 8 pictures fit in one batch of 8, so that one step of plain SGD moves by -0.5 times the gradient
    study = classes_study(training={"steps": 1})
    site = make_site(study, tmp_path)
    offer(site, study)
    data = site_data(study).splits[Split.TRAIN]
    weights = torch.from_numpy(start(study).copy()).requires_grad_()
    logits = data.images.flatten(1) @ weights[:32].view(2, 16).T + weights[32:]
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, data.labels), weights)
    assert TrainReply.parse(train(site, study)).update == pytest.approx(-0.5 * gradient.numpy(), abs=1e-6)


def failed(content: Any, code: Code, reason: str | None = None) -> None:
    failure = Failure.parse(content)
    assert failure.code is code
    if reason is not None:
        assert failure.reason == reason


def test_an_absent_policy_denies(study: Study, tmp_path: Path) -> None:
    failed(offer(make_site(study, tmp_path, policy=Policy()), study), Code.REFUSED, "study not approved")


def test_a_study_that_is_not_approved_is_refused_before_any_image_is_read(study: Study, tmp_path: Path) -> None:
    def never(_: Study) -> SiteData:
        raise AssertionError("images were read for a study that nobody approved")

    site = make_site(study, tmp_path, data=never, policy=policy_for(classes_study(seed=9)))
    failed(offer(site, study), Code.REFUSED, "study not approved")
    failed(train(site, study), Code.PROTOCOL, UNKNOWN_STUDY)


def test_an_approval_that_is_withdrawn_stops_training_and_scoring(study: Study, tmp_path: Path) -> None:
    records = MemoryRecords()
    offer(make_site(study, tmp_path, records=records), study)
    later = make_site(study, tmp_path, records=records, policy=policy_for(study, studies=()))
    for ask in (train, evaluate):
        failed(ask(later, study), Code.REFUSED, "study not approved")


def test_a_policy_that_expires_during_a_study_stops_it(study: Study, tmp_path: Path) -> None:
    records, policy = MemoryRecords(), policy_for(study, expires=datetime.date(2027, 1, 1), time_zone="UTC")
    offer(make_site(study, tmp_path, records=records, policy=policy), study)
    late = make_site(study, tmp_path, records=records, policy=policy, now=lambda: NOON + datetime.timedelta(days=1))
    for ask in (train, evaluate):
        failed(ask(late, study), Code.REFUSED, "expired")


def test_an_update_above_the_ceiling_does_not_leave(study: Study, tmp_path: Path) -> None:
    site = make_site(study, tmp_path, policy=policy_for(study, max_upload_mb_per_round=1e-4))  # 100 bytes; it has 136
    offer(site, study)
    reply = train(site, study)
    failed(reply, Code.REFUSED, "upload too large")
    assert set(reply) == {"config"}


def test_an_offer_whose_digest_is_another_is_a_protocol_error(study: Study, tmp_path: Path) -> None:
    site = make_site(study, tmp_path)
    changed = study.canonical().replace(b'"seed":0', b'"seed":1')
    signed = signature_of(study.model_copy(update={"seed": 1}))
    failed(call(site, Kind.OFFER, StudyOffer(study.digest, changed, signed).record()), Code.PROTOCOL)
    failed(train(site, study), Code.PROTOCOL, UNKNOWN_STUDY)


def test_a_round_beyond_the_last_is_refused(study: Study, tmp_path: Path) -> None:
    site = make_site(study, tmp_path)
    offer(site, study)
    failed(train(site, study, number=study.rounds.count + 1), Code.PROTOCOL)


@pytest.mark.parametrize("spoil", [lambda w: w[:-1], lambda w: w * np.float32(np.nan), lambda w: w.astype(np.float64)])
def test_weights_that_do_not_fit_are_a_protocol_error(study: Study, tmp_path: Path, spoil: Any) -> None:
    site = make_site(study, tmp_path)
    offer(site, study)
    for ask in (train, evaluate):
        failed(ask(site, study, spoil(start(study))), Code.PROTOCOL)


def spoiled(study: Study, change: Any) -> SiteData:
    data = site_data(study)
    train_set = data.splits[Split.TRAIN]
    changed = TensorSet(change(train_set.images), train_set.labels, train_set.patients)
    return SiteData({**data.splits, Split.TRAIN: changed}, data.report)


def test_a_loss_that_is_not_finite_is_a_training_failure_and_nothing_is_sent(study: Study, tmp_path: Path) -> None:
    site = make_site(study, tmp_path, data=spoiled(study, lambda images: images * float("nan")))
    offer(site, study)
    reply = train(site, study)
    failed(reply, Code.TRAINING)
    assert set(reply) == {"config"}


def test_weights_that_are_not_finite_after_a_finite_loss_are_a_training_failure(tmp_path: Path) -> None:
    study = classes_study(training={"steps": 1, "learning_rate": 10.0})
    # zero weights give even odds and a finite loss; a step of 10 times a gradient near 1e38 does not
    huge = torch.tensor([0.0, 3e38] * 4).view(8, 1, 1, 1)
    site = make_site(study, tmp_path, data=spoiled(study, huge.expand_as))
    offer(site, study)
    reply = train(site, study, np.zeros_like(start(study)))
    failed(reply, Code.TRAINING)
    assert set(reply) == {"config"}


def test_the_site_goes_on_after_a_failure(study: Study, tmp_path: Path) -> None:
    records = MemoryRecords()
    broken = make_site(study, tmp_path, records=records, data=spoiled(study, lambda images: images * float("nan")))
    offer(broken, study)
    train(broken, study)
    assert TrainReply.parse(train(make_site(study, tmp_path, records=records), study)).examples > 0


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (RuntimeError(f"cannot open /images/{PATIENT}/1.dcm"), Code.UNEXPECTED, "RuntimeError"),
        (KeyError(PATIENT), Code.UNEXPECTED, "KeyError"),
        (DataError(f"{PATIENT} has no label"), Code.DATA, ""),
    ],
)
def test_no_text_of_an_exception_ever_leaves(
    study: Study, tmp_path: Path, error: Exception, code: Code, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    def load(_: Study) -> SiteData:
        raise error

    reply = offer(make_site(study, tmp_path, data=load), study)
    failed(reply, code, reason)
    assert PATIENT not in everything_in(reply)
    if code is Code.UNEXPECTED:
        assert PATIENT not in caplog.text  # the text of a library's error stays out of the log as well
        assert "in load" in caplog.text  # where it happened does not


def test_no_text_of_an_exception_leaves_while_training(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object, **__: object) -> None:
        raise ValueError(PATIENT)

    site = make_site(study, tmp_path)
    offer(site, study)
    monkeypatch.setattr(plain, "build_loss", explode)
    reply = train(site, study)
    failed(reply, Code.UNEXPECTED, "ValueError")
    assert PATIENT not in everything_in(reply)


def test_malformed_messages_are_protocol_errors(study: Study, tmp_path: Path) -> None:
    site = make_site(study, tmp_path)
    for kind in (Kind.OFFER, Kind.TRAIN, Kind.EVALUATE):
        failed(call(site, kind, OfferAccepted().record()), Code.PROTOCOL)


def test_a_site_without_images_of_a_kind_says_so(study: Study, tmp_path: Path) -> None:
    data = site_data(study)
    site = make_site(study, tmp_path, data=SiteData({Split.TRAIN: data.splits[Split.TRAIN]}, data.report))
    offer(site, study)
    failed(evaluate(site, study), Code.DATA)


def test_scores_leave_only_where_the_policy_releases_them(study: Study, tmp_path: Path) -> None:
    keeps, tells = (
        make_site(study, tmp_path),
        make_site(study, tmp_path, policy=policy_for(study, release_site_metrics=True)),
    )
    for site, released in ((keeps, False), (tells, True)):
        offer(site, study)
        assert bool(TrainReply.parse(train(site, study)).tally) is released
        assert bool(EvaluateReply.parse(evaluate(site, study)).tally) is released


def test_the_site_keeps_its_own_scores_in_any_case(study: Study, tmp_path: Path) -> None:
    records = MemoryRecords()
    site = make_site(study, tmp_path, records=records)
    offer(site, study)
    train(site, study)
    evaluate(site, study)
    rows = records.rows[study.digest]
    assert [(row["round"], row["set"]) for row in rows] == [(1, "train"), (1, "validation")]
    assert rows[1]["scores"]["loss"] > 0


@pytest.mark.parametrize("make", [classes_study, labels_study, masks_study])
def test_the_same_round_gives_the_same_bits_at_another_site_object(make: Any, tmp_path: Path) -> None:
    study = make()

    def update(name: str = "north", number: int = 1) -> bytes:
        site = make_site(study, tmp_path, name=name)
        offer(site, study)
        torch.rand(3)  # whatever the global generator does
        return TrainReply.parse(train(site, study, number=number)).update.tobytes()

    assert update() == update()


def test_another_site_and_another_round_see_the_images_in_another_order(tmp_path: Path) -> None:
    study = classes_study(training={"batch_size": 2, "steps": 3})

    def update(name: str, number: int) -> bytes:
        site = make_site(study, tmp_path, name=name)
        offer(site, study)
        return TrainReply.parse(train(site, study, number=number)).update.tobytes()

    assert len({update("north", 1), update("south", 1), update("north", 2)}) == 3


def test_the_same_request_again_gets_the_same_answer_without_training(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_for(study, release_site_metrics=True)
    site = make_site(study, tmp_path, policy=policy, records=FolderRecords(tmp_path))
    offer(site, study)
    first = TrainReply.parse(train(site, study))
    monkeypatch.setattr(site._trainer, "_train_local", None)  # calling it would fail
    again = TrainReply.parse(train(site, study))
    assert again.update.tobytes() == first.update.tobytes()
    assert (again.examples, again.tally) == (first.examples, first.tally)


def test_personal_tensors_stay_at_the_site_and_survive_a_restart(tmp_path: Path) -> None:
    study = masks_study(**FEDBN)

    def restarted() -> Any:
        return make_site(study, tmp_path, records=FolderRecords(tmp_path))

    site = restarted()
    offer(site, study)
    first = TrainReply.parse(train(site, study))
    personal = FolderRecords(tmp_path).personal(study.digest)
    assert personal is not None
    assert first.update.size == start(study).size

    through = TrainReply.parse(train(site, study, start(study) + first.update, number=2)).update

    (tmp_path / "fresh").mkdir()
    other = make_site(study, tmp_path / "fresh", records=FolderRecords(tmp_path / "fresh"))
    offer(other, study)
    train(other, study)
    again = make_site(study, tmp_path / "fresh", records=FolderRecords(tmp_path / "fresh"))  # the process is restarted
    resumed = TrainReply.parse(train(again, study, start(study) + first.update, number=2)).update
    assert resumed.tobytes() == through.tobytes()

    forgetful = make_site(study, tmp_path / "empty", records=MemoryRecords())
    offer(forgetful, study)
    lost = TrainReply.parse(train(forgetful, study, start(study) + first.update, number=2)).update
    assert lost.tobytes() != through.tobytes()  # so the personal tensors do matter


def test_two_virtual_sites_share_a_network_and_not_their_personal_tensors(tmp_path: Path) -> None:
    study = masks_study(**FEDBN)
    bright = spoiled(study, lambda images: images * 5 + 3)
    alone = make_site(study, tmp_path, name="south")
    offer(alone, study)
    expected = TrainReply.parse(train(alone, study)).update

    records = MemoryRecords()
    north = make_site(study, tmp_path, name="north", data=bright)
    south = make_site(study, tmp_path, name="south", records=records)
    south._workbench = north._workbench
    for site in (north, south):
        offer(site, study)
    train(north, study)
    assert TrainReply.parse(train(south, study)).update.tobytes() == expected.tobytes()


def test_images_are_loaded_once_for_a_study(study: Study, tmp_path: Path) -> None:
    loaded: list[str] = []

    def load(wanted: Study) -> SiteData:
        loaded.append(wanted.digest)
        return site_data(wanted)

    site = make_site(study, tmp_path, data=load)
    offer(site, study)
    train(site, study)
    evaluate(site, study)
    assert loaded == [study.digest]


def test_evaluation_does_not_change_what_training_gives(study: Study, tmp_path: Path) -> None:
    site = make_site(study, tmp_path)
    offer(site, study)
    evaluate(site, study, start(study) + np.float32(1))
    other = make_site(study, tmp_path)
    offer(other, study)
    request = ModelRequest(study.digest, 1, start(study))
    assert site.train(request).update.tobytes() == other.train(request).update.tobytes()  # type: ignore[union-attr]


def with_initial(value: float = 0.25) -> tuple[Study, bytes]:
    tensors = {
        name: torch.full_like(tensor, value) for name, tensor in build_study_network(masks_study()).state_dict().items()
    }
    content = save(tensors)
    return masks_study(training={"train_only": "head"}, initial_weights=digest_of(content)), content


def offer_with(site: Site, study: Study, content: bytes) -> Any:
    return call(site, Kind.OFFER, StudyOffer(study.digest, study.canonical(), signature_of(study), content).record())


def test_initial_weights_are_asked_for_checked_and_kept_over_a_restart(tmp_path: Path) -> None:
    study, content = with_initial()
    site = make_site(study, tmp_path, records=FolderRecords(tmp_path / "state"))
    for reply in (offer(site, study), offer_with(site, study, content[:-1] + b"\0")):
        assert Failure.parse(reply) == Failure(Code.PROTOCOL, NO_INITIAL_WEIGHTS)
    assert OfferAccepted.parse(offer_with(site, study, content)) == OfferAccepted()
    again = make_site(study, tmp_path, records=FolderRecords(tmp_path / "state"))
    assert OfferAccepted.parse(offer(again, study)) == OfferAccepted()
    bench = again._bench(study)
    head = {name for name, _ in bench.layout.tensors}
    kept = [tensor for name, tensor in bench.network.state_dict().items() if name not in head]
    assert kept
    assert all(bool((tensor == 0.25).all()) for tensor in kept)


def test_a_policy_is_asked_before_the_initial_weights_are(tmp_path: Path) -> None:
    study, content = with_initial()
    site = make_site(study, tmp_path, policy=Policy())
    assert Failure.parse(offer_with(site, study, content)).reason == "study not approved"


def test_initial_weights_that_were_lost_are_sent_again(tmp_path: Path) -> None:
    study, content = with_initial()
    first = make_site(study, tmp_path, records=FolderRecords(tmp_path / "state"))
    offer_with(first, study, content)
    weights = first._bench(study).layout.flatten(first._bench(study).network.state_dict())
    (kept,) = (tmp_path / "state").rglob("initial.safetensors")
    kept.write_bytes(b"damaged")
    site = make_site(study, tmp_path, records=FolderRecords(tmp_path / "state"))
    assert Failure.parse(train(site, study, weights)) == Failure(Code.PROTOCOL, UNKNOWN_STUDY)
    assert OfferAccepted.parse(offer_with(site, study, content)) == OfferAccepted()
    assert np.abs(TrainReply.parse(train(site, study, weights)).update).max() > 0


def test_initial_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    content = save({"weight": torch.zeros(3)})
    study = classes_study(initial_weights=digest_of(content))
    reply = Failure.parse(offer_with(make_site(study, tmp_path), study, content))
    assert reply.code is Code.CONFIGURATION
