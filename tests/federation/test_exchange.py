"""Messages between a link and its nodes, over real TLS."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from federation import Lab, echo, question, text_of, until
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from medfl.client.notice import Notice
from medfl.server import link_grid
from medfl.server.link import Link, OpenRun
from medfl.shared.errors import Code, PolicyRefusal, ProtocolError, TrainingError

DIGEST = "d" * 64


def same_for_all(message: Message, context: Context) -> Message:
    return Message(RecordDict({"config": ConfigRecord({"text": "identical"})}), reply_to=message)


def held(link: Link) -> int:
    """Objects still in the coordinator's memory."""
    return len(link._state.object_store)  # type: ignore[arg-type]


def test_three_sites_answer_and_nothing_stays_in_memory(lab: Lab) -> None:
    with lab.federation() as (link, ids), link.run(None, name="study", digest=DIGEST) as run:
        replies = run.grid.send_and_receive([question(i, f"to {i}") for i in ids.values()], timeout=60)
        assert sorted(map(text_of, replies)) == sorted(f"to {i}" for i in ids.values())
        assert {reply.metadata.src_node_id for reply in replies} == set(ids.values())
        assert held(link) == 0
        assert set(run.grid.get_node_ids()) == set(ids.values())


def test_a_model_of_several_pieces_comes_back_bit_for_bit(lab: Lab) -> None:
    weights = np.random.default_rng(0).normal(size=3_000_000).astype("f4")  # 12 MB: three pieces of 5 MiB
    with lab.federation(sites=2) as (link, ids), link.run(None, name="study", digest=DIGEST) as run:
        content = RecordDict({"arrays": ArrayRecord({"w": Array(weights)})})
        for reply in run.grid.stream([Message(content, i, "train") for i in ids.values()], timeout=60):
            assert np.array_equal(reply.content["arrays"]["w"].numpy(), weights)
        assert held(link) == 0


def test_identical_replies_of_several_sites_all_arrive(lab: Lab) -> None:
    with lab.federation(same_for_all) as (link, ids), link.run(None, name="study", digest=DIGEST) as run:
        for _ in range(5):
            replies = run.grid.send_and_receive([question(i) for i in ids.values()], timeout=60)
            assert {reply.metadata.src_node_id for reply in replies} == set(ids.values())
            assert [text_of(reply) for reply in replies] == ["identical"] * 3
        assert held(link) == 0


