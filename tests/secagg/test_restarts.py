"""Sites and the coordinator are killed between any two messages; what can be finished is finished, exactly."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from secagg_world import PHASES, STUDY, Consortium

from medfl.client.secagg.contribution import Contribution
from medfl.server.secagg.finish import finish
from medfl.server.secagg.outcome import SumVoid
from medfl.server.secagg.store import FolderStore
from medfl.shared.errors import PolicyRefusal
from medfl.shared.secagg.announcement import Purpose
from medfl.shared.secagg.encoding import Encoding
from medfl.shared.secagg.exchange import Phase
from medfl.shared.secagg.rings import Ring

LATE = PHASES[2:]  # from the masked input on, a site's journal knows how to go on


class Killed(Exception):
    """The coordinator's process ends here."""


@pytest.mark.parametrize("phase", PHASES)
def test_a_site_that_restarts_after_its_masked_input_is_no_drop_out_and_one_before_it_is_asked_again(
    tmp_path: Path, phase: Phase
) -> None:
    world = Consortium(3, folder=tmp_path)  # threshold 3: no drop-out is bearable
    restarted: set[int] = set()

    def restart_after(reached: Phase, site: int, reply: Any) -> Any:
        if reached is phase and site not in restarted:
            restarted.add(site)
            world.start(site)
        return reply

    result = world.round().run(world.exchange(reply=restart_after))
    assert restarted == {1, 2, 3}
    world.check(result)
    assert (result.survivors, result.attempts) == ((1, 2, 3), 1 if phase in LATE else 2)


@pytest.mark.parametrize("phase", [Phase.CONFIRM_SURVIVORS, Phase.UNMASK])
def test_a_lost_reply_is_sent_again_byte_for_byte_also_after_a_restart(tmp_path: Path, phase: Phase) -> None:
    world = Consortium(3, folder=tmp_path)
    sent: list[Any] = []

    def lose_the_first(reached: Phase, site: int, reply: Any) -> Any:
        if reached is phase and site == 2:
            sent.append(reply.control)
            world.start(2)
            return None if len(sent) == 1 else reply
        return reply

    world.check(world.round().run(world.exchange(reply=lose_the_first)))
    assert len(sent) == 2
    assert sent[0] == sent[1]


@pytest.mark.parametrize("before_reply", [1, 2, 3, 4])
@pytest.mark.parametrize("phase", PHASES)
def test_a_coordinator_killed_between_any_two_messages_gets_the_exact_sum_after_its_restart(
    tmp_path: Path, phase: Phase, before_reply: int
) -> None:
    world = Consortium(4, folder=tmp_path)
    count = 0

    def kill(reached: Phase, site: int, reply: Any) -> Any:
        nonlocal count
        count += reached is phase
        if reached is phase and count == before_reply:
            raise Killed
        return reply

    with pytest.raises(Killed):
        world.round(FolderStore(tmp_path / "coordinator")).run(world.exchange(reply=kill))
    for site in world.ids:  # everybody restarts at once
        world.start(site)
    store = FolderStore(tmp_path / "coordinator")
    pending = store.pending(STUDY)
    assert (pending is not None) == (phase in (Phase.CONFIRM_SURVIVORS, Phase.UNMASK))
    if pending is None:
        result = world.round(store).run(world.exchange())
    else:
        result = finish(pending, roster=world.roster, exchange=world.exchange(), threads=1)
    world.check(result)
    assert result.survivors == world.ids


def test_a_coordinator_killed_before_its_checkpoint_gets_the_same_sum_again(tmp_path: Path) -> None:
    world = Consortium(4, folder=tmp_path)
    first = world.round(FolderStore(tmp_path / "coordinator")).run(world.exchange())
    pending = FolderStore(tmp_path / "coordinator").pending(STUDY)
    assert pending is not None
    again = finish(pending, roster=world.roster, exchange=world.exchange(), threads=1)
    assert np.array_equal(first.mean, again.mean)


