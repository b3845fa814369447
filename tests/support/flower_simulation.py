"""Run as a program: a tiny study under Flower's own simulation runtime (Ray), the final weights as the last line.

python flower_simulation.py FOLDER
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from threading import Event

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import torch
from flwr.app import Context
from flwr.serverapp import Grid
from flwr.simulation import run_simulation
from signer import signature_of
from sites import make_site
from tiny import classes_study, site_data

from medfl.client.app import build_client_app
from medfl.client.records import FolderRecords
from medfl.client.site import Site
from medfl.server.app import build_server_app
from medfl.server.reporter import Silent
from medfl.server.rounds import Rounds
from medfl.shared.study import Study
from medfl.shared.weights import weights_digest

NAMES = ("north", "south")


def study() -> Study:
    """The same study for the program and for the test that compares."""
    return classes_study(training={"batch_size": 3, "steps": 4}, rounds={"patience_s": 90, "deadline_s": 90})


class AllNodes:
    """Whoever Flower's grid knows."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def online(self) -> Mapping[int, str]:
        return {node: hashlib.sha256(str(node).encode()).hexdigest() for node in self._grid.get_node_ids()}

    def enrolled(self) -> Collection[str]:
        return self.online().values()

    def joined(self) -> Mapping[int, str]:
        return dict.fromkeys(self.online(), "")


def main(folder: Path) -> None:
    """Simulate with two SuperNodes."""

    def site_of(context: Context) -> Site:  # in whichever of Ray's processes the message has landed
        torch.set_num_threads(1)
        number = int(context.node_config["partition-id"])
        home = folder / NAMES[number]
        home.mkdir(exist_ok=True)
        data = site_data(study(), seed=number)
        return make_site(study(), home, name=NAMES[number], data=data, records=FolderRecords(home))

    digests: list[str] = []

    def work(grid: Grid, context: Context) -> None:
        rounds = Rounds(
            study(),
            grid,
            AllNodes(grid),
            checkpoints=None,
            reporter=Silent(),
            stop=Event(),
            signature=signature_of(study()),
        )
        result = rounds.run()
        digests.append(f"{result.ending.value} {result.round} {weights_digest(result.weights)}")

    run_simulation(
        build_server_app(work),
        build_client_app(site_of),
        num_supernodes=len(NAMES),
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 1}},
    )
    print(digests[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
