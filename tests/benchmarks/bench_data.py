"""What the data path costs beside the least that it could: ``python tests/benchmarks/bench_data.py [PART...]``.

Prints a table of ratios. ``epochs``: over resident tensors, over tensors that stay on the host, and of MONAI's
CacheDataset with DataLoader, beside a bare loop over ready-made batches with the same model. ``ingest``,
``compressed``: beside highdicom alone, with the same decoding. ``linear``: time and memory of many series.
``restart``: from the cache.

Times are processor time on the CPU, that of helper processes which decode in it (other work on the machine does not
count), and wall time on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import psutil
import pydicom
import torch
from monai.data import CacheDataset, DataLoader
from monai.networks.nets import UNet
from monai.transforms import (
    Compose,
    EnsureTyped,
    RandFlipd,
    RandRotated,
    RandScaleIntensityd,
    RandShiftIntensityd,
)
from pydicom.uid import UID, JPEG2000Lossless
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from dicom_lab import KEY, ct, save, seg, spec

from medfl.client.data.augment import augmenter
from medfl.client.data.batches import epoch
from medfl.client.data.load import load_site_data
from medfl.client.data.settings import DicomSettings, TableLabels
from medfl.client.data.splits import Split
from medfl.client.data.tensors import TensorSet
from medfl.shared.data_spec import Augmentation


def seconds(action: Callable[[], object]) -> float:
    """Processor time of this process and of those that it started and that have ended, or wall time on a GPU."""
    clock = time.perf_counter if torch.cuda.is_available() else _processor_time
    started = clock()
    action()
    for helper in multiprocessing.active_children():
        helper.join()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started


def _processor_time() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def epochs(device: str, *, quick: bool = False) -> list[tuple[str, float]]:
    """Ratios of an epoch of 256 (quick: 64) images of 128x128 to a bare loop, each the median of five.

    On the CPU each step stands beside a bare step, so that both see the same machine; on a GPU, where a step ends after
    the call that began it, each epoch beside a bare epoch. There also the bytes that an epoch sends to the device, and
    the memory that all of it takes.
    """
    count, batch = (64 if quick else 256, 8) if device == "cpu" else (4096, 32)
    images = torch.rand(count, 1, 128, 128, device=device)
    labels = (images[:, 0] > 0.8).to(torch.uint8)
    data = TensorSet(images, labels, torch.zeros(count, dtype=torch.int64, device=device))
    streamed = replace(data, images=images.cpu(), streamed=True)
    ready = list(zip(images.split(batch), labels.split(batch), strict=True))
    model = UNet(2, 1, 2, (16, 32, 64, 128), (2, 2, 2)).to(device)
    optimiser = torch.optim.SGD(model.parameters(), 1e-3)

    def train(batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        for x, y in batches:
            optimiser.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(model(x), y.long()).backward()
            optimiser.step()

    def ratio(batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        together = 1 if device == "cpu" else len(ready)
        bare, other = 0.0, 0.0
        coming = iter(batches)
        for start in range(0, len(ready), together):
            bare += seconds(lambda: train(ready[start : start + together]))  # noqa: B023
            other += seconds(lambda: train(itertools.islice(coming, together)))
        return other / bare

    generator = torch.Generator(device).manual_seed(0)
    changes = augmenter(Augmentation(flip=True, rotate_degrees=15, intensity=0.1))
    plain, changed = monai_loaders(images.cpu(), labels.cpu(), batch)

    def from_monai(loader: DataLoader) -> Iterable[tuple[Tensor, Tensor]]:
        for some in loader:
            yield some["image"].to(device), some["label"][:, 0].to(device)

    kinds: dict[str, Callable[[], Iterable[tuple[Tensor, Tensor]]]] = {
        "epoch over resident data": lambda: epoch(data, batch, generator),
        "the same with flips, rotations, intensity": lambda: epoch(data, batch, generator, changes),
        "epoch over data that stay on the host": lambda: epoch(streamed, batch, generator),
        "MONAI CacheDataset and DataLoader": lambda: from_monai(plain),
        "the same with flips, rotations, intensity (MONAI)": lambda: from_monai(changed),
    }
    train(ready)
    ratios: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(5):
        for name, kind in kinds.items():
            ratios[name].append(ratio(kind()))
    results = [(f"{name} / bare loop ({device})", statistics.median(values)) for name, values in ratios.items()]
    if device != "cpu":
        for name, kind in kinds.items():
            results.append((f"{name}: bytes to the device", bytes_to_device(lambda: train(kind()))))  # noqa: B023
        results.append(("device memory at most, MB", torch.cuda.max_memory_allocated() / 1e6))
    return results


def bytes_to_device(action: Callable[[], object]) -> float:
    """Bytes that ``action`` copies from the host's memory to the GPU, as its profiler counts them."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        action()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        seen.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    return float(sum(event["args"]["bytes"] for event in events if "HtoD" in str(event.get("name"))))


