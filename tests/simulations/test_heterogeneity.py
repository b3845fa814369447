"""Each property of a scanner on pictures of four values."""

from __future__ import annotations

import pytest
import torch
from tiny import masks_study, site_data

from medfl.client.data.splits import Split
from medfl.simulations.config import Scanner
from medfl.simulations.heterogeneity import as_scanned, scan


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


RAMP = torch.tensor([0.0, 1.0, 2.0, 4.0]).view(1, 1, 2, 2)


def test_gamma_works_on_the_images_own_range() -> None:
    # 0, 1/4, 1/2, 1 squared: 0, 1/16, 1/4, 1; times 4
    assert scan(RAMP, Scanner(gamma=2.0), drawn()).flatten().tolist() == pytest.approx([0, 0.25, 1, 4])


def test_inverted_contrast_swaps_both_ends_and_is_its_own_inverse() -> None:
    once = scan(RAMP, Scanner(invert=True), drawn())
    assert once.flatten().tolist() == [4, 3, 2, 0]
    assert torch.equal(scan(once, Scanner(invert=True), drawn()), RAMP)


def test_colour_scales_each_channel() -> None:
    picture = torch.cat([RAMP, RAMP], 1)
    changed = scan(picture, Scanner(colour=(1.0, 0.5)), drawn())
    assert changed[0, 0].flatten().tolist() == [0, 1, 2, 4]
    assert changed[0, 1].flatten().tolist() == [0, 0.5, 1, 2]


def test_half_the_resolution_leaves_no_checkerboard() -> None:
    board = (torch.arange(64).view(8, 8) + torch.arange(8).view(8, 1)) % 2
    changed = scan(board.float().view(1, 1, 8, 8), Scanner(resolution=0.5), drawn())
    assert changed.std() < 1e-6


def test_noise_has_the_promised_deviation_in_parts_of_the_range() -> None:
    picture = torch.zeros(1, 1, 100, 100)
    picture[..., 0, 0] = 2.0
    noise = scan(picture, Scanner(noise=0.1), drawn()) - picture
    assert float(noise.std()) == pytest.approx(0.2, rel=0.03)  # standard error of a deviation from 10,000 draws: 0.7 %


def test_a_bias_field_is_smooth_and_bounded() -> None:
    picture = torch.full((1, 1, 32, 32), 0.5)
    picture[..., 0, 0], picture[..., 0, 1] = 0.0, 1.0
    changed = scan(picture, Scanner(bias_field=0.4), drawn())[..., 2:, 2:]
    assert changed.min() >= 0.5 * 0.6
    assert changed.max() <= 0.5 * 1.4
    assert changed.diff(dim=-1).abs().max() < 0.06  # 0.4 over a third of 32 pixels


@pytest.mark.parametrize("size", [(1, 1, 8, 8), (2, 1, 4, 8, 8)])
def test_all_at_once_in_two_and_three_dimensions(size: tuple[int, ...]) -> None:
    scanner = Scanner(gamma=0.7, bias_field=0.3, noise=0.1, resolution=0.5, invert=True)
    picture = torch.rand(size, generator=drawn(5))
    changed = scan(picture, scanner, drawn())
    assert changed.shape == picture.shape
    assert torch.equal(changed, scan(picture, scanner, drawn()))
    assert not torch.equal(changed, scan(picture, scanner, drawn(1)))


def test_masks_and_patients_stay_and_no_scanner_changes_nothing() -> None:
    data = site_data(masks_study())
    changed = as_scanned(data, Scanner(gamma=2.0), seed=1)
    for split in Split:
        assert torch.equal(changed.splits[split].labels, data.splits[split].labels)
        assert torch.equal(changed.splits[split].patients, data.splits[split].patients)
    assert not torch.equal(changed.splits[Split.TRAIN].images, data.splits[Split.TRAIN].images)
    assert as_scanned(data, Scanner(), seed=1) is data
