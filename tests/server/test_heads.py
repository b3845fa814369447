"""Heads of sites' records: remembered over restarts, asked about before a round, signed, missed when they are gone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scripted import Answer, ScriptedGrid
from tiny import classes_study

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Message

from medfl.server.admission import Admission
from medfl.server.audit import Audit
from medfl.server.heads import HeadKeeping, Heads
from medfl.server.pace import Pace
from medfl.server.reporter import Silent
from medfl.server.rounds import _is_fault
from medfl.server.stage import Stages
from medfl.shared.chain import Head, inspect
from medfl.shared.errors import Code, DataError
from medfl.shared.messages import Failure, HeadsReply, HeadsRequest, Log
from medfl.shared.receipt import countersign, read_receipt

STUDY, OTHER = "ab" * 32, "cd" * 32
KEY = Ed25519PrivateKey.generate()


class Site:
    """A site whose records grow by a row each time it is asked."""

    def __init__(self) -> None:
        self.asked: list[HeadsRequest] = []
        self.rows, self.held = 4, True
        self.refusal: Failure | None = None

    def __call__(self, message: Message) -> Answer:
        self.asked.append(HeadsRequest.parse(message.content))
        if self.refusal is not None:
            return self.refusal.record()
        self.rows += 1
        return HeadsReply({log: self.head for log in Log}, audit_held=self.held).record()

    @property
    def head(self) -> Head:
        return Head(self.rows, f"{self.rows:064x}")


class World:
    def __init__(self, folder: Path, *, signing: bool = True) -> None:
        self.sites = {"north": Site(), "south": Site()}
        self.grid = ScriptedGrid(self.sites)
        self.audit = Audit(folder / "audit.jsonl")
        sign = partial(countersign, KEY) if signing else None
        self.keeping = HeadKeeping("lungs", folder / "heads.json", self.audit, sign)
        self.cohort = {node: name for node, name in self.grid.online().items()}

    def heads(self, study: str = STUDY, keeping: Any = ...) -> Heads:
        stages = stages_over(self.grid)
        return Heads(study, stages, self.keeping if keeping is ... else keeping)

    def rows(self, event: str) -> list[dict[str, Any]]:
        self.audit.flush()
        return [row for row in inspect(self.keeping.path.with_name("audit.jsonl")).rows if row["event"] == event]


def stages_over(grid: ScriptedGrid) -> Stages:
    return Stages(grid, Silent(), Event(), Pace(5.0), Admission(classes_study(), grid, grid))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_at_first_nothing_is_recorded_and_no_receipt_comes_along(world: World) -> None:
    agreed, words = world.heads().agree(1, world.cohort)
    assert (sorted(agreed.values()), words) == (["north", "south"], {})
    assert world.sites["north"].asked == [HeadsRequest(STUDY, 1)]


def test_the_next_question_has_what_was_told_and_a_receipt_for_the_audit_log(world: World) -> None:
    heads = world.heads()
    heads.agree(1, world.cohort)
    told = world.sites["north"].head
    heads.agree(2, world.cohort)
    request = world.sites["north"].asked[1]
    assert request.recorded == dict.fromkeys(Log, told)
    receipt = read_receipt(request.receipt, KEY.public_key())
    assert (receipt.consortium, receipt.site, receipt.head, receipt.study, receipt.round) == (
        "lungs", "north", told, STUDY, 1,
    )  # fmt: skip


def test_heads_are_remembered_over_a_restart_and_journals_by_study(world: World) -> None:
    world.heads().agree(1, world.cohort)
    told = world.sites["south"].head
    world.heads().agree(2, world.cohort)
    assert world.sites["south"].asked[1].recorded == dict.fromkeys(Log, told)
    told = world.sites["south"].head
    world.heads(OTHER).agree(1, world.cohort)
    assert world.sites["south"].asked[2].recorded == {
        Log.AUDIT: told,
        Log.LEDGER: told,
    }


def test_a_site_that_refuses_is_left_out_with_its_own_words(world: World) -> None:
    world.sites["south"].refusal = Failure(Code.REFUSED, "study not approved")
    agreed, words = world.heads().agree(1, world.cohort)
    assert (list(agreed.values()), words) == (["north"], {"south": "refused: study not approved"})


@pytest.mark.parametrize("what", ["ledger restored", "journal restored"])
def test_a_site_with_older_records_waits_and_is_no_reason_to_end_the_study(what: str, world: World) -> None:
    world.sites["south"].refusal = Failure(Code.REFUSED, what)
    _, words = world.heads().agree(1, world.cohort)
    assert words == {"south": f"waits: {what}"}
    assert not _is_fault(words["south"])


def test_an_audit_log_that_lost_what_was_seen_is_told_and_stands_in_the_coordinators_own(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    heads = world.heads()
    heads.agree(1, world.cohort)
    seen = world.sites["north"].head
    world.sites["north"].held = False
    agreed, _ = heads.agree(2, world.cohort)
    assert sorted(agreed.values()) == ["north", "south"]  # it is told, and no reason to stop
    assert "north: its audit log does not hold row 5 any more" in caplog.text
    (row,) = world.rows("head not held")
    assert (row["site"], row["rows"], row["head"]) == ("north", seen.rows, seen.digest)


def test_every_head_that_was_seen_stands_in_the_coordinators_audit_log(world: World) -> None:
    world.heads().agree(1, world.cohort)
    rows = world.rows("head seen")
    assert {(row["site"], row["rows"], row["round"], row["receipt"]) for row in rows} == {
        ("north", 5, 1, "signed"),
        ("south", 5, 1, "signed"),
    }


def test_without_the_consortiums_key_heads_are_remembered_and_nothing_is_signed(tmp_path: Path) -> None:
    world = World(tmp_path, signing=False)
    heads = world.heads()
    heads.agree(1, world.cohort)
    heads.agree(2, world.cohort)
    request = world.sites["north"].asked[1]
    assert (request.receipt, request.recorded[Log.AUDIT].rows) == (b"", 5)
    assert {row["receipt"] for row in world.rows("head seen")} == {"none"}


def test_virtual_sites_are_remembered_in_the_process_alone(world: World) -> None:
    heads = world.heads(keeping=None)
    heads.agree(1, world.cohort)
    heads.agree(2, world.cohort)
    assert world.sites["north"].asked[1].recorded[Log.LEDGER].rows == 5
    assert not world.keeping.path.exists()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"north": {}}', b'{"north": {"heads": {"audit": [1]}}}'])
def test_a_damaged_memory_is_not_taken_for_none(world: World, content: bytes) -> None:
    world.keeping.path.write_bytes(content)
    with pytest.raises(DataError, match="restore it from the latest backup"):
        world.heads()


def test_the_memory_names_sites_and_holds_no_spend(world: World) -> None:
    world.heads().agree(1, world.cohort)
    content = json.loads(world.keeping.path.read_bytes())
    assert set(content) == {"north", "south"}
    assert set(content["north"]["heads"]) == {"audit", "ledger", f"journal {STUDY}"}
