"""Standardised uptake value (body weight) of a PET series, where its header allows it."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

import pydicom

from medfl.client.data.case import Quarantine


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
    if full := tracer.get("RadiopharmaceuticalStartDateTime"):
        text = str(full)
        return _moment(text[:8], text[8:14])
    return _moment(dataset.SeriesDate, tracer.RadiopharmaceuticalStartTime)


def _moment(date: Any, time: Any) -> datetime:
    return datetime.strptime(f"{date}{str(time).partition('.')[0]}", "%Y%m%d%H%M%S")
