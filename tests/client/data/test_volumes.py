"""Series become volumes with exact values and places, or a reason why not."""

from __future__ import annotations

import contextlib
import copy
import math
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_lab import COLUMN_MM, ROW_MM, SLICE_MM, ct, hounsfield, lesion, save
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)
from waiting import wait_for

from medfl.client.data import decoder
from medfl.client.data.case import Quarantine
from medfl.client.data.grids import mask_onto_grid, onto_grid
from medfl.client.data.pixels import open_series
from medfl.client.data.uptake import suv_factor
from medfl.client.data.volumes import read_volume
from medfl.shared.data_spec import Modality

Slices = list[pydicom.FileDataset]


def in_syntax(slices: Slices, syntax: UID, folder: Path) -> Slices:
    for dataset in slices:
        if syntax.is_compressed and not syntax.is_deflated:
            dataset.compress(syntax, generate_instance_uid=False)
        elif syntax == ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
            dataset["PixelData"].VR = "OW"
            dataset.file_meta.TransferSyntaxUID = syntax
            dataset.set_original_encoding(False, False)
        else:
            dataset.file_meta.TransferSyntaxUID = syntax
    return open_series(save(slices, folder))


@pytest.mark.parametrize(
    "syntax",
    [
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        DeflatedExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        RLELossless,
        JPEG2000Lossless,
        JPEGLSLossless,
    ],
    ids=lambda syntax: syntax.name,
)
def test_every_lossless_syntax_gives_the_same_values_and_places(syntax: UID, tmp_path: Path) -> None:
    slices = ct()
    corner = [float(v) for v in slices[0].ImagePositionPatient]
    volume = read_volume(in_syntax(slices, syntax, tmp_path), Modality.CT)
    upright = volume.to_patient_orientation("HPL")
    assert np.array_equal(upright.array, np.maximum(hounsfield(), -1024).astype(np.float32))
    # slice 4, row 7, column 11 from the corner: 11 * 0.9 to the left, 7 * 0.7 backwards, 4 * 2.5 up
    expected = np.array(corner) + np.array([11 * COLUMN_MM, 7 * ROW_MM, 4 * SLICE_MM])
    assert np.abs(upright.map_indices_to_reference(np.array([[4, 7, 11]]))[0] - expected).max() < 0.01


@given(st.permutations(range(6)), st.booleans())
def test_the_order_of_files_and_instance_numbers_does_not_matter(order: list[int], numbered: bool) -> None:
    slices = ct()
    for dataset, number in zip(slices, order, strict=True):
        if numbered:
            dataset.InstanceNumber = number
        else:
            del dataset.InstanceNumber
    volume = read_volume([slices[n] for n in order], Modality.CT).to_patient_orientation("HPL")
    assert np.array_equal(volume.array, np.maximum(hounsfield(), -1024))


def test_an_enhanced_multi_frame_series_equals_the_single_frames() -> None:
    slices = ct()
    for dataset in slices:
        dataset.AcquisitionNumber, dataset.SeriesDate, dataset.SeriesTime = 1, "20200101", "120000"
    enhanced = LegacyConvertedEnhancedCTImage(slices, generate_uid(), 2, generate_uid(), 1)
    one, many = (read_volume(s, Modality.CT).to_patient_orientation("HPL") for s in ([enhanced], slices))
    assert np.array_equal(one.array, many.array)
    assert np.allclose(one.affine, many.affine, atol=0.01)


def test_values_outside_the_reconstruction_circle_become_air() -> None:
    slices = ct()
    for dataset in slices:
        dataset.RescaleIntercept = -3024
    assert read_volume(slices, Modality.CT).array.min() == -1024


def test_lying_slice_thickness_is_not_believed() -> None:
    slices = ct()
    for dataset in slices:
        dataset.SliceThickness, dataset.SpacingBetweenSlices = 99, 42
    assert read_volume(slices, Modality.CT).spacing[0] == pytest.approx(SLICE_MM, abs=1e-6)


def gap(slices: Slices) -> None:
    del slices[2]


def duplicate(slices: Slices) -> None:
    slices.append(copy.deepcopy(slices[2]))
    slices[-1].SOPInstanceUID = generate_uid()


def same_instance(slices: Slices) -> None:
    slices.append(slices[2])


def second_patient(slices: Slices) -> None:
    slices[3].PatientID = "SOMEBODY-ELSE"


def localizer(slices: Slices) -> None:
    slices[0].ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]


def other_orientation(slices: Slices) -> None:
    slices[0].ImageOrientationPatient = [1, 0, 0, 0, 0, -1]


def tilt(slices: Slices) -> None:
    for number, dataset in enumerate(slices):
        x, y, z = (float(v) for v in dataset.ImagePositionPatient)
        dataset.ImagePositionPatient = [x, y + number * SLICE_MM * math.tan(math.radians(15)), z]


def no_position(slices: Slices) -> None:
    del slices[1].ImagePositionPatient


def nan_position(slices: Slices) -> None:
    slices[1].ImagePositionPatient = ["nan", "0", "0"]


