"""The site's halves on vectors of one or two values, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from medfl.shared.algorithms import fed_dc, fed_dyn, fed_nova, scaffold
from medfl.shared.algorithms.moon import Representation, contrastive_loss
from medfl.shared.algorithms.personal_layers import layer_tensors
from medfl.shared.errors import ConfigError
from medfl.shared.weights import Flat


def vector(*values: float) -> Flat:
    return np.array(values, np.float32)


def test_scaffolds_new_control_variate_is_the_mean_gradient_along_the_way() -> None:
    # two steps of rate 0.5 on gradients 3 and 1, corrected by shared - own = 2 - 1: w moves by -0.5 * (4 + 2) = -3
    change = scaffold.control_change(vector(2), vector(-3), steps=2, learning_rate=0.5)
    assert (vector(1) + change).tolist() == [2.0]  # the mean of 3 and 1
    assert scaffold.correction(vector(2), vector(1)).tolist() == [1.0]


def test_the_shared_control_variate_moves_by_the_share_of_the_sites() -> None:
    assert scaffold.next_shared(vector(1, 0), vector(4, -4), share=0.25).tolist() == [2.0, -1.0]


def test_local_work_counts_each_gradient_as_often_as_momentum_repeats_it() -> None:
    # three steps with momentum 0.5: the first gradient enters 1.75 times, the second 1.5, the third once
    assert fed_nova.local_work(3, momentum=0.5) == pytest.approx(1.75 + 1.5 + 1.0)
    assert fed_nova.local_work(7, momentum=0.0) == 7


def test_normalised_updates_come_back_as_steps() -> None:
    sent = fed_nova.normalised(vector(6, -3), 3.0)
    assert sent == pytest.approx([2.0, -1.0, 0.003])
    assert fed_nova.effective_step(sent[:2], float(sent[2])) == pytest.approx([6.0, -3.0])


def test_feddyn_keeps_what_pulled_the_site_away() -> None:
    assert fed_dyn.next_own(vector(0, 1), vector(2, -2), alpha=0.5).tolist() == [-1.0, 2.0]


def test_feddc_sends_its_model_with_the_drift_it_has_gathered() -> None:
    # drift 1 and an update of -3: drift -2, sent -3 + -2
    drift = fed_dc.next_drift(vector(1, 0), vector(-3, 2))
    assert drift.tolist() == [-2.0, 2.0]
    assert fed_dc.corrected(vector(-3, 2), drift).tolist() == [-5.0, 4.0]


def test_feddc_pulls_by_what_its_last_update_differed_from_the_mean() -> None:
    # the site moved by -4, all by -1: in 3 steps of rate 0.5 its gradients were larger by 2, which is taken off
    assert fed_dc.gradient_term(vector(-4), vector(-1), steps=3, learning_rate=0.5).tolist() == [-2.0]


def test_the_contrastive_loss_is_low_near_the_global_and_high_near_the_last_model() -> None:
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    # similarities 1 and 0 at temperature 0.5: log(1 + exp(-2)); the other way round log(1 + exp(2)); equal: log 2
    assert float(contrastive_loss(x, x, y, temperature=0.5)) == pytest.approx(math.log1p(math.exp(-2)))
    assert float(contrastive_loss(x, y, x, temperature=0.5)) == pytest.approx(math.log1p(math.exp(2)))
    assert float(contrastive_loss(x, y, y, temperature=0.5)) == pytest.approx(math.log(2))


def test_a_representation_is_what_enters_the_last_layer_averaged_over_space() -> None:
    network = nn.Sequential(nn.Identity(), nn.Conv2d(2, 3, 1), nn.ReLU())
    seen = Representation(network)
    images = torch.arange(8.0).view(1, 2, 2, 2)
    network(images)
    assert seen.take().tolist() == [[1.5, 5.5]]
    seen.close()


def network() -> nn.Module:
    made = nn.Sequential()
    for name, layer in (("body", nn.Linear(2, 2)), ("body2", nn.Linear(2, 2)), ("head", nn.Linear(2, 1))):
        made.add_module(name, layer)
    return made


def test_without_names_the_last_layer_is_personal() -> None:
    assert layer_tensors(network(), ()) == {"head.weight", "head.bias"}


def test_layers_are_named_by_whole_parts() -> None:
    assert layer_tensors(network(), ("body",)) == {"body.weight", "body.bias"}
    assert layer_tensors(network(), ("body2.bias", "head")) == {"body2.bias", "head.weight", "head.bias"}
    with pytest.raises(ConfigError, match="has no tail: its last layers are body, body2, head"):
        layer_tensors(network(), ("tail",))