def monai_loaders(images: Tensor, labels: Tensor, batch: int) -> tuple[DataLoader, DataLoader]:
    """MONAI's usual way, plain and with the same kinds of augmentation; items are in its cache already."""
    items = [{"image": image, "label": label[None].float()} for image, label in zip(images, labels, strict=True)]
    both = ["image", "label"]
    ready: list[Any] = [EnsureTyped(both)]
    changes = [
        RandFlipd(both, prob=0.5, spatial_axis=0),
        RandFlipd(both, prob=0.5, spatial_axis=1),
        RandRotated(both, range_x=math.radians(15), prob=1, mode=("bilinear", "nearest"), padding_mode="border"),
        RandScaleIntensityd("image", factors=0.1, prob=1),
        RandShiftIntensityd("image", offsets=0.1, prob=1),
    ]
    return tuple(  # type: ignore[return-value]
        DataLoader(CacheDataset(items, Compose(steps), progress=False), batch_size=batch, shuffle=True)
        for steps in (ready, ready + changes)
    )


def ingest(folder: Path, name: str, syntax: UID | None, series: int = 3, repeats: int = 5) -> list[tuple[str, float]]:
    """Loading 40-slice 512x512 series, alone and with labels, beside highdicom, which reads the images alone."""
    rng = np.random.default_rng(0)
    smooth = np.cumsum(rng.integers(-3, 4, (40, 512, 512)), axis=2).clip(-1000, 3000).astype(np.int16)
    for number in range(series):
        slices = ct(smooth + np.int16(number), name=f"P{number}")
        mask = np.zeros(smooth.shape, bool)
        mask[10:20, 100:200, 100:200] = True
        label = seg(slices, {"Lesion": mask})
        for dataset in slices if syntax else []:
            dataset.compress(syntax, generate_instance_uid=False)
        save([*slices, label], folder / str(number))
    return _beside_highdicom(folder, series, name, repeats)


def _beside_highdicom(folder: Path, series: int, name: str, repeats: int) -> list[tuple[str, float]]:
    study = spec(preprocessing={"normalise": "none", "size": (512, 512)}, dimensions=2)
    settings = DicomSettings.model_validate({"source": "dicom", "folder": folder, "split": {"min_patients": 3}})

    rows = ["patient,label", *(f"P{number},{number % 2}" for number in range(series))]
    (table := folder.parent / f"{folder.name}.csv").write_text("\n".join(rows))
    of_table = settings.model_copy(update={"labels": TableLabels(kind="table", file=table)})

    def load(cache: Path | None = None) -> None:
        load_site_data(settings, study, task="segmentation", key=KEY, cache_dir=cache)

    def images() -> None:
        load_site_data(of_table, study, task="classification", key=KEY)

    def alone() -> None:
        for number in range(series):
            files = [pydicom.dcmread(path) for path in sorted((folder / str(number)).iterdir())]
            hd.get_volume_from_series([f for f in files if f.Modality == "CT"], dtype=np.float32)

    def into_a_new_cache() -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as cache:
            load(Path(cache))

    seconds(alone)
    seconds(load)
    actions = {
        ", images": images,
        ", with SEG labels": load,
        ", with SEG labels, into the encrypted cache": into_a_new_cache,
    }
    found: dict[str, list[float]] = {kind: [] for kind in actions}
    for _ in range(repeats):
        for kind, action in actions.items():
            reference = seconds(alone)
            found[kind].append(seconds(action) / reference)
    title = f"ingest ({name}{{}}) / get_volume_from_series alone"
    return [(title.format(kind), statistics.median(values)) for kind, values in found.items()]


