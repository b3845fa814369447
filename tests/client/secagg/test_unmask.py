"""A site reveals one share for each sharer, only when enough sites confirm the same survivors, and never another."""

from dataclasses import replace

import pytest
from secagg_world import Consortium, Stage

from medfl.shared.errors import PolicyRefusal, ProtocolError
from medfl.shared.secagg.exchange import Phase
from medfl.shared.secagg.messages import Confirmation, ConfirmationList, Reveal, SurvivorList
from medfl.shared.secagg.reasons import Reason

REVEAL = Phase.UNMASK


def refused(stage: Stage, *confirmations: Confirmation, site: int = 1) -> str:
    with pytest.raises((PolicyRefusal, ProtocolError)) as refusal:
        stage.world.ask(site, REVEAL, ConfirmationList(stage.context, confirmations))
    return refusal.value.reason


def test_the_reply_has_66_bytes_and_35_for_each_sharer() -> None:
    stage = Stage(Consortium(5), Phase.CONFIRM_SURVIVORS)
    assert len(stage.world.ask(1, REVEAL, stage.confirmation_list).control) == 66 + 5 * 35


def test_nothing_is_revealed_before_this_site_has_confirmed() -> None:
    stage = Stage(Consortium(5), Phase.MASKED_INPUT)
    others = [
        Confirmation.parse(stage.world.ask(s, Phase.CONFIRM_SURVIVORS, stage.survivor_list).control)
        for s in (2, 3, 4, 5)
    ]
    assert refused(stage, *others) == Reason.OUT_OF_ORDER


def test_fewer_confirmations_than_the_threshold_are_refused() -> None:
    stage = Stage(Consortium(10), Phase.CONFIRM_SURVIVORS)  # threshold 7
    assert refused(stage, *stage.confirmation_list.confirmations[:6]) == Reason.TOO_FEW_CONFIRMATIONS


def test_two_sets_of_survivors_get_no_share_from_either_half() -> None:
    stage = Stage(Consortium(10), Phase.MASKED_INPUT)
    without_five = SurvivorList(stage.context, (1, 2, 3, 4, 6, 7, 8, 9, 10))
    everyone = [(s, stage.survivor_list) for s in (1, 2, 3, 4, 5)]
    fewer = [(s, without_five) for s in (6, 7, 8, 9, 10)]
    confirmations = [
        Confirmation.parse(stage.world.ask(s, Phase.CONFIRM_SURVIVORS, told).control) for s, told in everyone + fewer
    ]
    assert refused(stage, *confirmations, site=1) == Reason.BAD_SIGNATURE
    assert refused(stage, *confirmations[4:], site=6) == Reason.BAD_SURVIVORS  # five confirms, yet is not on its list
    assert refused(stage, *confirmations[:5], site=1) == Reason.TOO_FEW_CONFIRMATIONS
    assert refused(stage, *confirmations[5:], site=6) == Reason.TOO_FEW_CONFIRMATIONS


def test_a_confirmation_of_another_round_is_refused() -> None:
    world = Consortium(5)
    first = Stage(world, Phase.UNMASK)
    second = Stage(world, Phase.CONFIRM_SURVIVORS, round=2)
    old = first.confirmation_list.confirmations
    assert refused(second, *second.confirmation_list.confirmations[:4], old[4]) == Reason.BAD_SIGNATURE


def test_the_seed_share_of_a_survivor_and_the_key_share_of_a_drop_out_are_revealed_and_never_both() -> None:
    stage = Stage(Consortium(5), Phase.MASKED_INPUT)
    survivors = SurvivorList(stage.context, (1, 2, 3, 4))
    masked = stage.world.sites[1]._open[stage.announcement.study, stage.announcement.purpose][1].masked
    confirmations = tuple(
        Confirmation.parse(stage.world.ask(s, Phase.CONFIRM_SURVIVORS, survivors).control) for s in (1, 2, 3, 4)
    )
    told = ConfirmationList(stage.context, confirmations)
    revealed = dict(Reveal.parse(stage.world.ask(1, REVEAL, told).control).shares)
    of_key, of_seed = ({s: pair[which] for s, pair in masked.shares.items()} for which in (0, 1))
    assert revealed == {1: of_seed[1], 2: of_seed[2], 3: of_seed[3], 4: of_seed[4], 5: of_key[5]}


def test_a_repeated_request_gets_the_same_bytes_even_with_other_valid_confirmations() -> None:
    stage = Stage(Consortium(5), Phase.UNMASK)
    fewer = replace(stage.confirmation_list, confirmations=stage.confirmation_list.confirmations[:4])
    for request in (stage.confirmation_list, fewer):
        assert stage.world.ask(1, REVEAL, request).control == stage.reveals[1].to_bytes()


def test_secrets_are_gone_after_the_reveal() -> None:
    stage = Stage(Consortium(5), Phase.UNMASK)
    state = stage.world.sites[1]._open[stage.announcement.study, stage.announcement.purpose][1]
    assert state.masked.shares == {}
    kept = stage.world.journals[1].kept(stage.context)
    assert kept is not None
    assert b'"shares": []' in kept
