"""One site's round of the study's algorithm: ordinary training with the site's half of the algorithm around it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from medfl.client.data.tensors import TensorSet
from medfl.client.training.plain import AdjustGradients, ExtraLoss, planned_steps, train_plain
from medfl.client.workbench import Bench
from medfl.shared.algorithms import fed_dc, fed_dyn, fed_nova, scaffold
from medfl.shared.algorithms.fed_prox import add_proximal_gradient
from medfl.shared.algorithms.moon import Representation, contrastive_loss
from medfl.shared.algorithms.settings import (
    DittoSettings,
    FedDCSettings,
    FedDynSettings,
    FedNovaSettings,
    MoonSettings,
    ScaffoldSettings,
)
from medfl.shared.study import Study
from medfl.shared.weights import Flat

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Given:
    """What a site starts a round from: the global model, what came beside it, and what it kept (None: nothing yet)."""

    weights: Flat
    beside: Flat
    kept: Flat | None


@dataclass(frozen=True, slots=True)
class Local:
    """What a site's round gave: what is sent (update, then what goes beside it), what is kept (None: nothing)."""

    update: Flat
    kept: Flat | None
    tally: dict[str, float]


class TrainLocally(Protocol):
    """One site's round without differential privacy: :func:`train_local`, or what gives the same."""

    def __call__(
        self,
        bench: Bench,
        data: TensorSet,
        study: Study,
        given: Given,
        *,
        generator: torch.Generator,
        round_number: int,
        progress: Progress | None = None,
    ) -> Local:
        """The round's result. Raises TrainingError."""
        ...


