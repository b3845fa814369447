"""Preprocessing does what the study says, in numbers that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dicom_lab import spec
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from medfl.client.data.case import Example, Quarantine
from medfl.client.data.preprocess import choose_slices, preprocess
from medfl.client.data.tensors import as_input, narrowest
from medfl.shared.data_spec import DataSpec, Slices


def study(dimensions: int = 2, **steps: object) -> DataSpec:
    return spec(dimensions=dimensions, preprocessing={"normalise": "none", "size": (4,) * dimensions} | steps)


def example(image: NDArray[np.generic], mask: NDArray[np.generic] | None = None, mm: float = 1.0) -> Example:
    image = np.asarray(image, np.float32)
    return Example(image[None], (mm,) * image.ndim, None if mask is None else np.asarray(mask, np.uint8))


def test_a_window_clips_and_scales_to_zero_and_one() -> None:
    image = np.tile([-500.0, -200, 50, 300], (4, 1))
    out, _ = preprocess(example(image), study(normalise="window", window=(-200, 300)), held_out=False)
    assert out[0, 0, 0].tolist() == [0, 0, 0.5, 1]


def test_zscore_is_over_the_whole_volume_also_when_only_one_slice_is_kept() -> None:
    volume = np.stack([np.zeros((4, 4)), np.full((4, 4), 2.0)])
    steps = study(normalise="zscore", slices={"per_case": 1, "foreground": 1.0})
    out, _ = preprocess(example(volume, volume), steps, held_out=False)
    assert out.unique().tolist() == [1.0]  # (2 - mean 1) / deviation 1


def test_minmax_goes_to_zero_and_one_per_channel() -> None:
    image = np.arange(16.0).reshape(4, 4) - 3
    out, _ = preprocess(example(image), study(normalise="minmax"), held_out=False)
    assert torch.allclose(out.flatten(), torch.arange(16) / 15)


def test_bytes_out_of_range_are_left_out() -> None:
    with pytest.raises(Quarantine, match=r"0\.\.255"):
        preprocess(example(np.full((4, 4), 300.0)), study(normalise="scale_255"), held_out=False)


def test_values_that_are_not_finite_are_left_out() -> None:
    with pytest.raises(Quarantine, match="not finite"):
        preprocess(example(np.full((4, 4), np.nan)), study(), held_out=False)


def test_cropping_keeps_the_middle_and_padding_adds_the_lowest_value() -> None:
    image = np.arange(1.0, 13).reshape(2, 6)
    out, mask = preprocess(example(image, image > 3), study(), held_out=False)
    assert out[0, 0].tolist() == [[1, 1, 1, 1], [2, 3, 4, 5], [8, 9, 10, 11], [1, 1, 1, 1]]
    assert mask is not None
    assert mask[0].tolist() == [[0] * 4, [0, 0, 1, 1], [1] * 4, [0] * 4]


def test_resampling_to_half_the_spacing_doubles_the_grid_and_keeps_the_ramp() -> None:
    image = np.tile(np.arange(8.0), (8, 1))
    out, _ = preprocess(example(image, mm=2.0), study(spacing_mm=(1, 1), size=(16, 16)), held_out=False)
    steps = out[0, 0, 8, 2:14].diff()
    assert torch.allclose(steps, torch.full_like(steps, 0.5), atol=0.04)


def test_a_mask_stays_on_its_image_through_resampling() -> None:
    image = np.zeros((12, 30, 30))
    image[4:8, 6:18, 10:24] = 100
    steps = study(3, spacing_mm=(1.0, 1.0, 1.0), size=(30, 50, 50))
    source = Example(np.asarray(image, np.float32)[None], (2.5, 1.6, 1.6), (image > 50).astype(np.uint8))
    out, mask = preprocess(source, steps, held_out=False)
    assert mask is not None
    inside = out[0, 0] > 50
    overlap = 2 * (inside & mask[0].bool()).sum() / (inside.sum() + mask.sum())
    assert overlap > 0.9  # linear and nearest differ by a voxel at the edge only
    voxels = 4 * 12 * 14 * 2.5 * 1.6 * 1.6
    assert float(mask.sum()) == pytest.approx(voxels, rel=0.15)


def test_resampling_needs_a_known_spacing() -> None:
    source = Example(np.zeros((1, 4, 4), np.float32), None)
    with pytest.raises(Quarantine, match="spacing is unknown"):
        preprocess(source, study(spacing_mm=(1, 1)), held_out=False)


def test_resize_stretches_image_and_mask_alike() -> None:
    image = np.kron(np.eye(4), np.ones((2, 2)))
    out, mask = preprocess(example(image, image), study(fit="resize"), held_out=False)
    assert mask is not None
    assert mask[0].tolist() == np.eye(4).tolist()
    assert (out[0, 0].argmax(1) == torch.arange(4)).all()


def test_slices_are_the_whole_volume_where_nothing_is_chosen() -> None:
    volume = np.arange(5 * 16.0).reshape(5, 4, 4)
    out, mask = preprocess(example(volume, volume > 40), study(), held_out=False)
    assert torch.equal(out[:, 0], torch.from_numpy(volume).float())
    assert mask is not None
    assert torch.equal(mask, torch.from_numpy(volume > 40).to(torch.uint8))


def test_held_out_volumes_give_every_slice() -> None:
    steps = study(slices={"per_case": 2})
    volume = np.zeros((9, 4, 4))
    counts = [len(preprocess(example(volume, volume), steps, held_out=held_out)[0]) for held_out in (False, True)]
    assert counts == [2, 9]


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 40), st.floats(0, 1))
def test_chosen_slices_are_distinct_ordered_and_as_many_as_asked_for(
    foreground: list[bool], count: int, share: float
) -> None:
    has = np.array(foreground)
    chosen = choose_slices(has, Slices(per_case=count, foreground=share))
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, len(has))
    wanted = min(int(has.sum()), round(share * min(count, len(has))))
    assert has[chosen].sum() >= wanted


@given(st.lists(st.integers(0, 255), min_size=1, max_size=50))
def test_bytes_are_stored_as_bytes_and_come_back_exactly(values: list[int]) -> None:
    images = torch.tensor(values).float() / 255
    stored = narrowest(images)
    assert stored.dtype == torch.uint8
    assert torch.equal(as_input(stored), images)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50))
def test_storage_never_changes_a_value(values: list[float]) -> None:
    images = torch.tensor(values)
    assert torch.equal(as_input(narrowest(images)), images)
