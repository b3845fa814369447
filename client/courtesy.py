"""Whose GPU it is: training waits while another process computes on the device, and takes no more memory than allowed.

Clinical work comes first. The other processes are those that NVML, NVIDIA's own interface, lists on the device.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Protocol

import torch

from medfl.client.config import GpuSettings
from medfl.shared.errors import GPU_IN_USE, ConfigError, PolicyRefusal

log = logging.getLogger("medfl.site")

_MIB = 1024 * 1024


class Device(Protocol):
    """What can be seen of a GPU."""

    def others(self) -> int:
        """Number of processes on it that are not this one."""
        ...

    def free_mb(self) -> float:
        """Free memory in MiB."""
        ...


class Nvml:
    """A CUDA device, seen through NVML.

    Raises on construction:
        ConfigError: NVML's Python package is missing, or the driver does not answer.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            import pynvml
        except ImportError:
            raise ConfigError("gpu: needs the package nvidia-ml-py: pip install 'medfl[gpu]'") from None
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
        except pynvml.NVMLError as error:
            raise ConfigError(f"gpu: the NVIDIA driver does not answer ({error}): leave gpu: out, or mend it") from None

    def others(self) -> int:
        """Processes that compute or draw on the device, without this one."""
        listed = [
            *self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle),
            *self._nvml.nvmlDeviceGetGraphicsRunningProcesses(self._handle),
        ]
        return len({process.pid for process in listed} - {os.getpid()})

    def free_mb(self) -> float:
        """Free memory in MiB."""
        return float(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).free) / _MIB


class Courtesy:
    """Asked before a training begins, and between its batches."""

    def __init__(
        self,
        settings: GpuSettings,
        device: Device,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings = settings
        self._device = device
        self._clock = clock
        self._sleep = sleep
        self._next_look = clock()

    def permit(self) -> None:
        """Return when a training may begin.

        Raises:
            PolicyRefusal: reason ``GPU in use``; the coordinator asks again later.
        """
        if self._settings.yield_to_others and self._device.others():
            raise PolicyRefusal("another process is on the GPU: training waits until it is gone", reason=GPU_IN_USE)
        free, needed = self._device.free_mb(), self._settings.min_free_mb
        if free < needed:
            raise PolicyRefusal(
                f"the GPU has {free:.0f} MiB free, and gpu.min_free_mb asks for {needed:.0f}", reason=GPU_IN_USE
            )

    def between_batches(self, step: int, steps: int) -> None:
        """Return at once, or, when another process has come, as soon as it is gone; unused memory is handed back.

        The round's deadline goes on meanwhile: a pause that is too long costs the site the round and nothing else.
        """
        if not self._settings.yield_to_others or self._clock() < self._next_look:
            return
        paused = False
        while self._device.others():
            if not paused:
                paused = True
                log.warning("paused after batch %d of %d: another process is on the GPU", step, steps)
                torch.cuda.empty_cache()
            self._sleep(self._settings.look_every_s)
        if paused:
            log.info("the GPU is free again: training goes on")
        self._next_look = self._clock() + self._settings.look_every_s


def courtesy_of(settings: GpuSettings | None, device: torch.device) -> Courtesy | None:
    """The site's courtesy on ``device``; None where nothing is asked or the device is no GPU.

    Raises:
        ConfigError: the device cannot be looked at.
    """
    if settings is None or device.type != "cuda":
        return None
    torch.cuda.set_per_process_memory_fraction(settings.memory_fraction, device)
    return Courtesy(settings, Nvml(device))
