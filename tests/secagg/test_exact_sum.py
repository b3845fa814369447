"""The sum is exact, whoever drops out; where too many do, there is none."""

import numpy as np
import pytest
from secagg_world import MODEL, PHASES, STUDY, Consortium

from medfl.client.secagg.contribution import Contribution
from medfl.server.secagg.outcome import SumPlan, SumVoid
from medfl.server.secagg.round import SecureRound
from medfl.server.secagg.store import MemoryStore
from medfl.shared.errors import ConfigError
from medfl.shared.secagg.announcement import Purpose
from medfl.shared.secagg.encoding import Encoding
from medfl.shared.secagg.exchange import Phase
from medfl.shared.secagg.limits import threshold_of
from medfl.shared.secagg.rings import Ring


@pytest.mark.parametrize("ring", list(Ring))
@pytest.mark.parametrize("n", [3, 4, 5, 10])
def test_the_sum_is_exact_with_as_many_drop_outs_as_the_threshold_allows_in_any_phase(n: int, ring: Ring) -> None:
    for phase in PHASES:
        rng = np.random.default_rng([n, ring, PHASES.index(phase)])
        world = Consortium(n, ring=ring, length=int(rng.integers(1, 300)), seed=n)
        gone = rng.choice(world.ids, n - threshold_of(n), replace=False).tolist()
        result = world.round().run(world.exchange(lose=dict.fromkeys(gone, phase), after=bool(rng.integers(2))))
        world.check(result)
        confirmed = phase in (Phase.CONFIRM_SURVIVORS, Phase.UNMASK)
        assert result.survivors == tuple(s for s in world.ids if confirmed or s not in gone)


@pytest.mark.parametrize("ring", [Ring.BITS_16, Ring.BITS_32])
def test_the_sum_of_33_sites_is_exact_with_ten_drop_outs_spread_over_all_phases(ring: Ring) -> None:
    world = Consortium(33, ring=ring, length=70_001)  # more than one block of the mask generator
    lose = {site: PHASES[site % 5] for site in range(1, 33 - threshold_of(33) + 1)}
    result = world.round().run(world.exchange(lose=lose))
    world.check(result)
    assert len(result.survivors) == 33 - 6  # two left in each phase; those of the last two phases are in the sum


@pytest.mark.parametrize("phase", PHASES)
def test_one_drop_out_too_many_means_no_sum(phase: Phase) -> None:
    world = Consortium(10, minimum=8)  # threshold 7; a shrunk cohort of less than 8 is not tried
    with pytest.raises(SumVoid) as void:
        world.round().run(world.exchange(lose=dict.fromkeys((1, 2, 3, 4), phase)))
    assert void.value.confirmed == (phase in (Phase.CONFIRM_SURVIVORS, Phase.UNMASK))
    assert {void.value.refusals[site].reason for site in (1, 2, 3, 4)} == {"no answer"}


def test_an_attempt_that_fails_is_repeated_with_the_sites_that_are_left_and_their_updates() -> None:
    world = Consortium(10)
    result = world.round().run(world.exchange(lose=dict.fromkeys((1, 2, 3, 4), Phase.SHARE_KEYS)))
    assert (result.attempts, result.survivors) == (2, (5, 6, 7, 8, 9, 10))
    world.check(result)


def test_a_site_that_is_slow_once_is_asked_again_where_the_cohort_needs_it() -> None:
    world, slow = Consortium(3), [True]
    exchange = world.exchange(
        request=lambda phase, site, control: None if site == 2 and slow and slow.pop() else control
    )
    result = world.round().run(exchange)
    assert (result.attempts, result.survivors) == (2, (1, 2, 3))


@pytest.mark.parametrize("n", [1, 2])
def test_one_or_two_sites_are_never_summed(n: int) -> None:
    world = Consortium(5)
    with pytest.raises(ConfigError, match="3 to 128 sites"):
        world.round(cohort=world.ids[:n])


def test_a_site_that_is_not_in_the_roster_is_never_summed() -> None:
    with pytest.raises(ConfigError, match="1 of them unknown"):
        Consortium(5).round(cohort=(1, 2, 3, 77))


def test_patient_numbers_alone_are_summed_without_a_vector() -> None:
    world = Consortium(4)
    encoding = Encoding(Ring.BITS_32, (), 0)
    for site, weight in zip(world.ids, (120, 80, 200, 50), strict=True):
        world.sites[site].hold(Contribution(STUDY, Purpose.SETUP, MODEL, encoding, weight))
    plan = SumPlan(STUDY, Purpose.SETUP, world.ids, encoding, MODEL)
    result = SecureRound(plan, roster=world.roster, store=MemoryStore()).run(world.exchange())
    assert (result.weight, result.mean.size) == (450.0, 0)


def test_the_mean_is_weighted_by_patients() -> None:
    world = Consortium(3, length=2, scalars=())  # weights 10, 20, 30
    for site, value in zip(world.ids, (0.6, 0.3, -0.2), strict=True):
        world.sites[site].hold(Contribution(
            STUDY, Purpose.TRAIN, MODEL, world.encoding, 10 * site, np.array([value, 2.0], np.float32)
        ))  # fmt: skip
    result = world.round().run(world.exchange())
    # (10 * 0.6 + 20 * 0.3 - 30 * 0.2) / 60 = 0.1; the second value is clipped to 1 at each of the three sites
    assert result.mean.tolist() == pytest.approx([0.1, 1.0], abs=1e-7)
    assert result.clipped == 3


def test_site_ids_may_be_any_two_bytes() -> None:
    world = Consortium(ids=(1, 300, 65533, 65534))
    world.check(world.round().run(world.exchange(lose={300: Phase.MASKED_INPUT})))


def test_two_threads_give_the_same_sum_as_one() -> None:
    world = Consortium(3, length=2_500_000)  # 10 MB: large enough to be split
    for site in world.ids:
        world.sites[site]._threads = 2
    world.check(world.round().run(world.exchange()))
