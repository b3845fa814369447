"""What a site checks in the key list, and what it sends out."""

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from secagg_world import Consortium, Stage

from medfl.client.secagg.enrolment import Rules
from medfl.shared.errors import PolicyRefusal, ProtocolError
from medfl.shared.secagg.exchange import Phase
from medfl.shared.secagg.messages import Advert, KeyList
from medfl.shared.secagg.reasons import Reason

SHARE = Phase.SHARE_KEYS


def public() -> bytes:
    return X25519PrivateKey.generate().public_key().public_bytes_raw()


def refused(stage: Stage, *adverts: Advert, site: int = 1) -> str:
    with pytest.raises((PolicyRefusal, ProtocolError)) as refusal:
        stage.world.ask(site, SHARE, KeyList(stage.context, adverts))
    return refusal.value.reason


def signed(stage: Stage, advert: Advert, key: Ed25519PrivateKey) -> Advert:
    return replace(advert, signature=key.sign(advert.signed(stage.context)))


def test_the_reply_has_98_bytes_and_84_for_each_peer() -> None:
    stage = Stage(Consortium(5), Phase.ADVERTISE_KEYS)
    assert len(stage.world.ask(1, SHARE, stage.key_list).control) == 98 + 4 * 84


def test_a_swapped_key_is_refused() -> None:
    stage = Stage(Consortium(5), Phase.ADVERTISE_KEYS)
    ours = signed(stage, Advert(2, public(), public()), Ed25519PrivateKey.generate())
    assert refused(stage, stage.adverts[1], ours, *(stage.adverts[s] for s in (3, 4, 5))) == Reason.BAD_SIGNATURE


def test_keys_of_another_round_are_refused() -> None:
    world = Consortium(5)
    old = Stage(world, Phase.ADVERTISE_KEYS)
    new = Stage(world, Phase.ADVERTISE_KEYS, round=2)
    assert refused(new, new.adverts[1], old.adverts[2], *(new.adverts[s] for s in (3, 4, 5))) == Reason.BAD_SIGNATURE


def test_sites_that_were_told_of_different_models_do_not_go_on() -> None:
    world = Consortium(5)
    world.sites[3].hold(replace(world.held[3], model=b"x" * 32))
    others = {s: Advert.parse(world.ask(s, Phase.ADVERTISE_KEYS, world.announcement()).control) for s in (1, 2, 4, 5)}
    told = world.announcement(model=b"x" * 32)
    third = Advert.parse(world.ask(3, Phase.ADVERTISE_KEYS, told).control)
    adverts = tuple(sorted((*others.values(), third), key=lambda advert: advert.site))
    for site, context in ((1, world.announcement().context()), (3, told.context())):
        with pytest.raises(ProtocolError, match="is not signed with its key"):
            world.ask(site, SHARE, KeyList(context, adverts))


def test_a_phantom_that_signs_with_a_site_of_the_rosters_key_is_still_outside_the_cohort() -> None:
    stage = Stage(Consortium(6), Phase.ADVERTISE_KEYS, cohort=(1, 2, 3, 4, 5), threshold=4)
    sixth = signed(stage, Advert(6, public(), public()), stage.world.keys[6])
    assert refused(stage, *stage.key_list.adverts, sixth) == Reason.BAD_KEYS


def test_altered_own_keys_are_refused() -> None:
    stage = Stage(Consortium(5), Phase.ADVERTISE_KEYS)
    own = signed(stage, Advert(1, public(), public()), stage.world.keys[1])
    assert refused(stage, own, *stage.key_list.adverts[1:]) == Reason.BAD_KEYS
    assert refused(stage, *stage.key_list.adverts[1:]) == Reason.BAD_KEYS


def test_one_key_twice_is_refused() -> None:
    stage = Stage(Consortium(5), Phase.ADVERTISE_KEYS)
    twin = signed(stage, replace(stage.adverts[2], mask_key=stage.adverts[3].mask_key), stage.world.keys[2])
    assert refused(stage, stage.adverts[1], twin, *stage.key_list.adverts[2:]) == Reason.BAD_KEYS


def test_a_key_of_low_order_is_refused() -> None:
    stage = Stage(Consortium(5), Phase.ADVERTISE_KEYS)
    zero = signed(stage, replace(stage.adverts[2], channel_key=bytes(32)), stage.world.keys[2])
    assert refused(stage, stage.adverts[1], zero, *stage.key_list.adverts[2:]) == Reason.BAD_KEYS


def test_fewer_sites_than_the_threshold_are_refused() -> None:
    stage = Stage(Consortium(10), Phase.ADVERTISE_KEYS)  # threshold 7
    assert refused(stage, *stage.key_list.adverts[:6]) == Reason.COHORT_TOO_SMALL


def test_fewer_sites_than_the_sites_minimum_are_refused() -> None:
    stage = Stage(Consortium(10, rules=Rules(minimum_cohort=10)), Phase.ADVERTISE_KEYS)
    assert refused(stage, *stage.key_list.adverts[:9]) == Reason.COHORT_TOO_SMALL


def test_a_refused_key_list_changes_nothing_and_the_honest_one_is_answered_once() -> None:
    stage = Stage(Consortium(5), Phase.ADVERTISE_KEYS)
    refused(stage, *stage.key_list.adverts[1:])
    stage.world.ask(1, SHARE, stage.key_list)
    assert refused(stage, *stage.key_list.adverts) == Reason.OUT_OF_ORDER  # else a second nonce-zero message a key
