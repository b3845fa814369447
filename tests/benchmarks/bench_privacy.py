"""Cost of a private step beside a plain one: time as median ratio in one run, peak memory, and a ledger charge.

    python tests/benchmarks/bench_privacy.py                      # every network, one thread
    python tests/benchmarks/bench_privacy.py unet2d-8 --repeats 31
    python tests/benchmarks/bench_privacy.py --device cuda        # adds a row under bf16 autocast

Each variant does the whole step: gradient, clip, noise, optimizer. Variants take turns, and each is compared with the
plain step of its own turn, so that a machine that slows down slows both. ``plain again`` shows what a ratio is worth.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from medfl.client.privacy.clipped import LossFunction, UnitData
from medfl.client.privacy.ledger import Ceilings, Charge, Ledger
from medfl.client.privacy.patient_gradient import private_gradients
from medfl.client.privacy.randomness import SecureGenerator
from medfl.client.privacy.surgery import make_private_ready
from medfl.shared.losses import build_loss
from medfl.shared.memory import keep_freed_buffers
from medfl.shared.privacy import accounting
from medfl.shared.privacy.plan import plan_training
from medfl.shared.privacy.settings import DpSgd, Engine
from medfl.shared.study import Loss
from medfl.shared.zoo import DenseNet121Spec, ResNet18Spec, UNetSpec, build_network

Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """A network and a batch. ``slices`` above 1: that many images for each of the ``units`` patients."""

    spec: UNetSpec | ResNet18Spec | DenseNet121Spec
    dimensions: int
    size: int
    units: int
    slices: int = 1
    limit: float = 1.0  # the ratio that is aimed at


UNET = UNetSpec(channels=(16, 32, 64, 128))
CASES = {
    "unet2d-8": Case(UNET, 2, 128, 8, limit=1.12),
    "unet2d-16": Case(UNET, 2, 128, 16, limit=1.12),
    "unet3d-4": Case(UNET, 3, 48, 4, limit=1.2),
    "resnet18-32": Case(ResNet18Spec(norm="group"), 2, 64, 32, limit=1.3),
    "densenet121-32": Case(DenseNet121Spec(norm="group"), 2, 64, 32, limit=1.5),
    "unet2d-8x4": Case(UNET, 2, 128, 8, slices=4, limit=1.0),
    "resnet18-8x4": Case(ResNet18Spec(norm="group"), 2, 64, 8, slices=4, limit=1.0),
}


def main() -> None:
    """Print one table for each case asked for, then the ledger."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}; all when none is given")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="plain and private only, without peak memory")
    parser.add_argument("--peak", metavar="VARIANT", help=argparse.SUPPRESS)  # one variant, alone in its process
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(unknown)}")
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="Full backward hook")
    logging.getLogger("absl").setLevel(logging.ERROR)
    if options.peak:
        print(json.dumps(peak_megabytes(CASES[options.cases[0]], options.peak, options.device)))
        return
    keep_freed_buffers()  # as wherever a study is trained
    print(f"device {options.device}, {options.threads} thread(s), load average {os.getloadavg()[0]:.1f}")
    for name in options.cases or CASES:
        memory = "" if options.quick else f"{'MB':>8}{'ratio':>8}"
        print(f"\n{name} (aim: {CASES[name].limit:g} x)\n{'':24}{'ms':>10}{'ratio':>8}{memory}")
        wanted = ("plain", "plain again", "private") if options.quick else None
        times = step_times(CASES[name], options.device, options.repeats, wanted)
        peaks = {} if options.quick else {variant: _peak_alone(name, variant, options) for variant in times}
        for variant, taken in times.items():
            ratio = statistics.median(a / b for a, b in zip(taken, times["plain"], strict=True))
            line = f"{variant:24}{statistics.median(taken) * 1e3:10.1f}{ratio:8.2f}"
            if peaks:
                line += f"{peaks[variant]:8.0f}{peaks[variant] / max(peaks['plain'], 1):8.2f}"
            print(line, flush=True)
    first, later = ledger_milliseconds()
    print(f"\nledger charge: first of a process {first:.1f} ms with its accounting, later median {later:.1f} ms")


def step_times(case: Case, device: str, repeats: int, wanted: Collection[str] | None = None) -> dict[str, list[float]]:
    """Seconds of each variant's step, the variants taking turns; two warm-up turns are left out."""
    steps = variants(case, device, wanted)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
        for name, step in steps.items():
            started = _now(device)
            step()
            if turn >= 2:
                taken[name].append(_now(device) - started)
    return taken


