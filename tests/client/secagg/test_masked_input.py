"""What a site checks of the shares it is sent, and that only then its vector leaves, masked."""

from dataclasses import replace

import numpy as np
import pytest
from secagg_world import STUDY, Consortium, Stage

from medfl.client.secagg.enrolment import Rules
from medfl.shared.errors import PolicyRefusal, ProtocolError, TrainingError
from medfl.shared.secagg.exchange import Phase, PhaseRequest
from medfl.shared.secagg.masks import self_mask
from medfl.shared.secagg.messages import KeyList, SealedShares, ShareDelivery, SurvivorList
from medfl.shared.secagg.prg import add_masks, add_scalar_masks
from medfl.shared.secagg.reasons import Reason
from medfl.shared.secagg.shamir import join, weights_at_zero

MASK = Phase.MASKED_INPUT


def refused(stage: Stage, delivery: ShareDelivery, site: int = 1) -> str:
    with pytest.raises((PolicyRefusal, ProtocolError)) as refusal:
        stage.world.ask(site, MASK, delivery)
    return refusal.value.reason


@pytest.mark.parametrize("byte", [0, 33, 65, 81])  # both shares and the authentication tag
def test_a_flipped_bit_of_a_share_is_refused(byte: int) -> None:
    stage = Stage(Consortium(5), Phase.SHARE_KEYS)
    (sender, sealed), *rest = stage.deliveries[1].sealed
    bad = sealed[:byte] + bytes([sealed[byte] ^ 1]) + sealed[byte + 1 :]
    assert refused(stage, replace(stage.deliveries[1], sealed=((sender, bad), *rest))) == Reason.BAD_SHARES


def test_shares_that_a_site_made_for_another_key_list_are_refused() -> None:
    stage = Stage(Consortium(7), Phase.ADVERTISE_KEYS)  # threshold 5
    stage.world.ask(1, Phase.SHARE_KEYS, stage.key_list)
    shorter = KeyList(stage.context, stage.key_list.adverts[:-1])
    shares = {s: SealedShares.parse(stage.world.ask(s, Phase.SHARE_KEYS, shorter).control) for s in (2, 3, 4, 5, 6)}
    delivery = ShareDelivery(stage.context, tuple((s, dict(message.sealed)[1]) for s, message in shares.items()))
    assert refused(stage, delivery) == Reason.BAD_SHARES


def test_shares_under_a_wrong_sender_are_refused() -> None:
    stage = Stage(Consortium(5), Phase.SHARE_KEYS)
    (two, of_two), (three, of_three), *rest = stage.deliveries[1].sealed
    swapped = replace(stage.deliveries[1], sealed=((two, of_three), (three, of_two), *rest))
    assert refused(stage, swapped) == Reason.BAD_SHARES


def test_shares_of_a_stranger_are_refused() -> None:
    stage = Stage(Consortium(5), Phase.SHARE_KEYS)
    more = replace(stage.deliveries[1], sealed=(*stage.deliveries[1].sealed, (9, bytes(82))))
    assert refused(stage, more) == Reason.BAD_SHARES


def test_fewer_sharers_than_the_threshold_are_refused() -> None:
    stage = Stage(Consortium(10), Phase.SHARE_KEYS)  # threshold 7, itself included
    few = replace(stage.deliveries[1], sealed=stage.deliveries[1].sealed[:5])
    assert refused(stage, few) == Reason.COHORT_TOO_SMALL


def test_fewer_sharers_than_the_sites_minimum_are_refused() -> None:
    stage = Stage(Consortium(10, rules=Rules(minimum_cohort=10)), Phase.SHARE_KEYS)
    few = replace(stage.deliveries[1], sealed=stage.deliveries[1].sealed[:8])
    assert refused(stage, few) == Reason.COHORT_TOO_SMALL


def test_an_update_that_is_not_finite_never_leaves() -> None:
    world = Consortium(5)
    vector = world.held[1].vector.copy()
    vector[7] = np.nan
    world.sites[1].hold(replace(world.held[1], vector=vector))
    stage = Stage(world, Phase.SHARE_KEYS)
    with pytest.raises(TrainingError, match="not finite"):
        world.ask(1, MASK, stage.deliveries[1])


