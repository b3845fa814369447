from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from medfl.shared.zoo import (
    AnySpec,
    DenseNet121Spec,
    LogisticSpec,
    ModelSpec,
    ModelTask,
    Norm,
    ResNet18Spec,
    UNetSpec,
    build_network,
    check_size,
    tasks_of,
)

NORMS: list[Norm] = ["batch", "group", "instance"]
BATCH_NORM = nn.modules.batchnorm._BatchNorm


def build(spec: AnySpec, *, dimensions: int = 2, seed: int = 0, inputs: int = 1) -> nn.Module:
    return build_network(spec, dimensions=dimensions, inputs=inputs, outputs=3, seed=seed)


def small_unet(norm: Norm = "instance") -> UNetSpec:
    return UNetSpec(channels=(4, 6, 8), residual_units=1, norm=norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_unet_gives_a_score_for_each_class_and_pixel(norm: Norm, dimensions: int) -> None:
    network = build(small_unet(norm), dimensions=dimensions, inputs=2)
    size = (8, 12, 16)[-dimensions:]
    assert network(torch.rand(2, 2, *size)).shape == (2, 3, *size)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("spec", [DenseNet121Spec, ResNet18Spec])
def test_a_classifier_gives_a_score_for_each_class(spec: type[DenseNet121Spec | ResNet18Spec], norm: Norm) -> None:
    with torch.no_grad():
        assert build(spec(norm=norm))(torch.rand(2, 1, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("spec", [DenseNet121Spec(norm="group"), ResNet18Spec(norm="instance")])
def test_a_classifier_of_volumes_has_kernels_of_three_axes(spec: DenseNet121Spec | ResNet18Spec) -> None:
    kernels = [module for module in build(spec, dimensions=3).modules() if isinstance(module, nn.Conv3d)]
    assert len(kernels) > 15


def test_logistic_regression_has_one_weight_for_each_pixel_and_class() -> None:
    network = build(LogisticSpec(inputs=16))
    assert [tuple(p.shape) for p in network.parameters()] == [(3, 16), (3,)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("make", [small_unet, lambda norm: ResNet18Spec(norm=norm), lambda n: DenseNet121Spec(norm=n)])
def test_only_batch_norm_has_batch_norm(make: object, norm: Norm) -> None:
    kinds = {type(module) for module in build(make(norm)).modules()}  # type: ignore[operator]
    assert any(issubclass(kind, BATCH_NORM) for kind in kinds) == (norm == "batch")
    assert (nn.GroupNorm in kinds) == (norm == "group" or (norm == "instance" and make is not small_unet))


def test_group_norm_has_as_many_groups_as_divide_the_channels_up_to_eight() -> None:
    groups = {m.num_channels: m.num_groups for m in build(small_unet("group")).modules() if isinstance(m, nn.GroupNorm)}
    assert groups[4] == 4
    assert groups[6] == 2
    assert groups[8] == 8


def test_instance_norm_of_a_classifier_is_one_group_a_channel() -> None:
    norms = [m for m in build(ResNet18Spec(norm="instance")).modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == 20
    assert all(norm.num_groups == norm.num_channels for norm in norms)


@pytest.mark.parametrize("spec", [small_unet(), small_unet("group"), LogisticSpec(inputs=4)])
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(spec: AnySpec) -> None:
    first, again, other = (build(spec, seed=seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_global_generator_is_left_as_it_was() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    build(small_unet())
    assert torch.equal(torch.rand(3), expected)


def test_weights_do_not_depend_on_the_global_generator() -> None:
    torch.manual_seed(1)
    first = build(LogisticSpec(inputs=4)).state_dict()
    torch.manual_seed(2)
    again = build(LogisticSpec(inputs=4)).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_each_network_does_one_task() -> None:
    assert tasks_of(UNetSpec()) == {ModelTask.SEGMENTATION}
    for spec in (DenseNet121Spec(), ResNet18Spec(), LogisticSpec(inputs=1)):
        assert tasks_of(spec) == {ModelTask.CLASSIFICATION}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "unet", "channels": [4, 8], "strides": [2, 2]}, "one value fewer than channels"),
        ({"name": "unet", "channels": [4, 8], "strides": [3]}, "strides must be 1 or 2"),
        ({"name": "unet", "channels": [4, 0]}, "between 1 and 2048"),
        ({"name": "unet", "channels": [4]}, "at least 2"),
        ({"name": "vnet"}, "does not match any of the expected tags"),
        ({"name": "unet", "path": "my.module"}, "Extra inputs"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TypeAdapter(ModelSpec).validate_python(settings)


@pytest.mark.parametrize("size", [(4, 4), (4, 8), (6, 8), (8, 8), (9, 8), (10, 12), (12, 16)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("strides", [None, (1, 2), (2, 1)])
def test_a_size_is_refused_exactly_where_the_unet_fails(
    size: tuple[int, int], norm: Norm, strides: tuple[int, int] | None
) -> None:
    spec = UNetSpec(channels=(2, 2, 2), strides=strides, residual_units=0, norm=norm)
    try:
        fits = build(spec)(torch.rand(2, 1, *size)).shape[2:] == size
    except (RuntimeError, ValueError):
        fits = False
    if fits:
        check_size(spec, channels=1, size=size)
    else:
        with pytest.raises(ValueError, match="size"):
            check_size(spec, channels=1, size=size)
