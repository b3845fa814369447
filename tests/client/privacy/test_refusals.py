"""What other validators let pass is refused here by name; sound networks are not."""

from collections.abc import Callable

import pytest
import torch
from monai.losses import DiceLoss
from monai.networks import nets
from torch import Tensor, nn
from torch.nn import functional

from medfl.client.privacy.refusals import (
    refuse_unnoised_changes,
    require_private_network,
    require_separable_loss,
)
from medfl.shared.errors import ConfigError, PolicyRefusal
from medfl.shared.losses import StudyLoss, build_loss
from medfl.shared.privacy.settings import Engine
from medfl.shared.study import Loss

IMAGES = torch.randn(3, 1, 8, 8)


class HiddenNorm(nn.BatchNorm2d):
    """A subclass that keeps no statistics still mixes the batch."""

    def __init__(self) -> None:
        super().__init__(4, track_running_stats=False)


class RunningMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return x


class BatchCentred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def with_layer(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.Conv2d(4, 1, 3))


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4).requires_grad_(False).eval(),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        HiddenNorm(),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
    ],
)
def test_layers_that_keep_or_share_statistics_are_refused(layer: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"layer 1 (is a BatchNorm|keeps statistics)"):
        require_private_network(with_layer(layer), IMAGES)


def test_a_buffer_that_sees_images_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"buffer 1\.mean changes with the images"):
        require_private_network(with_layer(RunningMean()), IMAGES)


def test_a_constant_buffer_is_fine() -> None:
    network = with_layer(nn.Identity())
    network.register_buffer("window", torch.ones(3))
    require_private_network(network, IMAGES)


def test_rows_that_see_each_other_are_refused_where_rows_are_units() -> None:
    with pytest.raises(ConfigError, match="depends on the other images of the batch"):
        require_private_network(with_layer(BatchCentred()), IMAGES)
    require_private_network(with_layer(BatchCentred()), IMAGES, engine=Engine.LOOP)  # within one patient it is allowed


def test_unused_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"parameter spare\.weight is not used.*freeze it"):
        require_private_network(Unused(), IMAGES)


def test_frozen_unused_parameters_are_fine() -> None:
    network = Unused()
    network.spare.requires_grad_(False)
    require_private_network(network, IMAGES)


def test_layers_registered_twice_are_refused_with_the_engine_that_counts_them_twice() -> None:
    network = nets.DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 16])
    require_private_network(network, IMAGES)
    with pytest.raises(ConfigError, match="Opacus counts it twice"):
        require_private_network(network, IMAGES, engine=Engine.OPACUS)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as problems:
        require_private_network(nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)), IMAGES)
    assert len(str(problems.value).splitlines()) == 2


def test_the_check_leaves_the_network_as_it_was() -> None:
    network = with_layer(RunningMean())
    with pytest.raises(ConfigError):
        require_private_network(network, IMAGES)
    assert network[1].mean == 0
    assert network[0].weight.grad is None


@pytest.mark.parametrize("norm", ["instance", ("group", {"num_groups": 1})])
def test_networks_of_the_zoo_are_accepted(norm: str | tuple[str, dict[str, int]]) -> None:
    require_private_network(nets.UNet(2, 1, 2, (4, 8), (2,), num_res_units=1, norm=norm, dropout=0.2), IMAGES)


def each_apart(loss: Callable[[Tensor, Tensor], Tensor]) -> StudyLoss:
    return StudyLoss(loss, lambda o, y: torch.stack([loss(o[i : i + 1], y[i : i + 1]) for i in range(len(o))]))


def of_the_batch(loss: Callable[[Tensor, Tensor], Tensor]) -> StudyLoss:
    """Whose rows have their part of a batch's loss."""
    return StudyLoss(loss, lambda o, y: loss(o, y).expand(len(o)))


@pytest.mark.parametrize(
    ("which", "labels"),
    [
        (Loss.CROSS_ENTROPY, torch.tensor([0, 1, 2, 1])),
        (Loss.BINARY_CROSS_ENTROPY, torch.tensor([[0, 1, 0], [1, 1, 1], [0, 0, 0], [0, 0, 1]])),
        (Loss.DICE_CE, torch.arange(4 * 64).reshape(4, 8, 8) // 60 % 3),
    ],
)
def test_a_studys_losses_are_means_over_images(which: Loss, labels: Tensor) -> None:
    space = labels.shape[1:] if which is Loss.DICE_CE else ()
    require_separable_loss(build_loss(which), torch.randn(4, 3, *space), labels)


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, y: DiceLoss(to_onehot_y=True, softmax=True, batch=True)(o, y[:, None]),
        lambda o, y: functional.cross_entropy(o, y, weight=torch.tensor([1.0, 5.0, 0.1])),
        lambda o, y: functional.cross_entropy(o, torch.where(o[:, 0] > 1, -100, y)),
    ],
    ids=["dice over the batch", "class weights", "ignored labels"],
)
def test_losses_that_couple_images_are_refused_and_fine_where_each_image_is_taken_apart(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    outputs, labels = torch.randn(4, 3, 8, 8), torch.randint(0, 3, (4, 8, 8))
    with pytest.raises(ConfigError, match="the loss couples the images"):
        require_separable_loss(of_the_batch(loss), outputs, labels)
    require_separable_loss(each_apart(loss), outputs, labels)


def test_an_update_with_state_that_got_no_noise_stays() -> None:
    network = with_layer(RunningMean())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        network[0].weight.add_(1.0)
    refuse_unnoised_changes(before, network)
    network(IMAGES)
    with pytest.raises(PolicyRefusal, match=r"1\.mean changed in training without noise") as refusal:
        refuse_unnoised_changes(before, network)
    assert refusal.value.reason == "unnoised state"


def test_a_frozen_weight_that_changed_stays() -> None:
    network = with_layer(nn.Identity()).requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network[0].weight.add_(1.0)
    with pytest.raises(PolicyRefusal, match=r"0\.weight changed"):
        refuse_unnoised_changes(before, network)
