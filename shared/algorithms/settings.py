"""The ``strategy:`` section of a study: one settings class an algorithm, told apart by its name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from medfl.shared.config import Settings

LayerName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,200}$")]


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


class PersonalLayersSettings(Settings):
    """FedAvg that leaves named layers at their site (Arivazhagan et al. 2019, https://arxiv.org/abs/1912.00818)."""

    name: Literal["personal-layers"] = "personal-layers"
    layers: tuple[LayerName, ...] = Field(default=(), max_length=100)  # beginnings of tensor names; absent: the last


class ScaffoldSettings(Settings):
    """Control variates against client drift (Karimireddy et al. 2020, https://arxiv.org/abs/1910.06378)."""

    name: Literal["scaffold"] = "scaffold"
    learning_rate: float = Field(default=1.0, gt=0, le=10)  # of the coordinator


class FedNovaSettings(Settings):
    """Mean of normalised updates where sites take unequal steps (Wang et al. 2020, https://arxiv.org/abs/2007.07481)."""

    name: Literal["fednova"] = "fednova"


class FedDynSettings(Settings):
    """Dynamic regularisation of local objectives (Acar et al. 2021, https://arxiv.org/abs/2111.04263)."""

    name: Literal["feddyn"] = "feddyn"
    alpha: float = Field(default=0.1, gt=0, le=100)


class FedDCSettings(Settings):
    """Local drift kept apart and corrected (Gao et al. 2022, https://arxiv.org/abs/2203.11751)."""

    name: Literal["feddc"] = "feddc"
    alpha: float = Field(default=0.1, gt=0, le=100)


class DittoSettings(Settings):
    """FedAvg, and at each site a model of its own near it (Li et al. 2021, https://arxiv.org/abs/2012.04221)."""

    name: Literal["ditto"] = "ditto"
    pull: float = Field(default=0.1, gt=0, le=100)  # lambda of the paper: 0 would be training alone


class MoonSettings(Settings):
    """FedAvg with model-contrastive local training (Li et al. 2021, https://arxiv.org/abs/2103.16257)."""

    name: Literal["moon"] = "moon"
    mu: float = Field(default=1.0, gt=0, le=100)
    temperature: float = Field(default=0.5, gt=0, le=100)


class QFedAvgSettings(Settings):
    """Sites with a larger loss weigh more (Li et al. 2020, https://arxiv.org/abs/1905.10497)."""

    name: Literal["qfedavg"] = "qfedavg"
    q: float = Field(default=0.2, ge=0, le=10)


class GeometricMedianSettings(Settings):
    """Geometric median of the updates (Pillutla et al. 2022, https://arxiv.org/abs/1912.13445)."""

    name: Literal["geometric-median"] = "geometric-median"
    iterations: int = Field(default=8, ge=1, le=1000)


class BulyanSettings(Settings):
    """Krum's choice, then a trimmed mean (El Mhamdi et al. 2018, https://arxiv.org/abs/1802.07927)."""

    name: Literal["bulyan"] = "bulyan"
    malicious: int = Field(default=0, ge=0, le=100)


class FedBuffSettings(Settings):
    """A round closes at ``rounds.minimum_sites`` answers (Nguyen et al. 2022, https://arxiv.org/abs/2106.06639).

    Nobody waits for a slow site: its answer counts in a later round, times ``(1 + rounds behind) ** -staleness``.
    """

    name: Literal["fedbuff"] = "fedbuff"
    learning_rate: float = Field(default=1.0, gt=0, le=10)  # of the coordinator
    staleness: float = Field(default=0.5, ge=0, le=10)


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
    | PersonalLayersSettings
    | ScaffoldSettings
    | FedNovaSettings
    | FedDynSettings
    | FedDCSettings
    | DittoSettings
    | MoonSettings
    | FedBuffSettings
    | QFedAvgSettings
    | TrimmedMeanSettings
    | MedianSettings
    | GeometricMedianSettings
    | KrumSettings
    | BulyanSettings,
    Field(discriminator="name"),
]
