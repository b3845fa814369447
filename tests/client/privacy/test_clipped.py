"""Norms of very many values, and that what is clipped by them is no longer than the clip."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medfl.client.privacy.bookkeeping.engine import clipped_sum_by_bookkeeping
from medfl.client.privacy.clipped import clipped_sum_by_loop, row_norms, total_norm

MANY = 10_000_000


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7])
def test_the_norm_of_ten_million_equal_values_is_the_root_of_their_number_times_the_value(value: float) -> None:
    values = torch.full((1, MANY), value)
    exact = float(values[0, 0]) * MANY**0.5
    assert float(row_norms(values)) == pytest.approx(exact, rel=1e-5)
    assert float(total_norm([values[0, : MANY // 2], values[0, MANY // 2 :]])) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("values", [1, 4095, 4096, 4097, 8192, 10_000])
def test_norms_of_rows_are_those_of_float64_at_any_length(values: int) -> None:
    rows = torch.randn(3, values, generator=torch.Generator().manual_seed(values))
    exact = rows.double().norm(dim=1)
    assert row_norms(rows).tolist() == pytest.approx(exact.tolist(), rel=1e-6)
    assert row_norms(rows.double()).tolist() == pytest.approx(exact.tolist(), rel=1e-14)
    assert float(total_norm([*rows, rows.new_zeros(2, 2)])) == pytest.approx(float(exact.norm()), rel=1e-6)


def test_norms_have_the_type_of_the_values_and_at_least_single_precision() -> None:
    rows = torch.full((2, 5000), 300.0)  # 300^2 * 5000 is beyond half precision
    for given, expected in (("float16", "float32"), ("bfloat16", "float32"), ("float64", "float64")):
        norms = row_norms(rows.to(getattr(torch, given)))
        assert norms.dtype == getattr(torch, expected)
        assert norms.tolist() == pytest.approx([300 * 5000**0.5] * 2, rel=1e-2)


def test_a_value_that_is_not_finite_makes_its_own_rows_norm_so() -> None:
    rows = torch.ones(2, 5000)
    rows[1, 4999] = torch.nan
    assert row_norms(rows).isfinite().tolist() == [True, False]


class Wide(nn.Module):
    """One convolution of 7 million weights, whose gradients are all equal for an image of one value."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(512, 512, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        means: Tensor = self.convolution(x).mean((2, 3, 4))
        return means


@pytest.mark.parametrize("clipped_sum", [clipped_sum_by_loop, clipped_sum_by_bookkeeping])
def test_the_clipped_gradient_of_a_wide_layer_is_no_longer_than_the_clip(clipped_sum: object) -> None:
    unit = torch.full((1, 512, 3, 3, 3), 0.7), torch.zeros(1, dtype=torch.long)
    clipped = clipped_sum(Wide(), lambda output, _: 10 * output.sum(1).mean(), [unit], 1.0)  # type: ignore[operator]
    assert 0.9998 < float(clipped.flat.double().norm()) <= 1.0
