"""Standardised uptake value (body weight) of a PET series, where its header allows it."""

from __future__ import annotations

import math
import re
from datetime import datetime
from typing import Any

import pydicom

from medfl.client.data.case import Quarantine

_SAME_S = 60
"""How far two statements of one moment may differ: one may be without seconds."""


def suv_factor(dataset: pydicom.Dataset) -> float:
    """What a rescaled value (Bq/ml) must be multiplied with to become SUVbw in g/ml; 1 where it is SUV already.

    With ``DecayCorrection`` START decay is counted from injection to the start of the series; with ADMIN values are
    those at the time of injection already. Source: QIBA FDG-PET/CT SUV vendor-neutral pseudo-code.

    Raises:
        Quarantine: units, decay correction, dose, half-life, weight or times are missing or of another kind.
    """
    if str(dataset.get("Units") or "") == "GML":
        if str(dataset.get("SUVType") or "BW") != "BW":
            raise Quarantine("PET in an uptake value other than by body weight")
        return 1.0
    corrected = {str(value) for value in dataset.get("CorrectedImage") or []}
    counted_from = str(dataset.get("DecayCorrection") or "")
    if str(dataset.get("Units") or "") != "BQML" or counted_from not in {"START", "ADMIN"}:
        raise Quarantine("PET that cannot become SUV: units or decay correction")
    if not {"ATTN", "DECY"} <= corrected:
        raise Quarantine("PET that cannot become SUV: not corrected for attenuation and decay")
    try:
        (tracer,) = dataset.RadiopharmaceuticalInformationSequence
        dose, half_life = float(tracer.RadionuclideTotalDose), float(tracer.RadionuclideHalfLife)
        weight_g = 1000 * float(dataset.PatientWeight)
        waited = 0.0
        if counted_from == "START":
            waited = (_series_start(dataset) - _injection(dataset, tracer)).total_seconds()
    except (AttributeError, KeyError, TypeError, ValueError):
        raise Quarantine("PET that cannot become SUV: dose, half-life, weight or times are missing") from None
    if not (dose > 1e5 and half_life > 0 and 1e3 < weight_g < 1e6 and 0 <= waited < 86400):
        raise Quarantine("PET that cannot become SUV: implausible dose, half-life, weight or times")
    return weight_g / (dose * math.exp(-waited * math.log(2) / half_life))


def _series_start(dataset: pydicom.Dataset) -> datetime:
    """Series time, unless the series was made after acquisition (then it is a reconstruction's time)."""
    series, acquisition = (_moment(dataset[f"{kind}Date"].value, dataset[f"{kind}Time"].value)
                           for kind in ("Series", "Acquisition"))  # fmt: skip
    if series > acquisition:
        raise ValueError
    return series


def _injection(dataset: pydicom.Dataset, tracer: pydicom.Dataset) -> datetime:
    """Time of injection where the series' times count from; it is often written twice.

    Raises:
        Quarantine: the two differ, or it is in another time zone.
    """
    full, time = tracer.get("RadiopharmaceuticalStartDateTime"), tracer.get("RadiopharmaceuticalStartTime")
    if not full:
        return _moment(dataset.SeriesDate, time)
    parts = re.fullmatch(r"(\d{8})(\d{2,6})(?:\.\d*)?([+-]\d{4})?", str(full).strip())
    if parts is None:
        raise ValueError
    injected = _moment(parts[1], parts[2])
    zone = str(dataset.get("TimezoneOffsetFromUTC") or "").strip()
    elsewhere = parts[3] and zone and parts[3] != zone
    if elsewhere or (time and abs((_moment(parts[1], time) - injected).total_seconds()) > _SAME_S):
        raise Quarantine("PET that cannot become SUV: times that contradict each other")
    return injected


def _moment(date: Any, time: Any) -> datetime:
    """Of a DICOM date and time (PS3.5 6.2), which may end after hours or minutes."""
    digits = str(time).strip().partition(".")[0]
    if len(digits) not in {2, 4, 6}:
        raise ValueError
    return datetime.strptime(f"{str(date).strip()}{digits:0<6}", "%Y%m%d%H%M%S")
