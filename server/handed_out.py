"""The model that a study scores and hands out: the newest, a mean of rounds' models, or the best that was scored."""

from __future__ import annotations

import numpy as np

from medfl.server.checkpoint import CheckpointFolder
from medfl.shared.study import Study
from medfl.shared.weights import Flat


class HandedOut:
    """Follows the models of a study's rounds; the best one is kept on the disk, where there is one."""

    def __init__(self, study: Study, checkpoints: CheckpointFolder | None) -> None:
        self._study = study
        self._checkpoints = checkpoints
        self._best: Flat | None = None  # where there is no disk for it
        self.average: Flat | None = None
        """Of rounds' models, where the study asks for it."""

    def follow(self, number: int, weights: Flat) -> None:
        """Take ``weights``, the model of round ``number``, into the mean of the models since the first that counts.

        Post-processing of what was released: free in privacy. Tail averaging: Polyak & Juditsky 1992,
        https://doi.org/10.1137/0330046. The moving average begins with the first round's model and not with the start:
        Kingma & Ba 2015, https://arxiv.org/abs/1412.6980, section 3.
        """
        rounds = self._study.rounds
        if (decay := rounds.average_decay) is not None:
            share = (1 - decay) / (1 - decay**number)
        elif rounds.average_last > 1 and (place := number - (rounds.count - rounds.average_last)) >= 1:
            share = 1 / place
        else:
            self.average = None
            return
        if share == 1 or self.average is None:
            self.average = weights
        else:
            self.average = self.average + (weights - self.average) * np.float32(share)

    def model(self, number: int, weights: Flat) -> Flat:
        """What is scored and handed out after round ``number``: the mean once all models are there, else the newest."""
        complete = number == self._study.rounds.count
        return self.average if complete and self.average is not None else weights

    def keep_best(self, number: int, model: Flat) -> None:
        """``model``, of round ``number``, has the best score so far. Raises OSError when the disk refuses."""
        if self._checkpoints is None:
            self._best = model
        else:
            self._checkpoints.save_best(self._study.digest, number, model)

    def best(self, number: int) -> Flat | None:
        """The model of round ``number`` that was kept as the best; None where it cannot be read."""
        if self._checkpoints is None:
            return self._best
        return self._checkpoints.load_best(self._study.digest, number)
