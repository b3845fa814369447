"""A study: everything a federation needs to know to train one model, as data. Its digest is what a site approves.

Any change of a study is another study. A release may add fields: as :func:`medfl.shared.config.later`, so that studies
which do not use them keep their digests. What a field means, and what it is where it is absent, never changes.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import cached_property, lru_cache
from math import cos, pi
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from medfl.shared.algorithms.needs import Demands, demands_of, misfit
from medfl.shared.algorithms.settings import FedAvgSettings, FedBNSettings, PersonalLayersSettings, StrategySettings
from medfl.shared.config import Settings, later
from medfl.shared.data_spec import DataSpec
from medfl.shared.errors import ConfigError, ProtocolError
from medfl.shared.metrics import Scoring
from medfl.shared.privacy.noised_encoding import suits
from medfl.shared.privacy.settings import ClientLevel, NoPrivacy, PrivacySettings
from medfl.shared.safeguards import Safeguards, unguarded
from medfl.shared.secagg.rings import Ring
from medfl.shared.zoo import LogisticSpec, ModelSpec, ModelTask, UNetSpec, check_size, tasks_of

MAX_STUDY_BYTES = 256 * 1024

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


def _readable(text: str) -> str:
    """Refuse characters that would let a study show a person something else than it says."""
    if any(unicodedata.category(letter)[0] == "C" and letter != "\n" for letter in text):
        raise ValueError("must be of printable characters: it holds a control character")
    return text


Words = Annotated[str, AfterValidator(_readable)]
"""Text for the person who decides on a study."""


class Optimizer(StrEnum):
    """Local optimizers; their state does not outlive a round."""

    ADAM = "adam"
    ADAMW = "adamw"
    SGD = "sgd"


class Loss(StrEnum):
    """Training losses: Dice with cross-entropy for segmentation, one of the other two for classification."""

    DICE_CE = "dice-ce"
    CROSS_ENTROPY = "cross-entropy"
    BINARY_CROSS_ENTROPY = "binary-cross-entropy"


class Training(Settings):
    """What each site does in one round. Exactly one of ``epochs`` and ``steps`` says how long."""

    loss: Loss
    optimizer: Optimizer = Optimizer.ADAM
    learning_rate: float = Field(default=1e-3, gt=0, le=10)
    decay: Literal["none", "cosine"] = "none"  # cosine: from learning_rate in round 1 towards 0 after the last round
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    momentum: float = Field(default=0.0, ge=0, lt=1)  # sgd only
    # head: the last layer; adapters: a narrow convolution beside each one, norms, and the last layer;
    train_only: Literal["all", "head", "adapters"] = "all"  # what is not trained stays as it begins
    adapter_rank: int = later(4, ge=1, le=256)  # channels of an adapter
    batch_size: int = Field(default=8, ge=1, le=4096)
    epochs: int | None = Field(default=None, ge=1, le=1000)
    steps: int | None = Field(default=None, ge=1, le=1_000_000)

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        return self

    def learning_rate_of(self, round_number: int, rounds: int) -> float:
        """Learning rate in round ``round_number`` (from 1) of ``rounds``.

        Cosine decay by round: Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983.

        >>> Training(loss="dice-ce", epochs=1, learning_rate=1.0, decay="cosine").learning_rate_of(3, 4)
        0.5
        """
        if self.decay == "none":
            return self.learning_rate
        return self.learning_rate * (1 + cos(pi * (round_number - 1) / rounds)) / 2


class Converged(Settings):
    """When a study has converged: its held-out score has not grown for so many rounds.

    The finished model is the one with the best score, or with ``keep: last`` that of the last round.
    """

    rounds: int = Field(ge=1, le=10_000)
    gain: float = Field(default=0.001, ge=0, lt=1)  # less is no growth
    keep: Literal["best", "last"] = "best"


class Rounds(Settings):
    """How often, with how many sites, and how long a stage may take."""

    count: int = Field(ge=1, le=10_000)
    minimum_sites: int = Field(default=2, ge=1, le=10_000)  # quorum: fewer answers void the round
    sites_per_round: int | None = Field(default=None, ge=1, le=10_000)  # absent: all that are online
    deadline_s: float = Field(default=3600.0, gt=0, le=7 * 86400)  # for one training or evaluation stage
    patience_s: float = Field(default=86400.0, gt=0)  # how long to wait for a quorum to come online
    evaluate_every: int = Field(default=1, ge=1)
    average_last: int = Field(default=1, ge=1)  # the finished model is the mean of so many last rounds' models
    converged: Converged | None = later(None)  # end before the last round; absent: never
    # The finished model is the moving average of all rounds' models; each counts so many times what the next one does.
    average_decay: float | None = later(None, gt=0, lt=1)

    @property
    def averaged(self) -> bool:
        """Whether the finished model is not the last round's."""
        return self.average_last > 1 or self.average_decay is not None

    @model_validator(mode="after")
    def _quorum_can_be_reached(self) -> Rounds:
        if self.average_decay is not None and (self.average_last > 1 or self.converged is not None):
            raise ValueError("average_decay goes neither with average_last nor with converged: leave all but one out")
        if self.average_last > self.count:
            raise ValueError(f"average_last must be at most count, which is {self.count}")
        if self.sites_per_round is not None and self.sites_per_round < self.minimum_sites:
            raise ValueError(f"sites_per_round must be at least minimum_sites, which is {self.minimum_sites}")
        return self