def test_a_site_that_has_trained_gives_its_free_memory_back_before_it_waits(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[str] = []
    monkeypatch.setattr("medfl.client.node.give_back_freed_buffers", lambda: given_back.append("all"))
    with lab.federation(sites=1) as (link, ids), link.run(None, name="study", digest=DIGEST) as run:
        run.grid.send_and_receive([question(ids["north"])], timeout=60)
        assert given_back == []  # a secure sum is a dozen such messages
        content = RecordDict({"config": ConfigRecord({"text": "hello"})})
        run.grid.send_and_receive([Message(content, ids["north"], "train")], timeout=60)
        until(lambda: given_back == ["all"])


def test_the_same_message_sent_twice_is_answered_twice(lab: Lab) -> None:
    with lab.federation(sites=1) as (link, ids), link.run(None, name="study", digest=DIGEST) as run:
        message = question(ids["north"])
        first, second = question(ids["north"]), question(ids["north"])
        second.metadata.created_at = first.metadata.created_at  # byte for byte the same
        assert len(run.grid.send_and_receive([first, second], timeout=60)) == 2
        for _ in range(2):
            assert len(run.grid.send_and_receive([message], timeout=60)) == 1


def test_replies_are_given_as_they_arrive_and_a_silent_site_is_dropped_at_the_deadline(lab: Lab) -> None:
    release = threading.Event()

    def app(message: Message, context: Context) -> Message:
        if text_of(message) == "slow":
            release.wait(120)
        return echo(message, context)

    with lab.federation(app) as (link, ids), link.run(None, name="study", digest=DIGEST) as run:
        texts = {"north": "slow", "south": "fast", "west": "fast"}
        started = time.monotonic()
        replies = run.grid.stream([question(ids[site], text) for site, text in texts.items()], timeout=3.0)
        assert [text_of(next(replies)), text_of(next(replies))] == ["fast", "fast"]
        assert list(replies) == []
        assert 2.9 < time.monotonic() - started < 60  # the slow one would take two minutes
        release.set()  # the late answer is dropped, and the site takes part again
        replies = iter(run.grid.send_and_receive([question(ids["north"])], timeout=60))
        assert text_of(next(replies)) == "hello"
        assert held(link) == 0


def test_an_instruction_not_fetched_in_time_is_withdrawn(lab: Lab) -> None:
    done: list[str] = []
    began, release = threading.Event(), threading.Event()

    def app(message: Message, context: Context) -> Message:
        done.append(text_of(message))
        began.set()
        release.wait(120)
        return echo(message, context)

    with lab.federation(app, sites=1) as (link, ids), link.run(None, name="study", digest=DIGEST) as run:
        node = ids["north"]
        run.grid.push_messages([question(node, "first", ttl=120)])
        assert began.wait(60)
        assert run.grid.send_and_receive([question(node, "queued")], timeout=0.5) == []
        release.set()
        assert len(run.grid.send_and_receive([question(node, "third")], timeout=60)) == 1
        assert done == ["first", "third"]


def test_an_answer_that_nobody_waits_for_any_more_is_let_go_while_the_run_goes_on(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_grid, "KEPT_S", 0.1)
    answered = threading.Event()

    def app(message: Message, context: Context) -> Message:
        answered.set()
        return echo(message, context)

    with lab.federation(app, sites=1) as (link, ids), link.run(None, name="study", digest=DIGEST) as run:
        message = question(ids["north"], "hello")
        message.metadata.ttl = 10.0
        (identity,) = run.grid.push_messages([message])
        assert answered.wait(60)
        until(lambda: bool(link._state.replies_to([identity])))
        assert held(link) > 0
        run.grid._sent[identity].instruction.metadata.ttl = 0.1  # whoever asked has waited for so long

        def let_go() -> bool:
            run.grid.pull_messages(["of another exchange"])
            return held(link) == 0

        until(let_go)


def test_an_exception_in_the_app_reaches_the_coordinator_as_a_code_only(lab: Lab) -> None:
    def app(message: Message, context: Context) -> Message:
        if text_of(message) == "ours":
            raise TrainingError("loss is NaN for /data/Smith^John.dcm")
        raise RuntimeError("cannot open /data/Smith^John.dcm")

    with lab.federation(app, sites=1) as (link, ids), link.run(None, name="study", digest=DIGEST) as run:
        for text, code in [("ours", "training"), ("foreign", "unexpected")]:
            (reply,) = run.grid.send_and_receive([question(ids["north"], text)], timeout=60)
            assert (reply.error.code, reply.error.reason) == (2, code)
            assert reply.metadata.src_node_id == ids["north"]


def test_the_gate_refuses_before_anything_is_fetched(lab: Lab) -> None:
    notices: list[Notice] = []

    def gate(notice: Notice) -> None:
        notices.append(notice)
        if notice.digest != DIGEST:
            raise PolicyRefusal("study x is not approved here", reason="study not approved")

    link = lab.link(sites=1)
    ids = link.enrol(lab.roster(1))
    running = lab.node("north", link.port, gate=gate)
    until(lambda: link.online() == set(ids.values()))
    fetched: list[object] = []
    fetch = running.node._fleet.fetch
    running.node._fleet.fetch = lambda *a: fetched.append(a) or fetch(*a)  # type: ignore[method-assign,func-returns-value]
    for digest, refused in [("e" * 64, True), (DIGEST, False)]:
        with link.run(None, name="lungs", digest=digest) as run:
            (reply,) = run.grid.send_and_receive([question(ids["north"])], timeout=60)
            assert reply.has_error() is refused
            if refused:
                assert (reply.error.code, reply.error.reason) == (6, "refused: study not approved")
                assert fetched == []
            assert notices[-1] == Notice("query", "", "lungs", digest, run.run_id, run.series_id)


def test_a_word_of_the_nodes_own_is_told_before_it_leaves_and_replaced_where_that_is_refused(lab: Lab) -> None:
    told: list[tuple[str, Code, str]] = []

    def tell(notice: Notice, code: Code, reason: str) -> None:
        told.append((notice.digest, code, reason))
        if len(told) > 2:
            raise PolicyRefusal("audit.jsonl cannot be written", reason="audit log unwritable")

    def gate(notice: Notice) -> None:
        if notice.message_type == "query":
            raise PolicyRefusal("study x is not approved here", reason="study not approved")

    def app(message: Message, context: Context) -> Message:
        raise ValueError("/pacs/NAME")

    link = lab.link(sites=1)
    ids = link.enrol(lab.roster(1))
    lab.node("north", link.port, app, gate, on_own_word=tell)
    until(lambda: link.online() == set(ids.values()))
    answers = []
    with link.run(None, name="lungs", digest=DIGEST) as run:
        for kind in ("query", "train", "train"):
            content = RecordDict({"config": ConfigRecord({"text": "hello"})})
            (reply,) = run.grid.send_and_receive([Message(content, ids["north"], kind)], timeout=60)
            answers.append(reply.error.reason)
    refused = (DIGEST, Code.REFUSED, "study not approved")
    assert told == [refused, (DIGEST, Code.UNEXPECTED, ""), (DIGEST, Code.UNEXPECTED, "")]
    assert answers == ["refused: study not approved", "unexpected", "refused: audit log unwritable"]


def test_a_message_beyond_the_sites_caps_is_answered_with_an_error(lab: Lab) -> None:
    link = lab.link(sites=1)
    ids = link.enrol(lab.roster(1))
    lab.node("north", link.port, settings=lab.node_settings("north", link.port, max_message_bytes=100_000))
    until(lambda: link.online() == set(ids.values()))
    with link.run(None, name="study", digest=DIGEST) as run:
        big = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(100_000, "f4"))})})
        (reply,) = run.grid.send_and_receive([Message(big, ids["north"], "train")], timeout=60)
        assert reply.error.reason == "protocol"
        (reply,) = run.grid.send_and_receive([question(ids["north"])], timeout=60)
        assert reply.has_content()


