"""The ``strategy:`` section of a study: one settings class an algorithm, told apart by its name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from medfl.shared.config import Settings


class FedAvgSettings(Settings):
    """Weighted mean of the sites' models (McMahan et al. 2017, https://arxiv.org/abs/1602.05629)."""

    name: Literal["fedavg"] = "fedavg"


class FedProxSettings(Settings):
    """FedAvg with a proximal pull of weight ``mu`` at the site (Li et al. 2020, https://arxiv.org/abs/1812.06127)."""

    name: Literal["fedprox"] = "fedprox"
    mu: float = Field(default=0.01, gt=0, le=100)


class FedAvgMSettings(Settings):
    """FedAvg with server momentum (Hsu et al. 2019, https://arxiv.org/abs/1909.06335)."""

    name: Literal["fedavgm"] = "fedavgm"
    learning_rate: float = Field(default=1.0, gt=0, le=10)
    momentum: float = Field(default=0.9, ge=0, lt=1)


class AdaptiveSettings(Settings):
    """Server-side Adam, Yogi or Adagrad on the mean update (Reddi et al. 2021, https://arxiv.org/abs/2003.00295)."""

    name: Literal["fedadam", "fedyogi", "fedadagrad"]
    learning_rate: float = Field(default=0.01, gt=0, le=10)
    beta_1: float = Field(default=0.9, ge=0, lt=1)
    beta_2: float = Field(default=0.99, ge=0, lt=1)
    tau: float = Field(default=1e-3, gt=0, le=1)


class FedBNSettings(Settings):
    """FedAvg that leaves normalisation layers at their site (Li et al. 2021, https://arxiv.org/abs/2102.07623)."""

    name: Literal["fedbn"] = "fedbn"


class TrimmedMeanSettings(Settings):
    """Coordinate-wise trimmed mean (Yin et al. 2018, https://arxiv.org/abs/1803.01498)."""

    name: Literal["trimmed-mean"] = "trimmed-mean"
    trim: float = Field(default=0.2, gt=0, lt=0.5)  # fraction cut at each end


class MedianSettings(Settings):
    """Coordinate-wise median (Yin et al. 2018, https://arxiv.org/abs/1803.01498)."""

    name: Literal["median"] = "median"


class KrumSettings(Settings):
    """Krum, or Multi-Krum where ``keep`` > 1 (Blanchard et al. 2017, https://arxiv.org/abs/1703.02757)."""

    name: Literal["krum"] = "krum"
    malicious: int = Field(default=0, ge=0, le=100)
    keep: int = Field(default=1, ge=1, le=100)


StrategySettings = Annotated[
    FedAvgSettings
    | FedProxSettings
    | FedAvgMSettings
    | AdaptiveSettings
    | FedBNSettings
    | TrimmedMeanSettings
    | MedianSettings
    | KrumSettings,
    Field(discriminator="name"),
]
