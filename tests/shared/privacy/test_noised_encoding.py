"""Room for client-level noise beside numbers worked out by hand, and what becomes of it in a sum."""

from __future__ import annotations

import numpy as np
import pytest

from medfl.client.privacy.randomness import SecureGenerator
from medfl.client.privacy.site_noise import clipped_and_noised
from medfl.shared.errors import ConfigError, ProtocolError
from medfl.shared.privacy.adaptive_clip import number_within
from medfl.shared.privacy.noised_encoding import check_room_for_noise, clip_with_noise, share_of_noise, suits
from medfl.shared.privacy.settings import AdaptiveClip, ClientLevel
from medfl.shared.secagg.encoding import CLIPPED, Encoding, Segment, decode_mean, decode_scalars, encode
from medfl.shared.secagg.rings import Ring


def level(noise_multiplier: float = 3**0.5, **changes: object) -> ClientLevel:
    return ClientLevel.model_validate(
        {"mode": "client-level", "epsilon": 50, "clip_norm": 2.0, "noise_multiplier": noise_multiplier, **changes}
    )


def encoding(clip: float, *, ring: Ring = Ring.BITS_32, sites: int = 9, names: tuple[str, ...] = ()) -> Encoding:
    return Encoding(ring, (Segment(10, 2 * clip), Segment(20_000, clip)), sites, names)


def test_a_share_is_the_noise_over_the_root_of_the_sites() -> None:
    assert share_of_noise(3.0, 2.0, 9) == 2.0


@pytest.mark.parametrize(
    ("noise", "clip", "survivors"), [(0.0, 1.0, 3), (1.0, 0.0, 3), (1.0, 1.0, 0), (np.nan, 1.0, 3)]
)
def test_noise_that_is_none_is_refused(noise: float, clip: float, survivors: int) -> None:
    with pytest.raises(ConfigError, match="set them under privacy"):
        share_of_noise(noise, clip, survivors)


def test_an_encoding_needs_room_for_the_clip_and_eight_shares_of_three_sites() -> None:
    # a share is sqrt(3) * 2 / sqrt(3) = 2, and 2 + 8 * 2 = 18
    assert clip_with_noise(2.0, level()) == pytest.approx(18.0)
    check_room_for_noise(encoding(18.001), level())
    with pytest.raises(ProtocolError, match=r"would cut updates at 17\.9, and with their noise they need 18"):
        check_room_for_noise(encoding(17.9), level())


def test_the_room_is_that_of_the_rounds_clip_where_it_follows_the_updates() -> None:
    adaptive = level(adaptive_clip=AdaptiveClip())
    check_room_for_noise(encoding(9.001, names=(number_within(1.0),)), adaptive)
    with pytest.raises(ProtocolError, match="need 36"):
        check_room_for_noise(encoding(18.001, names=(number_within(4.0),)), adaptive)
    with pytest.raises(ProtocolError, match="names no clip"):
        check_room_for_noise(encoding(18.001), adaptive)


@pytest.mark.parametrize("changes", [{"sites": 10**9}, {"ring": Ring.BITS_16}, {"clip": 1e9}])
def test_a_grid_that_is_coarse_beside_one_share_is_refused(changes: dict[str, object]) -> None:
    # in 16 bits: 2 * 18 * 9 / 2^15 = 0.0099, and a hundredth of 2 * sqrt(3) / sqrt(128) is 0.0031
    with pytest.raises(ProtocolError, match="so coarsely"):
        check_room_for_noise(encoding(**{"clip": 18.001, **changes}), level())  # type: ignore[arg-type]


@pytest.mark.parametrize(("ring", "fine"), [(16, False), (20, False), (24, True), (32, True)])
@pytest.mark.parametrize("noise_multiplier", [0.1, 1.0, 10.0])
def test_rings_of_24_bits_and_more_are_fine_enough_for_128_sites(
    ring: int, fine: bool, noise_multiplier: float
) -> None:
    # multiplier 1, in clips: 128 * (1 + 8 / sqrt(3)) / 2^19 = 0.0014 against 0.01 / sqrt(128) = 0.0009, in 20 bits
    assert suits(Ring(ring), level(noise_multiplier)) is fine


@pytest.mark.parametrize("noise_multiplier", [1.0, 30.0])
@pytest.mark.parametrize("ring", [Ring.BITS_24, Ring.BITS_32])
def test_the_sum_has_all_of_the_noise_and_nothing_was_cut(ring: Ring, noise_multiplier: float) -> None:
    # standard error of 20,000 draws: 0.5 %; one site has the largest update there is, in one value
    settings, generator = level(noise_multiplier), SecureGenerator()
    clip = settings.clip_norm
    chosen = Encoding(ring, (Segment(20_000, clip_with_noise(clip, settings)),), 4)
    check_room_for_noise(chosen, settings)
    update = np.zeros(20_000, np.float32)
    update[0] = clip
    total, scalars = np.zeros(20_000, np.uint32), np.zeros(2, np.uint64)
    for _ in range(3):
        noised = clipped_and_noised(
            update, clip_norm=clip, noise_multiplier=noise_multiplier, survivors=3, generator=generator
        )
        encoded = encode(noised, chosen, weight=1, scalars={})
        total += encoded.vector
        scalars += encoded.scalars
    summed = 3 * decode_mean(total, chosen, weight=3, terms=3)
    assert summed[1:].std() == pytest.approx(noise_multiplier * clip, rel=0.025)
    assert decode_scalars(scalars, chosen)[CLIPPED] == 0