def test_masks_are_applied_once() -> None:
    stage = Stage(Consortium(5), Phase.MASKED_INPUT)
    assert refused(stage, stage.deliveries[1]) == Reason.OUT_OF_ORDER


def test_neither_the_vector_nor_a_number_leaves_in_clear() -> None:
    world = Consortium(3, length=1000)
    stage = Stage(world, Phase.MASKED_INPUT)
    plain, masked = world.held[1].encode(), stage.masked[1]
    assert masked.vector is not None
    assert masked.scalars is not None
    # 1000 random words of 32 bits agree with given ones in one place with probability 2e-7
    assert not (plain.vector == masked.vector).any()
    assert not (plain.scalars == masked.scalars).any()


def test_the_held_update_is_not_changed_so_that_another_attempt_can_use_it() -> None:
    world = Consortium(3)
    before = world.held[1].vector.copy()
    Stage(world, Phase.MASKED_INPUT)
    assert np.array_equal(world.held[1].vector, before)


def test_every_masking_looks_different() -> None:
    world = Consortium(3, length=1000)
    first, second = Stage(world, Phase.MASKED_INPUT), Stage(world, Phase.MASKED_INPUT, attempt=1)
    assert not (first.masked[1].vector == second.masked[1].vector).any()


def test_the_site_is_asked_for_permission_just_before_its_masked_numbers_leave_and_not_after() -> None:
    world = Consortium(3)
    stage = Stage(world, Phase.SHARE_KEYS)
    asked: list[bytes] = []

    def deny(study: bytes) -> None:
        asked.append(study)
        raise PolicyRefusal("not at this hour", reason="outside hours")

    request = PhaseRequest(stage.deliveries[1].to_bytes())
    with pytest.raises(PolicyRefusal, match="not at this hour"):
        world.sites[1].answer(MASK, request, permit=deny)
    assert asked == [STUDY]
    world.sites[1].answer(MASK, request, permit=asked.append)  # the refusal has changed nothing
    confirm = PhaseRequest(SurvivorList(stage.context, (1, 2, 3)).to_bytes())
    world.sites[1].answer(Phase.CONFIRM_SURVIVORS, confirm, permit=deny)
    assert asked == [STUDY, STUDY]


def test_without_its_own_mask_which_the_coordinator_opens_a_vector_still_says_nothing_alone() -> None:
    world = Consortium(3, length=1000)
    stage = Stage(world, Phase.UNMASK)
    own = []
    for site in world.ids:
        shares = [dict(stage.reveals[peer].shares)[site] for peer in world.ids]
        seed = join(weights_at_zero([peer + 1 for peer in world.ids]), shares)
        own.append(self_mask(seed, context=stage.context, site=site).inverted())
    total = np.zeros(1000, np.uint32)
    for site, mask in zip(world.ids, own, strict=True):
        masked, plain = stage.masked[site], world.held[site].encode()
        assert masked.vector is not None
        assert masked.scalars is not None
        vector, scalars = masked.vector.copy(), masked.scalars.copy()
        add_masks(vector, [mask])
        add_scalar_masks(scalars, [mask])
        assert not (vector == plain.vector).any()  # the masks of its pairs are still on it
        assert not (scalars == plain.scalars).any()
        total += vector
    assert np.array_equal(total, sum(world.held[site].encode().vector for site in world.ids))  # and gone from the sum


def test_a_study_that_is_let_go_of_leaves_nothing_to_finish_its_sum_with() -> None:
    stage = Stage(Consortium(3), Phase.MASKED_INPUT)
    site = stage.world.sites[1]
    assert site._journal.kept(stage.context) is not None
    site.release(STUDY)
    assert site._journal.kept(stage.context) is None
    with pytest.raises(ProtocolError) as refusal:
        stage.world.ask(1, Phase.CONFIRM_SURVIVORS, stage.survivor_list)
    assert refusal.value.reason == Reason.OUT_OF_ORDER