def linear(folder: Path, most: int = 1000) -> list[tuple[str, float]]:
    """Milliseconds a series, and memory above what is kept, of ``most`` and fewer series of 8 slices of 128x128."""
    rng = np.random.default_rng(0)
    values = rng.integers(-1000, 1000, (8, 128, 128)).astype(np.int16)
    rows, results = ["patient,label"], []
    study = spec(preprocessing={"normalise": "window", "window": (-1000, 1000), "size": (8, 8)})
    written = 0
    for count in (most // 4, most // 2, most):
        for number in range(written, count):
            save(ct(values, name=f"P{number}"), folder / "data" / str(number))
            rows.append(f"P{number},{number % 2}")
        written = count
        (folder / "labels.csv").write_text("\n".join(rows))
        labels = {"kind": "table", "file": folder / "labels.csv"}
        settings = DicomSettings.model_validate({"source": "dicom", "folder": folder / "data", "labels": labels})
        gc.collect()
        before = psutil.Process().memory_info().rss
        highest = 0

        def looked(what: str, done: int, total: int) -> None:
            nonlocal highest
            highest = max(highest, psutil.Process().memory_info().rss)

        took = seconds(
            lambda: load_site_data(settings, study, task="classification", key=KEY, progress=looked)  # noqa: B023
        )
        results.append((f"{count} series of 8 slices of 128x128, milliseconds each", 1000 * took / count))
        results.append((f"{count} series, MB of memory more than before", (highest - before) / 1e6))
    return results


def restart(folder: Path, series: int = 250, slices: int = 40) -> list[tuple[str, float]]:
    """Seconds of the second start with ``series * slices`` slices of 128x128, kept in 16 bits and in 32."""
    rng = np.random.default_rng(0)
    for number in range(series):
        values = rng.integers(-256, 257, (slices, 128, 128)).astype(np.int16)  # whole numbers that bfloat16 holds
        scan = ct(values, name=f"P{number}")
        mask = np.zeros((slices, 128, 128), bool)
        mask[3:9, 20:60, 20:60] = True
        save([*scan, seg(scan, {"Lesion": mask})], folder / "data" / str(number))
    settings = DicomSettings(source="dicom", folder=folder / "data")
    results = []
    for dtype, normalise in (
        (torch.bfloat16, {"normalise": "none"}),
        (torch.float32, {"normalise": "window", "window": (-300, 300)}),
    ):
        study = spec(preprocessing={"size": (128, 128), **normalise})
        kept = []

        def load() -> None:
            data = load_site_data(settings, study, task="segmentation", key=KEY, cache_dir=folder / "cache")  # noqa: B023
            kept.append(data.splits[Split.TRAIN].images.dtype)  # noqa: B023

        name = f"{series * slices} slices of 128x128 as {str(dtype).removeprefix('torch.')}, seconds"
        results.append((f"first start, {name}", seconds(load)))
        started = time.perf_counter()
        results.append((f"second start from the cache, {name}", seconds(load)))
        results.append(("the same by the clock on the wall", time.perf_counter() - started))
        if set(kept) != {dtype}:
            raise SystemExit(f"images were kept as {kept}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["epochs", "ingest", "compressed", "linear", "restart"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer series and images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    del sys.modules["__main__"].__file__  # helper processes would import this file, and MONAI with it: no client's do
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts: dict[str, Callable[[], list[tuple[str, float]]]] = {
            "epochs": lambda: epochs(options.device, quick=options.quick),
            "ingest": lambda: ingest(folder / "ingest", "uncompressed", None),
            "compressed": lambda: ingest(folder / "compressed", "JPEG 2000", JPEG2000Lossless, series=8, repeats=1),
            "linear": lambda: linear(folder / "linear", 100 if options.quick else 1000),
            "restart": lambda: restart(folder / "restart", 25 if options.quick else 250),
        }
        for part in options.parts:
            for what, value in parts[part]():
                print(f"{what:85s} {value:8.3f}", flush=True)


if __name__ == "__main__":
    main()
