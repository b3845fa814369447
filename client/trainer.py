"""One round of training at a site, under whichever privacy its study asks for; what it costs is charged before."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from medfl.client.data.tensors import TensorSet
from medfl.client.notes import note_scores, note_spent
from medfl.client.privacy.ledger import Ceilings, Ledger
from medfl.client.records import Records
from medfl.client.training.charged import fix_plan, train_charged
from medfl.client.training.client_level import fix_client_level_plan, train_client_level
from medfl.client.training.local import Given, TrainLocally, train_local
from medfl.client.training.plain import round_generator
from medfl.client.training.private import require_private_training
from medfl.client.workbench import Bench
from medfl.shared.files import private_folder
from medfl.shared.messages import ModelRequest, TrainReply
from medfl.shared.privacy.settings import ClientLevel, DpSgd, NoPrivacy
from medfl.shared.study import Study
from medfl.shared.weights import Flat


class Trainer:
    """Trains for one site and keeps its ledger."""

    def __init__(
        self,
        site: str,
        records: Records,
        ledger: Path,
        *,
        ceilings: Ceilings,
        train_locally: TrainLocally = train_local,
    ) -> None:
        self._site = site
        self._records = records
        self._ledger_path = ledger
        self._ceilings = ceilings
        self._train_local = train_locally
        self._open_ledger: Ledger | None = None

    @property
    def ledger(self) -> Ledger:
        """The site's ledger, opened at the first private round and then held against other processes."""
        if self._open_ledger is None:
            private_folder(self._ledger_path.parent)
            self._open_ledger = Ledger(self._ledger_path, cohort=self._site, ceilings=self._ceilings)
        return self._open_ledger

    def check_ledger(self) -> None:
        """Open the ledger, where there is one. Raises PolicyRefusal: it is damaged, older than what was countersigned,
        or another process has it.
        """
        if any(self._ledger_path.parent.glob(self._ledger_path.name + "*")):  # a lost file is a damage too
            self.ledger  # noqa: B018 - opens it

    def plan(self, study: Study, bench: Bench, data: TensorSet, *, survivors: int) -> None:
        """Fix in the ledger what each round of ``study`` will cost; nothing without differential privacy.

        ``survivors``: least number of sites whose sum is opened with this one, for client-level privacy.

        Raises:
            ConfigError, DataError, PolicyRefusal: the study cannot keep its promise with this network or these images.
        """
        match study.privacy:
            case DpSgd() as privacy:
                require_private_training(bench.network, data, study, privacy)
                fix_plan(self.ledger, study, privacy, data)
            case ClientLevel() as privacy:
                fix_client_level_plan(
                    self.ledger,
                    study,
                    privacy,
                    patients=int(torch.unique(data.patients).numel()),
                    survivors=survivors,
                    values=bench.layout.length,
                )
            case NoPrivacy():
                pass

    def train(
        self,
        study: Study,
        bench: Bench,
        data: TensorSet,
        request: ModelRequest,
        given: Given,
        progress: Callable[[int, int], None],
        *,
        survivors: int,
    ) -> tuple[TrainReply, Flat | None]:
        """The result of a round, and what the site keeps of it. ``survivors`` as for :meth:`plan`.

        ``progress(step, steps)`` is called between batches, and ends the training by raising.

        Raises:
            PolicyRefusal, DataError, TrainingError: why there is none.
        """
        started = time.monotonic()
        match study.privacy:
            case DpSgd() as privacy:
                private = train_charged(
                    self.ledger,
                    bench,
                    study,
                    privacy,
                    data,
                    round_number=request.round,
                    weights=given.weights,
                    progress=progress,
                )
                note_spent(self._records, study, request, private, time.monotonic() - started)
                # Equal weights and no tally: an exact count or loss would be a release of its own.
                kept = bench.personal_weights() if bench.personal.tensors else None
                return TrainReply(private.update, examples=1), kept
            case ClientLevel() as privacy:
                private, kept = train_client_level(
                    self.ledger,
                    bench,
                    study,
                    privacy,
                    data,
                    given,
                    round_number=request.round,
                    survivors=survivors,
                    encoding=request.encoding,
                    progress=progress,
                )
                note_spent(self._records, study, request, private, time.monotonic() - started)
                return TrainReply(private.update, examples=1, tally=private.noised), kept
            case NoPrivacy():
                generator = round_generator(study, self._site, request.round, data.labels.device)
                local = self._train_local(
                    bench,
                    data,
                    study,
                    given,
                    generator=generator,
                    round_number=request.round,
                    progress=progress,
                )
                note_scores(self._records, study, request, "train", local.tally, time.monotonic() - started)
                return TrainReply(local.update, examples=len(data), tally=local.tally), local.kept

    def close(self) -> None:
        """Let go of the ledger."""
        if self._open_ledger is not None:
            self._open_ledger.close()
            self._open_ledger = None