def variants(case: Case, device: str, wanted: Collection[str] | None = None) -> dict[str, Step]:
    """Whole training steps by name, each with its own network."""
    loss = build_loss(Loss.DICE_CE) if isinstance(case.spec, UNetSpec) else functional.cross_entropy
    made = {
        "plain": lambda: _plain(case, device, loss),
        "plain again": lambda: _plain(case, device, loss),
        "private": lambda: _private(case, device, loss, Engine.BOOKKEEPING),
    }
    if case.slices == 1:
        made["private, loop"] = lambda: _private(case, device, loss, Engine.LOOP)
        made["private, opacus hooks"] = lambda: _private(case, device, loss, Engine.OPACUS)
    if device == "cuda":
        made["plain, bf16"] = lambda: _autocast(_plain(case, device, loss))
        made["private, bf16"] = lambda: _autocast(_private(case, device, loss, Engine.BOOKKEEPING))
    return {name: make() for name, make in made.items() if wanted is None or name in wanted}


def peak_megabytes(case: Case, variant: str, device: str) -> float:
    """Peak memory of a network, its data and three steps, above what the process held after one step like them.

    That step, of another network of the same size, is there because code is paid for once: pages of libraries, and the
    kernels that oneDNN writes for each shape. On the CPU :func:`_peak_alone` has the C library give every larger buffer
    back as soon as it is free: what counts is what is in use, as PyTorch counts it on a GPU, and not how the heap
    happens to fall into pieces.
    """
    if device == "cuda":
        step = variants(case, device, [variant])[variant]
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            step()
        return torch.cuda.max_memory_allocated() / 1e6
    variants(case, device, [variant])[variant]()
    gc.collect()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    step = variants(case, device, [variant])[variant]
    for _ in range(3):
        step()
    return _resident("VmHWM") - before


def ledger_milliseconds(charges: int = 50) -> tuple[float, float]:
    """Milliseconds of a process's first charge, without preparation, and of the median later one."""
    plan = plan_training(
        DpSgd(mode="dp-sgd", epsilon=8.0, noise_multiplier=4.0), units=200, patients=200, rounds=charges + 1
    )
    accounting._one_step.cache_clear()
    accounting._composed.cache_clear()
    taken = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        path = Path(folder) / "ledger.jsonl"
        with Ledger(path, cohort="all", ceilings=Ceilings(8.0, 8.0)) as ledger:
            ledger.fix_plan("a" * 64, plan, patients=200)
            for number in range(charges):
                if number == 1:
                    ledger.remaining("a" * 64)  # shown before training; makes the round's check a look-up
                started = time.perf_counter()
                ledger.charge(Charge("a" * 64, number, str(number), plan.round_cost))
                taken.append((time.perf_counter() - started) * 1e3)
    return taken[0], statistics.median(taken[1:])


def _network(case: Case, device: str) -> nn.Module:
    network = build_network(case.spec, dimensions=case.dimensions, inputs=1, outputs=2, seed=0)
    make_private_ready(network)
    return network.to(device).train()


def _units(case: Case, device: str) -> list[UnitData]:
    space = [case.size] * case.dimensions
    labels = space if isinstance(case.spec, UNetSpec) else []
    torch.manual_seed(0)
    return [
        (torch.randn(case.slices, 1, *space, device=device), torch.randint(0, 2, (case.slices, *labels), device=device))
        for _ in range(case.units)
    ]


def _plain(case: Case, device: str, loss: LossFunction) -> Step:
    network, units = _network(case, device), _units(case, device)
    images, labels = (torch.cat(part) for part in zip(*units, strict=True))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(network(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _private(case: Case, device: str, loss: LossFunction, engine: Engine) -> Step:
    network, units = _network(case, device), _units(case, device)
    optimizer, generator = torch.optim.SGD(network.parameters(), lr=1e-3), SecureGenerator()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        private_gradients(
            network,
            loss,
            units,
            clip_norm=1.0,
            noise_multiplier=1.0,
            expected_patients=float(case.units),
            generator=generator,
            engine=engine,
        )
        optimizer.step()

    return step


def _autocast(step: Step) -> Step:
    def mixed() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            step()

    return mixed


def _peak_alone(name: str, variant: str, options: argparse.Namespace) -> float:
    command = [sys.executable, __file__, name, "--peak", variant, "--device", options.device]
    done = subprocess.run(
        [*command, "--threads", str(options.threads)],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        check=True,
        capture_output=True,
        text=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def _now(device: str) -> float:
    """CPU seconds of this process: what other processes take does not count. On a GPU, wall time after it is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _resident(which: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
