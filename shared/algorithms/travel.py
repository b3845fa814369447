"""Which tensors of a study's network travel and which stay at the site, as its strategy demands."""

from __future__ import annotations

from torch import nn

from medfl.shared.algorithms.fed_bn import normalisation_tensors
from medfl.shared.algorithms.personal_layers import layer_tensors
from medfl.shared.algorithms.settings import FedBNSettings, PersonalLayersSettings
from medfl.shared.errors import ConfigError
from medfl.shared.study import Study
from medfl.shared.weights import Layout
from medfl.shared.zoo import build_network


def build_study_network(study: Study) -> nn.Module:
    """The network of ``study`` on the CPU, with the weights its seed gives on every machine.

    Where only the head is trained, everything else is frozen.
    """
    network = build_network(
        study.model,
        dimensions=study.data.dimensions,
        inputs=study.data.channels,
        outputs=len(study.data.classes),
        seed=study.seed,
    )
    if study.training.train_only == "head":
        head = layer_tensors(network, ())
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in head)
    return network


def layouts(study: Study, network: nn.Module) -> tuple[Layout, Layout]:
    """Layouts of the tensors that travel, and of the personal ones that stay (empty for most strategies).

    Raises:
        ConfigError: a personalised strategy would leave nothing out, or nothing to send.
    """
    personal: frozenset[str] = frozenset()
    if isinstance(study.strategy, FedBNSettings):
        personal = normalisation_tensors(network)
        if not personal:
            raise ConfigError(
                "strategy fedbn would leave nothing at the sites: this network's normalisation has no values: use "
                "model.norm batch or group"
            )
    if isinstance(study.strategy, PersonalLayersSettings):
        personal = layer_tensors(network, study.strategy.layers)
    trained = layer_tensors(network, ()) if study.training.train_only == "head" else frozenset(network.state_dict())
    travel = Layout.of(network, keep=lambda name: name in trained and name not in personal)
    if not travel.tensors:
        raise ConfigError("the study's strategy leaves nothing to send")
    return travel, Layout.of(network, keep=lambda name: name in personal)
