"""The simulator against a bare loop that does the same arithmetic, each in its own process, one thread.

    python tests/benchmarks/bench_simulation.py [--repeats 3]

The job: 4 sites with 32 images of 128x128, MONAI UNet 16-32-64-128, batch 8, one epoch a round, 5 rounds, FedAvg.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SITES, IMAGES, SIZE, ROUNDS, BATCH, RATE = 4, 32, 128, 5, 8, 1e-3
STUDY = {
    "name": "bench",
    "task": "segmentation",
    "data": {
        "modality": "ct",
        "dimensions": 2,
        "classes": ["background", "lesion"],
        "preprocessing": {"normalise": "zscore", "size": [SIZE, SIZE]},
    },
    "model": {"name": "unet", "channels": [16, 32, 64, 128], "residual_units": 2},
    "training": {"loss": "dice-ce", "learning_rate": RATE, "batch_size": BATCH, "epochs": 1},
    "rounds": {"count": ROUNDS, "minimum_sites": SITES, "evaluate_every": ROUNDS},
    "privacy": {"mode": "none"},
    "secure_aggregation": {"mode": "none"},
}


def site_tensors(site: int) -> tuple[Any, Any]:
    """Images float32 (32, 1, 128, 128) and masks uint8 (32, 128, 128): discs on noise, the same for the same site."""
    import torch

    generator = torch.Generator().manual_seed(site)
    centres = torch.randint(24, SIZE - 24, (IMAGES, 2), generator=generator)
    radii = torch.randint(8, 20, (IMAGES,), generator=generator)
    grid = torch.arange(SIZE)
    rows = (grid[None, :, None] - centres[:, 0, None, None]) ** 2
    columns = (grid[None, None, :] - centres[:, 1, None, None]) ** 2
    masks = rows + columns < radii[:, None, None] ** 2
    images = masks.float() + torch.randn((IMAGES, SIZE, SIZE), generator=generator)
    return images[:, None].contiguous(), masks.to(torch.uint8)


def plain(began: float) -> dict[str, Any]:
    """The bare loop: same networks, batches, losses and averages, nothing else."""
    import torch
    from monai.losses.dice import DiceCELoss
    from monai.networks.nets.unet import UNet

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = UNet(
        spatial_dims=2, in_channels=1, out_channels=2, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2
    )
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    sites = [site_tensors(site) for site in range(SITES)]
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    started = time.perf_counter()
    losses, ends = [], []
    for round_number in range(1, ROUNDS + 1):
        total = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        seen = 0.0
        for site, (images, masks) in enumerate(sites):
            seed = hashlib.sha256(f"0/site{site}/{round_number}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "little") >> 1)
            network.load_state_dict(state)
            network.train()
            optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
            for rows in torch.randperm(IMAGES, generator=generator).split(BATCH):
                loss = loss_of(network(images[rows]), masks[rows][:, None].long())
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                seen += float(loss) * len(rows)
            for name, tensor in network.state_dict().items():
                total[name] += tensor / SITES
        state = total
        losses.append(seen / (SITES * IMAGES))
        ends.append(time.perf_counter() - started)
    return measured(began, started, losses, ends)


def medfl(began: float) -> dict[str, Any]:
    """The same job through Study, ServerApp, ClientApp and the round loop."""
    import torch

    import medfl.shared.environment  # noqa: F401 - before flwr
    from medfl.client.data.splits import Split
    from medfl.client.data.tensors import SiteData, TensorSet
    from medfl.shared.logs import quiet_libraries
    from medfl.shared.study import Study
    from medfl.simulations.federation import federate

    quiet_libraries()
    torch.set_num_threads(1)
    study = Study.model_validate(STUDY)
    sites = {}
    for site in range(SITES):
        images, masks = site_tensors(site)
        patients = torch.arange(IMAGES)
        train = TensorSet(images, masks, patients)
        held_out = TensorSet(images[:1], masks[:1], patients[:1])
        sites[f"site{site}"] = SiteData({Split.TRAIN: train, Split.VALIDATION: held_out}, report=None)  # type: ignore[arg-type]
    started = time.perf_counter()
    rounds = federate(study, sites).rounds
    ends = [sum(r.seconds for r in rounds[: n + 1]) for n in range(len(rounds))]
    return measured(began, started, [r.training["loss"] for r in rounds], ends)


def measured(began: float, started: float, losses: list[float], ends: list[float]) -> dict[str, Any]:
    """What a worker reports: seconds, mebibytes, losses."""
    return {
        "start-up": started - began,
        "training": time.perf_counter() - started,
        "round 1": ends[0],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "losses": losses,
    }


def empty_rounds(sites: int) -> float:
    """Median milliseconds of a round in which each site answers at once with an update of zeros."""
    import numpy as np
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp

    import medfl.shared.environment  # noqa: F401 - before flwr
    from medfl.server.reporter import Silent
    from medfl.server.rounds import Rounds
    from medfl.shared.logs import quiet_libraries
    from medfl.shared.messages import EvaluateReply, OfferAccepted, TrainReply
    from medfl.shared.study import Study
    from medfl.simulations.grid import VirtualGrid

    quiet_libraries()
    app = ClientApp()
    update = np.zeros(2 * 16 * 16 + 2, np.float32)  # logistic regression of two classes on 16x16 pixels

    @app.query("offer")
    def offer(message: Message, context: Context) -> Message:
        return Message(OfferAccepted().record(), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(TrainReply(update, examples=1).record(), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(EvaluateReply().record(), reply_to=message)

    class Seconds(Silent):
        times: list[float] = []

        def finished_round(self, report: Any) -> None:
            self.times.append(report.seconds)

    study = Study.model_validate(
        STUDY
        | {
            "task": "classification",
            "data": {**STUDY["data"], "preprocessing": {"normalise": "zscore", "size": [16, 16]}},  # type: ignore[dict-item]
            "model": {"name": "logistic", "inputs": 256},
            "training": {"loss": "cross-entropy", "epochs": 1},
            "rounds": {"count": 30, "minimum_sites": sites, "evaluate_every": 30},
        }
    )
    from threading import Event

    seconds = Seconds()
    seconds.times = []
    grid = VirtualGrid(app, [f"site{number}" for number in range(sites)])
    Rounds(study, grid, grid, checkpoints=None, reporter=seconds, stop=Event()).run()
    return 1000 * statistics.median(seconds.times)


def in_own_process(worker: str) -> dict[str, Any]:
    """Run one worker afresh and read what it reports."""
    said = subprocess.run(
        [sys.executable, __file__, "--worker", worker], capture_output=True, text=True, check=True
    ).stdout
    report: dict[str, Any] = json.loads(said.splitlines()[-1])
    return report


def main() -> None:
    """Print the table."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", choices=("plain", "medfl"))
    options = parser.parse_args()
    workers: dict[str, Callable[[float], dict[str, Any]]] = {"plain": plain, "medfl": medfl}
    if options.worker:
        print(json.dumps(workers[options.worker](began)))
        return
    runs = [(in_own_process("plain"), in_own_process("medfl")) for _ in range(options.repeats)]
    difference = max(abs(a - b) for p, m in runs for a, b in zip(p["losses"], m["losses"], strict=True))
    print(f"{'':24}{'bare loop':>12}{'medfl-sim':>12}{'ratio':>8}   (median of {options.repeats}, ratio pair by pair)")
    for what, unit in (("start-up", "s"), ("training", "s"), ("round 1", "s"), ("peak", "MiB")):
        left, right = (statistics.median(run[side][what] for run in runs) for side in (0, 1))
        ratio = statistics.median(m[what] / p[what] for p, m in runs)
        print(f"{what + ', ' + unit:24}{left:12.2f}{right:12.2f}{ratio:8.2f}")
    print(f"largest difference of a round's loss: {difference:.1e}")
    for sites in (4, 50):
        print(f"empty round, {sites:2} virtual sites: {empty_rounds(sites):.1f} ms")


if __name__ == "__main__":
    main()
