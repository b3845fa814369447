"""Radiographs, ultrasound and photographs as they are meant to be seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from dicom_lab import KEY, save, seg, spec
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

from medfl.client.data.admission import admit
from medfl.client.data.case import Quarantine
from medfl.client.data.labels import label_image
from medfl.client.data.load import load_site_data
from medfl.client.data.planar import read_planar
from medfl.client.data.settings import DicomSettings
from medfl.client.data.splits import Split

DX, US, SECONDARY = (UID(f"1.2.840.10008.5.1.4.1.1.{tail}") for tail in ("1.1", "6.1", "7"))


def image(pixels: np.ndarray, sop_class: UID = DX, bits: int = 12, **elements: object) -> FileDataset:  # type: ignore[type-arg]
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, sop_class
    meta.MediaStorageSOPInstanceUID = generate_uid()
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
    ds.PatientID, ds.Modality = "P", {DX: "DX", US: "US"}.get(sop_class, "OT")
    ds.Rows, ds.Columns = pixels.shape[:2]
    ds.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    ds.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        ds.PlanarConfiguration = 0
    wide = bits > 8
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16 if wide else 8, bits, bits - 1, 0
    ds.PixelData = pixels.astype("<u2" if wide else "u1").tobytes()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


RAMP = np.arange(4096, step=16).reshape(16, 16)


def test_grey_without_a_window_is_scaled_from_the_range_of_its_bits() -> None:
    assert np.allclose(read_planar(image(RAMP), 1)[0], RAMP * 255 / 4095)


def test_monochrome1_is_inverted() -> None:
    shown = read_planar(image(RAMP, PhotometricInterpretation="MONOCHROME1"), 1)
    assert np.allclose(shown[0], 255 - RAMP * 255 / 4095)


def test_a_window_of_the_header_is_applied() -> None:
    # PS3.3 C.11.2.1.2.1: centre 2048.5, width 1025 is black at and below 1536, white from 2560 on
    shown = read_planar(image(RAMP, WindowCenter=2048.5, WindowWidth=1025), 1)[0]
    assert shown[RAMP <= 1536].max() == 0
    assert shown[RAMP >= 2560].min() == pytest.approx(255)
    assert shown[RAMP == 2048].item() == pytest.approx(127.5, abs=0.3)


def test_a_voi_table_is_applied() -> None:
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData = [4096, 0, 16], np.arange(4096)[::-1].astype("u2").tolist()
    shown = read_planar(image(RAMP, VOILUTSequence=[table]), 1)[0]
    assert np.allclose(shown, (4095 - RAMP) * 255 / 65535, atol=1e-3)


def test_padding_is_black_whatever_white_means() -> None:
    pixels = RAMP.copy()
    pixels[0] = 4095
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        shown = read_planar(image(pixels, PhotometricInterpretation=photometric, PixelPaddingValue=4095), 1)[0]
        assert (shown[0] == 0).all()
        assert shown[1:].max() > 200


def test_a_window_after_a_table_of_values_is_scaled_from_the_tables_range() -> None:
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData, table.ModalityLUTType = [4096, 0, 8], (np.arange(4096) // 32).tolist(), "US"
    shown = read_planar(image(RAMP, ModalityLUTSequence=[table], WindowCenter=64.5, WindowWidth=129), 1)[0]
    # PS3.3 C.11.2.1.2.1: (x - 64) / 128 + 0.5 of 0..255
    assert np.allclose(shown, np.clip(((RAMP // 32 - 64) / 128 + 0.5) * 255, 0, 255), atol=0.01)


def test_colour_is_rgb_channel_first() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 3))
    assert np.allclose(read_planar(image(pixels, US, bits=8), 3), np.moveaxis(pixels, 2, 0))


def test_grey_that_is_stored_as_colour_is_one_channel() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (8, 10))
    assert np.array_equal(read_planar(image(np.stack([grey] * 3, 2), US, bits=8), 1)[0], grey)


def test_a_reversible_colour_transform_is_undone() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3))
    dataset = image(pixels, US, bits=8)
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    assert np.array_equal(read_planar(dataset, 3), np.moveaxis(pixels, 2, 0))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"NumberOfFrames": 3}, "several frames"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "unreadable colour table"),
        ({"BitsStored": 8, "HighBit": 7}, "pixel bits that the header does not describe"),
        ({"HighBit": 15}, "pixel bits in an unusual place"),
        ({"PresentationLUTShape": "INVERSE"}, "polarity that contradicts itself"),
        ({"PresentationLUTShape": "IDENTITY", "PhotometricInterpretation": "MONOCHROME1"}, "polarity that contradicts"),
        ({"PixelData": b"\0" * 20}, "wrong length"),
        ({"PixelData": b"\0" * 5000}, "wrong length"),
    ],
)
def test_images_that_would_have_to_be_guessed_are_left_out(change: dict[str, object], reason: str) -> None:
    with pytest.raises(Quarantine, match=reason):
        read_planar(image(RAMP, **change), 1)


def palette(pixels: np.ndarray, first: int = 0, said: int = 16, **changes: object) -> FileDataset:  # type: ignore[type-arg]
    """An image of 16 colours: red grows with the index, green falls, blue is full."""
    dataset = image(pixels, US, bits=8, PhotometricInterpretation="PALETTE COLOR")
    index = np.arange(16)
    for colour, values in (("Red", 4096 * index), ("Green", 65535 - 4096 * index), ("Blue", 0 * index + 65535)):
        setattr(dataset, f"{colour}PaletteColorLookupTableDescriptor", [16, first, said])
        setattr(dataset, f"{colour}PaletteColorLookupTableData", values.astype("<u2").tobytes())
    for keyword, value in changes.items():
        setattr(dataset, keyword, value)
    return dataset


def test_a_palette_gives_its_colours() -> None:
    pixels = np.random.default_rng(0).integers(0, 16, (8, 10))
    shown = read_planar(palette(pixels), 3)
    assert np.allclose(shown, np.stack([4096 * pixels, 65535 - 4096 * pixels, 0 * pixels + 65535]) * 255 / 65535)


def test_values_outside_of_a_palette_take_its_nearest_colour() -> None:
    # PS3.3 C.7.6.3.1.5: below the first mapped value the first entry, above the last the last
    shown = read_planar(palette(np.array([[0, 9, 10, 25, 26, 255]]), first=10), 3)
    assert np.allclose(shown[0], np.array([[0, 0, 0, 15, 15, 15]]) * 4096 * 255 / 65535)


def test_a_palette_of_eight_bits_with_more_than_256_entries_does_not_begin_again() -> None:
    dataset = image(RAMP, US, PhotometricInterpretation="PALETTE COLOR")
    for colour in ("Red", "Green", "Blue"):
        setattr(dataset, f"{colour}PaletteColorLookupTableDescriptor", [4096, 0, 8])
        setattr(dataset, f"{colour}PaletteColorLookupTableData", bytes(n // 16 for n in range(4096)))
    with pytest.raises(Quarantine, match="unreadable colour table"):
        read_planar(dataset, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"GreenPaletteColorLookupTableDescriptor": [16, 1, 16]},
        {"BluePaletteColorLookupTableData": bytes(30)},
        {"RedPaletteColorLookupTableData": bytes(4)},
        {"said": 8},  # but the colours need 16
    ],
)
def test_a_palette_that_contradicts_itself_is_left_out(changes: dict[str, Any]) -> None:
    with pytest.raises(Quarantine, match="unreadable colour table"):
        read_planar(palette(np.zeros((4, 4), int), **changes), 3)


def test_a_palette_that_says_16_bits_and_holds_8_is_left_out() -> None:
    dataset = palette(np.zeros((4, 4), int))
    for colour in ("Red", "Green", "Blue"):
        setattr(dataset, f"{colour}PaletteColorLookupTableData", np.arange(16).astype("<u2").tobytes())
    with pytest.raises(Quarantine, match="unreadable colour table"):
        read_planar(dataset, 3)


def test_colour_is_left_out_of_a_grey_study() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 3))
    with pytest.raises(Quarantine, match="colour image"):
        read_planar(image(pixels, US, bits=8), 1)


@pytest.mark.parametrize("photometric", ["CMYK", "HSV", "YBR_PARTIAL_420"])
def test_colours_that_are_not_turned_into_rgb_are_left_out(photometric: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 3))
    with pytest.raises(Quarantine):
        read_planar(image(pixels, US, bits=8, PhotometricInterpretation=photometric), 3)


def radiograph(number: int, series: str) -> FileDataset:
    pixels = np.random.default_rng(number).integers(0, 4096, (16, 24))
    empty = dict.fromkeys(
        ["PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "StudyID"], ""
    )
    return image(pixels, PatientID=f"P{number}", SeriesInstanceUID=series, ReferringPhysicianName="", **empty)


def outline(number: int) -> np.ndarray:  # type: ignore[type-arg]
    shape = np.zeros((1, 16, 24), bool)
    shape[0, 2 + number % 3 : 9, 5 : 8 + number] = True
    return shape


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_segmentations_of_radiographs_cover_exactly_their_pixels(kind: str, tmp_path: Path) -> None:
    truth = {}
    for number in range(10):
        one = radiograph(number, generate_uid())
        save([one, seg([one], {"Lesion": outline(number)}, kind)], tmp_path)
        truth[np.round(read_planar(one, 1)).astype(int).sum()] = outline(number)[0]
    study = spec(modality="xray", preprocessing={"normalise": "none", "size": (16, 24)})
    data = load_site_data(DicomSettings(source="dicom", folder=tmp_path), study, task="segmentation", key=KEY)
    assert data.report.quarantined == {}
    train = data.splits[Split.TRAIN]
    for row in range(len(train)):
        total = int(train.inputs(torch.tensor([row])).round().long().sum())
        assert np.array_equal(train.labels[row].numpy(), truth[total])


def test_each_view_of_a_series_has_its_own_segmentation_or_none(tmp_path: Path) -> None:
    series = generate_uid()
    views = [radiograph(number, series) for number in range(3)]
    paths = save([seg([view], {"Lesion": outline(number)}) for number, view in enumerate(views[:2])], tmp_path)
    for number in range(2):
        mask, _ = label_image(paths, str(views[number].SOPInstanceUID), (16, 24), spec(modality="xray"), {})
        assert np.array_equal(mask, outline(number)[0])
    with pytest.raises(Quarantine, match="no label"):
        label_image(paths, str(views[2].SOPInstanceUID), (16, 24), spec(modality="xray"), {})


def test_radiographs_train_a_classification_by_instance(tmp_path: Path) -> None:
    rows = ["sop,label"]
    for number in range(10):
        dataset = image(np.full((16, 16), 100 * number), PatientID=f"P{number}")
        dataset.save_as(tmp_path / f"{number}.dcm", enforce_file_format=True)
        rows.append(f"{dataset.SOPInstanceUID},{number % 2}")
    image(RAMP, SECONDARY).save_as(tmp_path / "screenshot.dcm", enforce_file_format=True)
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    labels = {"kind": "table", "file": tmp_path / "labels.csv", "key": "instance", "key_column": "sop"}
    settings = DicomSettings.model_validate({"source": "dicom", "folder": tmp_path, "labels": labels})
    study = spec(modality="xray", preprocessing={"normalise": "scale_255", "size": (16, 16)})
    data = load_site_data(settings, study, task="classification", key=KEY)
    assert data.report.quarantined == {"SOP class that the study does not use": 1, "not a DICOM file": 1}
    train = data.splits[Split.TRAIN]
    numbers = (train.images[:, 0, 0, 0] * 4095 / 100).round().long()
    assert torch_equal(numbers % 2, train.labels)


def torch_equal(a: object, b: object) -> bool:
    return bool((a == b).all())  # type: ignore[attr-defined]


def test_what_the_header_admits_is_refused() -> None:
    for change in ({"BurnedInAnnotation": "YES"}, {"RecognizableVisualFeatures": "YES"}):
        with pytest.raises(Quarantine):
            admit(image(RAMP, **change))  # type: ignore[arg-type]
    hidden = image(RAMP)
    hidden.add_new((0x6000, 0x0100), "US", 16)
    hidden.add_new((0x6000, 0x0102), "US", 12)
    with pytest.raises(Quarantine, match="overlay inside the pixels"):
        admit(hidden)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"Modality": "US"}, "burned-in text possible"),
        ({"Modality": "US", "BurnedInAnnotation": "NO"}, None),
        ({"ImageType": ["DERIVED", "SECONDARY"]}, "burned-in text possible"),
        ({"ConversionType": "SI"}, "burned-in text possible"),
        ({"Modality": "MR", "BodyPartExamined": "Head"}, "a face may be recognisable"),
        ({"Modality": "CT", "BodyPartExamined": "BRAIN", "RecognizableVisualFeatures": "NO"}, None),
        ({"Modality": "CT", "BodyPartExamined": "ABDOMEN"}, None),
        ({"LossyImageCompression": "01"}, "lossy compression"),
    ],
)
def test_what_only_a_person_can_judge_is_counted_for_review(change: dict[str, object], note: str | None) -> None:
    assert admit(image(RAMP, **change)) == ({note} if note else set())
