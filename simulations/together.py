"""Sites that wait for the same round are trained as one batched model; each takes its result when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from medfl.client.data.tensors import TensorSet
from medfl.client.training.local import Given, Local, Progress, TrainLocally, train_local
from medfl.client.training.plain import round_generator
from medfl.client.training.stacked import can_stack, same_shapes, train_stacked
from medfl.client.workbench import Bench
from medfl.shared.errors import TrainingError
from medfl.shared.study import Study
from medfl.shared.weights import weights_digest


class Together:
    """The local training of virtual sites, for at most ``at_once`` of them in one computation (1: each by itself).

    A site is trained ahead of its turn only where it waits with the same request; what it may not or does not do with
    the result is for the site itself.
    """

    def __init__(self, sets: Mapping[str, TensorSet], *, at_once: int) -> None:
        self.companions: Callable[[], Sequence[str]] = list  # who waits with the request that is being answered
        self._sets = sets
        self._at_once = at_once
        self._asked: tuple[str, int, str] | None = None
        self._ready: dict[str, Local] = {}

    def trainer_of(self, name: str) -> TrainLocally:
        """How the site ``name`` trains."""
        if self._at_once == 1:
            return train_local

        def train(
            bench: Bench,
            data: TensorSet,
            study: Study,
            given: Given,
            *,
            generator: torch.Generator,
            round_number: int,
            progress: Progress | None = None,
        ) -> Local:
            asked = (study.digest, round_number, weights_digest(given.weights))
            if asked != self._asked:
                self._asked, self._ready = asked, {}
            if name not in self._ready:
                group = self._group(name, study, bench)
                if len(group) == 1:
                    return train_local(
                        bench, data, study, given, generator=generator, round_number=round_number, progress=progress
                    )
                others = [round_generator(study, other, round_number, data.labels.device) for other in group[1:]]
                sets = [data, *(self._sets[other] for other in group[1:])]
                results = train_stacked(
                    bench, sets, study, given, generators=[generator, *others], round_number=round_number
                )
                self._ready |= dict(zip(group, results, strict=True))
            return _checked(self._ready.pop(name))

        return train

    def _group(self, name: str, study: Study, bench: Bench) -> list[str]:
        """``name``, and who is trained with it."""
        if not can_stack(study, bench.network):
            return [name]
        mine = self._sets[name]
        others = [other for other in self.companions() if other != name and same_shapes(mine, self._sets[other])]
        return [name, *others[: self._at_once - 1]]


def _checked(local: Local) -> Local:
    if not np.isfinite(local.update).all() or not all(np.isfinite(value) for value in local.tally.values()):
        raise TrainingError("training left weights or a loss that are not finite: lower training.learning_rate")
    return local
