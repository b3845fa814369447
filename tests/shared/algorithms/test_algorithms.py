from __future__ import annotations

import pytest
import torch
from tiny import classes_study, masks_study
from torch import nn

from medfl.shared.algorithms.fed_bn import normalisation_tensors
from medfl.shared.algorithms.fed_prox import add_proximal_gradient
from medfl.shared.algorithms.travel import build_study_network, layouts
from medfl.shared.errors import ConfigError


def test_the_proximal_gradient_is_mu_times_the_distance() -> None:
    weights, anchor = nn.Parameter(torch.tensor([3.0, 1.0])), torch.tensor([1.0, 2.0])
    weights.grad = torch.tensor([10.0, 20.0])
    add_proximal_gradient([weights], [anchor], mu=0.5)
    assert weights.grad.tolist() == [10 + 0.5 * 2, 20 - 0.5 * 1]


def test_the_proximal_gradient_is_that_of_the_proximal_loss() -> None:
    weights, anchor = nn.Parameter(torch.tensor([3.0, 1.0])), torch.tensor([1.0, 2.0])
    (0.7 / 2 * (weights - anchor).square().sum()).backward()
    by_loss = weights.grad.clone()  # type: ignore[union-attr]
    weights.grad = torch.zeros(2)
    add_proximal_gradient([weights], [anchor], mu=0.7)
    assert weights.grad.tolist() == pytest.approx(by_loss.tolist())


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    frozen = nn.Parameter(torch.ones(2))
    add_proximal_gradient([frozen], [torch.zeros(2)], mu=1.0)
    assert frozen.grad is None


def test_normalisation_is_found_by_kind_and_not_by_name() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.GroupNorm(2, 4)), nn.LayerNorm(3))
    assert normalisation_tensors(network) == {
        "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked",
        "2.0.weight", "2.0.bias", "3.weight", "3.bias",
    }  # fmt: skip


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_fedbn_keeps_normalisation_home_and_sends_the_rest(norm: str) -> None:
    study = masks_study(strategy={"name": "fedbn"}, model={"name": "unet", "channels": [4, 8], "norm": norm})
    network = build_study_network(study)
    travel, stay = layouts(study, network)
    everything = {name for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    assert {name for name, _ in travel.tensors} | {name for name, _ in stay.tensors} == everything
    assert {name for name, _ in stay.tensors} == everything & normalisation_tensors(network)
    assert stay.length > 0
    assert not {name for name, _ in travel.tensors} & normalisation_tensors(network)


def test_other_strategies_send_everything() -> None:
    study = masks_study(model={"name": "unet", "channels": [4, 8], "norm": "batch"})
    travel, stay = layouts(study, build_study_network(study))
    assert stay.length == 0
    assert any(name.endswith("running_mean") for name, _ in travel.tensors)


def test_a_network_of_a_study_is_drawn_from_its_seed() -> None:
    first, again, other = (build_study_network(classes_study(seed=seed)).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["1.weight"], other["1.weight"])


def test_fedbn_on_a_network_without_values_in_its_norms_is_refused() -> None:
    study = masks_study(strategy={"name": "fedbn"}, model={"name": "unet", "channels": [4, 8], "norm": "group"})
    with pytest.raises(ConfigError, match="leave nothing at the sites"):
        layouts(study, nn.Sequential(nn.Conv2d(1, 1, 1), nn.InstanceNorm2d(1)))
    with pytest.raises(ConfigError, match="nothing to send"):
        layouts(study, nn.Sequential(nn.GroupNorm(1, 1)))


def test_only_the_head_is_trained_and_travels_where_a_study_says_so() -> None:
    study = masks_study(training={"train_only": "head"})
    network = build_study_network(study)
    travel, stay = layouts(study, network)
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert [name for name, _ in travel.tensors] == trained
    assert len({name.rpartition(".")[0] for name in trained}) == 1  # one layer
    assert travel.tensors[0][1][1] == 2  # a transposed convolution onto two classes
    assert stay.tensors == ()
    everything = build_study_network(masks_study())  # the seed gives the same weights whatever is trained
    for name, value in network.state_dict().items():
        assert torch.equal(value, everything.state_dict()[name])
