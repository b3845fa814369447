"""A masked vector looks like noise, byte for byte, and the test would see a mask with one value missing."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chi2
from secagg_world import Consortium, Stage

from medfl.shared.secagg.exchange import Phase
from medfl.shared.secagg.rings import Ring


def looks_uniform(data: bytes) -> bool:
    """Chi-squared over 256 byte values, two-sided, wrong once in 500 million times."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    statistic = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
    return bool(chi2.ppf(1e-9, 255) < statistic < chi2.isf(1e-9, 255))


@pytest.mark.parametrize("ring", list(Ring))
def test_a_masked_vector_of_zeros_is_uniform(ring: Ring) -> None:
    world = Consortium(3, ring=ring, length=200_000)
    for site in world.ids:
        world.sites[site].hold(replace(world.held[site], vector=np.zeros(200_000, np.float32)))
    masked = Stage(world, Phase.MASKED_INPUT).masked[1]
    assert masked.vector is not None
    wire = masked.vector.tobytes()
    assert looks_uniform(wire)
    assert not looks_uniform(wire.replace(b"\xff", b"\xfe"))  # one value missing
    assert not looks_uniform(wire[:100_000] * (len(wire) // 100_000))  # a key stream used again


def test_masked_scalars_are_uniform() -> None:
    world = Consortium(3, length=1, scalars=tuple(f"count-{i}" for i in range(9_998)))
    masked = Stage(world, Phase.MASKED_INPUT).masked[1]
    assert masked.scalars is not None
    assert masked.scalars.size == 10_000
    assert looks_uniform(masked.scalars.tobytes())


def test_vector_and_scalars_do_not_share_a_key_stream() -> None:
    world = Consortium(3, length=20_000, scalars=tuple(f"count-{i}" for i in range(9_998)))
    for site in world.ids:
        zeros = dict.fromkeys(world.encoding.scalars, 0.0)
        world.sites[site].hold(replace(world.held[site], vector=np.zeros(20_000, np.float32), scalars=zeros))
    masked = Stage(world, Phase.MASKED_INPUT).masked[1]
    assert masked.vector is not None
    assert masked.scalars is not None
    assert not (masked.vector.view(np.uint64) == masked.scalars).any()
