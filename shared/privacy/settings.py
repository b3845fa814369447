"""The ``privacy:`` section of a study: none, DP-SGD at the site, or noise on whole site updates."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, model_validator

from medfl.shared.config import Settings, later


class Unit(StrEnum):
    """Whose presence is hidden: everything a patient contributes in one study step, or one image."""

    PATIENT = "patient"
    IMAGE = "image"


class Engine(StrEnum):
    """How one clipped gradient per unit is computed. All three give the same numbers."""

    BOOKKEEPING = "bookkeeping"  # one backward pass for the step; refuses layers it has no rule for
    LOOP = "loop"  # one backward pass per unit; any network
    OPACUS = "opacus"  # Opacus' hooks; needs the package opacus, kept for comparison


class NoPrivacy(Settings):
    """No differential privacy. It has to be written, and each site's policy has to allow it."""

    mode: Literal["none"]


class DpSgd(Settings):
    """DP-SGD at the site (Abadi et al. 2016, https://arxiv.org/abs/1607.00133): the server never sees less noise.

    Each step draws every unit with the same probability, clips each drawn unit's gradient to ``clip_norm``, adds
    Gaussian noise of standard deviation ``noise_multiplier * clip_norm`` to the sum and divides by ``expected_batch``.
    """

    mode: Literal["dp-sgd"]
    unit: Unit = Unit.PATIENT
    epsilon: float = Field(gt=0, le=1e4)  # at most this, for the whole study and one unit
    delta: float = Field(default=1e-5, gt=0, lt=1)  # below one over the number of patients
    clip_norm: float = Field(default=1.0, gt=0, le=1e6)
    noise_multiplier: float | None = Field(default=None, ge=0.2, le=1e4)  # absent: solved from epsilon at each site
    expected_batch: float = Field(default=8.0, gt=0, le=1e6)  # units per step on average; also divides the sum
    sampling_rate: float | None = Field(default=None, gt=0, le=1)  # absent: expected_batch over the site's units
    steps_per_round: int = Field(default=10, ge=1, le=1_000_000)
    spare_rounds: int = Field(default=0, ge=0, le=10_000)  # of repeated trainings that the noise is solved for too
    slices_per_patient: int | None = Field(default=4, ge=1, le=10_000)  # drawn anew each step; null: all of them
    augmentations: int = Field(default=1, ge=1, le=64)  # averaged before the clip, so free in epsilon (De et al. 2022)
    images_per_patient: int | None = Field(default=None, ge=1, le=1000)  # unit image: the most one patient may have
    engine: Engine = Engine.BOOKKEEPING

    @model_validator(mode="after")
    def _unit_is_complete(self) -> DpSgd:
        if self.unit is Unit.IMAGE and self.images_per_patient is None:
            raise ValueError(
                "images_per_patient is required with unit: image, because a patient's epsilon depends on it: "
                "give the most images one patient may contribute, or use unit: patient"
            )
        if self.unit is Unit.PATIENT and self.images_per_patient is not None:
            raise ValueError("images_per_patient goes with unit: image only: remove it, or limit slices_per_patient")
        return self


class AdaptiveClip(Settings):
    """The clip moves until ``quantile`` of the updates are within it: medfl.shared.privacy.adaptive_clip."""

    quantile: float = Field(default=0.5, gt=0, lt=1)
    learning_rate: float = Field(default=0.2, gt=0, le=2)
    # Standard deviation on the number of sites within the clip; absent: twice noise_multiplier, which costs little.
    count_noise: float | None = Field(default=None, gt=0, le=1e6)


class ClientLevel(Settings):
    """Noise on whole site updates: hides that a site took part. At 3-30 sites the noise drowns the update.

    ``noise_multiplier`` is the standard deviation of the noise on the *sum* of all updates, in clip norms.
    """

    mode: Literal["client-level"]
    epsilon: float = Field(gt=0, le=1e4)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0, le=1e6)
    noise_multiplier: float = Field(gt=0, le=1e6)
    adaptive_clip: AdaptiveClip | None = later(None)  # clip_norm is where it begins


PrivacySettings = Annotated[NoPrivacy | DpSgd | ClientLevel, Field(discriminator="mode")]
"""Type of a study's ``privacy`` field. It has no default: what a study promises must be written."""
