"""Which patients train, validate and test: drawn by the site's secret, stable when data grow, by patient always."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection
from enum import StrEnum

from medfl.client.data.secret import SiteKey
from medfl.client.data.settings import SplitSettings
from medfl.shared.errors import DataError

QUOTA_BELOW = 50
"""Below this many patients each part gets its share exactly: by hash alone, one part of 10 patients is empty
with probability 0.38, of 20 with 0.09, of 50 with 0.001."""


class Split(StrEnum):
    """What a patient's images are used for."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


def split_patients(patients: Collection[str], key: SiteKey, settings: SplitSettings) -> dict[str, Split]:
    """Part of each pseudonym in ``patients``.

    From 50 patients on, a patient's part depends on the secret and that patient only, and so never changes when
    others come. Below, patients are ordered by hash and the first parts are held out, at least one for each part
    that is asked for.

    Raises:
        DataError: fewer patients than ``settings.min_patients``.
    """
    drawn = {patient: _uniform(patient, key) for patient in set(patients)}
    if len(drawn) < settings.min_patients:
        raise DataError(
            f"only {len(drawn)} patients can be used, at least {settings.min_patients} are needed "
            "(data.split.min_patients)"
        )
    if len(drawn) >= QUOTA_BELOW:
        test, held_out = settings.test, settings.test + settings.validation
        return {p: _part(u < test, u < held_out) for p, u in drawn.items()}
    order = sorted(drawn, key=drawn.__getitem__)
    n_test, n_validation = (_quota(share, len(order)) for share in (settings.test, settings.validation))
    return {p: _part(rank < n_test, rank < n_test + n_validation) for rank, p in enumerate(order)}


def _part(is_test: bool, is_held_out: bool) -> Split:
    return Split.TEST if is_test else Split.VALIDATION if is_held_out else Split.TRAIN


def _quota(share: float, patients: int) -> int:
    return max(1, round(share * patients)) if share > 0 else 0


def _uniform(patient: str, key: SiteKey) -> float:
    """A number in [0, 1) that nobody can foresee without the secret."""
    digest = hmac.digest(key.derive("split"), patient.encode(), hashlib.sha256)
    return int.from_bytes(digest[:8], "big") / 2**64
