"""What ``medfl-sim --config`` reads: a study, virtual sites with their data, and what to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StrictBool, model_validator

from medfl.client.data.settings import DataSettings
from medfl.shared.config import LocalPath, Settings
from medfl.shared.study import Name, Study


class VirtualSiteSettings(Settings):
    """One virtual hospital and where its images lie."""

    name: Name
    data: DataSettings


class Baselines(Settings):
    """What stands beside the federation, each with the same number of optimizer steps."""

    alone: StrictBool = True  # each site by itself
    pooled: StrictBool = True  # all images in one place
    unprotected: StrictBool = True  # a private study once more without privacy; nothing where privacy is none
    trivial: StrictBool = True  # best threshold and mean mask, or the commonest class


class SimulationSettings(Settings):
    """A simulation file."""

    study: Study
    sites: tuple[VirtualSiteSettings, ...] = Field(min_length=1)
    baselines: Baselines = Baselines()
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(default=(0,), min_length=1)
    output: LocalPath = Path("runs")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=1, ge=1, le=1024)

    @model_validator(mode="after")
    def _names_differ(self) -> SimulationSettings:
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise ValueError("sites must have names that differ from each other")
        if len(names) < self.study.rounds.minimum_sites:
            raise ValueError(
                f"study.rounds.minimum_sites is {self.study.rounds.minimum_sites}, there are {len(names)} sites"
            )
        return self
