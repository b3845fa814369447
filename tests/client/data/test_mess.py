"""What archives do wrong: stored bits, polarity, padding, copies, identifiers. Decoded exactly, or left out by name."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from dicom_lab import COLUMN_MM, KEY, ROW_MM, SLICE_MM, SLICES, ct, hospital, hounsfield, save, seg, spec
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.uid import RLELossless, generate_uid

from medfl.client.data.case import Quarantine
from medfl.client.data.load import load_site_data
from medfl.client.data.pixels import open_series
from medfl.client.data.settings import DicomSettings, SplitSettings
from medfl.client.data.splits import Split, split_patients
from medfl.client.data.tensors import SiteData
from medfl.client.data.volumes import AIR_HU, read_volume
from medfl.shared.data_spec import Modality
from medfl.shared.errors import DataError

Slices = list[pydicom.FileDataset]
TRUTH = np.maximum(hounsfield(), AIR_HU).astype(np.float32)


def stored(dataset: pydicom.Dataset, values: NDArray[np.generic], bits: int, signed: bool, intercept: float) -> None:
    dataset.PixelData = values.astype("<u2").tobytes()
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits - 1, int(signed)
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, intercept


def everywhere(**elements: object) -> Callable[[Slices], None]:
    def change(slices: Slices) -> None:
        for dataset in slices:
            for keyword, value in elements.items():
                setattr(dataset, keyword, value)

    return change


def signs_differ(slices: Slices) -> None:
    for number, (dataset, values) in enumerate(zip(slices, hounsfield().astype(int), strict=True)):
        if number % 2:
            stored(dataset, values, 16, True, 0)
        else:
            stored(dataset, values + 1024, 12, False, -1024)


def sign_is_the_twelfth_bit(slices: Slices) -> None:
    for dataset, values in zip(slices, hounsfield().astype(int), strict=True):
        stored(dataset, values & 0x0FFF, 12, True, 0)


def high_bits(slices: Slices) -> None:
    for dataset, values in zip(slices, hounsfield().astype(int), strict=True):
        stored(dataset, (values + 1024) | 0xA000, 12, False, -1024)


def bytes_swapped(slices: Slices) -> None:
    for dataset, values in zip(slices, hounsfield().astype(int), strict=True):
        stored(dataset, (values + 1024).astype("<u2").byteswap(), 12, False, -1024)


def to_the_left(slices: Slices) -> None:
    for dataset, values in zip(slices, hounsfield().astype(int), strict=True):
        stored(dataset, (values + 1024) << 4, 12, False, -1024)
        dataset.HighBit = 15


def air_where_padded(slices: Slices) -> None:
    for dataset, values in zip(slices, TRUTH.astype(int), strict=True):
        outside = np.where(values == AIR_HU, 63536 - 1024, values)
        outside[:3] = 63536 - 1024  # -2000 of a scanner whose exporter took the sign away
        stored(dataset, outside + 1024, 16, False, -1024)
        dataset.PixelPaddingValue = 63536


def sign_taken_away(slices: Slices) -> None:
    for dataset, values in zip(slices, hounsfield().astype(int), strict=True):
        stored(dataset, values, 16, False, 0)


def padded_with_water(slices: Slices) -> None:
    for dataset, values in zip(slices, hounsfield().astype(int), strict=True):
        stored(dataset, np.where(values < 0, 0, values), 16, True, 0)
        dataset.PixelPaddingValue = 0


def a_table(slices: Slices) -> None:
    table = pydicom.Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [0, 0, 16], "HU"
    table.LUTData = np.arange(65536).astype("<u2").tobytes()
    everywhere(ModalityLUTSequence=[table])(slices)


def palette(slices: Slices) -> None:
    everywhere(PhotometricInterpretation="PALETTE COLOR")(slices)


@pytest.mark.parametrize(
    "change",
    [
        everywhere(PhotometricInterpretation="MONOCHROME1"),  # Hounsfield units are units, however they are shown
        everywhere(PresentationLUTShape="INVERSE"),
        everywhere(WindowCenter=40, WindowWidth=80),
        everywhere(RescaleType="US"),
        everywhere(InstanceNumber=7),
        everywhere(SpacingBetweenSlices=-SLICE_MM),
        everywhere(Manufacturer="Another", KVP=80),
        signs_differ,
        sign_is_the_twelfth_bit,
    ],
)
def test_what_does_not_change_the_values_is_read_exactly(change: Callable[[Slices], None], tmp_path: Path) -> None:
    slices = ct()
    change(slices)
    volume = read_volume(open_series(save(slices, tmp_path)), Modality.CT).to_patient_orientation("HPL")
    assert np.array_equal(volume.array, TRUTH)
    assert volume.spacing == pytest.approx((SLICE_MM, ROW_MM, COLUMN_MM), abs=1e-9)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (high_bits, "pixel bits that the header does not describe"),
        (bytes_swapped, "pixel bits that the header does not describe"),
        (to_the_left, "pixel bits in an unusual place"),
        (everywhere(BitsStored=20, HighBit=19), "pixel bits in an unusual place"),
        (sign_taken_away, "CT values beyond any scanner's scale"),
        (padded_with_water, "padding value in the range of tissue"),
        (a_table, "table of values where slope and intercept are expected"),
        (palette, "colour volume"),
        (everywhere(SamplesPerPixel=3), "colour volume"),
        (everywhere(RescaleSlope=0), "rescale that makes all values equal"),
        (everywhere(PixelSpacing=[-ROW_MM, COLUMN_MM]), "missing geometry"),
        (everywhere(PixelSpacing=[0, COLUMN_MM]), "missing geometry"),
        (everywhere(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "missing geometry"),
        (everywhere(NumberOfFrames=2), "mixed series"),
        (lambda s: s[2].__setattr__("RescaleIntercept", -1025), "rescale that differs between slices"),
        (lambda s: s[2].__setattr__("PixelData", s[2].PixelData * 2), "pixel data of a wrong length"),
        (lambda s: s[2].__setattr__("IssuerOfPatientID", "Elsewhere"), "mixed series"),
    ],
)
def test_what_cannot_be_read_for_certain_is_left_out(change: Callable[[Slices], None], reason: str) -> None:
    slices = ct()
    change(slices)
    with pytest.raises(Quarantine) as caught:
        read_volume(slices, Modality.CT)
    assert str(caught.value) == reason


def test_padding_outside_of_what_was_scanned_becomes_air() -> None:
    slices = ct()
    air_where_padded(slices)
    expected = TRUTH.copy()
    expected[:, :3] = AIR_HU
    assert np.array_equal(read_volume(slices, Modality.CT).to_patient_orientation("HPL").array, expected)


def test_padding_of_a_magnetic_resonance_scan_becomes_its_lowest_value() -> None:
    slices = ct()
    for dataset in slices:
        pixels = np.full((32, 32), 500, "<u2")
        pixels[0], pixels[1] = 65535, 300
        dataset.PixelData, dataset.PixelPaddingValue, dataset.RescaleIntercept = pixels.tobytes(), 65535, 0
    array = read_volume(slices, Modality.MR).array
    assert sorted(np.unique(array).tolist()) == [300, 500]
    assert (array[:, 0] == 300).all()


def test_a_magnetic_resonance_scan_that_is_shown_inverted_is_turned_as_highdicom_does() -> None:
    slices = ct()
    everywhere(PhotometricInterpretation="MONOCHROME1")(slices)
    expected = hd.get_volume_from_series(slices, dtype=np.float32).array
    assert np.allclose(read_volume(slices, Modality.MR).array, expected)
    slices[2].PhotometricInterpretation = "MONOCHROME2"
    with pytest.raises(Quarantine, match="mixed series"):
        read_volume(slices, Modality.MR)


ANGLES = st.floats(-180, 180)


@given(ANGLES, ANGLES, ANGLES, st.sampled_from([0.5, 1, 2, 0.1367]))
def test_any_direction_and_rescale_gives_the_volume_of_highdicom(a: float, b: float, c: float, slope: float) -> None:
    turn = np.eye(3)
    for angle, (i, j) in zip(np.deg2rad([a, b, c]), [(0, 1), (1, 2), (0, 2)], strict=True):
        step = np.eye(3)
        step[i, i] = step[j, j] = np.cos(angle)
        step[i, j], step[j, i] = -np.sin(angle), np.sin(angle)
        turn = turn @ step
    slices = ct()
    for number, dataset in enumerate(slices):
        dataset.ImageOrientationPatient = [f"{v:.10f}" for v in (*turn[:, 0], *turn[:, 1])]
        dataset.ImagePositionPatient = [f"{v:.9f}" for v in 10 + turn[:, 2] * SLICE_MM * number]
        dataset.RescaleSlope = slope
    mine, reference = read_volume(slices, Modality.CT), hd.get_volume_from_series(slices, dtype=np.float32)
    assert np.allclose(mine.array, np.maximum(reference.array, AIR_HU), rtol=1e-6, atol=1e-3)
    assert np.abs(mine.affine - reference.affine).max() < 1e-4


def test_a_rescale_for_each_slice_is_applied_to_that_slice_of_a_positron_emission_scan() -> None:
    slices = ct()
    everywhere(Units="GML", SUVType="BW")(slices)
    for number, dataset in enumerate(slices):
        dataset.RescaleSlope, dataset.RescaleIntercept = 0.1367 * (number + 1), 0
    reference = hd.get_volume_from_series(slices, dtype=np.float32)
    assert np.allclose(read_volume(slices, Modality.PET).array, reference.array, rtol=1e-6)


@pytest.mark.parametrize("name", ["1.2.840.10008.1.2.2\0", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5\0"])
def test_a_wrong_transfer_syntax_is_noticed(name: str, tmp_path: Path) -> None:
    paths = save(ct(), tmp_path)
    right, length = b"1.2.840.10008.1.2.1\0", len(name)
    content = paths[2].read_bytes()
    at = content.index(right)
    wrong = content[: at - 2] + length.to_bytes(2, "little") + name.encode() + content[at + len(right) :]
    paths[2].write_bytes(wrong)
    with pytest.raises(Quarantine):
        read_volume(open_series(paths), Modality.CT)


def test_compressed_pixels_that_end_too_early_are_not_half_a_picture(tmp_path: Path) -> None:
    slices = ct()
    slices[2].compress(RLELossless, generate_instance_uid=False)
    (frame,) = pydicom.encaps.generate_frames(slices[2].PixelData, number_of_frames=1)
    slices[2].PixelData = pydicom.encaps.encapsulate([frame[: len(frame) // 4 * 2]])
    with pytest.raises(Quarantine, match="unreadable pixels"):
        open_series(save(slices, tmp_path))


@pytest.mark.parametrize("twice", [1, 3, 16])  # pydicom drops a rest of less than eight without a word
def test_bytes_that_came_in_between_are_noticed_by_what_is_left_behind_the_pixels(twice: int, tmp_path: Path) -> None:
    (path, *others) = save(ct(), tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:-500] + content[-500 - twice :])
    with pytest.raises(Quarantine, match="bytes behind the pixels"):
        open_series([path, *others])


@pytest.mark.parametrize("twice", [1, 3, 16])
def test_bytes_that_came_in_between_are_noticed_among_compressed_pixels(twice: int, tmp_path: Path) -> None:
    slices = ct()
    slices[2].compress(RLELossless, generate_instance_uid=False)
    paths = save(slices, tmp_path)
    content = paths[2].read_bytes()
    paths[2].write_bytes(content[:-500] + content[-500 - twice :])
    with pytest.raises(Quarantine, match="compressed pixels that are not whole"):
        open_series(paths)


def enhanced(slices: Slices) -> pydicom.Dataset:
    everywhere(AcquisitionNumber=1, SeriesDate="20200101", SeriesTime="120000")(slices)
    return LegacyConvertedEnhancedCTImage(slices, generate_uid(), 2, generate_uid(), 1)


def test_frames_out_of_order_are_put_right() -> None:
    slices = ct()
    order = [3, 0, 5, 1, 4, 2]
    image = enhanced(slices)
    pixels = np.frombuffer(image.PixelData, "<u2").reshape(SLICES, -1)
    image.PerFrameFunctionalGroupsSequence = [image.PerFrameFunctionalGroupsSequence[n] for n in order]
    image.PixelData = pixels[order].tobytes()
    assert np.array_equal(read_volume([image], Modality.CT).to_patient_orientation("HPL").array, TRUTH)


def frames_scaled_apart(image: pydicom.Dataset) -> None:
    for number, group in enumerate(image.PerFrameFunctionalGroupsSequence):
        scale = pydicom.Dataset()
        scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = 1, -10 * number, "HU"
        group.PixelValueTransformationSequence = [scale]


def two_stacks(image: pydicom.Dataset) -> None:
    further = copy.deepcopy(list(image.PerFrameFunctionalGroupsSequence))
    for group in further:
        x, y, z = (float(v) for v in group.PlanePositionSequence[0].ImagePositionPatient)
        group.PlanePositionSequence[0].ImagePositionPatient = [x, y, z + 100]
    image.PerFrameFunctionalGroupsSequence = [*image.PerFrameFunctionalGroupsSequence, *further]
    image.PixelData, image.NumberOfFrames = image.PixelData * 2, 2 * SLICES


def two_directions(image: pydicom.Dataset) -> None:
    turned = pydicom.Dataset()
    turned.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    image.PerFrameFunctionalGroupsSequence[3].PlaneOrientationSequence = [turned]


def frame_twice(image: pydicom.Dataset) -> None:
    groups = image.PerFrameFunctionalGroupsSequence
    groups[2].PlanePositionSequence = groups[3].PlanePositionSequence


def frame_missing(image: pydicom.Dataset) -> None:
    del image.PerFrameFunctionalGroupsSequence[2]
    pixels = np.frombuffer(image.PixelData, "<u2").reshape(SLICES, -1)
    image.PixelData, image.NumberOfFrames = np.delete(pixels, 2, 0).tobytes(), SLICES - 1


def description_missing(image: pydicom.Dataset) -> None:
    del image.PerFrameFunctionalGroupsSequence[2]


def tilted(image: pydicom.Dataset) -> None:
    for number, group in enumerate(image.PerFrameFunctionalGroupsSequence):
        place = group.PlanePositionSequence[0]
        x, y, z = (float(v) for v in place.ImagePositionPatient)
        place.ImagePositionPatient = [x, y + 0.7 * number, z]


def unscaled_frame(image: pydicom.Dataset) -> None:
    for groups in (*image.PerFrameFunctionalGroupsSequence, *image.SharedFunctionalGroupsSequence):
        if "PixelValueTransformationSequence" in groups:
            del groups.PixelValueTransformationSequence


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (frames_scaled_apart, "rescale that differs between slices"),
        (two_stacks, "missing slices"),
        (two_directions, "mixed series"),
        (frame_twice, "duplicate slice position"),
        (frame_missing, "missing slices"),
        (description_missing, "frames and their descriptions differ in number"),
        (tilted, "gantry tilt"),
        (unscaled_frame, "CT without rescale to Hounsfield units"),
    ],
)
def test_a_spoilt_multi_frame_image_is_left_out(spoil: Callable[[pydicom.Dataset], None], reason: str) -> None:
    image = enhanced(ct())
    spoil(image)
    with pytest.raises(Quarantine) as caught:
        read_volume([image], Modality.CT)
    assert str(caught.value) == reason


def load(folder: Path, labels: dict[str, object] | None = None, **changes: object) -> SiteData:
    fields: dict[str, object] = {"source": "dicom", "folder": folder, "split": {"min_patients": 3}}
    settings = DicomSettings.model_validate(fields | ({"labels": labels} if labels else {}))
    study = spec(**changes)
    return load_site_data(settings, study, task="classification" if labels else "segmentation", key=KEY)


def test_a_copy_of_a_file_counts_once_and_another_file_of_the_same_name_not_at_all(tmp_path: Path) -> None:
    hospital(tmp_path, 5)
    copied, forged = (sorted((tmp_path / folder).iterdir()) for folder in ("00", "01"))
    for number, path in enumerate(copied):
        (tmp_path / f"copy{number}").write_bytes(path.read_bytes())
    other = pydicom.dcmread(forged[0])
    other.PixelData = bytes(len(other.PixelData))
    other.save_as(tmp_path / "forged", enforce_file_format=True)
    report = load(tmp_path).report
    assert report.quarantined == {"copy of another file": len(copied), "same instance twice": 1}
    assert report.patients == 4


def test_identifiers_padded_with_spaces_are_the_same_identifiers(tmp_path: Path) -> None:
    hospital(tmp_path, 4)
    source = ct(hounsfield(7), name="P07")
    label = seg(source)
    for number, dataset in enumerate(source):
        if number % 2:
            dataset.PatientID += " "
            dataset.FrameOfReferenceUID = pydicom.uid.UID(dataset.FrameOfReferenceUID + " ")
            dataset.SeriesInstanceUID = pydicom.uid.UID(dataset.SeriesInstanceUID + " ")
    save([*source, label], tmp_path / "padded")
    report = load(tmp_path).report
    assert (report.patients, report.quarantined) == (5, {})


def test_files_without_a_patient_are_left_out(tmp_path: Path) -> None:
    hospital(tmp_path, 4)
    source = ct(name="NOBODY")
    everywhere(PatientID="  ")(source)
    save(source, tmp_path / "nobody")
    assert load(tmp_path).report.quarantined == {"no patient identifier": SLICES}


def test_one_identifier_of_two_issuers_gets_no_label_by_patient(tmp_path: Path) -> None:
    hospital(tmp_path, 5)
    for folder, issuer in (("00", "North"), ("other", "South")):
        source = ct(hounsfield(0), name="P00", seed=folder)
        everywhere(IssuerOfPatientID=issuer)(source)
        (tmp_path / folder).mkdir(exist_ok=True)
        for path in (tmp_path / folder).iterdir():
            path.unlink()
        save(source, tmp_path / folder)
    table = tmp_path / "labels.csv"
    table.write_text("patient,label\n" + "".join(f"P{n:02d},{n % 2}\n" for n in range(5)))
    report = load(tmp_path, {"kind": "table", "file": table, "key": "patient"}).report
    assert report.quarantined["one patient identifier of several issuers"] == 2
    assert report.patients == 4


def test_classes_by_file_belong_to_exactly_that_file(tmp_path: Path) -> None:
    rows = ["file,label"]
    for number in range(6):
        path = tmp_path / "in" / f"{number}.dcm"
        path.parent.mkdir(exist_ok=True)
        image = enhanced(ct(np.full((SLICES, 32, 32), 100 * number, np.int16), name=f"P{number}"))
        image.save_as(path, enforce_file_format=True)
        rows.append(f"in\\{number}.dcm,{number % 2}" if number else f"0.dcm,{number % 2}")  # the first is not there
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    data = load(tmp_path, {"kind": "table", "file": tmp_path / "labels.csv", "key": "file"})
    assert data.report.quarantined == {"no label": 1, "label without image": 1, "not a DICOM file": 1}
    assert data.report.labels == 5
    for part in data.splits.values():
        hundreds = (part.images.flatten(1)[:, 0] / 100).round().long()
        assert (hundreds % 2 == part.labels).all()


def test_classes_by_instance_that_contradict_each_other_within_a_series_are_left_out(tmp_path: Path) -> None:
    rows = ["instance,label"]
    for number in range(5):
        source = ct(hounsfield(number), name=f"P{number}")
        save(source, tmp_path / str(number))
        rows += [f"{d.SOPInstanceUID},{int(number == 0 and k == 3)}" for k, d in enumerate(source)]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    data = load(tmp_path, {"kind": "table", "file": tmp_path / "labels.csv", "key": "instance"})
    assert data.report.quarantined == {"two different labels in the table": 1, "not a DICOM file": 1}


def test_a_pipe_among_the_files_is_not_waited_for(tmp_path: Path) -> None:
    hospital(tmp_path, 4)
    os.mkfifo(tmp_path / "pipe")
    assert load(tmp_path).report.quarantined == {}


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    hospital(tmp_path, 4)
    (tmp_path / "labels.csv").write_text("patient,label,label\nP00,0,1\n")
    with pytest.raises(DataError, match="two columns 'label'"):
        load(tmp_path, {"kind": "table", "file": tmp_path / "labels.csv"})


def test_one_slice_is_no_volume(tmp_path: Path) -> None:
    for number in range(4):
        source = ct(hounsfield(number), name=f"P{number}")
        save(source[:1] if number == 0 else source, tmp_path / str(number))
    (tmp_path / "labels.csv").write_text("patient,label\n" + "".join(f"P{n},{n % 2}\n" for n in range(4)))
    report = load(
        tmp_path,
        {"kind": "table", "file": tmp_path / "labels.csv"},
        dimensions=3,
        preprocessing={"normalise": "none", "size": (8, 32, 32)},
    ).report
    assert report.quarantined["one slice where a volume is expected"] == 1


def test_where_nobody_of_a_held_out_part_can_be_read_others_take_their_place(tmp_path: Path) -> None:
    hospital(tmp_path, 6)
    parts = split_patients({KEY.pseudonym(f"P{n:02d}") for n in range(6)}, KEY, SplitSettings(min_patients=3))
    (number,) = (n for n in range(6) if parts[KEY.pseudonym(f"P{n:02d}")] is Split.VALIDATION)
    sorted((tmp_path / f"{number:02d}").iterdir())[2].unlink()  # its series lacks a slice
    data = load(tmp_path)
    assert data.report.quarantined == {"missing slices": 1}
    assert [data.report.cases[part] for part in Split] == [3, 1, 1]
    assert KEY.pseudonym(f"P{number:02d}") not in data.pseudonyms
