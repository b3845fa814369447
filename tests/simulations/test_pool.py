from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from tiny import classes_study, masks_study, site_data

from medfl.client.records import MemoryRecords
from medfl.shared.errors import MedFLError
from medfl.shared.study import Study
from medfl.simulations.config import Attacker, Failures
from medfl.simulations.federation import Federation, federate
from medfl.simulations.pool import PooledGrid

BATCH = {"name": "unet", "channels": [4, 8], "residual_units": 0, "norm": "batch", "dropout": 0.25}
SECURE = {"mode": "msa1", "ring_bits": 32, "clip": 4.0}
STUDIES = {
    "fedavg": classes_study(training={"batch_size": 2, "steps": 3}),
    "some of the sites": classes_study(rounds={"count": 4, "sites_per_round": 2}),
    "control variates at sites": classes_study(strategy={"name": "scaffold"}, rounds={"count": 3}),
    "personal layers and dropout": masks_study(strategy={"name": "fedbn"}, model=BATCH),
    "single updates": classes_study(strategy={"name": "median"}),
    "secure aggregation": classes_study(secure_aggregation=SECURE, rounds={"minimum_sites": 3}),
}


def run(study: Study, **how: Any) -> Federation:
    torch.set_num_threads(1)
    sites = {f"site-{n}": site_data(study, seed=n, patients=3 + n) for n in range(5)}
    return federate(study, sites, **how)


def facts(federation: Federation) -> Any:
    """Everything but the time it took, bit for bit."""
    rows = {
        site: [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
        for site, rows in federation.site_rows.items()
    }
    rounds = [(r.round, dict(sorted(r.outcomes.items())), r.training, r.scores) for r in federation.rounds]
    return federation.result.ending, federation.result.weights.tobytes(), rounds, rows


@pytest.mark.parametrize("name", list(STUDIES))
def test_one_worker_and_several_give_the_same_bits(name: str) -> None:
    alone = facts(run(STUDIES[name]))
    assert facts(run(STUDIES[name], workers=2)) == alone
    assert facts(run(STUDIES[name], workers=3)) == alone


def test_failures_and_attackers_are_the_same_in_several_workers() -> None:
    study = classes_study(rounds={"count": 4, "minimum_sites": 1, "deadline_s": 5})
    how = {"failures": Failures(drop_out=0.3), "attackers": {"site-1": Attacker(kind="noise")}}
    assert facts(run(study, workers=2, **how)) == facts(run(study, **how))


def message(node: int) -> Message:
    return Message(RecordDict(), dst_node_id=node, message_type="query.offer")


def test_each_site_is_always_answered_by_the_same_worker() -> None:
    def app(message: Message, context: Context) -> Message:
        reply = Message(RecordDict(), reply_to=message)
        reply.metadata.group_id = str(os.getpid())
        return reply

    with PooledGrid(app, {name: MemoryRecords() for name in "abcd"}, workers=2) as grid:
        replies = list(grid.send_and_receive([message(node) for node in (2, 3, 4, 5, 2, 3)]))
    by_site: dict[int, set[str]] = {}
    for reply in replies:
        by_site.setdefault(reply.metadata.src_node_id, set()).add(reply.metadata.group_id)
    assert len(replies) == 6
    assert all(len(processes) == 1 for processes in by_site.values())
    assert len(set.union(*by_site.values()) - {str(os.getpid())}) == 2


def test_a_worker_that_is_killed_ends_the_simulation_with_the_way_out() -> None:
    def app(message: Message, context: Context) -> Message:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    with (
        PooledGrid(app, {name: MemoryRecords() for name in "ab"}, workers=2) as grid,
        pytest.raises(MedFLError, match="set workers lower"),
    ):
        grid.send_and_receive([message(2)])


def test_what_nobody_asked_for_is_not_worked_on() -> None:
    def app(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    with PooledGrid(app, {"a": MemoryRecords()}, workers=2) as grid:
        first, second = grid.push_messages([message(2), message(2)])
        assert [reply.metadata.reply_to_message_id for reply in grid.pull_messages([second])] == [second]
        assert list(grid.pull_messages(["17"])) == []
        assert [reply.metadata.reply_to_message_id for reply in grid.pull_messages([first])] == [first]
