"""What a site checks before it answers an announcement: each test fails when its check is removed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from secagg_world import PHASES, Consortium, Stage

from medfl.client.secagg.advertise_keys import advertise_keys
from medfl.client.secagg.enrolment import Enrolment, Rules
from medfl.shared.errors import ConfigError, PolicyRefusal, ProtocolError
from medfl.shared.secagg.announcement import Purpose
from medfl.shared.secagg.encoding import Encoding, Segment
from medfl.shared.secagg.exchange import Phase
from medfl.shared.secagg.messages import SurvivorList
from medfl.shared.secagg.reasons import Reason
from medfl.shared.secagg.rings import Ring
from medfl.shared.secagg.roster import make_roster

ADVERTISE = Phase.ADVERTISE_KEYS


def refused(world: Consortium, site: int = 1, **announced: object) -> str:
    """The reason with which ``site`` refuses an announcement changed in this way."""
    with pytest.raises((PolicyRefusal, ProtocolError)) as refusal:
        world.ask(site, ADVERTISE, world.announcement(**announced))
    return refusal.value.reason


def test_an_honest_announcement_is_answered_with_130_bytes() -> None:
    world = Consortium(5)
    assert len(world.ask(1, ADVERTISE, world.announcement()).control) == 130


@pytest.mark.parametrize("n", [1, 2])
def test_a_cohort_of_one_or_two_is_refused(n: int) -> None:
    assert refused(Consortium(5), cohort=(1, 2)[:n], threshold=n) == Reason.COHORT_TOO_SMALL


def test_the_rosters_minimum_is_kept() -> None:
    world = Consortium(9, minimum=5)
    assert refused(world, cohort=(1, 2, 3, 4), threshold=3) == Reason.COHORT_TOO_SMALL


def test_the_sites_own_minimum_is_kept() -> None:
    world = Consortium(9, rules=Rules(minimum_cohort=7))
    assert refused(world, cohort=(1, 2, 3, 4, 5, 6), threshold=5) == Reason.COHORT_TOO_SMALL


@pytest.mark.parametrize("threshold", [0, 1, 6, 10])
def test_a_threshold_of_two_thirds_or_less_is_refused(threshold: int) -> None:
    assert refused(Consortium(9), threshold=threshold) == Reason.THRESHOLD_TOO_LOW  # 2 * 9 // 3 + 1 = 7; 10 > 9


@pytest.mark.parametrize("threshold", [7, 9])
def test_a_threshold_above_two_thirds_is_accepted(threshold: int) -> None:
    world = Consortium(9)
    world.ask(1, ADVERTISE, world.announcement(threshold=threshold))


def test_a_phantom_site_in_the_cohort_is_refused() -> None:
    assert refused(Consortium(5), cohort=(1, 2, 3, 4, 5, 9), threshold=5) == Reason.BAD_COHORT


def test_a_cohort_without_this_site_is_refused() -> None:
    assert refused(Consortium(5), cohort=(2, 3, 4, 5), threshold=3) == Reason.BAD_COHORT


def test_another_roster_is_refused() -> None:
    assert refused(Consortium(5), roster=bytes(32)) == Reason.BAD_ROSTER


def test_an_announcement_under_another_roster_than_the_one_it_is_judged_by_is_refused() -> None:
    world = Consortium(5)
    later = make_roster("lungs", 2, world.roster.members, minimum_cohort=3)
    history = world.journals[1].history(world.announcement(), epoch=2)
    with pytest.raises(ProtocolError) as refusal:
        advertise_keys(world.announcement(), world.held[1], Enrolment(1, world.keys[1], later), history)
    assert refusal.value.reason == Reason.BAD_ROSTER


def test_another_model_is_refused() -> None:
    assert refused(Consortium(5), model=bytes(32)) == Reason.OTHER_MODEL


@pytest.mark.parametrize(
    "change", [{"encoding": bytes(32)}, {"ring": Ring.BITS_16}, {"length": 41}], ids=["digest", "ring", "length"]
)
def test_another_encoding_is_refused(change: dict[str, object]) -> None:
    assert refused(Consortium(5), **change) == Reason.OTHER_ENCODING


def test_a_sum_for_which_nothing_is_held_is_refused() -> None:
    assert refused(Consortium(5), purpose=Purpose.EVALUATE) == Reason.NOTHING_HELD


def test_the_same_attempt_is_answered_once() -> None:
    world = Consortium(5)
    world.ask(1, ADVERTISE, world.announcement(round=4, attempt=2))
    assert refused(world, round=4, attempt=2) == Reason.REPLAYED
    assert refused(world, round=4, attempt=1) == Reason.REPLAYED
    assert refused(world, round=3, attempt=9) == Reason.REPLAYED
    world.ask(1, ADVERTISE, world.announcement(round=4, attempt=3))
    world.ask(1, ADVERTISE, world.announcement(round=5, attempt=0))


def test_a_replayed_attempt_is_refused_after_a_restart(tmp_path: Path) -> None:
    world = Consortium(5, folder=tmp_path)
    world.ask(1, ADVERTISE, world.announcement())
    world.start(1)
    assert refused(world) == Reason.REPLAYED


def test_a_consumed_round_is_not_opened_again_even_after_a_restart(tmp_path: Path) -> None:
    world = Consortium(5, folder=tmp_path)
    Stage(world, Phase.CONFIRM_SURVIVORS)
    assert refused(world, attempt=1) == Reason.REPLAYED
    world.start(1)
    assert refused(world, attempt=1) == Reason.REPLAYED


def test_a_round_that_was_not_confirmed_may_be_tried_again() -> None:
    world = Consortium(5)
    Stage(world, Phase.MASKED_INPUT)
    Stage(world, Phase.UNMASK, attempt=1)


def test_an_update_is_not_summed_a_second_time_after_retraining(tmp_path: Path) -> None:
    world = Consortium(5, folder=tmp_path)
    Stage(world, Phase.CONFIRM_SURVIVORS)
    world.hold(vector=np.zeros(40, np.float32))
    assert refused(world, round=2) == Reason.CONSUMED
    world.start(1)
    assert refused(world, round=2) == Reason.CONSUMED


def test_another_model_is_summed_in_the_next_round() -> None:
    world = Consortium(5)
    Stage(world, Phase.UNMASK)
    world.hold(model=b"n" * 32)
    Stage(world, Phase.UNMASK, round=2, model=b"n" * 32)


@pytest.mark.parametrize(
    ("changes", "round_number", "told"),
    [
        ({}, 2, False),
        ({}, 4, True),
        ({"scalars": {}, "encoding": replace(Consortium(5).encoding, scalars=())}, 4, False),
    ],
    ids=["no sum was missed", "two were", "two were, and no number goes with them"],
)
def test_a_site_that_missed_sums_reads_in_its_log_what_they_tell_of_it(
    changes: dict[str, object], round_number: int, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    world = Consortium(5)
    world.encoding = changes.get("encoding", world.encoding)  # type: ignore[assignment]
    world.hold(**changes)
    Stage(world, Phase.UNMASK)
    assert "with and without it" not in caplog.text
    world.hold(model=b"n" * 32)
    world.ask(1, ADVERTISE, world.announcement(round=round_number, model=b"n" * 32))
    assert ("2 sums over other sites" in caplog.text) is told


def test_the_very_same_sum_may_be_repeated_under_a_new_round() -> None:
    world = Consortium(5)
    Stage(world, Phase.CONFIRM_SURVIVORS)
    Stage(world, Phase.UNMASK, round=2)


def test_a_repeated_sum_over_fewer_sites_is_refused() -> None:
    world = Consortium(5)
    Stage(world, Phase.CONFIRM_SURVIVORS)
    assert refused(world, round=2, cohort=(1, 2, 3, 4), threshold=3) == Reason.COHORT_SHRANK


def test_a_repeated_sum_whose_survivors_shrink_later_is_refused() -> None:
    world = Consortium(5)
    Stage(world, Phase.CONFIRM_SURVIVORS)
    again = Stage(world, Phase.MASKED_INPUT, round=2)
    with pytest.raises(PolicyRefusal) as refusal:
        world.ask(1, Phase.CONFIRM_SURVIVORS, SurvivorList(again.context, (1, 2, 3, 4)))
    assert refusal.value.reason == Reason.COHORT_SHRANK


def test_a_shrunk_repetition_needs_both_the_sites_permission_and_retraining() -> None:
    world = Consortium(5, rules=Rules(allow_shrunk_repeat=True))
    Stage(world, Phase.CONFIRM_SURVIVORS)
    smaller = {"round": 2, "cohort": (1, 2, 3, 4), "threshold": 3}
    assert refused(world, **smaller) == Reason.COHORT_SHRANK  # the same update
    world.hold(vector=np.zeros(40, np.float32))
    world.ask(1, ADVERTISE, world.announcement(**smaller))


def test_numbers_that_are_only_encoded_anew_are_not_retrained_ones() -> None:
    world = Consortium(5, rules=Rules(allow_shrunk_repeat=True))
    Stage(world, Phase.CONFIRM_SURVIVORS)
    clip = world.encoding.segments[0].clip
    world.encoding = replace(world.encoding, segments=(Segment(40, np.nextafter(clip, 2)),))
    world.hold(encoding=world.encoding)
    assert refused(world, round=2, cohort=(1, 2, 3, 4), threshold=3) == Reason.COHORT_SHRANK
    assert refused(world, round=2) == Reason.CONSUMED


@pytest.mark.parametrize("asked", [{"training": 2}, {"sent": b"v" * 32}], ids=["another round", "another vector"])
def test_sites_that_were_asked_different_things_are_not_in_one_sum(asked: dict[str, object]) -> None:
    world = Consortium(5)
    world.hold(training=1, sent=b"w" * 32)
    same = {"training": 1, "sent": b"w" * 32}
    assert refused(world, **{**same, **asked}) == Reason.OTHER_MODEL
    Stage(world, Phase.UNMASK, **same)


@pytest.mark.parametrize("purpose", [Purpose.TRAIN, Purpose.EVALUATE])
def test_a_round_is_summed_once_however_little_the_model_differs(purpose: Purpose, tmp_path: Path) -> None:
    world = Consortium(5, folder=tmp_path)
    world.hold(training=3, purpose=purpose)
    Stage(world, Phase.CONFIRM_SURVIVORS, training=3, purpose=purpose)
    world.hold(model=b"n" * 32)
    world.start(1)
    again = {"round": 2, "model": b"n" * 32, "training": 3, "purpose": purpose}
    assert refused(world, **again, cohort=(1, 2, 3, 4), threshold=3) == Reason.COHORT_SHRANK
    world.hold(training=4)
    Stage(world, Phase.UNMASK, **{**again, "training": 4})


def test_patient_numbers_may_be_summed_again_when_a_site_joins_and_not_when_one_is_left_out() -> None:
    world = Consortium(6)
    encoding = Encoding(Ring.BITS_32, (), 0)
    setup = {"purpose": Purpose.SETUP, "encoding": encoding.digest, "length": 0}
    world.hold(purpose=Purpose.SETUP, encoding=encoding, vector=np.empty(0, np.float32), scalars={})
    Stage(world, Phase.UNMASK, cohort=(1, 2, 3, 4, 5), threshold=4, **setup)
    assert refused(world, round=2, cohort=(1, 2, 3, 4), threshold=3, **setup) == Reason.COHORT_SHRANK
    Stage(world, Phase.UNMASK, round=2, cohort=(1, 2, 3, 4, 5, 6), threshold=5, **setup)


def test_a_weight_above_the_one_given_before_is_refused_until_the_next_roster_epoch(tmp_path: Path) -> None:
    world = Consortium(5, folder=tmp_path)
    world.ask(1, ADVERTISE, world.announcement())  # weight 10
    world.held[1] = replace(world.held[1], weight=11)
    world.start(1)
    assert refused(world, round=2) == Reason.WEIGHT_ROSE
    world.held[1] = replace(world.held[1], weight=9)
    world.start(1)
    world.ask(1, ADVERTISE, world.announcement(round=2))
    world.held[1] = replace(world.held[1], weight=11)
    later = make_roster("lungs", 2, world.roster.members, minimum_cohort=3)
    world.start(1, roster=later)
    world.ask(1, ADVERTISE, world.announcement(round=3, roster=later.digest))


def test_patient_numbers_are_counted_anew_with_another_roster() -> None:
    world = Consortium(5)
    encoding = Encoding(Ring.BITS_32, (), 0)
    setup = {"purpose": Purpose.SETUP, "encoding": encoding.digest, "length": 0}
    world.hold(purpose=Purpose.SETUP, encoding=encoding, vector=np.empty(0, np.float32), scalars={})
    Stage(world, Phase.UNMASK, **setup)
    fewer = {"round": 2, "cohort": (1, 2, 3, 4), "threshold": 3}
    assert refused(world, **fewer, **setup) == Reason.COHORT_SHRANK
    later = make_roster("lungs", 2, world.roster.members[:4], minimum_cohort=3)
    world.start(1, roster=later)
    world.ask(1, ADVERTISE, world.announcement(roster=later.digest, **fewer, **setup))


def test_the_weight_of_an_evaluation_is_no_ceiling_and_has_none() -> None:
    world = Consortium(5)
    world.sites[1].hold(replace(world.held[1], purpose=Purpose.EVALUATE, weight=1))
    world.ask(1, ADVERTISE, world.announcement(purpose=Purpose.EVALUATE))
    world.ask(1, ADVERTISE, world.announcement())  # weight 10
    world.sites[1].hold(replace(world.held[1], purpose=Purpose.EVALUATE, weight=50))
    world.ask(1, ADVERTISE, world.announcement(purpose=Purpose.EVALUATE, round=2))


def test_purposes_have_rounds_of_their_own() -> None:
    world = Consortium(5)
    Stage(world, Phase.UNMASK, round=7)
    world.hold(purpose=Purpose.EVALUATE)
    Stage(world, Phase.UNMASK, round=1, purpose=Purpose.EVALUATE)


def test_a_key_that_is_not_the_rosters_is_refused_at_the_start() -> None:
    world = Consortium(3)
    with pytest.raises(ConfigError, match="does not have this site's key"):
        Enrolment(1, world.keys[2], world.roster)
    with pytest.raises(ConfigError, match="does not have this site's key"):
        Enrolment(9, world.keys[2], world.roster)


def test_no_phase_but_the_first_is_answered_before_an_announcement() -> None:
    stage = Stage(Consortium(3), Phase.UNMASK)
    fresh = Consortium(3)
    messages = (stage.key_list, stage.deliveries[1], stage.survivor_list, stage.confirmation_list)
    for phase, message in zip(PHASES[1:], messages, strict=True):
        with pytest.raises(ProtocolError) as refusal:
            fresh.ask(1, phase, message)
        assert refusal.value.reason == Reason.OUT_OF_ORDER
