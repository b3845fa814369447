from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
from scripted import Answer, ScriptedGrid, ScriptedSite
from tiny import classes_study

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import RecordDict

from medfl.server import admission as module
from medfl.server.admission import Admission
from medfl.shared.errors import Code
from medfl.shared.messages import NO_INITIAL_WEIGHTS, EvaluateReply, Failure, Kind, OfferAccepted, StudyOffer

STUDY = classes_study()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class Answering(ScriptedSite):
    """Answers offers with what it was given, one after the other; the last stays."""

    def __init__(self, *answers: Answer) -> None:
        super().__init__()
        self.answers = list(answers)
        self.offers: list[StudyOffer] = []

    def consider(self, content: RecordDict) -> Answer:
        self.offers.append(StudyOffer.parse(content))
        if not self.answers:
            return super().consider(content)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def names(admission: Admission) -> list[str]:
    return sorted(admission.taking_part().values())


def test_every_site_is_offered_the_very_study_once() -> None:
    sites = {"a": Answering(), "b": Answering()}
    grid = ScriptedGrid(sites)
    admission = Admission(STUDY, grid, grid, bytes(64))
    for _ in range(3):
        admission.refresh()
    assert names(admission) == ["a", "b"]
    for site in sites.values():
        assert [(offer.digest, offer.canonical) for offer in site.offers] == [(STUDY.digest, STUDY.canonical())]


def test_where_nobody_comes_or_goes_a_site_that_forgot_is_still_offered_again() -> None:
    class Same(ScriptedGrid):
        def online(self) -> Mapping[int, str]:
            return self._names  # the very mapping, as of virtual sites

    site = Answering()
    grid = Same({"a": site, "b": Answering()})
    admission = Admission(STUDY, grid, grid, bytes(64))
    for _ in range(3):
        admission.refresh()
        assert names(admission) == ["a", "b"]
    assert admission.taking_part() is admission.taking_part()
    admission.forget(next(iter(admission.taking_part())))
    assert names(admission) == ["b"]
    admission.refresh()
    assert names(admission) == ["a", "b"]
    assert len(site.offers) == 2


def test_a_site_that_comes_online_is_offered_the_study_then() -> None:
    grid = ScriptedGrid({"a": Answering(), "b": Answering()})
    grid.offline = {"b"}
    admission = Admission(STUDY, grid, grid, bytes(64))
    admission.refresh()
    assert names(admission) == ["a"]
    grid.offline = set()
    admission.refresh()
    assert names(admission) == ["a", "b"]


def test_a_site_that_is_offline_does_not_take_part_now_but_needs_no_second_offer() -> None:
    site = Answering()
    grid = ScriptedGrid({"a": site})
    admission = Admission(STUDY, grid, grid, bytes(64))
    admission.refresh()
    grid.offline = {"a"}
    assert names(admission) == []
    grid.offline = set()
    admission.refresh()
    assert names(admission) == ["a"]
    assert len(site.offers) == 1


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Failure(Code.REFUSED, "study not approved").record(), "refused: study not approved"),
        (Failure(Code.DATA).record(), "data"),
        (EvaluateReply().record(), "malformed answer"),
        (RecordDict(), "malformed answer"),
    ],
)
def test_a_refusal_is_kept_with_its_reason_until_the_site_accepts(clock: Clock, answer: Any, why: str) -> None:
    from medfl.shared.messages import OfferAccepted

    site = Answering(answer, OfferAccepted().record())
    grid = ScriptedGrid({"a": site})
    admission = Admission(STUDY, grid, grid, bytes(64))
    admission.refresh()
    assert names(admission) == []
    assert admission.refusals == {"a": why}
    clock.now += 9.9
    admission.refresh()
    assert len(site.offers) == 1
    clock.now += 0.2
    admission.refresh()
    assert names(admission) == ["a"]
    assert admission.refusals == {}


