from __future__ import annotations

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from medfl.simulations.grid import VirtualGrid


def counting_grid(*, moment_s: float = 0) -> tuple[VirtualGrid, list[str]]:
    app, worked = ClientApp(), []

    @app.query()
    def answer(message: Message, context: Context) -> Message:
        site = str(context.node_config["site"])
        worked.append(site)
        times = context.state.get("times", ConfigRecord({"n": 0}))
        context.state["times"] = ConfigRecord({"n": int(times["n"]) + 1})  # type: ignore[arg-type, call-overload, index]
        return Message(RecordDict({"c": ConfigRecord({"site": site, **context.state["times"]})}), reply_to=message)  # type: ignore[dict-item]

    return VirtualGrid(app, ["north", "south"], moment_s=moment_s), worked


def ask(node: int) -> Message:
    return Message(RecordDict(), dst_node_id=node, message_type="query")


def test_every_name_is_a_node_that_is_online() -> None:
    grid, _ = counting_grid()
    assert list(grid.online().values()) == ["north", "south"]
    assert list(grid.get_node_ids()) == list(grid.online())


def test_a_site_works_only_when_its_reply_is_pulled_and_one_at_a_time() -> None:
    grid, worked = counting_grid()
    nodes = list(grid.get_node_ids())
    identities = list(grid.push_messages([ask(node) for node in nodes]))
    assert worked == []
    first = list(grid.pull_messages(identities))
    assert worked == ["north"]
    assert [reply.metadata.reply_to_message_id for reply in first] == identities[:1]
    second = list(grid.pull_messages(identities))
    assert [reply.metadata.src_node_id for reply in second] == nodes[1:]
    assert list(grid.pull_messages(identities)) == []


def test_sites_that_are_done_in_a_moment_answer_together_in_their_order() -> None:
    grid, worked = counting_grid(moment_s=600)
    identities = list(grid.push_messages([ask(node) for node in grid.get_node_ids()]))
    replies = list(grid.pull_messages(identities))
    assert worked == ["north", "south"]
    assert [reply.metadata.reply_to_message_id for reply in replies] == identities


def test_a_message_nobody_pulls_is_never_worked_on() -> None:
    grid, worked = counting_grid()
    first, second = grid.push_messages([ask(node) for node in grid.get_node_ids()])
    del first
    list(grid.pull_messages([second]))
    assert worked == ["south"]


def test_each_node_keeps_its_own_state_from_message_to_message() -> None:
    grid, _ = counting_grid()
    north, south = grid.get_node_ids()
    replies = list(grid.send_and_receive([ask(north), ask(north), ask(south)]))
    assert [(r.content["c"]["site"], r.content["c"]["n"]) for r in replies] == [  # type: ignore[index, call-overload]
        ("north", 1), ("north", 2), ("south", 1)
    ]  # fmt: skip
