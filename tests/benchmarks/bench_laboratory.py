"""The simulator with many sites beside bare loops that do the same arithmetic, one thread.

    python tests/benchmarks/bench_laboratory.py [--rounds 1000] [--repeats 3] [--without-ray]

Two jobs. Small: 1,000 sites of 32 samples with 20 features, logistic regression, SGD, batch 8, 10 sites a round
(pfl-research's benchmark of overhead); once more with the 10 sites of a round trained as one batched model. The bare
loop runs in the same process, one round after each of the simulator's, so that both meet the same machine. Many: the
U-Net of bench_simulation.py at 4, 50 and 500 sites, 4 or 8 of them active in each of 3 rounds; the peak of memory above
what the data take must not grow with the number of sites.
Seconds are of the processor, so that a busy machine does not blur them. At last the U-Net among 4 sites once more in
this process and under Flower's own runtime with Ray on one CPU, from the first round to the last, in seconds of the
clock: Ray's work is in other processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

FEATURES, SAMPLES, BATCH, ACTIVE, SITES, RATE = (4, 5), 32, 8, 10, 1000, 0.05


def small_study(rounds: int) -> dict[str, Any]:
    """The small job as a study."""
    return {
        "name": "small",
        "task": "classification",
        "data": {
            "modality": "photo",
            "dimensions": 2,
            "classes": ["no", "yes"],
            "preprocessing": {"normalise": "none", "size": list(FEATURES)},
        },
        "model": {"name": "logistic", "inputs": 20},
        "training": {
            "loss": "cross-entropy",
            "optimizer": "sgd",
            "learning_rate": RATE,
            "batch_size": BATCH,
            "epochs": 1,
        },
        "rounds": {"count": rounds, "minimum_sites": ACTIVE, "sites_per_round": ACTIVE, "evaluate_every": rounds},
        "privacy": {"mode": "none"},
        "secure_aggregation": {"mode": "none"},
    }


def small_data(site: int) -> tuple[Any, Any]:
    """Features float32 (32, 1, 4, 5) and classes int64 (32,)."""
    import torch

    generator = torch.Generator().manual_seed(site)
    images = torch.randn((SAMPLES, 1, *FEATURES), generator=generator)
    return images, (images.sum((1, 2, 3)) > 0).long()


def seed_of(site: str, round_number: int) -> int:
    """The seed of one site's round, as the product draws it."""
    digest = hashlib.sha256(f"0/{site}/{round_number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class BareSmall:
    """The bare loop of the small job, one round at a time: the same batches, losses and means."""

    def __init__(self, rounds: int) -> None:
        import torch
        from torch import nn

        from medfl.shared.algorithms.travel import build_study_network
        from medfl.shared.study import Study

        self.network = build_study_network(Study.model_validate(small_study(rounds)))
        self.loss_of = nn.CrossEntropyLoss()
        self.data = [small_data(number) for number in range(SITES)]
        self.state = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        torch.optim.SGD([torch.zeros(1, requires_grad=True)]).step()  # its first step imports a compiler: not counted

    def round(self, number: int) -> None:
        """Train ten sites one after the other and take their mean."""
        import torch

        total = {name: torch.zeros_like(tensor) for name, tensor in self.state.items()}
        for node in sorted(random.Random(f"0/{number - 1}").sample(range(2, SITES + 2), ACTIVE)):
            images, labels = self.data[node - 2]
            generator = torch.Generator().manual_seed(seed_of(f"s{node - 2:04d}", number))
            self.network.load_state_dict(self.state)
            self.network.train()
            optimizer = torch.optim.SGD(self.network.parameters(), lr=RATE)
            for rows in torch.randperm(SAMPLES, generator=generator).split(BATCH):
                loss = self.loss_of(self.network(images[rows]), labels[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            for name, tensor in self.network.state_dict().items():
                total[name] += tensor / ACTIVE
        self.state = total

    @property
    def weights(self) -> Any:
        """The model as a flat vector."""
        import torch

        return torch.cat([tensor.flatten() for tensor in self.state.values()]).numpy()


def small(rounds: int) -> dict[str, Any]:
    """The small job one by one and batched, a round of the bare loop after each of their rounds; seconds of each."""
    import torch

    from medfl.server.reporter import RoundReport, Silent
    from medfl.shared.logs import quiet_libraries
    from medfl.shared.study import Study
    from medfl.simulations.federation import federate

    class Beside(Silent):
        """Runs the bare loop's round when one of the simulator's is finished, and keeps book of its time."""

        def __init__(self) -> None:
            self.bare, self.seconds = BareSmall(rounds), 0.0

        def finished_round(self, report: RoundReport) -> None:
            began = time.process_time()
            self.bare.round(report.round)
            self.seconds += time.process_time() - began

    quiet_libraries()
    torch.set_num_threads(1)
    study = Study.model_validate(small_study(rounds))
    sites = {f"s{number:04d}": as_site(*small_data(number)) for number in range(SITES)}
    report: dict[str, Any] = {}
    weights = {}
    for how, at_once in (("one by one", 1), ("batched", ACTIVE)):
        beside, began = Beside(), time.process_time()
        weights[how] = federate(study, sites, at_once=at_once, reporter=beside).result.weights
        whole = time.process_time() - began
        report[how] = beside.seconds, whole - beside.seconds
        report[f"{how}, away"] = float(abs(weights[how] - beside.bare.weights).max())
    report["batched from one by one"] = float(abs(weights["batched"] - weights["one by one"]).max())
    return report


def on_ray(rounds: int) -> dict[str, Any]:
    """The U-Net of bench_simulation.py among 4 sites, here and under Flower's runtime: seconds of all rounds."""
    import torch
    from bench_simulation import STUDY, site_tensors

    from medfl.shared.logs import quiet_libraries
    from medfl.shared.study import Study
    from medfl.simulations.federation import federate
    from medfl.simulations.ray_engine import federate_on_ray

    quiet_libraries()
    torch.set_num_threads(1)
    settings = {"count": rounds, "minimum_sites": 4, "evaluate_every": rounds}
    study = Study.model_validate(STUDY | {"rounds": settings})
    data = {f"s{number}": as_site(*site_tensors(number)) for number in range(4)}
    here = federate(study, data)
    started = time.perf_counter()
    there = federate_on_ray(study, data, cpus=1)
    return {
        "here": sum(report.seconds for report in here.rounds),
        "ray": sum(report.seconds for report in there.rounds),
        "with start": time.perf_counter() - started,
        "away": float(abs(here.result.weights - there.result.weights).max()),
    }


def as_site(images: Any, labels: Any) -> Any:
    """Training data, and one held-out example."""
    import torch

    from medfl.client.data.splits import Split
    from medfl.client.data.tensors import SiteData, TensorSet

    patients = torch.arange(len(images))
    held_out = TensorSet(images[:1], labels[:1], patients[:1])
    return SiteData({Split.TRAIN: TensorSet(images, labels, patients), Split.VALIDATION: held_out}, report=None)  # type: ignore[arg-type]


def many(sites: int, *, bare: bool) -> dict[str, Any]:
    """The U-Net of bench_simulation.py among ``sites``, at most 8 active in each of 3 rounds of one epoch."""
    import torch
    from bench_simulation import STUDY, site_tensors  # type: ignore[import-not-found]

    from medfl.client.data.batches import epoch
    from medfl.client.workbench import make_bench
    from medfl.shared.logs import quiet_libraries
    from medfl.shared.losses import build_loss
    from medfl.shared.study import Study
    from medfl.simulations.federation import federate

    quiet_libraries()
    torch.set_num_threads(1)
    active, rounds = min(sites, 8), 3
    settings = {"count": rounds, "minimum_sites": active, "sites_per_round": active, "evaluate_every": rounds}
    study = Study.model_validate(STUDY | {"rounds": settings})
    shared = [site_tensors(number) for number in range(4)]  # images are shared, so that memory is the simulator's own
    data = {f"s{number:03d}": as_site(*shared[number % 4]) for number in range(sites)}
    before, started = peak(), time.process_time()
    if bare:
        bench, loss_of = make_bench(study, torch.device("cpu")), build_loss(study.training.loss)
        names = list(data)
        state = {name: tensor.clone() for name, tensor in bench.network.state_dict().items()}
        for number in range(1, rounds + 1):
            total = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
            nodes = range(2, sites + 2)
            cohort = sorted(random.Random(f"0/{number - 1}").sample(nodes, active)) if active < sites else nodes
            for node in cohort:
                bench.network.load_state_dict(state)
                bench.network.train()
                optimizer = torch.optim.Adam(bench.network.parameters(), lr=study.training.learning_rate)
                part = next(iter(data[names[node - 2]].splits.values()))
                generator = torch.Generator().manual_seed(seed_of(names[node - 2], number))
                for images, labels in epoch(part, study.training.batch_size, generator):
                    loss = loss_of(bench.network(images), labels)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                for name, tensor in bench.network.state_dict().items():
                    total[name] += tensor / active
            state = total
    else:
        federate(study, data)
    return {"seconds": time.process_time() - started, "peak": peak() - before}


def peak() -> float:
    """Peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_own_process(*worker: str) -> dict[str, Any]:
    """Run one worker afresh and read what it reports."""
    command = [sys.executable, __file__, "--worker", *worker]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    report: dict[str, Any] = json.loads(said.splitlines()[-1])
    return report


def work(worker: list[str]) -> dict[str, Any]:
    """What a child process does."""
    what, number = worker[0], int(worker[1])
    match what:
        case "small":
            return small(number)
        case "ray":
            return on_ray(number)
        case "many-plain":
            return many(number, bare=True)
        case _:
            return many(number, bare=False)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sites", type=int, nargs="*", default=[4, 50, 500])
    parser.add_argument("--without-ray", action="store_true")
    parser.add_argument("--worker", nargs=2)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker)))
        return
    print(f"{'':40}{'bare loop':>12}{'medfl-sim':>12}{'ratio':>8}")
    runs = [in_own_process("small", str(options.rounds)) for _ in range(options.repeats)]
    show(f"1,000 sites, 10 active, {options.rounds} rounds, s", [run["one by one"] for run in runs])
    show("  10 as one batched model, s", [run["batched"] for run in runs])
    for what in ("one by one, away", "batched, away", "batched from one by one"):
        print(f"  largest difference of a weight, {what}: {max(run[what] for run in runs):.1e}")
    for sites in options.sites:
        runs = [
            (in_own_process("many-plain", str(sites)), in_own_process("many-medfl", str(sites)))
            for _ in range(options.repeats)
        ]
        show(
            f"U-Net, {sites} sites, {min(sites, 8)} active, 3 rounds, s",
            [(p["seconds"], m["seconds"]) for p, m in runs],
        )
        show("  memory above the data, MiB", [(p["peak"], m["peak"]) for p, m in runs])
    if not options.without_ray:
        found = in_own_process("ray", "5")
        print(f"U-Net, 4 sites, 5 rounds, seconds of the clock: {found['here']:.1f} here, {found['ray']:.1f} under Ray")
        print(f"  ({found['with start']:.1f} with Ray's start; largest difference of a weight {found['away']:.1e})")


def show(what: str, pairs: list[tuple[float, float]]) -> None:
    """One line: medians, and the median of the ratios pair by pair."""
    left, right = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
    print(f"{what:40}{left:12.2f}{right:12.2f}{statistics.median(b / a for a, b in pairs):8.2f}", flush=True)


if __name__ == "__main__":
    main()
