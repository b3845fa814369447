"""A site signs one list of survivors: with itself on it, long enough, of sites whose shares it holds."""

import pytest
from secagg_world import Consortium, Stage

from medfl.client.secagg.enrolment import Rules
from medfl.shared.errors import PolicyRefusal, ProtocolError
from medfl.shared.secagg.exchange import Phase
from medfl.shared.secagg.messages import ShareDelivery, SurvivorList
from medfl.shared.secagg.reasons import Reason

CONFIRM = Phase.CONFIRM_SURVIVORS


def refused(stage: Stage, *survivors: int, site: int = 1) -> str:
    with pytest.raises((PolicyRefusal, ProtocolError)) as refusal:
        stage.world.ask(site, CONFIRM, SurvivorList(stage.context, survivors))
    return refusal.value.reason


def test_the_reply_has_66_bytes() -> None:
    stage = Stage(Consortium(5), Phase.MASKED_INPUT)
    assert len(stage.world.ask(1, CONFIRM, stage.survivor_list).control) == 66


def test_nothing_is_confirmed_before_the_masked_input_has_left() -> None:
    assert refused(Stage(Consortium(5), Phase.SHARE_KEYS), 1, 2, 3, 4, 5) == Reason.OUT_OF_ORDER


def test_survivors_without_this_site_are_refused() -> None:
    assert refused(Stage(Consortium(5), Phase.MASKED_INPUT), 2, 3, 4, 5) == Reason.BAD_SURVIVORS


def test_survivors_below_the_threshold_are_refused() -> None:
    stage = Stage(Consortium(10), Phase.MASKED_INPUT)  # threshold 7
    assert refused(stage, 1, 2, 3, 4, 5, 6) == Reason.COHORT_TOO_SMALL


def test_survivors_below_the_sites_minimum_are_refused() -> None:
    stage = Stage(Consortium(10, rules=Rules(minimum_cohort=10)), Phase.MASKED_INPUT)
    assert refused(stage, 1, 2, 3, 4, 5, 6, 7, 8, 9) == Reason.COHORT_TOO_SMALL


def test_survivors_whose_shares_are_not_here_are_refused() -> None:
    stage = Stage(Consortium(5), Phase.SHARE_KEYS)
    without_five = ShareDelivery(stage.context, stage.deliveries[1].sealed[:-1])
    stage.world.ask(1, Phase.MASKED_INPUT, without_five)
    assert refused(stage, 1, 2, 3, 4, 5) == Reason.BAD_SURVIVORS


def test_a_second_list_is_refused_and_the_first_gets_the_same_bytes_again() -> None:
    stage = Stage(Consortium(5), Phase.MASKED_INPUT)
    first = stage.world.ask(1, CONFIRM, stage.survivor_list)
    assert refused(stage, 1, 2, 3, 4) == Reason.BAD_SURVIVORS
    assert stage.world.ask(1, CONFIRM, stage.survivor_list) == first


def test_a_second_list_is_refused_after_the_reveal_too() -> None:
    stage = Stage(Consortium(5), Phase.UNMASK)
    assert refused(stage, 1, 2, 3, 4) == Reason.BAD_SURVIVORS
    assert stage.world.ask(1, CONFIRM, stage.survivor_list).control == stage.confirmations[1].to_bytes()


def test_a_round_that_is_no_longer_open_is_not_confirmed() -> None:
    stage = Stage(Consortium(5), Phase.MASKED_INPUT)
    stage.world.ask(1, Phase.ADVERTISE_KEYS, stage.world.announcement(attempt=1))
    assert refused(stage, 1, 2, 3, 4, 5) == Reason.OUT_OF_ORDER
