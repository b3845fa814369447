"""The words in which a site says to the coordinator why it does not go on; nothing else of an error crosses."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a site refuses a secure sum. Fixed word groups without any value in them."""

    BAD_ROSTER = "another roster is pinned here"
    UNCONFIRMED_ROSTER = "roster not confirmed here"
    BAD_COHORT = "cohort not acceptable"
    COHORT_TOO_SMALL = "cohort too small"
    THRESHOLD_TOO_LOW = "threshold too low"
    NOTHING_HELD = "no result is held here"
    OTHER_MODEL = "another model is held here"
    OTHER_ENCODING = "another encoding is held here"
    REPLAYED = "round or attempt replayed"
    CONSUMED = "model already summed"
    COHORT_SHRANK = "cohort shrank since the last sum"
    WEIGHT_ROSE = "weight above the one given before"
    BAD_SIGNATURE = "bad signature"
    BAD_KEYS = "keys not acceptable"
    BAD_SHARES = "bad shares"
    BAD_SURVIVORS = "survivors not acceptable"
    TOO_FEW_CONFIRMATIONS = "too few confirmations"
    OUT_OF_ORDER = "out of order"
    MALFORMED = "malformed message"
    JOURNAL = "journal unavailable"
    JOURNAL_RESTORED = "journal restored"
