"""Bad ways between site and coordinator: far, narrow, lossy, cut for a while, reset in the middle of an upload."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time

import numpy as np
import pytest
from faulty_network import Faults, FaultyNetwork
from federation import Lab, RunningNode, question, text_of, until
from flwr.app import Array, ArrayRecord, Message, RecordDict

from medfl.client.node import Phase
from medfl.server.link import Link, OpenRun

DIGEST = "d" * 64
MIB = 2**20


def over(lab: Lab, network: FaultyNetwork, link: Link) -> tuple[int, RunningNode]:
    """North behind ``network``, online; its node id."""
    node = link.enrol(lab.roster(1))["north"]
    running = lab.node("north", network.port)
    until(lambda: link.online() == {node})
    return node, running


def exchanged(run: OpenRun, node: int, megabytes: float, timeout: float) -> float:
    """Send so many random bytes there and back, check every bit, and return the seconds it took."""
    values = np.random.default_rng(0).integers(0, 2**31, int(megabytes * MIB) // 4).astype(np.int32)
    message = Message(RecordDict({"arrays": ArrayRecord({"w": Array(values)})}), node, "train")
    began = time.monotonic()
    (reply,) = run.grid.send_and_receive([message], timeout=timeout)
    assert reply.has_content(), reply.error
    assert np.array_equal(reply.content["arrays"]["w"].numpy(), values)
    return time.monotonic() - began


WAYS = {
    "300 ms": (Faults(latency_s=0.15), 1.0, 200),
    "1 Mbit/s": (Faults(bytes_per_s=125_000), 0.5, 200),
    "10 % loss": (Faults(loss=0.1, latency_s=0.02, retransmission_s=0.02), 0.5, 200),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_comes_and_goes_bit_for_bit_over_a_bad_way(lab: Lab, way: str) -> None:
    faults, megabytes, timeout = WAYS[way]
    link = lab.link(sites=1)
    with FaultyNetwork(link.port, faults) as network:
        node, _ = over(lab, network, link)
        with link.run(None, name="study", digest=DIGEST) as run:
            seconds = exchanged(run, node, megabytes, timeout)
        assert seconds >= 2 * megabytes * MIB / faults.bytes_per_s  # the way is as narrow as it says
        assert seconds >= 4 * faults.latency_s


@pytest.mark.parametrize(("bytes_per_s", "one_by_one"), [(300_000, True), (float("inf"), False)])
def test_pieces_of_an_answer_go_one_by_one_over_a_narrow_line_and_side_by_side_over_a_wide_one(
    lab: Lab, bytes_per_s: float, one_by_one: bool
) -> None:
    link, on_the_way, most = lab.link(sites=1), [0], [0]
    with FaultyNetwork(link.port, Faults(bytes_per_s=bytes_per_s)) as network:
        node, running = over(lab, network, link)
        client = running.node._fleet._connection.client
        push_object = client.PushObject

        def counted(piece: object) -> object:
            on_the_way[0] += 1
            most[0] = max(most[0], on_the_way[0])
            time.sleep(0.05)
            answer = push_object(piece)  # type: ignore[arg-type]
            on_the_way[0] -= 1
            return answer

        client.PushObject = counted  # type: ignore[method-assign, assignment]
        draw = np.random.default_rng(0)
        arrays = {str(n): Array(draw.integers(0, 2**31, MIB // 16).astype(np.int32)) for n in range(6)}  # 1.5 MiB
        with link.run(None, name="study", digest=DIGEST) as run:
            message = Message(RecordDict({"arrays": ArrayRecord(arrays)}), node, "train")
            (reply,) = run.grid.send_and_receive([message], timeout=90)
            assert reply.has_content()
    assert (most[0] == 1) == one_by_one


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_model_of_30_megabytes_over_1_megabit_with_300_ms(lab: Lab) -> None:
    link = lab.link(sites=1)
    with FaultyNetwork(link.port, Faults(bytes_per_s=125_000, latency_s=0.15)) as network:
        node, _ = over(lab, network, link)
        with link.run(None, name="study", digest=DIGEST) as run:
            assert exchanged(run, node, 30, 1200) > 503  # 2 * 30 MiB at 1 Mbit/s: the way is as narrow as it says
        assert network.sent < 31 * MIB  # no piece was sent twice


def test_an_upload_that_is_reset_goes_on_where_it_was(lab: Lab) -> None:
    link, size = lab.link(sites=1), 24 * MIB
    with FaultyNetwork(link.port, Faults()) as network:
        node, _ = over(lab, network, link)
        with link.run(None, name="study", digest=DIGEST) as run:
            network.faults.reset_after = network.sent + size * 3 // 4
            before = network.sent
            exchanged(run, node, size / MIB, 200)
        assert network.resets == 1
        # at most the four pieces of 5 MiB that were on their way are sent again, not all five
        assert size < network.sent - before < size + 4 * 5 * MIB * 3 // 4


def test_a_way_that_was_cut_is_taken_up_again_and_the_site_says_so_meanwhile(lab: Lab) -> None:
    link = lab.link(sites=1)
    with FaultyNetwork(link.port, Faults()) as network:
        node, running = over(lab, network, link)
        with link.run(None, name="study", digest=DIGEST) as run:
            network.faults.cut = True
            network.break_all()
            until(lambda: running.phase is Phase.WAITING)
            time.sleep(3)
            network.faults.cut = False
            mended = time.monotonic()
            (reply,) = run.grid.send_and_receive([question(node)], timeout=60)
            while reply.has_error():  # it was not back yet
                assert time.monotonic() < mended + 90
                (reply,) = run.grid.send_and_receive([question(node)], timeout=60)
            assert text_of(reply) == "hello"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_way_that_was_cut_for_ten_minutes_is_taken_up_again_within_seconds(lab: Lab) -> None:
    link = lab.link(sites=1)
    with FaultyNetwork(link.port, Faults()) as network:
        node, running = over(lab, network, link)
        network.faults.cut = True
        network.break_all()
        until(lambda: link.online() == set())
        time.sleep(600)
        assert running.phase is Phase.WAITING
        network.faults.cut = False
        until(lambda: link.online() == {node})


def test_a_coordinator_that_moved_to_another_machine_is_found_under_its_name(
    lab: Lab, tmp_path_factory: object
) -> None:
    """Its state folder was copied; the name leads there now, and the run series goes on."""
    seen: list[int] = []

    def app(message: Message, context: object) -> Message:
        seen.append(message.metadata.run_id)
        return Message(message.content, reply_to=message)

    with FaultyNetwork(1, Faults()) as name:
        with Link(lab.link_settings()) as link:
            name.move_to(link.port)
            node = link.enrol(lab.roster(1))["north"]
            lab.node("north", name.port, app)
            until(lambda: link.online() == {node})
            with link.run(None, name="study", digest=DIGEST) as run:
                (reply,) = run.grid.send_and_receive([question(node)], timeout=60)
                assert reply.has_content()
        shutil.copytree(lab.folder / "server", lab.folder / "elsewhere")
        moved = dataclasses.replace(lab.link_settings(), state_dir=lab.folder / "elsewhere")
        with Link(moved) as link:
            name.move_to(link.port)
            assert link.enrol(lab.roster(1)) == {"north": node}
            until(lambda: link.online() == {node})
            with link.run(run.series_id, name="study", digest=DIGEST) as again:
                (reply,) = again.grid.send_and_receive([question(node)], timeout=60)
                assert reply.has_content()
            lab.stop_nodes()
    assert len(seen) == 2


def test_an_answer_after_the_deadline_and_the_same_answer_twice_are_of_no_use(lab: Lab) -> None:
    release = threading.Event()

    def app(message: Message, context: object) -> Message:
        if text_of(message) == "slow":
            release.wait(120)
        return Message(message.content, reply_to=message)

    with lab.federation(app, sites=1) as (link, ids), link.run(None, name="study", digest=DIGEST) as run:
        sent = run.grid.push_messages([question(ids["north"], "slow", ttl=1.0)])
        time.sleep(2.5)
        release.set()
        (late,) = run.grid.pull_messages(sent)
        assert late.has_error()  # its time was over, whatever comes
        assert run.grid.pull_messages(sent) == []
        (reply,) = run.grid.send_and_receive([question(ids["north"], "next")], timeout=60)
        assert text_of(reply) == "next"