def test_a_coordinator_killed_while_scores_are_summed_still_gets_the_sum_of_the_updates(tmp_path: Path) -> None:
    world = Consortium(4, folder=tmp_path)
    store = FolderStore(tmp_path / "coordinator")
    first = world.round(store).run(world.exchange())
    scores = Encoding(Ring.BITS_32, (), 0, ("loss",))
    for site in world.ids:
        world.sites[site].hold(
            Contribution(STUDY, Purpose.EVALUATE, b"n" * 32, scores, 1, scalars={"loss": float(site)})
        )
    result = world.round(store, purpose=Purpose.EVALUATE, model=b"n" * 32, encoding=scores).run(world.exchange())
    assert result.scalars == {"loss": 10.0}  # 1 + 2 + 3 + 4
    for site in world.ids:
        world.start(site)
    pending = FolderStore(tmp_path / "coordinator").pending(STUDY)
    assert pending is not None
    again = finish(pending, roster=world.roster, exchange=world.exchange(), threads=1)
    assert np.array_equal(first.mean, again.mean)


def test_a_void_sum_can_be_finished_later_or_repeated_with_the_same_sites(tmp_path: Path) -> None:
    world = Consortium(4, folder=tmp_path)
    store = FolderStore(tmp_path / "coordinator")
    with pytest.raises(SumVoid) as void:
        world.round(store).run(world.exchange(lose=dict.fromkeys((1, 2), Phase.UNMASK)))
    assert (void.value.confirmed, void.value.survivors) == (True, (1, 2, 3, 4))
    pending = store.pending(STUDY)
    assert pending is not None
    world.check(finish(pending, roster=world.roster, exchange=world.exchange(), threads=1))
    repeated = world.round(store, cohort=void.value.survivors).run(world.exchange())
    world.check(repeated)


def test_a_void_sum_is_not_repeated_with_fewer_sites(tmp_path: Path) -> None:
    world = Consortium(5, folder=tmp_path)
    store = FolderStore(tmp_path / "coordinator")
    with pytest.raises(SumVoid):
        world.round(store).run(world.exchange(lose=dict.fromkeys((1, 2), Phase.UNMASK)))
    with pytest.raises(SumVoid) as void:
        world.round(store, cohort=(2, 3, 4, 5)).run(world.exchange())
    assert {refusal.reason for refusal in void.value.refusals.values()} == {"cohort shrank since the last sum"}


def test_the_round_number_is_on_disk_before_the_first_site_is_asked(tmp_path: Path) -> None:
    world = Consortium(3)

    def never(*_: Any) -> Iterator[Any]:
        raise Killed

    for expected in (2, 3):
        with pytest.raises(Killed):
            world.round(FolderStore(tmp_path)).run(never)
        rounds = (tmp_path / STUDY.hex() / "rounds.json").read_text()
        assert rounds == f'{{"1": {expected - 1}}}'


def test_the_journal_is_written_before_the_confirmation_leaves(tmp_path: Path) -> None:
    world = Consortium(3, folder=tmp_path)

    def look(phase: Phase, site: int, reply: Any) -> Any:
        if phase is Phase.CONFIRM_SURVIVORS:
            world.start(site)  # knows only what is on disk
            with pytest.raises(PolicyRefusal, match="answered before"):
                world.ask(site, Phase.ADVERTISE_KEYS, world.announcement(attempt=1))
        return reply

    world.check(world.round().run(world.exchange(reply=look)))


def ahead(world: Consortium, sites: tuple[int, ...], number: int) -> None:
    """These sites have answered an announcement of that number."""
    for site in sites:
        world.ask(site, Phase.ADVERTISE_KEYS, world.announcement(round=number))


def test_a_coordinator_that_counts_from_an_old_backup_goes_far_ahead_and_has_all_in_the_sum() -> None:
    world = Consortium(7)
    ahead(world, world.ids, 200)
    result = world.round().run(world.exchange())
    world.check(result)
    assert result.survivors == world.ids  # 1 is refused, so is 1 + 16; 17 + 256 is beyond what they have seen


def test_a_few_sites_that_call_every_number_old_are_left_out_and_hold_up_nobody() -> None:
    world = Consortium(7)  # 5 of 7 are needed; without these three, 4 of 4 sum
    ahead(world, (5, 6, 7), 2**31)
    result = world.round().run(world.exchange())
    world.check(result)
    assert (result.attempts, result.survivors) == (2, (1, 2, 3, 4))
