from __future__ import annotations

from scripted import ScriptedGrid, ScriptedSite

from medfl.server.cohort import CohortGrid


def test_a_strategy_sees_the_cohort_and_nobody_else() -> None:
    grid = ScriptedGrid({name: ScriptedSite() for name in "abc"})
    assert list(CohortGrid(grid, {2: "a", 4: "c"}).get_node_ids()) == [2, 4]
    assert list(grid.get_node_ids()) == [2, 3, 4]


def test_messages_go_through_the_grid_itself() -> None:
    grid = ScriptedGrid({"a": ScriptedSite()})
    view = CohortGrid(grid, {2: "a"})
    assert list(view.pull_messages([])) == []
    assert list(view.push_messages([])) == []
    assert list(view.send_and_receive([])) == []
    assert view.run is None
