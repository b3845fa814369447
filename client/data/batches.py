"""Batches of resident tensors: a permutation on the device, index-selects, no worker and no copy from the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from medfl.client.data.tensors import TensorSet

Augment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""``augment(images, labels, generator)`` gives changed images and the labels that belong to them."""


def epoch(
    data: TensorSet, batch_size: int, generator: torch.Generator, augment: Augment | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every example once, in random order: images (B, channel, *spatial) float32 and their labels as stored.

    The last batch is smaller when ``batch_size`` does not divide the set. ``generator`` must be on the data's device.
    """
    order = torch.randperm(len(data), generator=generator, device=data.images.device)
    for rows in torch.split(order, batch_size):
        images, labels = data.inputs(rows), data.labels.index_select(0, rows)
        yield augment(images, labels, generator) if augment else (images, labels)


def in_order(data: TensorSet, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every example once, as stored, for evaluation: images, labels and patients of each batch."""
    rows = torch.arange(len(data), device=data.images.device)
    for some in torch.split(rows, batch_size):
        yield data.inputs(some), data.labels.index_select(0, some), data.patients.index_select(0, some)
