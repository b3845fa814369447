"""Hospitals that do not exist: CT-like DICOM series with lesions that are hard to see, and DICOM SEG labels of them.

Every patient has a body with fat, spine, a large organ and a small one. Lesions are round and a little brighter than
the large organ. So are the small organ and the vessels (tubes), while calcifications are brighter and cysts are darker:
brightness alone does not find a lesion, shape and surroundings do. Each hospital has its own scanner.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless
from scipy.ndimage import gaussian_filter

from medfl.client.data.headers import Progress

SLICES = 24
LESION = "Lesion"
"""Label of the one segment in every SEG object."""

_CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"


@dataclass(frozen=True, slots=True)
class Scanner:
    """How one hospital's images differ from another's. Lengths in mm, values in Hounsfield units."""

    manufacturer: str
    model: str
    kvp: int
    matrix: int  # rows and columns
    spacing: tuple[float, float]  # row, column
    slice_spacing: float
    noise: float  # standard deviation
    smoothing: float  # of the noise, in pixels: the reconstruction kernel
    offset: float  # of soft tissue: miscalibration, contrast phase
    cupping: float  # darker towards the middle by so much
    syntax: UID
    feet_first: bool = False  # instance numbers run the other way


SCANNERS = (
    Scanner("Phantom Works", "PW-16", 120, 80, (4.0, 4.0), 5.0, 10.0, 0.6, 0.0, 4.0, ExplicitVRLittleEndian),
    Scanner("Imaginary Imaging", "II-64", 100, 96, (3.4, 3.4), 4.0, 15.0, 0.5, 8.0, 0.0, ImplicitVRLittleEndian, True),
    Scanner("Nowhere Medical", "NM-Duo", 140, 72, (4.4, 4.6), 6.0, 7.0, 0.8, -8.0, 8.0, RLELossless),
    Scanner(
        "Fictional Systems", "FS-1", 110, 88, (3.8, 3.6), 4.5, 12.0, 0.4, 4.0, -6.0, DeflatedExplicitVRLittleEndian
    ),
    Scanner("Phantom Works", "PW-32", 80, 96, (3.3, 3.3), 4.0, 18.0, 0.4, 14.0, 2.0, ExplicitVRLittleEndian),
    Scanner("Utopia Radiology", "UR-X", 120, 64, (5.0, 5.0), 6.0, 6.0, 1.0, -4.0, 0.0, RLELossless, True),
    Scanner("Imaginary Imaging", "II-128", 130, 84, (3.9, 4.1), 5.0, 9.0, 0.7, -12.0, 10.0, ImplicitVRLittleEndian),
    Scanner("Nowhere Medical", "NM-Mono", 100, 76, (4.2, 4.2), 5.5, 14.0, 0.9, 10.0, -8.0, ExplicitVRLittleEndian),
)
"""One for each hospital, used again from the first when there are more hospitals."""


@dataclass(frozen=True, slots=True)
class Phantom:
    """One patient's scan: Hounsfield units and lesion mask, both (slice, row, column), slices from feet to head."""

    hounsfield: NDArray[np.int16]
    lesion: NDArray[np.bool_]


def write_hospital(
    folder: Path,
    site_index: int,
    patients: int,
    seed: int,
    *,
    slices: int = SLICES,
    workers: int = 1,
    progress: Progress | None = None,
) -> None:
    """Write the private data of one hospital: one folder a patient, ``slices`` CT files and one SEG file in each.

    The same arguments give the same pixels and identifiers. Names and identifiers say PHANTOM.
    """
    jobs = [(folder, site_index, number, seed, slices) for number in range(patients)]
    with ExitStack() as stack:
        write = map if workers == 1 else stack.enter_context(ProcessPoolExecutor(workers)).map
        for done, _ in enumerate(write(_write_patient, jobs), 1):
            if progress is not None:
                progress("drawing phantom patients", done, patients)