class SecureAggregation(Settings):
    """Whether updates are summed under MSA-1 masks, and how they are encoded (see docs/secure-aggregation.md)."""

    mode: Literal["none", "msa1"]
    ring_bits: Literal[16, 20, 24, 32] = 32
    clip: float = Field(default=1.0, gt=0, le=1e6)  # largest absolute value of one entry of an update
    statistics_clip: float = Field(default=16.0, gt=0, le=1e6)  # the same of normalisation's running statistics
    phase_deadline_s: float = Field(default=120.0, gt=0, le=86400)


class Study(Settings):
    """One training of one model by a consortium. Crosses the wire as canonical JSON; holds no path and no code."""

    name: Name
    purpose: Words = Field(default="", max_length=2000)  # in words, for the person who approves it
    responsible: Words = later("", max_length=200)  # who answers for the study: person and institution
    legal_basis: Words = later("", max_length=500)  # on which patients' data are used
    ethics: Words = later("", max_length=200)  # number of the ethics committee's vote
    recipients: Words = later("", max_length=500)  # who receives the model, and in which countries
    last_day: datetime.date | None = later(None)  # no site trains for it afterwards
    task: ModelTask
    data: DataSpec
    model: ModelSpec
    training: Training
    rounds: Rounds
    privacy: PrivacySettings  # no default: "mode: none" must be written
    secure_aggregation: SecureAggregation  # no default either
    strategy: StrategySettings = FedAvgSettings()
    safeguards: Safeguards = later(Safeguards())
    initial_weights: Sha256 | None = later(None)  # of a safetensors file at the coordinator; absent: from the seed
    seed: int = Field(default=0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _fits_together(self) -> Study:
        if self.task not in tasks_of(self.model):
            raise ValueError(f"model {self.model.name} cannot do {self.task.value}: choose another model")
        if (self.training.loss is Loss.DICE_CE) != (self.task is ModelTask.SEGMENTATION):
            raise ValueError("training.loss must be dice-ce for segmentation, and is for segmentation only")
        several = self.task is ModelTask.CLASSIFICATION and self.data.multi_label
        if (self.training.loss is Loss.BINARY_CROSS_ENTROPY) != several:
            raise ValueError("training.loss binary-cross-entropy goes with data.multi_label: true, and only with it")
        if not isinstance(self.privacy, NoPrivacy) and getattr(self.model, "norm", None) == "batch":
            raise ValueError(
                "model.norm: batch norm shares statistics between patients, which privacy forbids: "
                "use norm: group or norm: instance"
            )
        if isinstance(self.privacy, ClientLevel) and self.secure_aggregation.mode == "none":
            raise ValueError(
                "privacy mode client-level needs secure_aggregation.mode: msa1, because each site adds only a part of "
                "the noise: switch it on, or use mode: dp-sgd"
            )
        ring = Ring(self.secure_aggregation.ring_bits)
        if isinstance(self.privacy, ClientLevel) and not suits(ring, self.privacy):
            raise ValueError(
                f"secure_aggregation.ring_bits {ring} rounds more coarsely than a hundredth of one site's noise in "
                "privacy mode client-level, so that less of it would reach the sum: use ring_bits: 32, and a larger "
                "noise_multiplier where that is not enough"
            )
        if self.rounds.converged is not None and not isinstance(self.privacy, NoPrivacy):
            raise ValueError(
                "rounds.converged looks at held-out scores, and under differential privacy no score leaves a site: "
                "leave it out"
            )
        self._check_head()
        check_size(self.model, channels=self.data.channels, size=self.data.preprocessing.size)
        norm = getattr(self.model, "norm", None)
        if isinstance(self.strategy, FedBNSettings) and (
            norm is None or (norm == "instance" and isinstance(self.model, UNetSpec))
        ):
            raise ValueError(
                "strategy fedbn would leave nothing at the sites: this network's normalisation has no parameters: "
                "use model.norm: batch or group"
            )
        wrong = misfit(
            self.strategy,
            optimizer=self.training.optimizer.value,
            momentum=self.training.momentum,
            private=not isinstance(self.privacy, NoPrivacy),
            norm=norm,
            sites=self.rounds.minimum_sites,
        )
        wrong = wrong or unguarded(
            self.safeguards,
            private=not isinstance(self.privacy, NoPrivacy),
            secure=self.secure_aggregation.mode != "none",
            averaged=self.rounds.averaged,
            evaluate_every=self.rounds.evaluate_every,
            settles=demands_of(self.strategy).settles,
        )
        if wrong is not None:
            raise ValueError(wrong)
        return self

    def _check_head(self) -> None:
        if self.training.train_only == "all":
            return
        if getattr(self.model, "norm", None) == "batch":
            raise ValueError(
                f"training.train_only: {self.training.train_only} keeps other layers as they are, and batch norm would "
                "change with the images: use model.norm: group or instance"
            )
        if isinstance(self.strategy, FedBNSettings | PersonalLayersSettings):
            raise ValueError(
                f"strategy {self.strategy.name} keeps layers at the sites, and training.train_only: "
                f"{self.training.train_only} trains few layers: use strategy fedavg or fedprox, or train_only: all"
            )
        if self.training.train_only == "adapters" and getattr(self.model, "weight_standardisation", False):
            raise ValueError(
                "training.train_only: adapters could not be folded into standardised weights: set "
                "model.weight_standardisation: false, or use train_only: head"
            )
        if self.training.train_only == "adapters" and isinstance(self.model, LogisticSpec):
            raise ValueError("training.train_only: adapters needs convolutions: use train_only: all")

    def canonical(self) -> bytes:
        """The study as JSON with sorted keys and no spaces: the bytes that are sent, signed and hashed.

        Every field is there, at its default too, except those that are :func:`medfl.shared.config.later`.
        """
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @property
    def scoring(self) -> Scoring:
        """How models of this study are scored."""
        if self.task is ModelTask.SEGMENTATION:
            return Scoring.DICE
        return Scoring.PER_LABEL if self.data.multi_label else Scoring.CONFUSION

    @cached_property
    def digest(self) -> str:
        """SHA-256 of :meth:`canonical`, hexadecimal. Any change of any value changes it."""
        return hashlib.sha256(self.canonical()).hexdigest()

    @cached_property
    def data_digest(self) -> str:
        """SHA-256 of all that says how images become tensors: studies with the same one train on the same tensors."""
        return hashlib.sha256(self.data.model_dump_json().encode() + self.task.value.encode()).hexdigest()

    @cached_property
    def demands(self) -> Demands:
        """What its strategy asks of a round."""
        return demands_of(self.strategy)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, without what was worked out of the fields, which a copy would carry over."""
        copy = super().model_copy(update=update, deep=deep)
        for name in ("digest", "data_digest", "demands"):
            copy.__dict__.pop(name, None)
        return copy

    @classmethod
    def from_canonical(cls, data: bytes, *, digest: str) -> Study:
        """Parse a received study and check that it is the one that ``digest`` names.

        Raises:
            ProtocolError: too large, not the announced digest, or not a study this release can build.
        """
        if len(data) > MAX_STUDY_BYTES:
            raise ProtocolError(f"the study is larger than {MAX_STUDY_BYTES} bytes")
        if hashlib.sha256(data).hexdigest() != digest:
            raise ProtocolError("the study does not have the digest it was announced with")
        return _parsed(data)


@lru_cache(maxsize=4)  # hundreds of virtual sites are offered the same study
def _parsed(data: bytes) -> Study:
    try:
        study = Study.model_validate_json(data)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
        where = ".".join(str(part) for part in first["loc"])[:200]
        if first["type"] == "extra_forbidden":
            raise ProtocolError(
                f"the study uses {where}, which this release does not know: update this machine's MedFL"
            ) from None
        raise ProtocolError(
            f"this release cannot build the study: {where}: {first['msg']}: ask the coordinator what it needs"
        ) from None
    if study.canonical() != data:
        raise ProtocolError("the study is not in canonical form: both sides must run releases that agree on it")
    return study


def named(given: str, studies: Iterable[Study]) -> Study:
    """The one of ``studies`` that ``given`` means: the beginning of its digest (4 digits or more), or its name.

    Raises:
        ConfigError: none, or several.
    """
    known = {study.digest: study for study in studies}
    wanted = given.lower()
    found = [study for digest, study in known.items() if len(wanted) >= 4 and digest.startswith(wanted)]
    found = found or [study for study in known.values() if study.name == given]
    if len(found) == 1:
        return found[0]
    if found:
        choices = ", ".join(study.digest[:12] for study in found)
        raise ConfigError(f"{len(found)} studies are called {given}: say which by its digest: {choices}")
    raise ConfigError(f"no study here is called {given}: list them first, and give a name or the digest's beginning")
