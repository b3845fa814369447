"""What the machine refuses (memory, the training device, the disk): found among library errors, and said in words."""

from __future__ import annotations

import errno
import gc

import torch

from medfl.shared.errors import DataError, MedFLError, TrainingError

OUT_OF_MEMORY = "out of memory"
DEVICE_LOST = "device lost"
DISK_FULL = "disk full"
DISK_READ_ONLY = "disk read-only"
DISK_FAILS = "disk fails"

_DISKS = {
    errno.ENOSPC: DISK_FULL,
    errno.EDQUOT: DISK_FULL,
    errno.EFBIG: DISK_FULL,
    errno.EROFS: DISK_READ_ONLY,
    errno.EIO: DISK_FAILS,
}
_DEVICE_WORDS = ("cuda error", "nccl error", "cudnn_status", "cublas_status", "device-side assert")
_MEMORY_WORDS = ("can't allocate memory", "not enough memory", "cublas_status_alloc_failed")


class DeviceLost(TrainingError):
    """The training device does not answer. This process cannot use it again: it has to be started anew."""


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on the device or on this machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _MEMORY_WORDS)


def in_words(error: BaseException) -> MedFLError | None:
    """What ``error`` means for the person at this machine, with a reason for the coordinator; None for any other."""
    if out_of_memory(error):
        return TrainingError(
            "memory ran out: it was freed. Lower training.batch_size in the study, or free the device",
            reason=OUT_OF_MEMORY,
        )
    if _device_lost(error):
        return DeviceLost(
            "the training device does not answer any more: look at it (nvidia-smi), then start this node again",
            reason=DEVICE_LOST,
        )
    if isinstance(error, OSError) and (reason := _DISKS.get(error.errno or 0)):
        return DataError(
            f"the state folder cannot be written ({error.strerror}): free or repair the disk", reason=reason
        )
    return None


def free_memory() -> None:
    """Give back what dead tensors still hold."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _device_lost(error: BaseException) -> bool:
    accelerator = getattr(torch, "AcceleratorError", None)  # since PyTorch 2.8
    if accelerator is not None and isinstance(error, accelerator):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _DEVICE_WORDS)
