"""Six attacks that work on Flower's SecAgg+ (flwr 1.41), each tried on MSA-1; the first shows that it works there."""

import base64
import hashlib
from dataclasses import replace

import numpy as np
import pytest
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from secagg_world import Consortium, Stage

from medfl.shared.errors import PolicyRefusal, ProtocolError
from medfl.shared.secagg.exchange import Phase
from medfl.shared.secagg.masks import seed_commitment
from medfl.shared.secagg.messages import Confirmation, ConfirmationList, KeyList, SealedShares, SurvivorList
from medfl.shared.secagg.prg import Mask, add_masks
from medfl.shared.secagg.shamir import join, weights_at_zero

KEY = hashlib.sha256(b"a key").digest()


def flowers_mask(key: bytes) -> list[int]:
    return pseudo_rand_gen(base64.urlsafe_b64encode(key), 1 << 32, [(8,)])[0].tolist()


def our_mask(key: bytes) -> list[int]:
    words = np.zeros(8, np.uint32)
    add_masks(words, [Mask(key)])
    return words.tolist()


def test_seed_width_two_keys_with_the_same_fold_give_the_same_mask_at_flower_and_not_here() -> None:
    # 48 bits swap places with the 48 bits 12 characters of base64 later: the XOR of the 32-bit words stays the same
    swapped = KEY[9:18] + KEY[:9] + KEY[18:]
    assert flowers_mask(swapped) == flowers_mask(KEY)
    assert our_mask(swapped) != our_mask(KEY)


def test_seed_search_finds_flowers_mask_among_32_bit_seeds_and_not_ours() -> None:
    def search(observed: list[int], around: int) -> bool:
        near = range(around - 500, around + 500)
        return any(np.random.RandomState(seed).randint(0, 2**32 - 1, 8, np.int64).tolist() == observed for seed in near)

    text = base64.urlsafe_b64encode(KEY)
    fold = int(np.bitwise_xor.reduce(np.frombuffer(text, "<u4")))
    fold_of_bytes = int(np.bitwise_xor.reduce(np.frombuffer(KEY, "<u4")))
    assert search(flowers_mask(KEY), fold)
    assert not search(our_mask(KEY), fold)
    assert not search(our_mask(KEY), fold_of_bytes)


@pytest.mark.parametrize("bit", range(0, 256, 5))
def test_seed_width_every_bit_of_the_key_changes_the_whole_mask(bit: int) -> None:
    changed = bytearray(KEY)
    changed[bit // 8] ^= 1 << bit % 8
    different = sum((a ^ b).bit_count() for a, b in zip(our_mask(KEY), our_mask(bytes(changed)), strict=True))
    assert 70 < different < 186  # 128 of 256 bits, give or take 7 standard deviations of 8


def test_active_and_dead_at_once_does_not_give_both_secrets_of_a_site() -> None:
    """At Flower the coordinator lists site 5 as active and dead, and unmasks it alone."""
    stage = Stage(Consortium(5), Phase.UNMASK)
    for site in (1, 2, 3, 4):
        with pytest.raises(ProtocolError):
            stage.world.ask(site, Phase.CONFIRM_SURVIVORS, SurvivorList(stage.context, (1, 2, 3, 4)))
    # all shares that are out open site 5's seed; there is none of its mask key
    points = [1, 2, 3, 4]
    secret = join(weights_at_zero([site + 1 for site in points]), [dict(stage.reveals[s].shares)[5] for s in points])
    assert seed_commitment(secret, context=stage.context, site=5) == stage.shares[5].commitment


def test_phantom_sites_made_up_by_the_coordinator_do_not_get_a_hospital_to_answer() -> None:
    """At Flower keys are not signed: two invented neighbours are enough to learn everything."""
    world, phantoms = Consortium(3), Consortium(ids=(7, 8))
    with pytest.raises(ProtocolError, match="outside the roster"):
        world.ask(1, Phase.ADVERTISE_KEYS, world.announcement(cohort=(1, 7, 8), threshold=3))
    stage = Stage(world, Phase.ADVERTISE_KEYS)
    for site, phantom in ((2, 7), (3, 8)):  # real names, the coordinator's keys
        unsigned = replace(stage.adverts[site], channel_key=bytes([phantom]) * 32, mask_key=bytes([phantom + 9]) * 32)
        signature = phantoms.keys[phantom].sign(unsigned.signed(stage.context))
        stage.adverts[site] = replace(unsigned, signature=signature)
    with pytest.raises(ProtocolError, match="not signed with its key"):
        world.ask(1, Phase.SHARE_KEYS, KeyList(stage.context, tuple(stage.adverts.values())))


def test_a_cohort_of_one_is_refused() -> None:
    world = Consortium(3)
    with pytest.raises(PolicyRefusal, match="1 sites would be summed"):
        world.ask(1, Phase.ADVERTISE_KEYS, world.announcement(cohort=(1,), threshold=1))


def test_a_threshold_of_one_share_is_refused() -> None:
    world = Consortium(5)
    with pytest.raises(PolicyRefusal, match="at least 4"):
        world.ask(1, Phase.ADVERTISE_KEYS, world.announcement(threshold=1))


def test_the_number_of_patients_crosses_in_no_message() -> None:
    """At Flower num_examples stands beside the masked vector."""
    world = Consortium(4, length=500)
    weight = 0xC0FFEE
    contribution = replace(world.held[1], weight=weight, encoding=replace(world.encoding, reference=1 << 30))
    for site in world.ids:
        world.held[site] = replace(world.held[site], encoding=contribution.encoding)
        world.sites[site].hold(contribution if site == 1 else world.held[site])
    world.encoding = contribution.encoding
    world.round().run(world.exchange())
    sent = [reply for _, site, reply in world.log if site == 1]
    assert len(sent) == 5
    raw = b"".join(
        reply.control + b"".join(a.tobytes() for a in (reply.vector, reply.scalars) if a is not None) for reply in sent
    )
    for form in (weight.to_bytes(3, "little"), weight.to_bytes(3, "big"), (weight << 20).to_bytes(6, "little")[2:]):
        assert form not in raw  # by chance: 3000 bytes / 2^24 for each


def test_shares_cannot_be_read_by_the_coordinator() -> None:
    """Every share crosses encrypted to its receiver: no 33 bytes of any sealed message are a share that is used."""
    stage = Stage(Consortium(5), Phase.UNMASK)
    revealed = {share for reveal in stage.reveals.values() for _, share in reveal.shares}
    sealed = b"".join(SealedShares.to_bytes(message) for message in stage.shares.values())
    assert not any(share in sealed for share in revealed)


def test_one_confirmation_repeated_does_not_count_for_many() -> None:
    stage = Stage(Consortium(5), Phase.CONFIRM_SURVIVORS)
    one = stage.confirmations[1]
    with pytest.raises(ProtocolError):
        stage.world.ask(1, Phase.UNMASK, ConfirmationList(stage.context, (one,) * 4))
    disguised = tuple(Confirmation(site, one.signature) for site in (1, 2, 3, 4))
    with pytest.raises(ProtocolError, match="not signed"):
        stage.world.ask(1, Phase.UNMASK, ConfirmationList(stage.context, disguised))
