"""Batches of a site's tensors: a permutation and index-selects on the device, or copies from the host made ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from medfl.client.data.tensors import TensorSet, as_input

Augment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""``augment(images, labels, generator)`` gives changed images and the labels that belong to them."""

_SMALL = 1 << 20  # bytes of images that are put in order once an epoch: to pick each batch by itself costs more there
_BOUNDARY = 64  # bytes, at which PyTorch's tensors begin: last bits of a product depend on it


def epoch(
    data: TensorSet, batch_size: int, generator: torch.Generator, augment: Augment | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every example once, in random order: images (B, channel, *spatial) float32 and their labels as stored.

    The last batch is smaller when ``batch_size`` does not divide the set. ``generator`` must be on the device.
    """
    order = torch.randperm(len(data), generator=generator, device=data.labels.device)
    batches = _in_pieces(data, order, batch_size) if _splits(data, batch_size) else _picked(data, order, batch_size)
    return (augment(*batch, generator) for batch in batches) if augment else batches


def _splits(data: TensorSet, batch_size: int) -> bool:
    """Whether batches are cut from the whole set in order: it is small, and each begins where a new tensor would."""
    batch = data.images.shape[1:].numel() * batch_size * torch.float32.itemsize
    return not data.streamed and data.images.nbytes <= _SMALL and batch % _BOUNDARY == 0


def _in_pieces(data: TensorSet, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = data.inputs(order), data.labels.index_select(0, order)
    return zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)


def _picked(data: TensorSet, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for rows, images in _with_images(data, torch.split(order, batch_size)):
        yield images, data.labels.index_select(0, rows)


def in_order(data: TensorSet, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every example once, as stored, for evaluation: images, labels and patients of each batch."""
    for some, images in _with_images(data, torch.split(data.rows, batch_size)):
        yield images, data.labels.index_select(0, some), data.patients.index_select(0, some)


def _with_images(data: TensorSet, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of each batch and their images as network input."""
    if data.streamed:
        yield from _ahead(data, list(batches))
    else:
        for rows in batches:
            yield rows, data.inputs(rows)


def _ahead(data: TensorSet, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """As :func:`_with_images`: while one batch trains, a thread collects the next and sends it to the device."""
    device = data.labels.device
    beside = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    host = [rows.to(data.images.device) for rows in batches]  # once, so that no batch waits for the device

    def fetch(rows: Tensor) -> Tensor:
        with torch.cuda.stream(beside):
            return data.to_device(rows)

    with ThreadPoolExecutor(1, thread_name_prefix="images") as pool:
        coming: Future[Tensor] | None = pool.submit(fetch, host[0]) if host else None
        for number, rows in enumerate(batches):
            assert coming is not None  # noqa: S101 - one for each batch
            stored = coming.result()
            if beside is not None:
                here = torch.cuda.current_stream(device)
                here.wait_stream(beside)  # before the next copy is begun: that one need not be waited for
                stored.record_stream(here)
            coming = pool.submit(fetch, host[number + 1]) if number + 1 < len(host) else None
            yield rows, as_input(stored)
