"""A site's examples as tensors that stay on the training device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medfl.client.data.report import DataReport
from medfl.client.data.splits import Split


@dataclass(frozen=True, slots=True)
class TensorSet:
    """One split, all on one device. Row ``i`` of each tensor is the same example.

    ``images`` is (N, channel, *spatial): float32, bfloat16 where that is exact, or uint8 which stands for itself / 255
    (see :meth:`inputs`). ``labels`` is (N, *spatial) uint8 class index for segmentation, (N,) int64 for classification,
    (N, classes) float32 of 0 and 1 for multi-label. ``patients`` is (N,) int64, the patient's number at this site.
    """

    images: Tensor
    labels: Tensor
    patients: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def inputs(self, rows: Tensor) -> Tensor:
        """Images of ``rows`` (int64, same device) as float32 network input."""
        return as_input(self.images.index_select(0, rows))


@dataclass(frozen=True, slots=True)
class SiteData:
    """Everything a site trains and evaluates on, and what was found on the way."""

    splits: Mapping[Split, TensorSet]
    report: DataReport


def as_input(images: Tensor) -> Tensor:
    """Stored ``images`` as float32: bytes become 0..1."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


def narrowest(images: Tensor) -> Tensor:
    """``images`` (float32) in the smallest type of uint8, bfloat16 and float32 that gives back every value exactly."""
    as_bytes = images.mul(255).round_().clamp_(0, 255).to(torch.uint8)
    if torch.equal(as_input(as_bytes), images):
        return as_bytes
    half = images.to(torch.bfloat16)
    return half if torch.equal(half.float(), images) else images


def gather(
    images: Sequence[Tensor], labels: Sequence[Tensor], patients: Sequence[int], device: torch.device
) -> TensorSet:
    """One set on ``device`` from blocks of examples, one block a case; ``patients`` has one number a block.

    Blocks are moved one by one into the tensor that stays, so that host memory never holds a second copy of the set.
    """
    count = sum(len(block) for block in images)
    dtype = images[0].dtype if len({block.dtype for block in images}) == 1 else torch.float32
    out = torch.empty((count, *images[0].shape[1:]), dtype=dtype, device=device)
    start = 0
    for block in images:
        out[start : start + len(block)] = block if block.dtype == dtype else as_input(block)
        start += len(block)
    numbers = torch.repeat_interleave(
        torch.tensor(patients, dtype=torch.int64), torch.tensor([len(block) for block in images])
    )
    return TensorSet(out, torch.cat(list(labels)).to(device), numbers.to(device))
