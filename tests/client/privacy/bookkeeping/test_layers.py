"""Single layers in every geometry agree with a backward pass for each unit; others are refused by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from medfl.client.privacy.bookkeeping import engine
from medfl.client.privacy.bookkeeping.engine import clipped_sum_by_bookkeeping
from medfl.client.privacy.clipped import UnitData, clipped_sum_by_loop, empty_sum
from medfl.shared.errors import ConfigError
from medfl.shared.standardised import standardise_convolutions

CONVS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs.flatten(1).mean(1) - labels).square().mean() + outputs.square().mean()


def assert_exact(network: nn.Module, units: list[UnitData]) -> None:
    """With one row for each unit, and with two."""
    assert_as_by_loop(network, units)
    assert_as_by_loop(network, in_pairs(units))


def in_pairs(units: list[UnitData]) -> list[UnitData]:
    """Units of two rows each."""
    pairs = zip(units[::2], units[1::2], strict=True)
    return [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in pairs]


def assert_as_by_loop(network: nn.Module, units: list[UnitData]) -> None:
    network = network.double().train()
    free = clipped_sum_by_loop(network, loss, units, 1e9)
    clip = float(free.norms.median())
    reference = clipped_sum_by_loop(network, loss, units, clip)
    measured = clipped_sum_by_bookkeeping(network, loss, units, clip)
    torch.testing.assert_close(measured.norms, reference.norms, rtol=1e-10, atol=1e-12)
    scale = max(float(part.abs().max()) for part in reference.sums)
    for ours, theirs in zip(measured.sums, reference.sums, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10 * scale)


def rows(*shape: int, units: int = 4) -> list[UnitData]:
    torch.manual_seed(1)
    return [(torch.randn(1, *shape).double(), torch.randn(1).double()) for _ in range(units)]


@settings(max_examples=60, deadline=None)
@given(
    axes=st.integers(1, 3),
    transposed=st.booleans(),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
)
def test_convolutions_of_any_geometry_are_exact(
    axes: int, transposed: bool, kernel: int, stride: int, padding: int, dilation: int, groups: int, bias: bool
) -> None:
    layer = CONVS[axes][transposed]
    padding = min(padding, dilation * (kernel - 1) // 2)  # a transposed output must not become empty
    conv = layer(4, 6, kernel, stride, padding, dilation=dilation, groups=groups, bias=bias)
    size = 8 if axes < 3 else 7
    assert_exact(nn.Sequential(conv, nn.Tanh(), layer(6, 2, 1)), rows(4, *[size] * axes))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 1), "same", "valid"])
@pytest.mark.parametrize("kernel", [3, (2, 4)])
def test_padding_modes_are_exact(
    mode: str, padding: int | str | tuple[int, int], kernel: int | tuple[int, int]
) -> None:
    conv = nn.Conv2d(2, 3, kernel, padding=padding, padding_mode=mode)  # type: ignore[arg-type]
    assert_exact(nn.Sequential(nn.Conv2d(1, 2, 1), conv), rows(1, 6, 6))


def test_a_pointwise_layer_that_pads_or_skips_is_exact() -> None:
    # As many positions before as after, and not the same ones: 3 of the padded 5, every second one.
    assert_exact(nn.Conv2d(2, 3, 1, stride=2, padding=1), rows(2, 3, 3))


def test_what_the_network_does_not_use_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "empty_sum", lambda parameters: empty_sum(parameters).fill_(float("nan")))
    network = nn.Sequential(nn.Linear(4, 2)).double()
    network.spare = nn.Linear(3, 3).double()  # type: ignore[assignment]
    network.forward = lambda x: network[0](x)  # type: ignore[method-assign]
    sums = clipped_sum_by_bookkeeping(network, loss, rows(4), 1.0).sums
    assert [bool(part.any()) for part in sums] == [True, True, False, False]
    assert all(part.isfinite().all() for part in sums)


@pytest.mark.parametrize("output_padding", [0, 1])
def test_output_padding_is_exact(output_padding: int) -> None:
    assert_exact(nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=output_padding), rows(2, 5, 5))


@pytest.mark.parametrize("size", [2, 24])  # few positions: norms without instantiating; many: instantiated
def test_both_ways_of_having_norms_are_exact(size: int) -> None:
    assert_exact(nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)), rows(8, size, size))


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), (1, (2, 1), 2), (3, 0, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_wide_layers_go_by_the_offsets_of_their_kernel_and_are_exact(
    stride: int, padding: int | tuple[int, int], dilation: int, transposed: bool
) -> None:
    conv = CONVS[2][transposed](96, 100, (3, 2), stride, padding, dilation=dilation)  # 9,600 pairs of channels
    assert_exact(nn.Sequential(nn.Conv2d(2, 96, 1), conv), rows(2, 24, 23))


def test_wide_standardised_layers_are_exact() -> None:
    network = nn.Sequential(nn.Conv2d(2, 96, 1), nn.Conv2d(96, 100, 3))
    standardise_convolutions(network)
    assert_exact(network, rows(2, 12, 12))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.GroupNorm(2, 6), (6, 4, 4)),
        (nn.GroupNorm(3, 6), (6,)),
        (nn.InstanceNorm1d(6, affine=True), (6, 5)),
        (nn.InstanceNorm2d(6, affine=True), (6, 4, 4)),
        (nn.InstanceNorm3d(6, affine=True), (6, 2, 3, 4)),
        (nn.LayerNorm(5), (6, 5)),
        (nn.LayerNorm((6, 5)), (6, 5)),
        (nn.LayerNorm(5, bias=False), (2, 3, 5)),
        (nn.PReLU(), (6, 4, 4)),
        (nn.PReLU(6), (6, 4)),
        (nn.PReLU(6), (6,)),
        (nn.Linear(5, 3), (5,)),
        (nn.Linear(5, 3, bias=False), (7, 5)),
        (nn.Linear(40, 30), (2, 2, 40)),
    ],
    ids=str,
)
def test_other_layers_are_exact(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    assert_exact(layer, rows(*shape))


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embeddings_are_exact(padding_idx: int | None) -> None:
    torch.manual_seed(0)
    units = [(torch.randint(0, 5, (1, 3, 2)), torch.randn(1).double()) for _ in range(4)]
    assert_exact(nn.Embedding(5, 4, padding_idx=padding_idx), units)


def test_frozen_parameters_are_left_out() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.PReLU(), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3))
    network[0].requires_grad_(False)
    network[3].bias.requires_grad_(False)
    assert_exact(network, rows(1, 8, 8))


@pytest.mark.parametrize("rows_each", [1, 2])
def test_a_unit_that_is_not_finite_is_dropped_and_changes_no_other(rows_each: int) -> None:
    # Each kind of layer: deferred and instantiated convolutions, norm, slope, linear.
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.PReLU(), nn.Conv2d(8, 16, 3, 2), nn.Flatten(), nn.Linear(144, 2)
    ).double()  # fmt: skip
    units = rows(1, 9, 9, units=3 * rows_each)
    units = units if rows_each == 1 else in_pairs(units)
    damaged = units[1][0].clone()
    damaged[0] = float("nan")  # one row of the unit
    broken = [units[0], (damaged, units[1][1]), units[2]]
    with_broken = clipped_sum_by_bookkeeping(network, loss, broken, 0.1)
    without = clipped_sum_by_bookkeeping(network, loss, [units[0], units[2]], 0.1)
    assert with_broken.norms.isfinite().tolist() == [True, False, True]
    for a, b in zip(with_broken.sums, without.sums, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_float32_norms_stay_within_the_clip_slack() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.PReLU(), nn.Conv2d(8, 16, 3, 2))
    units = [(images.float() + 3, labels.float()) for images, labels in rows(1, 17, 17)]
    single = clipped_sum_by_bookkeeping(network, loss, units, 1e-3)
    exact = clipped_sum_by_loop(network.double(), loss, [(x.double(), y.double()) for x, y in units], 1e-3)
    torch.testing.assert_close(single.norms.double(), exact.norms, rtol=1e-4, atol=0)


def test_under_autocast_gradients_agree_to_the_precision_of_bfloat16() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.PReLU(), nn.ConvTranspose2d(8, 2, 3))
    units = [(images.float(), labels.float()) for images, labels in rows(1, 9, 9)]
    exact = clipped_sum_by_bookkeeping(network, loss, units, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = clipped_sum_by_bookkeeping(network, loss, units, 0.1)
    torch.testing.assert_close(mixed.norms, exact.norms, rtol=0.05, atol=0)
    assert all(part.dtype == torch.float32 for part in mixed.sums)


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(96, 100, 3), nn.Linear(6, 200)], ids=str)
@pytest.mark.parametrize("size", [6, 24])
def test_under_autocast_no_clipped_gradient_is_longer_than_the_clip(layer: nn.Module, size: int) -> None:
    # bfloat16 has steps of 2^-8: factors or sums rounded to it would be up to 0.4 % too long.
    torch.manual_seed(0)
    channels = 6 if isinstance(layer, nn.Linear) else layer.in_channels
    one = [(torch.randn(1, channels, size, 6 if isinstance(layer, nn.Linear) else size), torch.randn(1))]
    with torch.autocast("cpu", torch.bfloat16):
        clipped = clipped_sum_by_bookkeeping(layer, loss, one, 1e-3)
    assert float(clipped.norms) > 2e-3
    assert 0.999e-3 < float(clipped.flat.double().norm()) <= 1e-3


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight - self.weight.mean(), self.bias)


class OtherConvolution(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv2d(x, weight * 2, bias)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class FunctionalUse(nn.Module):
    """Uses a layer's weight without calling the layer: autograd would sum it over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.layer(x), self.layer.weight)


