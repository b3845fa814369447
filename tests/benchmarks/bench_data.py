"""What the data path costs beside the least that it could: ``python tests/benchmarks/bench_data.py [--device cuda]``.

Prints a table of ratios: an epoch over resident tensors (plain and augmented) beside a bare loop over ready-made
batches with the same model; ingest beside highdicom alone; a second start from the cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import torch
from monai.networks.nets import UNet
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from dicom_lab import KEY, ct, save, seg, spec

from medfl.client.data.augment import augmenter
from medfl.client.data.batches import epoch
from medfl.client.data.load import load_site_data
from medfl.client.data.settings import DicomSettings
from medfl.client.data.tensors import TensorSet
from medfl.shared.data_spec import Augmentation


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def epochs(device: str) -> list[tuple[str, float]]:
    """Ratios of an epoch of 256 images of 128x128 to a bare loop, each the median of interleaved pairs."""
    count, batch = (256, 8) if device == "cpu" else (4096, 32)
    images = torch.rand(count, 1, 128, 128, device=device)
    labels = (images[:, 0] > 0.8).to(torch.uint8)
    data = TensorSet(images, labels, torch.zeros(count, dtype=torch.int64, device=device))
    ready = list(zip(images.split(batch), labels.split(batch), strict=True))
    model = UNet(2, 1, 2, (16, 32, 64, 128), (2, 2, 2)).to(device)
    optimiser = torch.optim.SGD(model.parameters(), 1e-3)

    def train(batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        for x, y in batches:
            optimiser.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(model(x), y.long()).backward()
            optimiser.step()

    generator = torch.Generator(device).manual_seed(0)
    changes = augmenter(Augmentation(flip=True, rotate_degrees=15, intensity=0.1))
    kinds: dict[str, Callable[[], object]] = {
        "epoch over resident data": lambda: train(epoch(data, batch, generator)),
        "the same with flips, rotations, intensity": lambda: train(epoch(data, batch, generator, changes)),
    }
    train(ready)
    ratios: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(5):
        for name, kind in kinds.items():
            ratios[name].append(seconds(kind) / seconds(lambda: train(ready)))
    return [(f"{name} / bare loop ({device})", statistics.median(values)) for name, values in ratios.items()]


def ingest(folder: Path, series: int = 6) -> list[tuple[str, float]]:
    """Loading 40-slice 512x512 series with labels, beside highdicom on the same files."""
    rng = np.random.default_rng(0)
    for number in range(series):
        values = rng.integers(-1000, 1000, (40, 512, 512)).astype(np.int16)
        slices = ct(values, name=f"P{number}")
        mask = np.zeros(values.shape, bool)
        mask[10:20, 100:200, 100:200] = True
        save([*slices, seg(slices, {"Lesion": mask})], folder / str(number))
    study = spec(preprocessing={"normalise": "none", "size": (512, 512)}, dimensions=2)
    settings = DicomSettings.model_validate({"source": "dicom", "folder": folder, "split": {"min_patients": 3}})

    def alone() -> None:
        for number in range(series):
            files = [pydicom.dcmread(path) for path in sorted((folder / str(number)).iterdir())]
            hd.get_volume_from_series([f for f in files if f.Modality == "CT"], dtype=np.float32)

    alone()
    pairs = [
        (seconds(lambda: load_site_data(settings, study, task="segmentation", key=KEY)), seconds(alone))
        for _ in range(3)
    ]
    return [("ingest with labels / get_volume_from_series alone", statistics.median(a / b for a, b in pairs))]


def restart(folder: Path, series: int = 250, slices: int = 40) -> list[tuple[str, float]]:
    """Seconds of the second start with ``series * slices`` slices of 128x128."""
    rng = np.random.default_rng(0)
    for number in range(series):
        scan = ct(rng.integers(-1000, 1000, (slices, 128, 128)).astype(np.int16), name=f"P{number}")
        mask = np.zeros((slices, 128, 128), bool)
        mask[3:9, 20:60, 20:60] = True
        save([*scan, seg(scan, {"Lesion": mask})], folder / "data" / str(number))
    study = spec(preprocessing={"normalise": "window", "window": (-1000, 1000), "size": (128, 128)})
    settings = DicomSettings(source="dicom", folder=folder / "data")

    def load() -> None:
        load_site_data(settings, study, task="segmentation", key=KEY, cache_dir=folder / "cache")

    first, second = seconds(load), seconds(load)
    name = f"{series * slices} slices of 128x128"
    return [(f"first start, {name}, seconds", first), (f"second start from the cache, {name}, seconds", second)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer series")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = epochs(options.device)
    with tempfile.TemporaryDirectory() as folder:
        results += ingest(Path(folder) / "ingest", 3 if options.quick else 6)
        results += restart(Path(folder) / "restart", 25 if options.quick else 250)
    for name, value in results:
        print(f"{name:75s} {value:8.3f}")


if __name__ == "__main__":
    main()
