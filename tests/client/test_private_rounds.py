"""Private rounds through the ClientApp: charged before anything leaves, nothing exact goes with it, no second spend."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sites import call, evaluate, offer, policy_for, start, train
from sites import make_site as any_site
from tiny import LOGISTIC_VALUES, classes_study

from medfl.client.participant import Participant
from medfl.client.privacy.ledger import Ceilings, Ledger
from medfl.client.records import FolderRecords
from medfl.client.secagg.enrolment import Enrolment, Rules
from medfl.client.secagg.journal import Journal
from medfl.client.secagg.session import SecureSite
from medfl.client.site import Site
from medfl.shared.errors import Code
from medfl.shared.messages import (
    EvaluateReply,
    Failure,
    HeadsReply,
    HeadsRequest,
    Kind,
    Log,
    ModelRequest,
    OfferAccepted,
    Ready,
    TrainReply,
    WeightRequest,
)
from medfl.shared.secagg.encoding import Encoding, Segment
from medfl.shared.secagg.reasons import Reason
from medfl.shared.secagg.rings import Ring
from medfl.shared.secagg.roster import Member, make_roster
from medfl.shared.study import Study

PRIVACY: dict[str, Any] = {
    "mode": "dp-sgd",
    "epsilon": 8,
    "delta": 1e-2,
    "clip_norm": 1.0,
    "expected_batch": 2,
    "noise_multiplier": 0.7,  # given, so that no test solves for it
    "steps_per_round": 3,
}


@pytest.fixture
def study() -> Study:
    return classes_study(privacy=PRIVACY)


def make_site(study: Study, folder: Path, *, records: FolderRecords | None = None, **rules: Any) -> Site:
    allowed = {"max_epsilon_per_study": 8, "max_epsilon_total": 8, "max_delta": 1e-2, **rules}
    return any_site(study, folder, policy=policy_for(study, **allowed), records=records)


def spent(tmp_path: Path, study: Study) -> float:
    with Ledger(tmp_path / "north" / "ledger.jsonl", cohort="north", ceilings=Ceilings(8, 8, 1e-2)) as ledger:
        return ledger.spent(study.digest).study


def test_a_private_round_is_charged_and_sends_an_equal_weight_and_no_tally(study: Study, tmp_path: Path) -> None:
    site = make_site(study, tmp_path)
    assert OfferAccepted.parse(offer(site, study)) == OfferAccepted()
    reply = TrainReply.parse(train(site, study))
    assert reply.examples == 1
    assert reply.tally == {}
    assert np.abs(reply.update).max() > 0
    site.close()
    assert 0 < spent(tmp_path, study) < 8


def test_exact_scores_never_leave_a_private_study_whatever_the_policy_says(study: Study, tmp_path: Path) -> None:
    site = make_site(study, tmp_path, release_site_metrics=True)
    offer(site, study)
    assert EvaluateReply.parse(evaluate(site, study)).tally == {}


def test_the_same_request_again_is_answered_without_training_or_charge(study: Study, tmp_path: Path) -> None:
    records = FolderRecords(tmp_path / "state")
    site = make_site(study, tmp_path, records=records)
    offer(site, study)
    first = TrainReply.parse(train(site, study))
    again = TrainReply.parse(train(site, study))
    assert (first.update == again.update).all()
    site.close()
    once = spent(tmp_path, study)

    restarted = make_site(study, tmp_path, records=FolderRecords(tmp_path / "state"))
    assert (TrainReply.parse(train(restarted, study)).update == first.update).all()
    restarted.close()
    assert spent(tmp_path, study) == once


def test_a_round_beyond_the_ceiling_is_refused_and_nothing_is_trained(tmp_path: Path) -> None:
    study = classes_study(privacy=PRIVACY, rounds={"count": 2})
    site = make_site(study, tmp_path, max_epsilon_total=0.5)
    offer(site, study)
    refused = Failure.parse(train(site, study))
    assert (refused.code, refused.reason) == (Code.REFUSED, "budget")
    site.close()
    assert spent(tmp_path, study) == 0


def test_a_ledger_restored_from_a_backup_is_refused(study: Study, tmp_path: Path) -> None:
    site = make_site(study, tmp_path)
    offer(site, study)
    site.close()
    shutil.copytree(tmp_path / "north", tmp_path / "backup")
    site = make_site(study, tmp_path)
    offer(site, study)
    train(site, study)
    heads = HeadsReply.parse(call(site, Kind.HEADS, HeadsRequest(study.digest, 1).record())).heads
    assert heads[Log.LEDGER].rows > 1
    site.close()

    shutil.rmtree(tmp_path / "north")
    shutil.copytree(tmp_path / "backup", tmp_path / "north")
    restored = make_site(study, tmp_path)
    offer(restored, study)
    refused = Failure.parse(call(restored, Kind.HEADS, HeadsRequest(study.digest, 2, heads).record()))
    assert (refused.code, refused.reason) == (Code.REFUSED, "ledger restored")
    restored.close()


def test_the_learning_rate_falls_to_half_in_the_middle_of_a_cosine() -> None:
    training = classes_study(training={"decay": "cosine", "learning_rate": 0.4}).training
    assert training.learning_rate_of(1, 4) == pytest.approx(0.4)
    assert training.learning_rate_of(3, 4) == pytest.approx(0.2)
    assert classes_study().training.learning_rate_of(3, 4) == 0.5


def secure_site(study: Study, folder: Path, *, least: int) -> Site:
    """A site of a consortium of five that sums with at least so many."""
    keys = [Ed25519PrivateKey.generate() for _ in range(5)]
    members = [Member(n, f"site-{n}", key.public_key().public_bytes_raw()) for n, key in enumerate(keys, 1)]
    enrolment = Enrolment(1, keys[0], make_roster("five", 1, members, minimum_cohort=3), Rules(least))
    policy = policy_for(study, max_epsilon_per_study=1e4, max_epsilon_total=1e4, max_delta=1e-2)
    site = any_site(study, folder, policy=policy, records=FolderRecords(folder / "records"))
    site._participant = Participant(SecureSite(enrolment, Journal(None)))
    return site


def client_level_study() -> Study:
    return classes_study(
        privacy={"mode": "client-level", "epsilon": 50.0, "delta": 1e-3, "noise_multiplier": 2.0},
        secure_aggregation={"mode": "msa1"},
        rounds={"count": 2, "minimum_sites": 3},
    )


def asked(study: Study, *, clip: float, sites: int) -> ModelRequest:
    """A request to train for a sum whose encoding has this clip and counts so many sites."""
    encoding = Encoding(Ring.BITS_32, (Segment(LOGISTIC_VALUES, clip),), sites)
    return ModelRequest(study.digest, 1, start(study), encoding=encoding.to_bytes())


def test_noise_that_was_sized_for_more_sites_than_are_sure_now_is_made_anew_and_charged(tmp_path: Path) -> None:
    study = client_level_study()
    request = asked(study, clip=11.0, sites=5)
    charges = []
    for least in (5, 5, 3):  # a share for five sites; the same again after a restart; three are enough now
        site = secure_site(study, tmp_path, least=least)
        assert OfferAccepted.parse(offer(site, study)) == OfferAccepted()
        assert Ready.parse(call(site, Kind.TRAIN, request.record())) == Ready()
        site.close()
        rows = (tmp_path / "north" / "ledger.jsonl").read_text().splitlines()
        charges.append(sum(json.loads(row)["kind"] == "charge" for row in rows))
    assert charges == [1, 1, 2]


# 1 + 8 * 2 / sqrt(3) = 10.24 leaves room for the noise. The grid may have a hundredth of the smallest share,
# 2 / sqrt(128) / 100 = 0.0018; with a clip of 11 and 1,000,000 sites it has 11 * 1,000,000 / 2^31 = 0.005
@pytest.mark.parametrize(("clip", "sites"), [(1.0, 5), (1e-6, 5), (10.2, 5), (11.0, 1_000_000), (1e6, 5)])
def test_an_encoding_that_would_take_the_noise_away_is_refused_and_nothing_is_charged(
    clip: float, sites: int, tmp_path: Path
) -> None:
    study = client_level_study()
    site = secure_site(study, tmp_path, least=3)
    offer(site, study)
    failure = Failure.parse(call(site, Kind.TRAIN, asked(study, clip=clip, sites=sites).record()))
    site.close()
    assert (failure.code, failure.reason) == (Code.PROTOCOL, Reason.OTHER_ENCODING)
    assert '"kind":"charge"' not in (tmp_path / "north" / "ledger.jsonl").read_text().replace(" ", "")


def test_an_update_that_is_at_hand_is_not_given_to_a_sum_that_would_take_its_noise_away(tmp_path: Path) -> None:
    study = client_level_study()
    site = secure_site(study, tmp_path, least=3)
    offer(site, study)
    assert Ready.parse(call(site, Kind.TRAIN, asked(study, clip=11.0, sites=5).record())) == Ready()
    failure = Failure.parse(call(site, Kind.TRAIN, asked(study, clip=1e-6, sites=5).record()))
    site.close()
    assert (failure.code, failure.reason) == (Code.PROTOCOL, Reason.OTHER_ENCODING)


@pytest.mark.parametrize("privacy", [PRIVACY, {"mode": "client-level", "epsilon": 50, "noise_multiplier": 2}])
def test_the_number_of_images_of_a_private_study_is_given_to_no_sum(privacy: dict[str, Any], tmp_path: Path) -> None:
    study = classes_study(
        privacy={**privacy, "delta": 1e-2},
        secure_aggregation={"mode": "msa1"},
        rounds={"count": 2, "minimum_sites": 3},
    )
    site = secure_site(study, tmp_path, least=3)
    offer(site, study)
    request = WeightRequest(study.digest, Encoding(Ring.BITS_32, (), 0).to_bytes())
    failure = Failure.parse(call(site, Kind.WEIGHT, request.record()))
    assert (failure.code, failure.reason) == (Code.REFUSED, "weight is private")