def skewed_axes(slices: Slices) -> None:
    for dataset in slices:
        dataset.ImageOrientationPatient = [1, 0, 0, 0.5, 0.5, 0]


def other_spacing(slices: Slices) -> None:
    slices[1].PixelSpacing = [0.8, 0.9]


def other_size(slices: Slices) -> None:
    slices[1].Rows = 10


def no_rescale(slices: Slices) -> None:
    del slices[4].RescaleSlope, slices[4].RescaleIntercept


def half_a_rescale(slices: Slices) -> None:
    del slices[4].RescaleSlope


def other_unit(slices: Slices) -> None:
    for dataset in slices:
        dataset.RescaleType = "OD"


def truncated(slices: Slices) -> None:
    slices[5].PixelData = slices[5].PixelData[:-40]


def no_pixels(slices: Slices) -> None:
    del slices[5].PixelData


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (gap, "missing slices"),
        (duplicate, "duplicate slice position"),
        (same_instance, "same instance twice"),
        (second_patient, "mixed series"),
        (localizer, "localizer in the series"),
        (other_orientation, "mixed series"),
        (tilt, "gantry tilt"),
        (no_position, "missing geometry"),
        (nan_position, "missing geometry"),
        (skewed_axes, "missing geometry"),
        (other_spacing, "mixed series"),
        (other_size, "mixed series"),
        (no_rescale, "CT without rescale to Hounsfield units"),
        (half_a_rescale, "rescale that is not complete"),
        (other_unit, "CT in other units than Hounsfield"),
        (truncated, "pixel data of a wrong length"),
        (no_pixels, "no pixels"),
    ],
)
def test_a_spoilt_series_is_left_out_with_its_reason(spoil: Callable[[Slices], None], reason: str) -> None:
    slices = ct()
    spoil(slices)
    with pytest.raises(Quarantine) as caught:
        read_volume(slices, Modality.CT)
    assert str(caught.value) == reason


def test_a_second_channel_is_resampled_onto_the_grid_of_the_first() -> None:
    # values that grow by 10 a slice: on a grid of half the slice spacing they grow by 5
    ramp = np.broadcast_to((10 * np.arange(6, dtype=np.int16))[:, None, None], (6, 32, 32))
    coarse = read_volume(ct(ramp), Modality.CT).to_patient_orientation("HPL")
    affine = coarse.affine.copy()
    affine[:, 0] /= 2
    fine = type(coarse)(
        np.zeros((11, 32, 32), np.float32), affine, "PATIENT", frame_of_reference_uid=coarse.frame_of_reference_uid
    )
    assert onto_grid(coarse, fine)[:, 5, 5].tolist() == pytest.approx([5 * n for n in range(11)])


def test_a_label_of_a_second_channel_lands_on_the_grid_of_the_first() -> None:
    coarse = read_volume(ct(), Modality.CT).to_patient_orientation("HPL")
    affine = coarse.affine.copy()
    affine[:, 0] /= 2
    frame = coarse.frame_of_reference_uid
    fine = type(coarse)(np.zeros((11, 32, 32), np.float32), affine, "PATIENT", frame_of_reference_uid=frame)
    moved = mask_onto_grid(lesion(), coarse, fine)
    assert np.array_equal(moved[::2], lesion())
    assert np.array_equal(mask_onto_grid(moved, fine, coarse), lesion())
    cut = type(coarse)(np.zeros((6, 8, 32), np.float32), coarse.affine, "PATIENT", frame_of_reference_uid=frame)
    with pytest.raises(Quarantine, match="reaches outside"):  # the lesion ends in row 8
        mask_onto_grid(lesion(), coarse, cut)


def test_channels_of_different_frames_of_reference_are_refused() -> None:
    one = read_volume(ct(), Modality.CT)
    other = read_volume(ct(name="P2"), Modality.CT)
    with pytest.raises(Quarantine, match="different frames of reference"):
        onto_grid(other, one)


def pet() -> pydicom.Dataset:
    dataset = pydicom.Dataset()
    dataset.Units, dataset.DecayCorrection, dataset.CorrectedImage = "BQML", "START", ["ATTN", "DECY", "SCAT"]
    dataset.SeriesDate, dataset.SeriesTime = "20200101", "110000"
    dataset.AcquisitionDate, dataset.AcquisitionTime = "20200101", "110000.50"
    dataset.PatientWeight = 70
    tracer = pydicom.Dataset()
    tracer.RadionuclideTotalDose, tracer.RadionuclideHalfLife = 350e6, 3600
    tracer.RadiopharmaceuticalStartTime = "100000"
    dataset.RadiopharmaceuticalInformationSequence = [tracer]
    return dataset


def test_uptake_counts_decay_from_injection_to_the_series() -> None:
    # one half-life has passed: 175 MBq are left in 70,000 g: 70000 / 175e6 = 4e-4 for each Bq/ml
    assert suv_factor(pet()) == pytest.approx(4e-4)


