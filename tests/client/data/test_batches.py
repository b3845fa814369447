"""Batches see every example once; augmentation moves images and labels together."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import affine_grid

from medfl.client.data import batches
from medfl.client.data.augment import _places, augment, augmenter
from medfl.client.data.batches import epoch, in_order
from medfl.client.data.tensors import TensorSet
from medfl.shared.data_spec import Augmentation


def numbered(count: int) -> TensorSet:
    """Example ``i`` is an image full of ``i`` with label ``i`` of patient ``i // 2``."""
    order = torch.arange(count)
    return TensorSet(order.float().reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous(), order, order // 2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 40), st.integers(1, 15))
def test_an_epoch_sees_every_example_once_with_its_label(count: int, batch: int) -> None:
    seen = []
    for images, labels in epoch(numbered(count), batch, generator()):
        assert len(images) <= batch
        assert torch.equal(images[:, 0, 0, 0], labels.float())
        seen += labels.tolist()
    assert sorted(seen) == list(range(count))


def test_the_order_comes_from_the_generator() -> None:
    orders = [torch.cat([labels for _, labels in epoch(numbered(30), 7, generator(s))]).tolist() for s in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_evaluation_goes_in_order_with_patients() -> None:
    patients = torch.cat([p for _, _, p in in_order(numbered(9), 4)])
    assert patients.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_bytes_become_zero_to_one() -> None:
    data = TensorSet(torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8), torch.zeros(1), torch.zeros(1))
    ((images, _),) = epoch(data, 1, generator())
    assert images.flatten().tolist() == pytest.approx([0, 0.2, 1])


def block(shape: tuple[int, ...] = (24, 20), count: int = 6) -> tuple[Tensor, Tensor]:
    """Images of one bright block that no turn or flip maps onto itself, and its mask."""
    mask = torch.zeros(count, *shape, dtype=torch.uint8)
    mask[..., 4:10, 5:8] = 1
    mask[..., 8:10, 5:15] = 1
    return mask.unsqueeze(1).float(), mask


GEOMETRY = {
    "flip": Augmentation(flip=True),
    "rotate": Augmentation(rotate_degrees=25),
    "scale": Augmentation(scale=0.2),
    "elastic": Augmentation(elastic=0.03),
    "all": Augmentation(flip=True, rotate_degrees=15, scale=0.1, elastic=0.02),
}


@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize("shape", [(24, 20), (6, 24, 20)], ids=["2d", "3d"])
def test_masks_move_with_their_images(name: str, shape: tuple[int, ...]) -> None:
    images, masks = block(shape)
    changed, moved = augment(images, masks, GEOMETRY[name], generator(3))
    inside = changed[:, 0] > 0.5
    overlap = 2 * (inside & moved.bool()).sum() / (inside.sum() + moved.sum())
    assert overlap > 0.9
    assert not torch.equal(moved, masks)
    assert moved.dtype == torch.uint8
    assert set(moved.unique().tolist()) <= {0, 1}


@pytest.mark.parametrize("spatial", [(24, 20), (6, 24, 20), (1, 7)])
def test_places_are_those_of_affine_grid(spatial: tuple[int, ...]) -> None:
    matrices = torch.randn(5, len(spatial), len(spatial) + 1, generator=generator())
    reference = affine_grid(matrices, [5, 1, *spatial], align_corners=False)
    torch.testing.assert_close(_places(matrices, torch.Size(spatial)).movedim(1, -1), reference, atol=1e-6, rtol=0)


def test_a_turn_keeps_areas_also_where_pictures_are_not_square() -> None:
    images = torch.zeros(8, 1, 40, 80)
    images[..., 15:25, 30:50] = 1
    masks = images[:, 0].to(torch.uint8)
    _, moved = augment(images, masks, Augmentation(rotate_degrees=30), generator())
    # 10 x 20 pixels stay 200 whatever the angle; nearest neighbour is off by some along the edge
    assert moved.flatten(1).sum(1).tolist() == pytest.approx([200] * 8, abs=14)


def test_a_turn_by_a_known_angle_lands_where_trigonometry_says() -> None:
    images = torch.zeros(64, 1, 41, 81)
    images[..., 19:22, 59:62] = 1  # 20 columns right of the middle
    moved, _ = augment(images, torch.zeros(64, 1), Augmentation(rotate_degrees=60), generator())
    for image in moved[:, 0]:
        r, c = (float((image * axis).sum() / image.sum()) for axis in torch.meshgrid(
            torch.arange(41.0) - 20, torch.arange(81.0) - 40, indexing="ij"))  # fmt: skip
        assert np.hypot(r, c) == pytest.approx(20, abs=0.5)


def test_flips_are_exact_and_of_each_kind() -> None:
    images, masks = block(count=64)
    changed, moved = augment(images, masks, Augmentation(flip=True), generator())
    assert torch.equal(changed[:, 0], moved.float())
    assert len(torch.unique(moved.flatten(1), dim=0)) == 4


def test_brightness_changes_images_only() -> None:
    images, masks = block()
    changed, same = augment(images, masks, Augmentation(intensity=0.2, noise=0.05, bias_field=0.2), generator())
    assert same is masks
    assert not torch.equal(changed, images)
    assert float((changed - images).abs().max()) < 1.0


def test_noise_has_the_promised_size() -> None:
    images = torch.zeros(400, 1, 32, 32)
    changed, _ = augment(images, torch.zeros(400), Augmentation(noise=0.1), generator())
    deviations = changed.flatten(1).std(1)
    assert float(deviations.max()) <= 0.11
    assert float(deviations.mean()) == pytest.approx(0.05, abs=0.004)  # the mean of a uniform 0..0.1


def test_class_labels_are_left_alone() -> None:
    images, _ = block()
    labels = torch.arange(6)
    assert augment(images, labels, GEOMETRY["all"], generator())[1] is labels


def test_nothing_asked_for_is_nothing_done() -> None:
    assert augmenter(Augmentation()) is None
    assert augmenter(Augmentation(flip=True)) is not None


@given(st.integers(1, 40), st.integers(1, 15))
def test_images_that_stay_on_the_host_give_the_very_same_batches(count: int, batch: int) -> None:
    resident = numbered(count)
    streamed = replace(resident, streamed=True)
    for mine, reference in zip(epoch(streamed, batch, generator()), epoch(resident, batch, generator()), strict=True):
        assert torch.equal(mine[0], reference[0])
        assert torch.equal(mine[1], reference[1])
    for mine, reference in zip(in_order(streamed, batch), in_order(resident, batch), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, reference, strict=True))
    rows = torch.arange(count).flip(0)
    assert torch.equal(streamed.inputs(rows), resident.inputs(rows))
    assert streamed.without([0]).streamed


