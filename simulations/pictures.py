"""The report's example pictures: one held-out image of each site, what is right and what methods say, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medfl.simulations.examples import Example

_SIDE = 168  # pixels of a picture in the page
_RIGHT, _MISSED, _FALSE = (0, 158, 115), (86, 180, 233), (213, 94, 0)  # Okabe & Ito: told apart by the colour-blind
_SHOWN = 6  # methods at most, beside the truth


@dataclass(frozen=True, slots=True)
class Picture:
    """One cell of the table: ``uri`` of an image, or nothing, and words below it."""

    uri: str
    words: str


@dataclass(frozen=True, slots=True)
class Pictures:
    """A table: the head, and a row of pictures for each site."""

    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Picture]]]


def pictures(found: Mapping[str, Example], methods: Sequence[str], classes: Sequence[str]) -> Pictures | None:
    """The table of up to six of ``methods``, in that order; None where nothing was kept."""
    shown = [method for method in methods if any(method in example.predicted for example in found.values())][:_SHOWN]
    if not shown:
        return None
    first = next(iter(found.values()))
    if first.truth.ndim == 2:
        rows = [(site, _masks(example, shown)) for site, example in found.items()]
        return Pictures(("image", "right", *shown), rows)
    rows = [(site, _classes(example, shown, classes)) for site, example in found.items()]
    return Pictures(("image", "right", *shown), rows)


def _masks(example: Example, methods: Sequence[str]) -> list[Picture]:
    truth = example.truth.astype(np.int64)
    row = [Picture(_uri(example.image), ""), Picture(_uri(overlay(example.image, truth, truth)), "")]
    for method in methods:
        if (said := example.predicted.get(method)) is None:
            row.append(Picture("", "not kept"))
            continue
        predicted = said.astype(np.int64)
        both, either = int(((predicted == truth) & (truth > 0)).sum()), int((truth > 0).sum() + (predicted > 0).sum())
        words = f"Dice {2 * both / either:.2f}" if either else "nothing to find"
        row.append(Picture(_uri(overlay(example.image, truth, predicted)), words))
    return row


def _classes(example: Example, methods: Sequence[str], classes: Sequence[str]) -> list[Picture]:
    truth = [int(example.truth)] if example.truth.ndim == 0 else np.flatnonzero(example.truth).tolist()
    row = [Picture(_uri(example.image), ""), Picture("", ", ".join(classes[c] for c in truth) or "none")]
    for method in methods:
        said = example.predicted.get(method)
        best = 0 if said is None else int(said.argmax())
        row.append(Picture("", "not kept" if said is None else f"{classes[best]} {100 * float(said[best]):.0f} %"))
    return row


def overlay(image: NDArray[np.uint8], truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> NDArray[np.uint8]:
    """``image`` (row, column, 3) with what is found, missed and falsely found in three colours."""
    colours = image.astype(np.float64) * 0.75
    for where, colour in (
        ((truth > 0) & (predicted == truth), _RIGHT),
        ((truth > 0) & (predicted != truth), _MISSED),
        ((truth == 0) & (predicted > 0), _FALSE),
    ):
        colours[where] = 0.35 * colours[where] + 0.65 * np.array(colour)
    mixed: NDArray[np.uint8] = colours.round().astype(np.uint8)
    return mixed


def _uri(image: NDArray[np.uint8]) -> str:
    picture = Image.fromarray(image)
    width = max(1, round(_SIDE * picture.width / picture.height))
    out = io.BytesIO()
    picture.resize((width, _SIDE), Image.Resampling.BILINEAR).save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
