"""A coordinator of secure sums that is killed, restarted or restored from a backup, beside sites that go on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.serverapp import Grid
from tiny import classes_study, site_data

from medfl.client.app import build_client_app
from medfl.client.records import MemoryRecords
from medfl.client.site import Site
from medfl.client.workbench import Workbench
from medfl.server import gathering, rounds
from medfl.server.answers import Answers
from medfl.server.app import build_server_app
from medfl.server.checkpoint import CheckpointFolder
from medfl.server.ending import Ending, Result
from medfl.server.reporter import RoundReport, Silent
from medfl.server.rounds import Rounds
from medfl.server.secagg import round as secure_round
from medfl.server.secagg.store import FolderStore
from medfl.server.weight_sum import SecureParts
from medfl.shared.secagg.announcement import Purpose
from medfl.shared.study import Study
from medfl.simulations.federation import Consortium, _secure_parts, permissive_policy
from medfl.simulations.grid import VirtualGrid

NAMES = "abcde"


PRIVATE = {
    "mode": "dp-sgd",
    "epsilon": 50,
    "delta": 1e-2,
    "expected_batch": 2,
    "steps_per_round": 1,
    "spare_rounds": 20,  # what is trained again is paid for
}


class Killed(BaseException):
    """The coordinator is gone."""


class Watching(Silent):
    """Calls ``seen`` after each round."""

    def __init__(self, seen: Callable[[int], None]) -> None:
        self._seen = seen

    def finished_round(self, report: RoundReport) -> None:
        self._seen(report.round)


class World:
    """Five sites that live on, and coordinators that come and go, each with its folder."""

    def __init__(self, study: Study, folder: Path) -> None:
        self.study, self._folder = study, folder
        self._consortium = Consortium.signing(study)
        secure, participants = _secure_parts(study, NAMES, FolderStore(folder / "unused"))
        assert secure is not None
        self._rosters = secure.rosters
        workbench, policy = Workbench(torch.device("cpu")), permissive_policy(study)
        sites = {
            name: Site(
                name,
                policy=policy,
                load_data=lambda _, seed=seed: site_data(study, seed=seed),
                workbench=workbench,
                records=MemoryRecords(),
                ledger=folder / name / "ledger.jsonl",
                participant=participants[name],
                verify=self._consortium.verify,
            )
            for seed, name in enumerate(NAMES)
        }
        self.away: set[str] = set()
        self._grid = _SomeAway(build_client_app(lambda context: sites[str(context.node_config["site"])]), sites)
        self._grid.away = self.away

    def coordinate(
        self, name: str, *, seen: Callable[[int], None] = lambda _: None, stop: Event | None = None
    ) -> Result:
        folder, outcome = self._folder / name, list[Result]()
        secure = SecureParts(self._rosters, FolderStore(folder / "sums"), folder / "sum.json")

        def work(grid: Grid, context: Context) -> None:
            going = Rounds(
                self.study,
                grid,
                self._grid,
                checkpoints=CheckpointFolder(folder),
                reporter=Watching(seen),
                stop=stop or Event(),
                secure=secure,
                signature=self._consortium.signature,
            )
            outcome.append(going.run())

        build_server_app(work)(
            self._grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
        )
        return outcome[0]

    def restored(self, name: str, copy: str) -> str:
        shutil.copytree(self._folder / name, self._folder / copy)
        return copy


class _SomeAway(VirtualGrid):
    away: set[str]

    def online(self) -> dict[int, str]:
        return {node: site for node, site in super().online().items() if site not in self.away}


@pytest.fixture(autouse=True)
def _in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((rounds, "_VOID_S"), (gathering, "_SETTLE_S"), (gathering, "_RETURN_S")):
        monkeypatch.setattr(module, name, 0.05)


def secure_study(count: int, **changes: Any) -> Study:
    settings = {"mode": "msa1"} | changes.pop("secure_aggregation", {})
    return classes_study(
        rounds={"count": count, "minimum_sites": 3, "patience_s": 30}, secure_aggregation=settings, **changes
    )


@pytest.mark.parametrize("strategy", [{"name": "feddyn", "alpha": 0.1}, {"name": "scaffold"}], ids=lambda s: s["name"])
def test_a_sum_that_is_finished_after_a_kill_stands_for_the_same_share_of_sites(
    strategy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # five sites of 8 images; one is away from the second round on: those sums stand for 32 of 40 images
    models, really, share_of, shares = {}, secure_round.finish, Answers.share, list[float]()

    def share(self: Answers, *given: Any) -> float:
        shares.append(share_of(self, *given))
        return shares[-1]

    monkeypatch.setattr(Answers, "share", share)
    for killed in (False, True):
        world = World(secure_study(3, strategy=strategy), tmp_path / str(killed))
        deadly = [killed]

        def finish(pending: Any, *, world: World = world, deadly: list[bool] = deadly, **more: Any) -> Any:
            if deadly[0] and world.away and pending.announcement.purpose is Purpose.TRAIN:
                deadly[0] = False
                raise Killed
            return really(pending, **more)

        def leave(number: int, world: World = world) -> None:
            world.away |= {"e"} if number == 1 else set()

        with monkeypatch.context() as changes:
            changes.setattr(secure_round, "finish", finish)
            try:
                result = world.coordinate("coordinator", seen=leave)
            except Killed:
                result = world.coordinate("coordinator", seen=leave)
        assert (result.ending, deadly[0]) == (Ending.DONE, False)
        models[killed] = result.weights.tobytes()
        assert shares == [1, 0.8, 0.8]
        shares.clear()
    assert models[True] == models[False]


@pytest.mark.parametrize("ring", [32, 16])
def test_a_restart_forgets_no_clip(ring: int, tmp_path: Path) -> None:
    # updates are longer than this clip: it is doubled, or follows the tensors, round by round
    study = secure_study(6, secure_aggregation={"clip": 0.05, "ring_bits": ring})
    expected = World(study, tmp_path / "whole").coordinate("coordinator")
    world, stop = World(study, tmp_path / "parts"), Event()
    first = world.coordinate("coordinator", seen=lambda number: stop.set() if number == 3 else None, stop=stop)
    assert (first.ending, first.round) == (Ending.STOPPED, 3)
    found = world.coordinate("coordinator")
    if ring == 32:  # with 16 bits, values are rounded at random
        assert found.weights.tobytes() == expected.weights.tobytes()
    assert found.weights == pytest.approx(expected.weights, abs=2e-3)


def test_a_coordinator_restored_from_an_old_backup_goes_on(tmp_path: Path) -> None:
    world = World(secure_study(12), tmp_path)

    def back_up(number: int) -> None:
        if number == 1:
            world.restored("coordinator", "backup")

    world.coordinate("coordinator", seen=back_up)  # eleven rounds and scorings more than the backup knows
    restored = world.coordinate("backup")
    assert (restored.ending, restored.round) == (Ending.DONE, 12)


@pytest.mark.parametrize(
    ("changes", "ends_at"),
    [
        ({"secure_aggregation": {"ring_bits": 16}}, 3),  # rounded at random: the model after round 3 is another
        ({"privacy": PRIVATE}, 2),
    ],
    ids=["rounded at random", "private"],
)
def test_no_second_update_of_a_round_is_had_from_a_coordinator_restored_to_before_it(
    changes: dict[str, Any], ends_at: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(secure_study(5, **changes), tmp_path)

    def back_up(number: int) -> None:
        if number == 2:
            world.restored("coordinator", "backup")

    world.coordinate("coordinator", seen=back_up)
    restored = world.coordinate("backup")
    assert (restored.ending, restored.round) == (Ending.VOID_ROUNDS, ends_at)
    assert "refused: model already summed" in caplog.text
