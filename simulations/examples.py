"""What models make of one held-out image of each site, kept beside the scores for the report's pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData
from medfl.client.workbench import make_bench
from medfl.shared.files import write_whole
from medfl.shared.study import Study
from medfl.shared.weights import Flat
from medfl.shared.zoo import ModelTask

_DIGEST = "digest/of the pictures"  # no site has such a name

Models = Mapping[str, tuple[Flat, Flat | None]]
"""By site: the global weights, and what the site has kept of its own (None: nothing)."""


@dataclass(frozen=True, slots=True)
class Example:
    """One site's image, what is right and what each method says.

    Of a segmentation ``truth`` and ``predicted`` are class indices (row, column), of a volume one slice; of a
    classification the true class or classes, and one probability a class.
    """

    image: NDArray[np.uint8]  # (row, column, 3)
    truth: NDArray[np.uint8]
    predicted: Mapping[str, NDArray[np.float32]]


def shown(study: Study, data: SiteData) -> tuple[int, int]:
    """Which held-out image of ``data``, and which slice of it (0 in 2D): where most of it is marked."""
    held_out = data.splits[Split.VALIDATION]
    if study.task is not ModelTask.SEGMENTATION:
        return 0, 0
    image = int((held_out.labels > 0).flatten(1).sum(1).argmax())
    if held_out.labels.ndim == 3:
        return image, 0
    return image, int((held_out.labels[image] > 0).flatten(1).sum(1).argmax())


@torch.no_grad()
def predict(study: Study, models: Models, sites: Mapping[str, SiteData], device: torch.device) -> dict[str, Flat]:
    """By site, what its model says of the image that is :func:`shown`."""
    bench, said = make_bench(study, device), {}
    for name, (weights, kept) in models.items():
        held_out = sites[name].splits[Split.VALIDATION]
        number, at = shown(study, sites[name])
        bench.load_for_patients(study, weights, kept)
        logits = bench.network.eval()(held_out.inputs(torch.tensor([number], device=held_out.labels.device)))
        if study.task is ModelTask.SEGMENTATION:
            classes = logits.argmax(1)[0]
            said[name] = (classes if classes.ndim == 2 else classes[at]).float().cpu().numpy()
        else:
            said[name] = (logits.sigmoid() if study.data.multi_label else logits.softmax(1))[0].float().cpu().numpy()
    return said


def save_truth(path: Path, study: Study, sites: Mapping[str, SiteData]) -> str:
    """Write each site's image and labels; returns their digest, which :func:`save` notes with what methods say."""
    arrays: dict[str, NDArray[np.uint8]] = {}
    for name, data in sites.items():
        held_out = data.splits[Split.VALIDATION]
        number, at = shown(study, data)
        image = held_out.inputs(torch.tensor([number], device=held_out.labels.device))[0].cpu()
        labels = held_out.labels[number].cpu()
        if image.ndim == 4:
            image = image[:, at]
            labels = labels[at] if study.task is ModelTask.SEGMENTATION else labels
        arrays[f"image/{name}"], arrays[f"truth/{name}"] = _grey_or_colour(image), labels.numpy().astype(np.uint8)
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape}".encode() + array.tobytes())
    save(path, arrays, digest.hexdigest())
    return digest.hexdigest()


def save(path: Path, arrays: Mapping[str, NDArray[np.generic]], digest: str) -> None:
    """Write named arrays as one ``.npz``; they are, or are of, the pictures of that ``digest``."""
    import io

    path.parent.mkdir(parents=True, exist_ok=True)
    out = io.BytesIO()
    np.savez_compressed(out, **arrays, **{_DIGEST: np.array(digest)})  # type: ignore[arg-type]
    write_whole(path, out.getvalue())


def load(folder: Path, methods: list[str]) -> dict[str, Example]:
    """By site, what earlier runs have written into ``folder`` of these methods; empty where there is nothing.

    What was said of other pictures, as before a change of splits or scanners, is left out.
    """
    if not (folder / "truth.npz").exists():
        return {}
    truth, digest = _read(folder / "truth.npz")
    said: dict[str, dict[str, NDArray[np.float32]]] = {}
    for method in methods:
        if digest and (folder / f"{method}.npz").exists():
            by_site, of = _read(folder / f"{method}.npz")
            said |= {method: by_site} if of == digest else {}
    sites = [name.removeprefix("image/") for name in truth if name.startswith("image/")]
    return {
        site: Example(
            truth[f"image/{site}"],
            truth[f"truth/{site}"],
            {m: by_site[site] for m, by_site in said.items() if site in by_site},
        )
        for site in sites
    }


def _read(path: Path) -> tuple[dict[str, NDArray[Any]], str]:
    """Named arrays, and the digest that was noted with them; empty where there is none."""
    with np.load(path) as file:
        arrays = dict(file)
    return arrays, str(arrays.pop(_DIGEST, ""))


def _grey_or_colour(image: torch.Tensor) -> NDArray[np.uint8]:
    """(channel, row, column) as (row, column, 3), from the 1st to the 99th percentile of its brightness."""
    channels = image if len(image) == 3 else image[:1].expand(3, -1, -1)
    low, high = torch.quantile(channels.flatten(), torch.tensor([0.01, 0.99])).tolist()
    unit = ((channels - low) / max(high - low, 1e-6)).clamp(0, 1)
    grey: NDArray[np.uint8] = (unit * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return grey