def test_uptake_of_values_as_of_injection_counts_no_decay() -> None:
    dataset = pet()
    dataset.DecayCorrection = "ADMIN"
    del dataset.SeriesTime
    # 350 MBq in 70,000 g: 70000 / 350e6 = 2e-4 for each Bq/ml
    assert suv_factor(dataset) == pytest.approx(2e-4)
    dataset.DecayCorrection = "NONE"
    with pytest.raises(Quarantine, match="decay correction"):
        suv_factor(dataset)


def test_times_without_seconds_are_hours_and_minutes() -> None:
    dataset = pet()
    dataset.SeriesTime = dataset.AcquisitionTime = "1030"  # and not 10:03:00
    # half a half-life has passed since 10:00
    assert suv_factor(dataset) == pytest.approx(2e-4 * 2**0.5)


@pytest.mark.parametrize(
    ("injected", "time", "zone"),
    [
        ("20200101090000", "100000", ""),  # an hour apart
        ("20200101100000+0000", "100000", "+0100"),
    ],
)
def test_moments_of_injection_that_contradict_each_other_are_left_out(injected: str, time: str, zone: str) -> None:
    dataset = pet()
    tracer = dataset.RadiopharmaceuticalInformationSequence[0]
    tracer.RadiopharmaceuticalStartDateTime, tracer.RadiopharmaceuticalStartTime = "20200101100000.00+0100", "1000"
    dataset.TimezoneOffsetFromUTC = "+0100"
    assert suv_factor(dataset) == pytest.approx(4e-4)
    tracer.RadiopharmaceuticalStartDateTime, tracer.RadiopharmaceuticalStartTime = injected, time
    dataset.TimezoneOffsetFromUTC = zone
    with pytest.raises(Quarantine, match="times that contradict each other"):
        suv_factor(dataset)


@pytest.mark.parametrize("keyword", ["PatientWeight", "Units", "DecayCorrection", "CorrectedImage", "SeriesTime"])
def test_pet_without_what_uptake_needs_is_left_out(keyword: str) -> None:
    dataset = pet()
    del dataset[keyword]
    with pytest.raises(Quarantine, match="PET that cannot become SUV"):
        suv_factor(dataset)


def test_pet_reconstructed_after_acquisition_is_left_out() -> None:
    dataset = pet()
    dataset.SeriesTime = "113000"
    with pytest.raises(Quarantine, match="times"):
        suv_factor(dataset)


def test_a_decoder_that_crashes_costs_one_series_and_not_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = ct()
    for dataset in slices:
        dataset.compress(RLELossless, generate_instance_uid=False)
    paths = save(slices, tmp_path)
    monkeypatch.setattr(decoder, "_in_child", crash)
    with pytest.raises(Quarantine, match="a decoder crashed") as crashed:
        open_series(paths)
    assert crashed.value.passing  # the file need not be to blame
    monkeypatch.setattr(decoder, "_SECONDS", 0)
    with pytest.raises(Quarantine, match="decoding did not end") as unfinished:
        open_series(paths)
    assert unfinished.value.passing
    monkeypatch.undo()
    assert len(open_series(paths)) == len(paths)


def test_the_decoders_process_ends_when_all_is_loaded(tmp_path: Path) -> None:
    slices = ct()
    for dataset in slices:
        dataset.compress(RLELossless, generate_instance_uid=False)
    open_series(save(slices, tmp_path))
    assert decoder._pool is not None
    (process,) = decoder._pool._processes.values()
    decoder.end_decoder()
    # Not process.join: the pool's own thread reaps it, and the loser of the two sees no status for a moment.
    wait_for(lambda: process.exitcode is not None, 30)
    assert process.exitcode == 0


def a_worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def compressed(folder: Path) -> list[Path]:
    slices = ct()
    for dataset in slices:
        dataset.compress(RLELossless, generate_instance_uid=False)
    return save(slices, folder)


def test_a_worker_process_that_has_decoded_ends(tmp_path: Path) -> None:
    pool = a_worker()
    pool.submit(decoder._decode, compressed(tmp_path)).result()
    (worker,) = pool._processes.values()
    (its_decoder,) = children_of(worker.pid)
    pool.shutdown(wait=False)
    try:
        wait_for(lambda: worker.exitcode is not None, 30)
        assert worker.exitcode == 0
    finally:  # else this process would wait for it too
        for pid in {worker.pid, its_decoder} & running():
            os.kill(pid, signal.SIGKILL)


def test_a_decoder_ends_with_the_worker_process_that_is_killed(tmp_path: Path) -> None:
    with a_worker() as pool:
        pool.submit(decoder._decode, compressed(tmp_path)).result()
        (worker,) = pool._processes.values()
        (its_decoder,) = children_of(worker.pid)
        worker.kill()
        wait_for(lambda: its_decoder not in running(), 30)


def running() -> set[int]:
    """Ids of all processes; one that only waits to be reaped does not count."""
    return set(parents())


def children_of(pid: int) -> list[int]:
    return [child for child, parent in parents().items() if parent == pid]


def parents() -> dict[int, int]:
    out = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                out[int(path.parent.name)] = int(parent)
    return out


def crash(paths: list[Path]) -> None:
    os.abort()