@dataclass(frozen=True, slots=True)
class _Work:
    """One site's round: with what it trains, and from what."""

    bench: Bench
    data: TensorSet
    study: Study
    given: Given
    generator: torch.Generator
    round_number: int
    progress: Progress | None

    def train(self, adjust: AdjustGradients | None = None, extra_loss: ExtraLoss | None = None) -> dict[str, float]:
        """Train the network that is in the bench."""
        return train_plain(
            self.bench.network,
            self.data,
            self.study,
            generator=self.generator,
            round_number=self.round_number,
            progress=self.progress,
            adjust=adjust,
            extra_loss=extra_loss,
        )

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters."""
        return [parameter for parameter in self.bench.network.parameters() if parameter.requires_grad]

    @property
    def steps(self) -> int:
        """Optimizer steps of the round."""
        return planned_steps(self.study.training, len(self.data.labels))


def train_local(
    bench: Bench,
    data: TensorSet,
    study: Study,
    given: Given,
    *,
    generator: torch.Generator,
    round_number: int,
    progress: Progress | None = None,
) -> Local:
    """Train the model in ``bench``, into which ``given.weights`` were loaded, as the study's strategy says.

    Raises:
        TrainingError: a loss or a weight is not finite, or the device has no memory left.
    """
    work = _Work(bench, data, study, given, generator, round_number, progress)
    match study.strategy:
        case ScaffoldSettings():
            return _scaffold(work)
        case FedDCSettings(alpha=alpha):
            return _fed_dc(work, alpha)
        case FedDynSettings(alpha=alpha):
            return _fed_dyn(work, alpha)
        case FedNovaSettings():
            tally = work.train()
            done = fed_nova.local_work(work.steps, momentum=study.training.momentum)
            return Local(fed_nova.normalised(bench.update_from(given.weights), done), None, tally)
        case DittoSettings(pull=pull):
            return _ditto(work, pull)
        case MoonSettings() as settings:
            return _moon(work, settings)
        case _:
            tally = work.train()
            kept = bench.personal_weights() if bench.personal.tensors else None
            return Local(bench.update_from(given.weights), kept, tally)


def _scaffold(work: _Work) -> Local:
    bench, given, training = work.bench, work.given, work.study.training
    own = np.zeros_like(given.weights) if given.kept is None else given.kept
    terms, parameters = bench.on_parameters(scaffold.correction(given.beside, own)), work.parameters

    def adjust() -> None:
        for parameter, term in zip(parameters, terms, strict=True):
            if parameter.grad is not None and term is not None:
                parameter.grad.add_(term)

    tally = work.train(adjust)
    update = bench.update_from(given.weights)
    rate = training.learning_rate_of(work.round_number, work.study.rounds.count)
    change = scaffold.control_change(given.beside, update, steps=work.steps, learning_rate=rate)
    change[~bench.trainable()] = 0  # running statistics have no gradient
    return Local(np.concatenate([update, change]), own + change, tally)


def _fed_dc(work: _Work, alpha: float) -> Local:
    bench, given, training = work.bench, work.given, work.study.training
    nothing = np.zeros_like(given.weights)
    drift, last = (nothing, nothing) if given.kept is None else np.split(given.kept, 2)
    rate = training.learning_rate_of(work.round_number, work.study.rounds.count)
    term = fed_dc.gradient_term(last, given.beside, steps=work.steps, learning_rate=rate)
    if given.kept is None:  # a site that joins has no last update: nothing to compare with
        term = nothing
    terms, shifts, parameters = bench.on_parameters(term), bench.on_parameters(drift), work.parameters
    anchors = [
        parameter.detach().clone() if shift is None else parameter.detach() - shift
        for parameter, shift in zip(parameters, shifts, strict=True)
    ]

    def adjust() -> None:
        add_proximal_gradient(parameters, anchors, mu=alpha)
        for parameter, of_parameter in zip(parameters, terms, strict=True):
            if parameter.grad is not None and of_parameter is not None:
                parameter.grad.add_(of_parameter)

    tally = work.train(adjust)
    update = bench.update_from(given.weights)
    own = np.where(bench.trainable(), update, np.float32(0))  # running statistics do not drift
    drift = fed_dc.next_drift(drift, own)
    return Local(np.concatenate([fed_dc.corrected(update, drift), own]), np.concatenate([drift, own]), tally)


def _fed_dyn(work: _Work, alpha: float) -> Local:
    bench, given = work.bench, work.given
    own = np.zeros_like(given.weights) if given.kept is None else given.kept
    terms, parameters = bench.on_parameters(own), work.parameters
    anchors = [parameter.detach().clone() for parameter in parameters]

    def adjust() -> None:
        add_proximal_gradient(parameters, anchors, mu=alpha)
        for parameter, term in zip(parameters, terms, strict=True):
            if parameter.grad is not None and term is not None:
                parameter.grad.sub_(term)

    tally = work.train(adjust)
    update = bench.update_from(given.weights)
    return Local(update, fed_dyn.next_own(own, update, alpha=alpha), tally)


def _ditto(work: _Work, pull: float) -> Local:
    """The global model's round first, then one of the site's own model, pulled towards the received global one."""
    bench, given, parameters = work.bench, work.given, work.parameters
    anchors = [parameter.detach().clone() for parameter in parameters]
    tally = work.train()
    update = bench.update_from(given.weights)
    bench.load(given.weights if given.kept is None else given.kept, None)
    work.train(lambda: add_proximal_gradient(parameters, anchors, mu=pull))
    return Local(update, bench.layout.flatten(bench.network.state_dict()), tally)


def _moon(work: _Work, settings: MoonSettings) -> Local:
    bench, given = work.bench, work.given
    if given.kept is None:  # nothing to keep away from yet: FedAvg's round
        tally = work.train()
    else:
        anchor, last = copy.deepcopy(bench.network), copy.deepcopy(bench.network)
        bench.layout.load(given.kept, last)
        here, there, before = (Representation(network) for network in (bench.network, anchor, last))

        def contrast(images: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                anchor(images)
                last(images)
            mine, globals_, lasts = here.take(), there.take(), before.take()
            return settings.mu * contrastive_loss(mine, globals_, lasts, temperature=settings.temperature)

        try:
            tally = work.train(extra_loss=contrast)
        finally:
            here.close()
    return Local(bench.update_from(given.weights), bench.layout.flatten(bench.network.state_dict()), tally)