def test_the_next_batch_is_collected_while_this_one_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []
    collect = TensorSet.to_device

    def noted(self: TensorSet, rows: Tensor) -> Tensor:
        fetched.append(len(fetched))
        return collect(self, rows)

    monkeypatch.setattr(TensorSet, "to_device", noted)
    coming = epoch(replace(numbered(40), streamed=True), 10, generator())
    next(coming)
    ends = time.monotonic() + 60
    while len(fetched) < 2:
        assert time.monotonic() < ends, "nothing was fetched in advance"
    time.sleep(0.05)
    assert len(fetched) == 2, "one in advance, not all: memory stays at two batches"
    del coming


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_small_set_is_put_in_order_at_once_and_gives_the_very_same_batches(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = replace(numbered(30), images=numbered(30).images.to(dtype))

    def seen(how: Augmentation) -> list[tuple[Tensor, Tensor]]:
        mine = generator()
        return [batch for _ in range(2) for batch in epoch(data, 7, mine, augmenter(how))]

    for how in (Augmentation(), GEOMETRY["all"]):
        at_once = seen(how)
        with monkeypatch.context() as patched:
            patched.setattr(batches, "_SMALL", 0)
            picked = seen(how)
        for mine, reference in zip(at_once, picked, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, reference, strict=True))


@pytest.mark.parametrize(("images", "at_once"), [((32, 1, 4, 5), True), ((32, 1, 1, 5), False)])
def test_batches_of_a_small_set_begin_where_tensors_of_their_own_would(images: tuple[int, ...], at_once: bool) -> None:
    # MKL adds up in another order from other places: 8 images of 20 values are 10 times 64 bytes, 8 of 5 are 2.5 times
    labels = torch.zeros(32)
    found = [batch for batch, _ in epoch(TensorSet(torch.rand(images), labels, labels), 8, generator())]
    assert all(batch.data_ptr() % 64 == 0 for batch in found)
    assert (found[1].untyped_storage().data_ptr() == found[0].untyped_storage().data_ptr()) == at_once


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_of_the_host_reach_the_gpu_unchanged() -> None:
    resident = numbered(64)
    there = TensorSet(resident.images, resident.labels.cuda(), resident.patients.cuda(), streamed=True)
    coming = epoch(there, 7, torch.Generator("cuda"))
    pairs = [pair for images, labels in coming for pair in zip(images, labels, strict=True)]
    assert len(pairs) == 64
    assert all(torch.equal(image.cpu(), resident.images[int(label)]) for image, label in pairs)