def test_a_site_that_keeps_refusing_is_asked_less_and_less_often(clock: Clock) -> None:
    site = Answering(Failure(Code.REFUSED, "no").record())
    grid = ScriptedGrid({"a": site})
    admission = Admission(STUDY, grid, grid, bytes(64))
    asked_at = []
    for _ in range(1500):
        before = len(site.offers)
        admission.refresh()
        if len(site.offers) > before:
            asked_at.append(clock.now - 1000)
        clock.now += 1
    gaps = [b - a for a, b in itertools.pairwise(asked_at)]
    assert gaps == [10, 20, 40, 80, 160, 300, 300, 300]


def test_a_silent_site_is_awaited_until_the_offer_expires_and_then_asked_again(clock: Clock) -> None:
    site = Answering(None)
    grid = ScriptedGrid({"a": site})
    admission = Admission(STUDY, grid, grid, bytes(64))
    admission.refresh()
    assert admission.awaited == 1
    clock.now += STUDY.rounds.deadline_s + 1
    admission.refresh()
    admission.refresh()
    assert len(site.offers) == 2


def test_a_site_that_leaves_while_it_is_asked_is_not_awaited() -> None:
    grid = ScriptedGrid({"a": Answering(None)})
    admission = Admission(STUDY, grid, grid, bytes(64))
    admission.refresh()
    grid.offline = {"a"}
    admission.refresh()
    assert admission.awaited == 0


def test_a_site_that_forgot_the_study_is_offered_it_again() -> None:
    site = Answering()
    grid = ScriptedGrid({"a": site})
    admission = Admission(STUDY, grid, grid, bytes(64))
    admission.refresh()
    (node,) = admission.taking_part()
    admission.forget(node)
    assert names(admission) == []
    admission.refresh()
    assert names(admission) == ["a"]
    assert len(site.offers) == 2


def test_an_offer_lives_as_long_as_a_stage() -> None:
    grid = ScriptedGrid({"a": Answering()})
    Admission(STUDY, grid, grid, bytes(64)).refresh()
    assert grid.times_to_live == [STUDY.rounds.deadline_s]
    assert grid.asked == [("a", Kind.OFFER.value)]


def test_a_site_that_refused_and_joins_anew_is_asked_at_once(clock: Clock) -> None:
    site = Answering(Failure(Code.REFUSED, "study not approved").record())
    grid = ScriptedGrid({"a": site})
    admission = Admission(STUDY, grid, grid, bytes(64))
    for _ in range(3):
        admission.refresh()
    assert len(site.offers) == 1
    assert admission.refusals == {"a": "refused: study not approved"}
    grid.sessions["a"] = "second"  # somebody has approved it there
    site.answers.clear()
    admission.refresh()
    admission.refresh()
    assert len(site.offers) == 2
    assert names(admission) == ["a"]
    assert admission.refusals == {}


def test_a_site_that_lacks_the_initial_weights_is_sent_them_at_once_and_once() -> None:
    wanted = Failure(Code.PROTOCOL, NO_INITIAL_WEIGHTS).record()
    asking, knowing = Answering(wanted, OfferAccepted().record()), Answering()
    grid = ScriptedGrid({"a": asking, "b": knowing})
    admission = Admission(STUDY, grid, grid, bytes(64), b"the file")
    admission.refresh()
    admission.refresh()
    assert names(admission) == ["a", "b"]
    assert admission.refusals == {}
    assert [offer.initial for offer in asking.offers] == [b"", b"the file"]
    assert [offer.initial for offer in knowing.offers] == [b""]


def test_a_site_that_will_not_have_the_file_is_asked_later_as_after_any_refusal(clock: Clock) -> None:
    asking = Answering(Failure(Code.PROTOCOL, NO_INITIAL_WEIGHTS).record())
    grid = ScriptedGrid({"a": asking})
    admission = Admission(STUDY, grid, grid, bytes(64), b"the file")
    for _ in range(5):
        admission.refresh()
    assert len(asking.offers) == 2
    assert admission.refusals == {"a": f"protocol: {NO_INITIAL_WEIGHTS}"}
