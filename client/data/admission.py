"""What is asserted of an image before it may train: refused outright, or counted for a person to look at.

Follows PS3.15 Annex E (Clean Pixel Data, Clean Recognizable Visual Features). Tags only speak when present: their
absence proves nothing, so the contact sheet is for a person's eyes.
"""

from __future__ import annotations

import re
from typing import Any

import pydicom

from medfl.client.data.case import Quarantine
from medfl.shared.data_spec import Modality

_TEXT_IS_USUAL = frozenset({"US", "XA", "RF", "ES", "XC", "OT", "SC", "DOC", "ECG", "GM", "SM", "OP"})
_SHOWS_FACE = re.compile(
    r"head|brain|face|facial|skull|neck|sinus|orbit|iac\b|jaw|\beyes?\b|cerebr|cranio|cranium|neuro|sch.?del|kopf|"
    r"cr[aâ]ne|cerveau|cabeza|craneo|testa|encefal",
    re.IGNORECASE,
)
"""Names of the body part or the protocol of scans that show a face. Too many are asked about rather than too few."""


_TEXT, _FACE = "burned-in text possible", "a face may be recognisable"


def admit(dataset: pydicom.Dataset) -> frozenset[str]:
    """Things in this image that a person should look at before training.

    Raises:
        Quarantine: the header itself says that the pixels show who the patient is.
    """
    if str(dataset.get("BurnedInAnnotation") or "").upper() == "YES":
        raise Quarantine("burned-in annotation")
    if str(dataset.get("RecognizableVisualFeatures") or "").upper() == "YES":
        raise Quarantine("recognisable visual features")
    if _overlay_in_pixels(dataset):
        raise Quarantine("overlay inside the pixels")
    review = set()
    kind = {str(value).upper() for value in dataset.get("ImageType") or []}
    modality = str(dataset.get("Modality") or "")
    risky = modality in _TEXT_IS_USUAL or kind & {"SECONDARY", "SCREEN SAVE"} or dataset.get("ConversionType")
    if risky and str(dataset.get("BurnedInAnnotation") or "").upper() != "NO":
        review.add(_TEXT)
    defaced = str(dataset.get("RecognizableVisualFeatures") or "").upper() == "NO"
    if modality in {"CT", "MR", "PT"} and not defaced and _SHOWS_FACE.search(_anatomy(dataset)):
        review.add(_FACE)
    if _overlay_groups(dataset):
        review.add("overlay planes (not used)")
    if str(dataset.get("LossyImageCompression") or "") == "01":
        review.add("lossy compression")
    return frozenset(review)


def may_show_face(modality: Modality, words: str) -> frozenset[str]:
    """The note for a scan without a header, of which only ``words`` say what it shows."""
    through = modality in {Modality.CT, Modality.MR, Modality.PET}
    return frozenset({_FACE} if through and _SHOWS_FACE.search(words) else ())


def may_show_text(modality: Modality) -> frozenset[str]:
    """The note for a picture without a header, as for the same kind of picture with one."""
    usual = modality in {Modality.ULTRASOUND, Modality.FUNDUS, Modality.PHOTO}
    return frozenset({_TEXT} if usual else ())


def _anatomy(dataset: pydicom.Dataset) -> str:
    """What the header says of the body part; where it says nothing, the names of protocol, series and study."""
    region = dataset.get("AnatomicRegionSequence") or []
    words = [str(dataset.get("BodyPartExamined") or ""), *(str(item.get("CodeMeaning") or "") for item in region)]
    if not any(words):
        words = [str(dataset.get(name) or "") for name in ("ProtocolName", "SeriesDescription", "StudyDescription")]
    return " ".join(words)


def _overlay_in_pixels(dataset: pydicom.Dataset) -> bool:
    """Whether an overlay sits in unused high bits of the pixels (retired, PS3.5 8.1.2): group 60xx without its data."""
    groups = _overlay_groups(dataset)
    return any((group, 0x3000) not in dataset and (group, 0x0102) in dataset for group in groups)


def _overlay_groups(dataset: pydicom.Dataset) -> set[int]:
    tags: Any = dataset.keys()  # iterating the dataset itself would parse every element
    return {tag.group for tag in tags if 0x6000 <= tag.group <= 0x60FF and tag.group % 2 == 0}
