"""What the coordinator asks while it finishes a sum, and which void sums it asks for again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from secagg_world import STUDY, Consortium, pending_sum

from medfl.server.secagg import round as rounds
from medfl.server.secagg.finish import finish
from medfl.server.secagg.outcome import SumVoid
from medfl.server.secagg.round import SecureRound, summed
from medfl.server.secagg.store import FolderStore
from medfl.shared.secagg.announcement import Purpose
from medfl.shared.secagg.exchange import Phase, PhaseReply, PhaseRequest, SiteRefusal


def test_nobody_is_asked_to_unmask_a_sum_that_too_few_have_confirmed() -> None:
    asked: list[Phase] = []

    def silence(phase: Phase, requests: Mapping[int, PhaseRequest]) -> Iterator[tuple[int, PhaseReply | SiteRefusal]]:
        asked.append(phase)
        return iter(())

    with pytest.raises(SumVoid, match="could not be opened") as void:
        finish(pending_sum(), roster=Consortium(3).roster, exchange=silence)
    assert asked == [Phase.CONFIRM_SURVIVORS] * 2  # once more, as the same sum may be asked for again
    assert void.value.confirmed


@pytest.mark.parametrize(
    ("void", "again"),
    [
        (SumVoid("too few finished", confirmed=True), True),
        (SumVoid("too few were left", confirmed=False), False),
        (SumVoid("shares that do not open", confirmed=True, culprits=(2,)), False),
    ],
    ids=["confirmed", "unconfirmed", "culprits"],
)
def test_a_void_sum_is_asked_for_again_only_where_its_survivors_stand_and_nobody_cheated(
    void: SumVoid, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, finished = FolderStore(tmp_path), list[bool]()
    store.keep(pending_sum())

    def fails(self: SecureRound, exchange: object) -> None:
        raise void

    monkeypatch.setattr(SecureRound, "__init__", lambda self, *_, **__: None)
    monkeypatch.setattr(SecureRound, "run", fails)
    monkeypatch.setattr(rounds, "finish", lambda *_, **__: finished.append(True))
    plan = type("Plan", (), {"study": STUDY, "purpose": Purpose.TRAIN})()
    if again:
        summed(plan, roster=Consortium(3).roster, store=store, exchange=lambda *_: iter(()))
    else:
        with pytest.raises(SumVoid):
            summed(plan, roster=Consortium(3).roster, store=store, exchange=lambda *_: iter(()))
    assert finished == [True] * again
