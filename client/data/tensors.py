"""A site's examples as tensors that stay on the training device, or on the host where it has no room."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from medfl.client.data.opt_out import OptOuts
from medfl.client.data.report import DataReport
from medfl.client.data.splits import Split


@dataclass(frozen=True, slots=True)
class TensorSet:
    """One split. Row ``i`` of each tensor is the same example.

    ``images`` is (N, channel, *spatial): float32, bfloat16 where that is exact, or uint8 which stands for itself / 255
    (see :meth:`inputs`). They lie on the device, or where that has no room in the host's memory (``streamed``), and
    come to the device batch by batch. ``labels`` is (N, *spatial) uint8 class index for segmentation, (N,) int64 for
    classification, (N, classes) float32 of 0 and 1 for multi-label. ``patients`` is (N,) int64, the patient's number
    at this site. Both are always on the device.
    """

    images: Tensor
    labels: Tensor
    patients: Tensor
    streamed: bool = False

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def rows(self) -> Tensor:
        """The numbers of all examples in order, int64, on the device."""
        return torch.arange(len(self), device=self.labels.device)

    def inputs(self, rows: Tensor) -> Tensor:
        """Images of ``rows`` (int64, on the device) as float32 network input on the device."""
        if not self.streamed:
            return as_input(self.images.index_select(0, rows))
        return as_input(self.to_device(rows.to(self.images.device)))

    def to_device(self, rows: Tensor) -> Tensor:
        """Images of ``rows`` (on the host) as stored, on their way from the host's memory to the device."""
        some = self.images.index_select(0, rows)
        if self.labels.device.type == "cuda":
            some = some.pin_memory()  # from a pool of such memory: only then does the copy run beside the training
        return some.to(self.labels.device, non_blocking=True)

    def without(self, patients: Sequence[int]) -> TensorSet:
        """The set less the examples of ``patients``; itself where there are none."""
        stays = ~torch.isin(self.patients, torch.tensor(patients, dtype=torch.int64, device=self.patients.device))
        if bool(stays.all()):
            return self
        images = self.images[stays.to(self.images.device)]
        return TensorSet(images, self.labels[stays], self.patients[stays], self.streamed)


@dataclass(frozen=True, slots=True)
class SiteData:
    """Everything a site trains and evaluates on, and what was found on the way."""

    splits: Mapping[Split, TensorSet]
    report: DataReport
    pseudonyms: tuple[str, ...] = field(default=(), repr=False)  # by the patient's number
    opt_outs: OptOuts | None = field(default=None, repr=False)  # the list by which it was last looked through


def as_input(images: Tensor) -> Tensor:
    """Stored ``images`` as float32: bytes become 0..1."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


def narrowest(images: Tensor) -> Tensor:
    """``images`` (N, ...) float32 in the smallest type of uint8, bfloat16 and float32 that gives back every value
    exactly.
    """
    # Most sets are neither: a glance at some values spares passes over all.
    glance = images.flatten()[:: max(1, images.numel() // 1000)]
    for narrow in (_as_bytes, _as_half):
        if _is_exact(glance, narrow(glance)):
            out = _all_exact(images, narrow)
            if out is not None:
                return out
    return images


def _as_bytes(images: Tensor) -> Tensor:
    return images.mul(255).round_().clamp_(0, 255).to(torch.uint8)


def _as_half(images: Tensor) -> Tensor:
    return images.to(torch.bfloat16)


def _is_exact(images: Tensor, narrowed: Tensor) -> bool:
    return torch.equal(as_input(narrowed), images)


def _all_exact(images: Tensor, narrow: Callable[[Tensor], Tensor]) -> Tensor | None:
    """All ``images`` narrowed, one example at a time so that the processor's cache holds it; None where one is not."""
    out = torch.empty(images.shape, dtype=narrow(images.flatten()[:1]).dtype)
    for one, kept in zip(images, out, strict=True):
        kept.copy_(narrow(one))
        if not _is_exact(one, kept):
            return None
    return out


def image_bytes(blocks: Sequence[tuple[Tensor, Tensor, int]]) -> int:
    """Bytes that the images of ``blocks`` take together."""
    return sum(images.numel() for images, _, _ in blocks) * _common_dtype(blocks).itemsize


def gather(blocks: list[tuple[Tensor, Tensor, int]], device: torch.device, *, streamed: bool = False) -> TensorSet:
    """One set on ``device`` from (images, labels, patient) of each case. Empties ``blocks`` as it goes.

    With ``streamed`` the images stay in the host's memory. Blocks are moved one by one into the tensor that stays, so
    that memory never holds the set twice.
    """
    count = sum(len(images) for images, _, _ in blocks)
    first_images, first_labels, _ = blocks[0]
    dtype = _common_dtype(blocks)
    home = torch.device("cpu") if streamed else device
    out = torch.empty((count, *first_images.shape[1:]), dtype=dtype, device=home)
    labels = torch.empty((count, *first_labels.shape[1:]), dtype=first_labels.dtype, device=device)
    patients = torch.empty(count, dtype=torch.int64, device=device)
    blocks.reverse()
    start = 0
    while blocks:
        images, of_images, patient = blocks.pop()
        rows = slice(start, start + len(images))
        out[rows] = images if images.dtype == dtype else as_input(images)
        labels[rows], patients[rows] = of_images, patient
        start = rows.stop
    return TensorSet(out, labels, patients, streamed)


def _common_dtype(blocks: Sequence[tuple[Tensor, Tensor, int]]) -> torch.dtype:
    dtypes = {images.dtype for images, _, _ in blocks}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32