class Folding(nn.Module):
    """Folds positions into rows, as windowed attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, 2)).reshape(len(x), -1)


@pytest.mark.parametrize(
    "layer",
    [
        Standardised(1, 2, 3),
        OtherConvolution(1, 2, 3),
        Bare(),
        nn.Bilinear(2, 2, 2),
        nn.MultiheadAttention(4, 2),
        nn.LSTM(4, 4),
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4).requires_grad_(False),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.Embedding(4, 4, max_norm=1.0),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 2, 3)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_without_a_rule_is_refused_by_name(layer: nn.Module) -> None:
    network = nn.Sequential(nn.Identity(), layer)
    with pytest.raises(ConfigError, match=r"layer 1.*loop"):
        clipped_sum_by_bookkeeping(network, loss, rows(4), 1.0)


def test_a_replaced_forward_is_refused() -> None:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x @ layer.weight  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="forward was replaced"):
        clipped_sum_by_bookkeeping(nn.Sequential(layer), loss, rows(4), 1.0)


def test_a_weight_used_outside_its_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="outside its own layer"):
        clipped_sum_by_bookkeeping(FunctionalUse().double(), loss, rows(4), 1.0)


def test_units_folded_into_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="8 rows for 4 images"):
        clipped_sum_by_bookkeeping(Folding().double(), loss, rows(4), 1.0)


def test_a_refused_step_leaves_network_and_gradients_as_they_were() -> None:
    network = Folding().double()
    network.layer.weight.grad = torch.ones_like(network.layer.weight)
    with pytest.raises(ConfigError):
        clipped_sum_by_bookkeeping(network, loss, rows(4), 1.0)
    assert "forward" not in vars(network.layer)
    assert network.layer.weight.grad.eq(1).all()
