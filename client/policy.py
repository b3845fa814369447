"""The site's own rules: ceilings that no message can raise. What is absent is forbidden."""

from __future__ import annotations

import datetime
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, Field, StrictBool

from medfl.client.hours import Window
from medfl.shared.config import Settings
from medfl.shared.errors import OUTSIDE_HOURS, PolicyRefusal
from medfl.shared.privacy.settings import NoPrivacy
from medfl.shared.study import Study
from medfl.shared.zoo import ModelTask

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _window(text: str) -> str:
    Window.parse(text)
    return text


def _zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError):
        raise ValueError(f"this machine knows no time zone {name!r}: write one like Europe/Berlin") from None
    return name


class PreApproval(Settings):
    """A class of studies that run without a decision of their own. All of it must hold, and the whole policy besides.

    ``signer`` is the fingerprint of the key that must have signed them: the one that this site has pinned.
    """

    tasks: tuple[ModelTask, ...] = Field(min_length=1)
    max_epsilon: float | None = Field(default=None, gt=0)  # absent: also studies without differential privacy
    secure_aggregation: StrictBool = True  # False: also studies that send updates in clear
    minimum_sites: int = Field(ge=2)  # fewer may not be a study's quorum
    max_rounds: int = Field(ge=1)
    signer: str = Field(pattern=r"^SHA256:[A-Za-z0-9+/]{43}$")

    def covers(self, study: Study, signer: str) -> bool:
        """Whether ``study``, signed by the key with fingerprint ``signer``, is of this class."""
        cheap = self.max_epsilon is None or (
            not isinstance(study.privacy, NoPrivacy) and study.privacy.epsilon <= self.max_epsilon
        )
        return (
            signer == self.signer
            and study.task in self.tasks
            and cheap
            and (study.secure_aggregation.mode != "none" or not self.secure_aggregation)
            and study.rounds.minimum_sites >= self.minimum_sites
            and study.rounds.count <= self.max_rounds
        )


class Policy(Settings):
    """``policy:`` in site.yaml. The coordinator can only ask for less than stands here."""

    studies: tuple[Digest, ...] = ()  # digests that are approved beforehand; medfl-client ... approve does it later
    pre_approve: tuple[PreApproval, ...] = ()  # classes of studies that need no decision of their own
    allow_no_privacy: StrictBool = False
    require_secure_aggregation: StrictBool = True
    minimum_cohort: int = Field(default=3, ge=3, le=128)  # under secure aggregation: fewer sites are never summed
    max_epsilon_per_study: float = Field(default=0.0, ge=0)
    max_epsilon_total: float = Field(default=0.0, ge=0)
    max_delta: float = Field(default=1e-5, gt=0, lt=1)
    unit: Literal["patient", "image"] = "patient"  # image: accepts both units
    max_upload_mb_per_round: float = Field(default=1024.0, gt=0)
    release_site_metrics: StrictBool = False
    expires: datetime.date | None = None
    hours: tuple[Annotated[str, AfterValidator(_window)], ...] = ()  # "mon-fri 19:00-06:00"; absent: at any time
    time_zone: Annotated[str, AfterValidator(_zone)] | None = None  # of hours and expires; absent: the machine's

    def permit_day(self, study: Study, *, today: datetime.date) -> None:
        """Return when neither the policy nor ``study`` is past its last day. Raises PolicyRefusal."""
        if self.expires is not None and today > self.expires:
            raise PolicyRefusal(f"this site's policy expired on {self.expires}: renew policy.expires", reason="expired")
        if study.last_day is not None and today > study.last_day:
            raise PolicyRefusal(
                f"study {study.name} was approved until {study.last_day}: a longer one is another study",
                reason="study over",
            )

    def permit(self, study: Study) -> None:
        """Return when ``study`` stays below every ceiling. Whether it is approved is for Approvals to say.

        Raises:
            PolicyRefusal: with the rule that forbids it and what the administrator can change.
        """
        if self.require_secure_aggregation and study.secure_aggregation.mode == "none":
            raise PolicyRefusal(
                f"study {study.name} sends updates in clear, and policy.require_secure_aggregation is true",
                reason="secure aggregation required",
            )
        self._permit_privacy(study)

    def _permit_privacy(self, study: Study) -> None:
        privacy = study.privacy
        if isinstance(privacy, NoPrivacy):
            if not self.allow_no_privacy:
                raise PolicyRefusal(
                    f"study {study.name} trains without differential privacy, and policy.allow_no_privacy is not true",
                    reason="privacy required",
                )
            return
        if privacy.epsilon > self.max_epsilon_per_study:
            raise PolicyRefusal(
                f"study {study.name} asks for epsilon {privacy.epsilon:g}, and policy.max_epsilon_per_study is "
                f"{self.max_epsilon_per_study:g}",
                reason="epsilon above ceiling",
            )
        if privacy.delta > self.max_delta:
            raise PolicyRefusal(
                f"study {study.name} asks for delta {privacy.delta:g}, and policy.max_delta is {self.max_delta:g}",
                reason="delta above ceiling",
            )
        if getattr(privacy, "unit", "patient") == "image" and self.unit == "patient":
            raise PolicyRefusal(
                f"study {study.name} protects single images, and policy.unit demands whole patients",
                reason="unit too weak",
            )

    def local(self, now: datetime.datetime) -> datetime.datetime:
        """``now``, which has a time zone, on this site's clock."""
        return now.astimezone(None if self.time_zone is None else ZoneInfo(self.time_zone))

    def permit_hour(self, now: datetime.datetime) -> None:
        """Return when this site works for federations at ``now``.

        Raises:
            PolicyRefusal: reason ``outside hours``; the coordinator asks again later.
        """
        if not self.hours:
            return
        local = self.local(now)
        if not any(Window.parse(text).opens(local) for text in self.hours):
            raise PolicyRefusal(
                f"it is {local:%A %H:%M}, outside policy.hours ({'; '.join(self.hours)}): nothing runs or leaves now",
                reason=OUTSIDE_HOURS,
            )

    def permit_upload(self, size: int) -> None:
        """Raise PolicyRefusal when ``size`` bytes are more than one round may send."""
        if size > self.max_upload_mb_per_round * 1e6:
            raise PolicyRefusal(
                f"the update has {size / 1e6:.1f} MB, and policy.max_upload_mb_per_round is "
                f"{self.max_upload_mb_per_round:g}",
                reason="upload too large",
            )
