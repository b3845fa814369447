"""Which tensors of a study's network travel and which stay at the site, as its strategy demands."""

from __future__ import annotations

from torch import nn

from medfl.shared.adapters import adapter_tensors, add_adapters, fold_adapters
from medfl.shared.algorithms.fed_bn import normalisation_tensors
from medfl.shared.algorithms.personal_layers import layer_tensors
from medfl.shared.algorithms.settings import FedBNSettings, PersonalLayersSettings
from medfl.shared.errors import ConfigError
from medfl.shared.initial_weights import digest_of, load_initial, shelved
from medfl.shared.study import Study
from medfl.shared.weights import Flat, Layout
from medfl.shared.zoo import build_network


def build_study_network(study: Study, initial: bytes | None = None) -> nn.Module:
    """The network of ``study`` on the CPU, with the weights its seed gives on every machine, or with the ``initial``.

    Where only the head or adapters are trained, everything else is frozen.

    Raises:
        ConfigError: the study names initial weights, and these are not the ones or do not fit.
    """
    network = build_network(
        study.model,
        dimensions=study.data.dimensions,
        inputs=study.data.channels,
        outputs=len(study.data.classes),
        seed=study.seed,
    )
    if study.initial_weights is not None:
        initial = initial or shelved(study.initial_weights)
        if initial is None or digest_of(initial) != study.initial_weights:
            raise ConfigError(
                f"study {study.name} begins with weights of its own, and the file with SHA-256 "
                f"{study.initial_weights} is not here: the coordinator names it under initial_weights"
            )
        load_initial(initial, network)
    if study.training.train_only != "all":
        trained = layer_tensors(network, ())
        if study.training.train_only == "adapters":
            add_adapters(network, study.training.adapter_rank, seed=study.seed, skip=trained)
            trained |= adapter_tensors(network) | normalisation_tensors(network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in trained)
    return network


def whole_model(study: Study, layout: Layout, weights: Flat, initial: bytes | None) -> tuple[Layout, Flat]:
    """The plain network with all its layers, those that were not trained too, and adapters folded in."""
    network = build_study_network(study, initial)
    layout.load(weights, network)
    fold_adapters(network)
    whole = Layout.of(network)
    return whole, whole.flatten(network.state_dict())


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
    trained = frozenset(network.state_dict())
    if study.training.train_only != "all":
        trained = frozenset(name for name, parameter in network.named_parameters() if parameter.requires_grad)
    travel = Layout.of(network, keep=lambda name: name in trained and name not in personal)
    if not travel.tensors:
        raise ConfigError("the study's strategy leaves nothing to send")
    return travel, Layout.of(network, keep=lambda name: name in personal)
