"""The coordinator's memory of a clip that follows the updates."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from medfl.server.adaptive_clip import Clip
from medfl.shared.errors import ProtocolError
from medfl.shared.privacy.adaptive_clip import number_within
from medfl.shared.privacy.settings import AdaptiveClip, ClientLevel

ADAPTIVE = AdaptiveClip()
SETTINGS = ClientLevel(
    mode="client-level", epsilon=50, delta=1e-2, clip_norm=2.0, noise_multiplier=1.0, adaptive_clip=ADAPTIVE
)
NEXT = 2.0 * math.exp(-0.1)  # after all of four sites were within it


def test_it_begins_at_the_studys_and_moves_with_each_sum() -> None:
    clip = Clip(SETTINGS, ADAPTIVE, None)
    assert clip.names == ("within clip 2.0",)
    clip.follow({"within clip 2.0": 2.0}, sites=4)
    assert clip.names == (number_within(NEXT),)


def test_it_outlives_the_coordinator_and_the_same_sum_again_moves_it_no_further(tmp_path: Path) -> None:
    memory = tmp_path / "clip.json"
    Clip(SETTINGS, ADAPTIVE, memory).follow({"within clip 2.0": 2.0}, sites=4)
    restarted = Clip(SETTINGS, ADAPTIVE, memory)
    assert restarted.names == (number_within(NEXT),)
    restarted.follow({"within clip 2.0": 2.0}, sites=4)
    assert restarted.names == (number_within(NEXT),)


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"{}", b'["within clip nan"]', b'["loss"]', b"[7]"])
def test_a_damaged_memory_begins_anew(tmp_path: Path, content: bytes) -> None:
    memory = tmp_path / "clip.json"
    memory.write_bytes(content)
    assert Clip(SETTINGS, ADAPTIVE, memory).names == ("within clip 2.0",)


def test_a_sum_of_something_else_is_refused() -> None:
    with pytest.raises(ProtocolError, match="names no clip"):
        Clip(SETTINGS, ADAPTIVE, None).follow({"loss": 1.0}, sites=4)
