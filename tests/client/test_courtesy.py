"""A training on somebody else's GPU: a device that is written down in advance, and a clock that only we move."""

from __future__ import annotations

import pytest
import torch

from medfl.client.config import GpuSettings
from medfl.client.courtesy import Courtesy, courtesy_of
from medfl.shared.errors import GPU_IN_USE, PolicyRefusal


class Written:
    """A device on which ``others`` gives the next number of the list at each look, the last one for ever."""

    def __init__(self, *others: int, free: float = 1000.0) -> None:
        self.list, self.free, self.looks = list(others), free, 0

    def others(self) -> int:
        self.looks += 1
        return self.list.pop(0) if len(self.list) > 1 else self.list[0]

    def free_mb(self) -> float:
        return self.free


class Clock:
    def __init__(self) -> None:
        self.now, self.slept = 100.0, 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


def courtesy(device: Written, clock: Clock | None = None, **settings: float | bool) -> Courtesy:
    clock = clock or Clock()
    return Courtesy(GpuSettings.model_validate(settings), device, clock=clock, sleep=clock.sleep)


def test_no_training_begins_beside_another_process() -> None:
    with pytest.raises(PolicyRefusal, match="another process") as refusal:
        courtesy(Written(1)).permit()
    assert refusal.value.reason == GPU_IN_USE


def test_no_training_begins_with_too_little_memory() -> None:
    with pytest.raises(PolicyRefusal, match="999 MiB free"):
        courtesy(Written(0, free=999), min_free_mb=1000).permit()
    courtesy(Written(0, free=1000), min_free_mb=1000).permit()


def test_a_training_pauses_until_the_other_process_is_gone() -> None:
    clock, device = Clock(), Written(2, 1, 0)
    courtesy(device, clock, look_every_s=5).between_batches(3, 10)
    assert clock.slept == 10  # two looks in vain
    assert device.looks == 3


def test_the_device_is_looked_at_every_few_seconds_and_not_at_every_batch() -> None:
    clock, device = Clock(), Written(0)
    polite = courtesy(device, clock, look_every_s=5)
    for step in range(100):  # 10 s of batches
        polite.between_batches(step, 100)
        clock.now += 0.1
    assert device.looks == 2


def test_who_does_not_yield_is_not_paused() -> None:
    device = Written(1)
    polite = courtesy(device, yield_to_others=False)
    polite.permit()
    polite.between_batches(1, 2)
    assert device.looks == 0


def test_on_a_processor_there_is_nothing_to_yield() -> None:
    assert courtesy_of(GpuSettings(), torch.device("cpu")) is None
    assert courtesy_of(None, torch.device("cuda")) is None
