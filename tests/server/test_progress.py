"""What is told of the study that runs."""

from __future__ import annotations

from medfl.server.progress import Live


def test_a_site_that_refused_and_takes_part_now_is_told_by_its_work_and_not_by_its_refusal() -> None:
    live = Live()
    refusals = {"south": "refused: study not approved", "west": "refused: budget"}
    live.waiting(["north", "south", "west"], ["north"], 2, refusals)
    assert live.read()[2] == refusals
    live.gathered({"west": "refused: budget"})
    live.stage(1, "training", [], ["north", "south"])
    doing, sites, refused = live.read()
    assert doing == "round 1, training: 0 of 2 sites have answered"
    assert (sites["south"], refused) == ("training", {"west": "refused: budget"})