def test_one_object_that_no_node_would_accept_is_refused_when_sent(lab: Lab) -> None:
    huge = RecordDict({"config": ConfigRecord({"blob": b"0" * (17 * 2**20)})})
    with lab.federation(sites=1) as (link, ids), link.run(None, name="study", digest=DIGEST) as run:
        with pytest.raises(ProtocolError, match="ArrayRecord"):
            run.grid.push_messages([Message(huge, ids["north"], "train")])
        assert held(link) == 0


def test_a_node_that_is_not_online_is_reported_at_once(lab: Lab) -> None:
    link = lab.link(sites=2)
    ids = link.enrol(lab.roster(2))
    running = lab.node("north", link.port)
    until(lambda: link.online() == {ids["north"]})
    with link.run(None, name="study", digest=DIGEST) as run:
        replies = run.grid.send_and_receive([question(i) for i in ids.values()], timeout=60)
        assert {r.metadata.src_node_id: r.has_error() and r.error.code for r in replies} == {
            ids["north"]: False,
            ids["south"]: 5,
        }
        ids_sent = run.grid.push_messages([question(ids["north"])])
        until(lambda: bool(link._state.replies_to(ids_sent)))
        running.stop()  # it answered and left before anyone looked: the answer counts
        until(lambda: link.online() == set())
        (reply,) = run.grid.pull_messages(ids_sent)
        assert text_of(reply) == "hello"


def test_runs_follow_one_another_and_a_series_keeps_each_sites_state(lab: Lab) -> None:
    def count(message: Message, context: Context) -> Message:
        before = context.state.config_records.get("seen", ConfigRecord({"times": 0}))
        context.state["seen"] = ConfigRecord({"times": before["times"] + 1})
        if text_of(message) == "fail":
            raise RuntimeError
        return Message(RecordDict({"config": ConfigRecord({"text": str(before["times"])})}), reply_to=message)

    def ask(run: OpenRun, text: str = "") -> str | None:
        (reply,) = run.grid.send_and_receive([question(ids["north"], text)], timeout=60)
        return text_of(reply) if reply.has_content() else None

    with lab.federation(count, sites=1) as (link, ids):
        with link.run(None, name="study", digest=DIGEST) as run:
            assert [ask(run), ask(run)] == ["0", "1"]
            assert ask(run, "fail") is None  # leaves the state as it was
            assert run.context.series_id == run.series_id
        with link.run(run.series_id, name="study", digest=DIGEST) as again:
            assert again.run_id != run.run_id
            assert again.series_id == run.series_id
            assert ask(again) == "2"
        with link.run(None, name="study", digest=DIGEST) as other:
            assert ask(other) == "0"
        with pytest.raises(ProtocolError, match="unknown"), link.run(12345, name="study", digest=DIGEST):
            pass


def test_one_run_is_open_at_a_time_and_a_failed_one_does_not_block_the_next(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):  # other tests of this process may have left an identity
        monkeypatch.setattr(TaskIdentity, name, None)
    link = lab.link(sites=1)
    first = link.run(None, name="study", digest=DIGEST)
    with first, pytest.raises(ProtocolError, match="open already"), link.run(None, name="study", digest=DIGEST):
        pass
    with pytest.raises(ZeroDivisionError), link.run(None, name="study", digest=DIGEST):
        raise ZeroDivisionError
    with link.run(None, name="study", digest=DIGEST):
        pass
    with pytest.raises(RuntimeError, match="not set"):  # no identity is left behind
        question(1)


def test_an_answer_after_the_run_is_over_is_dropped_and_the_node_stays(lab: Lab) -> None:
    began, release = threading.Event(), threading.Event()

    def app(message: Message, context: Context) -> Message:
        began.set()
        release.wait(120)
        return echo(message, context)

    with lab.federation(app, sites=1) as (link, ids):
        with link.run(None, name="study", digest=DIGEST) as run:
            run.grid.push_messages([question(ids["north"])])
            assert began.wait(60)
        release.set()
        with link.run(None, name="study", digest=DIGEST) as run:
            (reply,) = run.grid.send_and_receive([question(ids["north"], "next")], timeout=60)
            assert text_of(reply) == "next"
