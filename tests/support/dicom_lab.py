"""DICOM series, labels and spoilt variants of them whose truth is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from medfl.client.data.secret import SiteKey
from medfl.shared.data_spec import DataSpec
from medfl.simulations.phantoms import Scanner, ct_series

KEY = SiteKey(bytes(range(32)))

ROWS, COLUMNS, SLICES = 32, 32, 6  # openjpeg encodes nothing smaller
ROW_MM, COLUMN_MM, SLICE_MM = 0.7, 0.9, 2.5
SCANNER = Scanner("Lab", "L1", 120, ROWS, (ROW_MM, COLUMN_MM), SLICE_MM, 0, 0, 0, 0, ExplicitVRLittleEndian)


def spec(**changes: object) -> DataSpec:
    """A 2D CT study of lesions that leaves values alone, with ``changes`` to its fields."""
    fields: dict[str, object] = {
        "modality": "ct",
        "dimensions": 2,
        "classes": ("background", "lesion"),
        "preprocessing": {"normalise": "none", "size": (ROWS, COLUMNS)},
    }
    return DataSpec.model_validate(fields | changes)


def hounsfield(seed: int = 0) -> NDArray[np.int16]:
    """Random values, all different enough that any reordering shows."""
    return np.random.default_rng(seed).integers(-1000, 2000, (SLICES, ROWS, COLUMNS)).astype(np.int16)


def ct(values: NDArray[np.int16] | None = None, name: str = "P1", seed: str = "lab") -> list[pydicom.FileDataset]:
    """Slices from feet to head of ``values``."""
    values = hounsfield() if values is None else values
    return ct_series(values, SCANNER, name, rng=np.random.default_rng(1), seed=f"{seed}/{name}")


def lesion() -> NDArray[np.bool_]:
    """An L-shaped block in slices 2 and 3 that no turn or flip maps onto itself."""
    mask = np.zeros((SLICES, ROWS, COLUMNS), bool)
    mask[2:4, 3:9, 4:6] = True
    mask[2, 7:9, 4:12] = True
    return mask


def seg(
    source: Sequence[pydicom.Dataset],
    masks: dict[str, NDArray[np.generic]] | None = None,
    kind: str = "BINARY",
    **options: object,
) -> hd.seg.Segmentation:
    """A SEG of ``masks`` by segment name (default: "Lesion"); fractional ones are 0..1 floats."""
    masks = masks or {"Lesion": lesion()}
    descriptions = [
        hd.seg.SegmentDescription(
            number,
            name,
            codes.SCT.MorphologicallyAbnormalStructure,
            codes.SCT.Lesion,
            hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, name in enumerate(masks, 1)
    ]
    stacked = np.stack([np.asarray(mask) for mask in masks.values()], axis=-1)
    if kind == "LABELMAP":
        stacked = sum((stacked[..., n] > 0).astype(np.uint8) * (n + 1) for n in range(len(masks)))
    elif kind == "BINARY":
        stacked = stacked.astype(np.uint8)
    return hd.seg.Segmentation(
        list(source), stacked, kind, descriptions, generate_uid(), 100, generate_uid(), 1, "Lab", "L1", "1", "1",
        **options,
    )  # fmt: skip


def structure_set(
    source: Sequence[pydicom.Dataset], regions: dict[str, Iterable[NDArray[np.float64]]]
) -> pydicom.Dataset:
    """An RTSTRUCT whose regions are polygons of (n, 3) points in patient mm."""
    first = source[0]
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.481.3"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID"):
        setattr(ds, keyword, first[keyword].value)
    ds.SeriesInstanceUID, ds.Modality = generate_uid(), "RTSTRUCT"
    series, study, frame = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    series.SeriesInstanceUID = first.SeriesInstanceUID
    series.ContourImageSequence = []
    for image in source:
        item = pydicom.Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
        series.ContourImageSequence.append(item)
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = first.FrameOfReferenceUID, [study]
    ds.ReferencedFrameOfReferenceSequence = [frame]
    ds.StructureSetROISequence, ds.ROIContourSequence = [], []
    for number, (name, polygons) in enumerate(regions.items(), 1):
        roi, contours = pydicom.Dataset(), pydicom.Dataset()
        roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = number, name, first.FrameOfReferenceUID
        contours.ReferencedROINumber, contours.ContourSequence = number, []
        for polygon in polygons:
            contour = pydicom.Dataset()
            contour.ContourGeometricType = "CLOSED_PLANAR"
            contour.NumberOfContourPoints = len(polygon)
            contour.ContourData = [f"{value:.4f}" for value in np.asarray(polygon).ravel()]
            contours.ContourSequence.append(contour)
        ds.StructureSetROISequence.append(roi)
        ds.ROIContourSequence.append(contours)
    return ds


def save(datasets: Iterable[pydicom.Dataset], folder: Path) -> list[Path]:
    """Write each to a file of its own with a name that says nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    start = len(list(folder.iterdir()))
    for number, dataset in enumerate(datasets, start):
        paths.append(folder / f"f{number:05d}")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def hospital(folder: Path, patients: int = 10) -> list[Path]:
    """``patients`` with one labelled series each."""
    out = []
    for number in range(patients):
        source = ct(hounsfield(number), name=f"P{number:02d}")
        out += save([*source, seg(source)], folder / f"{number:02d}")
    return out