def draw_phantom(scanner: Scanner, rng: np.random.Generator, slices: int = SLICES) -> Phantom:
    """A new patient as ``scanner`` sees it."""
    shape = (slices, scanner.matrix, scanner.matrix)
    steps = (scanner.slice_spacing, *scanner.spacing)
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, steps, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    build = rng.uniform(0.9, 1.1)

    def ellipsoid(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> NDArray[np.float64]:
        """Below 1 inside."""
        (cz, cy, cx), (rz, ry, rx) = centre, radii
        return np.asarray(np.sqrt(((z - cz) / rz) ** 2 + ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2))

    far = 1e6  # a cylinder along the body is an ellipsoid that never ends
    image = np.full(shape, -1000.0)
    body = ellipsoid((0, 0, 0), (far, 100 * build, 135 * build))
    image[body < 1] = -90  # fat
    image[body < 0.86] = 45  # muscle
    centre = (0.0, -5.0 * build, -45.0 * build)
    organ = ellipsoid(centre, (slices * steps[0] * 0.62, 68 * build, 62 * build)) < 1
    image[organ] = 60
    small = ellipsoid((0.0, 5.0, 78.0 * build), (slices * steps[0] * 0.3, 34 * build, 24 * build)) < 1
    image[small] = 96
    image[ellipsoid((0, 72 * build, 0), (far, 16, 18)) < 1] = 420  # spine
    image[ellipsoid((0, 48 * build, 12), (far, 10, 10)) < 1] = 110  # a large vessel beside it

    extent = slices * steps[0] * 0.4

    def inside_organ(reach: float) -> tuple[float, float, float]:
        angle, radius = rng.uniform(0, 2 * np.pi), np.sqrt(rng.uniform(0, reach))
        side = (centre[1] + 58 * build * radius * np.sin(angle), centre[2] + 52 * build * radius * np.cos(angle))
        return float(rng.uniform(-extent, extent)), side[0], side[1]

    for _ in range(rng.integers(4, 7)):  # vessels through the organ: as bright as lesions, but long and thin
        start, end = np.array(inside_organ(0.9)), np.array(inside_organ(0.9))
        image[organ & (_to_segment((z, y, x), start, end, tail=60.0) < rng.uniform(4, 7))] = rng.uniform(88, 105)
    for _ in range(rng.integers(2, 4)):  # cysts
        image[organ & (ellipsoid(inside_organ(0.7), _radii(rng, 10, 18)) < 1)] = rng.uniform(5, 20)
    for _ in range(rng.integers(2, 5)):  # calcifications
        image[organ & (ellipsoid(inside_organ(0.8), _radii(rng, 5, 9)) < 1)] = rng.uniform(250, 500)
    lesion = np.zeros(shape, bool)
    ripple = gaussian_filter(rng.standard_normal(shape), [6 / s for s in steps])
    ripple *= 0.1 / ripple.std()
    for _ in range(rng.integers(2, 5)):
        edge = ellipsoid(inside_organ(0.65), _radii(rng, 15, 25)) + ripple
        lesion |= organ & (edge < 1)
    image[lesion] = 60 + rng.uniform(28, 40)
    return Phantom(_scan(image, body, scanner, rng), lesion)


def _radii(rng: np.random.Generator, low: float, high: float) -> tuple[float, float, float]:
    radius = rng.uniform(low, high)
    a, b, c = (float(radius * factor) for factor in rng.uniform(0.85, 1.15, 3))
    return a, b, c


def _to_segment(
    grid: tuple[NDArray[np.float64], ...], start: NDArray[np.float64], end: NDArray[np.float64], tail: float
) -> NDArray[np.float64]:
    """Distance in mm of every point to the line from ``start`` to ``end``, prolonged by ``tail`` at both ends."""
    direction = (end - start) / max(float(np.linalg.norm(end - start)), 1e-6)
    start, length = start - tail * direction, float(np.linalg.norm(end - start)) + 2 * tail
    offset = [axis - origin for axis, origin in zip(grid, start, strict=True)]
    along = np.clip(sum(o * d for o, d in zip(offset, direction, strict=True)), 0, length)
    return np.asarray(np.sqrt(sum((o - along * d) ** 2 for o, d in zip(offset, direction, strict=True))))


def _scan(
    image: NDArray[np.float64], body: NDArray[np.float64], scanner: Scanner, rng: np.random.Generator
) -> NDArray[np.int16]:
    """What the scanner makes of it: partial volume, texture, bias, noise."""
    out = gaussian_filter(image, (0.3, 0.5, 0.5))
    texture = gaussian_filter(rng.standard_normal(image.shape), (1.0, 1.5, 1.5))
    out += 5 * texture / texture.std()
    out += np.where(body < 1, scanner.offset - scanner.cupping * (1 - np.minimum(body, 1)) * 2, 0)
    noise = gaussian_filter(rng.standard_normal(image.shape), (0, scanner.smoothing, scanner.smoothing))
    out += scanner.noise * noise / noise.std()
    return np.asarray(np.clip(np.round(out), -1024, 3071), np.int16)


def _write_patient(job: tuple[Path, int, int, int, int]) -> None:
    folder, site_index, number, seed, slices = job
    scanner = SCANNERS[site_index % len(SCANNERS)]
    rng = np.random.default_rng([seed, site_index, number])
    phantom = draw_phantom(scanner, rng, slices)
    name = f"PHANTOM-{site_index + 1}-{number + 1:03d}"
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    ct = ct_series(phantom.hounsfield, scanner, name, rng=rng, seed=f"{seed}/{name}")
    for position, dataset in enumerate(ct):
        dataset.save_as(target / f"I{position:04d}", enforce_file_format=True)
    seg_object(ct, phantom.lesion, seed=f"{seed}/{name}").save_as(target / "S0001")


def _uid(*parts: object) -> str:
    """The same identifier for the same parts (PS3.5 B.2: a number below 2^128 under 2.25)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


def ct_series(
    hounsfield: NDArray[np.int16], scanner: Scanner, name: str, *, rng: np.random.Generator, seed: str
) -> list[FileDataset]:
    """CT slices of ``hounsfield`` (slice from feet to head, row, column) as single-frame CT Image Storage objects."""
    rows, columns = hounsfield.shape[1:]
    row_mm, column_mm = scanner.spacing
    corner = (-(columns - 1) / 2 * column_mm, -(rows - 1) / 2 * row_mm, float(np.round(rng.uniform(-400, 0), 1)))
    sex, age = str(rng.choice(["F", "M"])), int(rng.integers(30, 86))
    out = []
    for index, pixels in enumerate(hounsfield):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = UID(_CT_IMAGE_STORAGE)
        meta.MediaStorageSOPInstanceUID = UID(_uid(seed, "slice", index))
        compressed = scanner.syntax == RLELossless
        meta.TransferSyntaxUID = ExplicitVRLittleEndian if compressed else scanner.syntax
        ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID = _uid(seed, "study"), _uid(seed, "series")
        ds.FrameOfReferenceUID = _uid(seed, "frame")
        ds.PatientName, ds.PatientID, ds.PatientBirthDate = f"PHANTOM^{name}", name, ""
        ds.PatientSex, ds.PatientAge = sex, f"{age:03d}Y"
        ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20200101", "120000", "1", ""
        ds.ReferringPhysicianName, ds.PositionReferenceIndicator = "", ""
        ds.Modality, ds.SeriesNumber, ds.BodyPartExamined, ds.PatientPosition = "CT", 2, "ABDOMEN", "HFS"
        ds.SeriesDescription = "Phantom abdomen"
        ds.Manufacturer, ds.ManufacturerModelName, ds.KVP = scanner.manufacturer, scanner.model, scanner.kvp
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.PatientIdentityRemoved, ds.BurnedInAnnotation = "YES", "NO"
        ds.DeidentificationMethod = "No patient: drawn by a program"
        ds.InstanceNumber = index + 1 if scanner.feet_first else len(hounsfield) - index
        ds.ImagePositionPatient = [corner[0], corner[1], corner[2] + index * scanner.slice_spacing]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.SliceThickness = [row_mm, column_mm], scanner.slice_spacing
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.Rows, ds.Columns = rows, columns
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = -1024, 1, "HU"
        ds.PixelData = (pixels + 1024).astype("<u2").tobytes()
        if compressed:
            ds.compress(RLELossless, generate_instance_uid=False)
        out.append(ds)
    return out


def seg_object(ct: list[FileDataset], lesion: NDArray[np.bool_], *, seed: str) -> hd.seg.Segmentation:
    """Binary DICOM SEG of ``lesion`` on the slices of ``ct``, empty slices left out as usual."""
    segment = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label=LESION,
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Lesion,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
    )
    return hd.seg.Segmentation(
        source_images=[pydicom.Dataset(ds) for ds in ct],
        pixel_array=lesion.astype(np.uint8),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[segment],
        series_instance_uid=_uid(seed, "seg series"),
        series_number=100,
        sop_instance_uid=_uid(seed, "seg"),
        instance_number=1,
        manufacturer="MedFL",
        manufacturer_model_name="phantoms",
        software_versions="1",
        device_serial_number="1",
    )
