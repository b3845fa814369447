"""A local web page of examples with the labels' outlines, for a person to look at before the first training."""

from __future__ import annotations

import base64
import html
import io
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage.segmentation import find_boundaries
from torch import Tensor

from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData, TensorSet
from medfl.shared.data_spec import DataSpec

_COLOURS = np.array([(230, 60, 60), (60, 160, 250), (250, 190, 40), (90, 200, 90), (200, 90, 220)], np.uint8)
_SMALLEST_SIDE = 192  # pixels; smaller images are enlarged

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>MedFL: what this site would train on</title>
<style>body{{font:14px sans-serif;background:#111;color:#ddd;margin:2em}}figure{{display:inline-block;margin:4px}}
img{{image-rendering:pixelated}}figcaption{{font-size:12px;color:#aaa}}pre{{color:#bbb}}b{{font-weight:600}}</style>
<h1>What this site would train on</h1>
<p>Look for text in the images, faces, labels beside what they should be on, turned or mirrored anatomy, wrong classes.
This page holds patients' images: it stays on this machine. Delete it when you have looked.</p>
<p>{legend}</p><pre>{report}</pre>{sections}</html>"""


def write_contact_sheet(data: SiteData, spec: DataSpec, path: Path, *, per_split: int = 24) -> None:
    """Write a page (mode 0600) of up to ``per_split`` examples of each split, evenly over its patients.

    Volumes show their slice with most foreground (the middle one where there is none).
    """
    sections = [_section(part, found, spec, per_split) for part, found in data.splits.items() if len(found)]
    page = _PAGE.format(
        legend=_legend(spec), report=html.escape("\n".join(data.report.lines())), sections="".join(sections)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(page)


def _legend(spec: DataSpec) -> str:
    return ", ".join(
        f'<b style="color:rgb{tuple(_colour(index).tolist())}">{html.escape(name)}</b>'
        for index, name in enumerate(spec.classes)
        if index
    )


def _colour(index: int) -> NDArray[np.uint8]:
    return np.asarray(_COLOURS[(index - 1) % len(_COLOURS)])


def _section(part: Split, found: TensorSet, spec: DataSpec, count: int) -> str:
    figures = []
    for row in _rows(found, count):
        number = int(found.patients[row])
        image, mask = _plane(found.inputs(torch.tensor([row], device=found.images.device))[0], found.labels[row])
        caption = f"patient {number}" + ("" if mask is not None else f": {html.escape(_classes(found, row, spec))}")
        figures.append(f'<figure><img src="{_picture(image, mask)}" alt=""><figcaption>{caption}</figcaption></figure>')
    return f"<h2>{part.value}: {len(found)} examples</h2>{''.join(figures)}"


def _rows(found: TensorSet, count: int) -> list[int]:
    """Rows evenly over the set, which is in the order of cases; for segmentation those with foreground first."""
    rows = torch.arange(len(found))
    if found.labels.ndim > 2:
        has = found.labels.flatten(1).any(1).cpu()
        rows = rows[has.bool()] if bool(has.any()) else rows
    take = min(count, len(rows))
    return [int(rows[int((n + 0.5) * len(rows) / take)]) for n in range(take)]


def _plane(image: Tensor, label: Tensor) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
    """First channel (or three as colours) and mask of one slice."""
    pixels = image.cpu().numpy()
    mask = label.cpu().numpy() if label.shape == image.shape[1:] else None
    if pixels.ndim == 4:
        at = pixels.shape[1] // 2
        if mask is not None and mask.any():
            at = int((mask > 0).reshape(len(mask), -1).sum(1).argmax())
        pixels, mask = pixels[:, at], None if mask is None else mask[at]
    return pixels[:3] if len(pixels) == 3 else pixels[:1], mask


def _classes(found: TensorSet, row: int, spec: DataSpec) -> str:
    label = found.labels[row]
    if label.ndim:
        return ", ".join(name for name, on in zip(spec.classes, label.tolist(), strict=True) if on) or "none"
    return spec.classes[int(label)]


def _picture(image: NDArray[np.float32], mask: NDArray[np.uint8] | None) -> str:
    """A data address of a PNG: grey or colour from darkest to brightest, with outlines of the classes."""
    low, high = float(image.min()), float(image.max())
    shown = np.round((image - low) / max(high - low, 1e-6) * 255).astype(np.uint8)
    rgb = np.moveaxis(np.repeat(shown, 3, axis=0) if len(shown) == 1 else shown, 0, 2).copy()
    times = max(1, -(-_SMALLEST_SIDE // min(rgb.shape[:2])))
    rgb = rgb.repeat(times, 0).repeat(times, 1)
    if mask is not None:
        large = mask.repeat(times, 0).repeat(times, 1)
        for index in np.unique(large[large > 0]).tolist():
            edge = find_boundaries(large == index, mode="inner")  # type: ignore[no-untyped-call]
            rgb[edge] = _colour(index)
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
