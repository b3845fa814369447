"""The optimizers a study may name, by PyTorch's functional forms: the same bits as its classes, less around them.

The classes import PyTorch's compiler at their first use: seconds and a hundred megabytes in every process, for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from medfl.shared.study import Optimizer, Study

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # PyTorch's defaults


class LocalOptimizer(Protocol):
    """Changes parameters in place by their gradients; a parameter without a gradient stays as it is."""

    def zero_grad(self) -> None:
        """Let all gradients go."""
        ...

    def step(self) -> None:
        """One step."""
        ...


def build_optimizer(study: Study, parameters: Sequence[Tensor], round_number: int) -> LocalOptimizer:
    """The study's optimizer over ``parameters``, with a fresh state and the round's learning rate."""
    training = study.training
    rate = training.learning_rate_of(round_number, study.rounds.count)
    match training.optimizer:
        case Optimizer.ADAM:
            return Adam(parameters, rate=rate, weight_decay=training.weight_decay, decoupled=False)
        case Optimizer.ADAMW:
            return Adam(parameters, rate=rate, weight_decay=training.weight_decay, decoupled=True)
        case Optimizer.SGD:
            return Sgd(parameters, rate=rate, momentum=training.momentum, weight_decay=training.weight_decay)


class _Base:
    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        # What the classes choose too, at every step: several tensors at a time on a GPU, one by one on the CPU.
        self._foreach = False if all([parameter.is_cpu for parameter in self._parameters]) else None

    def zero_grad(self) -> None:
        """Let all gradients go."""
        for parameter in self._parameters:
            parameter.grad = None

    def _live(self) -> tuple[list[int], list[Tensor], list[Tensor]]:
        """Places, values and gradients of the parameters that have a gradient."""
        places, values, gradients = [], [], []
        for place, parameter in enumerate(self._parameters):
            if (gradient := parameter.grad) is not None:
                places.append(place)
                values.append(parameter)
                gradients.append(gradient)
        return places, values, gradients


class Sgd(_Base):
    """As ``torch.optim.SGD``: momentum without dampening, weight decay in the gradient."""

    def __init__(self, parameters: Sequence[Tensor], *, rate: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters)
        self._rate, self._momentum, self._weight_decay = rate, momentum, weight_decay
        self._velocity: list[Tensor | None] = [None] * len(self._parameters)
        # The function spends more around such a step than in it, which shows in a small network.
        plain = self._foreach is False and not momentum and not weight_decay
        self._plain = [(parameter, parameter.detach()) for parameter in self._parameters] if plain else None

    def step(self) -> None:
        """One step."""
        if self._plain is None:
            self._full_step()
            return
        for parameter, values in self._plain:
            if (gradient := parameter.grad) is not None:
                values.add_(gradient, alpha=-self._rate)

    @torch.no_grad()
    def _full_step(self) -> None:
        places, values, gradients = self._live()
        velocity = [self._velocity[place] for place in places]
        sgd(
            values,
            gradients,
            velocity,
            foreach=self._foreach,
            lr=self._rate,
            momentum=self._momentum,
            weight_decay=self._weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        for place, buffer in zip(places, velocity, strict=True):
            self._velocity[place] = buffer


class Adam(_Base):
    """As ``torch.optim.Adam``; as ``torch.optim.AdamW`` where weight decay is ``decoupled`` from the gradient."""

    def __init__(self, parameters: Sequence[Tensor], *, rate: float, weight_decay: float, decoupled: bool) -> None:
        super().__init__(parameters)
        self._rate, self._weight_decay, self._decoupled = rate, weight_decay, decoupled
        self._means: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # of gradients, of their squares; steps

    @torch.no_grad()
    def step(self) -> None:
        """One step."""
        places, values, gradients = self._live()
        for place, value in zip(places, values, strict=True):
            if place not in self._means:
                self._means[place] = torch.zeros_like(value), torch.zeros_like(value), torch.zeros(())
        means = [self._means[place] for place in places]
        (adamw if self._decoupled else adam)(
            values,
            gradients,
            [first for first, _, _ in means],
            [second for _, second, _ in means],
            [],
            [steps for _, _, steps in means],
            foreach=self._foreach,
            amsgrad=False,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            lr=self._rate,
            weight_decay=self._weight_decay,
            eps=_EPSILON,
            maximize=False,
        )
