"""Labels of every kind land on exactly the voxels that they mean, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_lab import COLUMN_MM, ROW_MM, SLICES, ct, lesion, save, seg, spec, structure_set
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from numpy.typing import NDArray
from pydicom.uid import generate_uid
from skimage.draw import polygon2mask

from medfl.client.data.case import Quarantine
from medfl.client.data.contours import read_contours
from medfl.client.data.labels import combine, label_volume
from medfl.client.data.volumes import read_volume, slices_of_each
from medfl.shared.data_spec import DataSpec, Modality


def upright(slices: list[pydicom.FileDataset], path: Path, study: DataSpec | None = None) -> NDArray[np.uint8]:
    """The mask of one label file, slices from feet to head."""
    volume = read_volume(slices, Modality.CT)
    paths = ([path], []) if pydicom.dcmread(path).Modality == "SEG" else ([], [path])
    instances = slices_of_each(slices, volume)
    mask, _ = label_volume(*paths, volume, instances, study or spec(), {})
    return np.asarray(volume.with_array(mask).to_patient_orientation("HPL").array)


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
@pytest.mark.parametrize("omit", [True, False])
def test_every_type_of_segmentation_covers_exactly_its_voxels(kind: str, omit: bool, tmp_path: Path) -> None:
    slices = ct()
    masks = {"Lesion": lesion().astype(np.float32 if kind == "FRACTIONAL" else np.uint8)}
    (path,) = save([seg(slices, masks, kind, omit_empty_frames=omit)], tmp_path)
    assert np.array_equal(upright(slices, path), lesion())


def test_a_fraction_counts_from_one_half(tmp_path: Path) -> None:
    slices = ct()
    fractions = np.zeros(lesion().shape, np.float32)
    fractions[2:4, 5, 4:8] = [0.2, 0.45, 0.55, 0.9]
    (path,) = save([seg(slices, {"Lesion": fractions}, "FRACTIONAL")], tmp_path)
    assert upright(slices, path)[2:4, 5, 4:8].tolist() == [[0, 0, 1, 1]] * 2


def test_a_label_of_one_slice_lands_on_that_slice(tmp_path: Path) -> None:
    slices = ct()
    mask = lesion()
    mask[3] = False
    (path,) = save([seg(slices, {"Lesion": mask})], tmp_path)
    assert np.array_equal(upright(slices, path), mask)


def test_an_empty_segmentation_says_that_there_is_nothing(tmp_path: Path) -> None:
    slices = ct()
    (path,) = save([seg(slices, {"Lesion": np.zeros(lesion().shape, bool)}, omit_empty_frames=False)], tmp_path)
    assert not upright(slices, path).any()


def test_where_segments_overlap_the_later_class_wins(tmp_path: Path) -> None:
    slices = ct()
    organ = np.zeros(lesion().shape, bool)
    organ[1:5, 2:16, 2:16] = True
    (path,) = save([seg(slices, {"Lesion": lesion(), "Organ": organ})], tmp_path)
    study = spec(classes=("background", "organ", "lesion"))
    assert np.array_equal(upright(slices, path, study), np.where(lesion(), 2, organ.astype(int)))


def test_names_go_through_the_sites_aliases_and_the_studys_map(tmp_path: Path) -> None:
    slices = ct()
    (path,) = save([seg(slices, {"Tumeur 1": lesion(), "Foie": lesion()})], tmp_path)
    volume = read_volume(slices, Modality.CT)
    study = spec(label_map={"GTV": "lesion"})
    mask, unmatched = label_volume([path], [], volume, slices_of_each(slices, volume), study, {"Tumeur 1": "gtv"})
    assert mask.sum() == lesion().sum()
    assert unmatched == ("Foie",)


@pytest.mark.parametrize("frames", [None, 1, 3])
def test_a_segmentation_with_another_number_of_frames_than_descriptions_is_refused(
    frames: int | None, tmp_path: Path
) -> None:
    slices = ct()
    label = seg(slices)
    label.NumberOfFrames = frames
    (path,) = save([label], tmp_path)
    with pytest.raises(Quarantine, match="frames and their descriptions differ in number"):
        upright(slices, path)


def test_segments_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    slices = ct()
    both = {"Other": np.roll(lesion(), 1, 0), "Lesion": lesion()}
    twice, stray = seg(slices, both), seg(slices, both)
    twice.SegmentSequence[1].SegmentNumber = 1
    stray.PerFrameFunctionalGroupsSequence[0].SegmentIdentificationSequence[0].ReferencedSegmentNumber = 9
    for label, reason in ((twice, "two segments of one number"), (stray, "frame of a segment that is not described")):
        (path,) = save([label], tmp_path)
        with pytest.raises(Quarantine, match=reason):
            upright(slices, path)


@pytest.mark.parametrize("largest", [1, 100, 200])
def test_a_fraction_is_counted_from_the_largest_value_that_the_file_names(largest: int, tmp_path: Path) -> None:
    slices = ct()
    label = seg(slices, {"Lesion": lesion().astype(float)}, "FRACTIONAL", max_fractional_value=largest)
    (path,) = save([label], tmp_path)
    assert np.array_equal(upright(slices, path), lesion())


def test_a_segmentation_in_another_frame_of_reference_is_refused(tmp_path: Path) -> None:
    slices = ct()
    label = seg(slices)
    label.FrameOfReferenceUID = generate_uid()
    (path,) = save([label], tmp_path)
    with pytest.raises(Quarantine, match="another frame of reference"):
        upright(slices, path)


def test_a_segmentation_between_the_grid_points_is_refused(tmp_path: Path) -> None:
    slices = ct()
    (path,) = save([seg(slices)], tmp_path)
    for dataset in slices:
        x, y, z = (float(v) for v in dataset.ImagePositionPatient)
        dataset.ImagePositionPatient = [x + COLUMN_MM / 2, y, z]
    with pytest.raises(Quarantine, match="not on the image's grid"):
        upright(slices, path)


def test_a_segmentation_that_reaches_outside_the_volume_is_refused(tmp_path: Path) -> None:
    slices = ct()
    (path,) = save([seg(slices)], tmp_path)
    volume = read_volume(slices[3:], Modality.CT)
    with pytest.raises(Quarantine, match="outside the image"):
        label_volume([path], [], volume, {d.SOPInstanceUID: () for d in slices}, spec(), {})


def test_a_series_that_lost_its_last_slice_is_noticed_by_its_label(tmp_path: Path) -> None:
    slices = ct()
    (path,) = save([seg(slices)], tmp_path)
    with pytest.raises(Quarantine, match="slices that are missing"):
        upright(slices[:-1], path)


def test_a_file_without_any_class_of_the_study_is_refused(tmp_path: Path) -> None:
    slices = ct()
    (path,) = save([seg(slices, {"Kidney": lesion()})], tmp_path)
    with pytest.raises(Quarantine, match="no segment is a class"):
        upright(slices, path)


def test_two_readers_of_one_class_are_refused() -> None:
    voxels = {1: lesion()}
    with pytest.raises(Quarantine, match="two label objects"):
        combine([(voxels, {}), (voxels, {})], lesion().shape)  # type: ignore[list-item]


def circle(slices: list[pydicom.FileDataset], index: int, radius: float, points: int = 400) -> NDArray[np.float64]:
    """A circle about the middle of one slice, in patient mm."""
    x, y, z = (float(v) for v in slices[index].ImagePositionPatient)
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    middle = (x + 15.5 * COLUMN_MM, y + 15.5 * ROW_MM)
    return np.stack([middle[0] + radius * np.cos(angle), middle[1] + radius * np.sin(angle), 0 * angle + z], 1)


def disc(radius: float) -> NDArray[np.bool_]:
    """Voxels whose centre lies within ``radius`` mm of the middle: the truth, without any polygon."""
    r, c = np.mgrid[:32, :32]
    return ((r - 15.5) * ROW_MM) ** 2 + ((c - 15.5) * COLUMN_MM) ** 2 < radius**2


def test_contours_cover_the_voxels_whose_centre_is_inside_also_on_pixels_that_are_not_square(tmp_path: Path) -> None:
    slices = ct()
    (path,) = save([structure_set(slices, {"Lesion": [circle(slices, 2, 6.03), circle(slices, 3, 4.03)]})], tmp_path)
    mask = upright(slices, path)
    assert np.array_equal(mask[2], disc(6.03))
    assert np.array_equal(mask[3], disc(4.03))
    assert not mask[[0, 1, 4, 5]].any()


def test_a_contour_inside_another_is_a_hole(tmp_path: Path) -> None:
    slices = ct()
    (path,) = save([structure_set(slices, {"Lesion": [circle(slices, 2, 8.03), circle(slices, 2, 3.03)]})], tmp_path)
    assert np.array_equal(upright(slices, path)[2], disc(8.03) & ~disc(3.03))


def test_a_hole_that_the_outline_itself_leads_to_is_a_hole(tmp_path: Path) -> None:
    slices = ct()
    around, hole = circle(slices, 2, 6.03), circle(slices, 2, 3.03)[::-1]
    keyhole = np.concatenate([around, around[:1], np.roll(hole, 1, axis=0), around[:1]])
    (path,) = save([structure_set(slices, {"Lesion": [keyhole]})], tmp_path)
    assert (upright(slices, path)[2] != disc(6.03) & ~disc(3.03)).sum() <= 2  # the bridge may take a voxel


def test_a_mark_beside_the_contours_of_a_region_changes_nothing(tmp_path: Path) -> None:
    slices = ct()
    drawing = structure_set(slices, {"Lesion": [circle(slices, 2, 6.03), circle(slices, 3, 4.03)[:1]]})
    drawing.ROIContourSequence[0].ContourSequence[1].ContourGeometricType = "POINT"
    (path,) = save([drawing], tmp_path)
    mask = upright(slices, path)
    assert np.array_equal(mask[2], disc(6.03))
    assert not mask[3].any()


def test_a_region_in_two_places_of_a_slice_is_both(tmp_path: Path) -> None:
    slices = ct()
    aside = np.array([5 * COLUMN_MM, 0, 0])
    (path,) = save(
        [structure_set(slices, {"Lesion": [circle(slices, 2, 2.03) - aside, circle(slices, 2, 2.03) + aside]})],
        tmp_path,
    )
    middle = disc(2.03)
    assert np.array_equal(upright(slices, path)[2], np.roll(middle, -5, 1) | np.roll(middle, 5, 1))


def cross(slices: list[pydicom.FileDataset]) -> pydicom.Dataset:
    polygons = [circle(slices, 2, 5.03), circle(slices, 2, 5.03) + np.array([4.0, 0, 0])]
    return structure_set(slices, {"Lesion": polygons})


def twice(slices: list[pydicom.FileDataset]) -> pydicom.Dataset:
    return structure_set(slices, {"Lesion": [circle(slices, 2, 5.03)] * 2})


def never_drawn(slices: list[pydicom.FileDataset]) -> pydicom.Dataset:
    return structure_set(slices, {"Lesion": []})


def a_point(slices: list[pydicom.FileDataset]) -> pydicom.Dataset:
    drawing = structure_set(slices, {"Lesion": [circle(slices, 2, 5.03)[:1]]})
    drawing.ROIContourSequence[0].ContourSequence[0].ContourGeometricType = "POINT"
    return drawing


def an_open_end(slices: list[pydicom.FileDataset]) -> pydicom.Dataset:
    drawing = structure_set(slices, {"Lesion": [circle(slices, 2, 5.03), circle(slices, 3, 5.03)]})
    drawing.ROIContourSequence[0].ContourSequence[1].ContourGeometricType = "OPEN_PLANAR"
    return drawing


def figure_of_eight(slices: list[pydicom.FileDataset]) -> pydicom.Dataset:
    outline = circle(slices, 2, 5.03, points=4)
    return structure_set(slices, {"Lesion": [outline[[0, 1, 3, 2]]]})


def between_the_centres(slices: list[pydicom.FileDataset]) -> pydicom.Dataset:
    return structure_set(slices, {"Lesion": [circle(slices, 2, 0.2)]})


def another_number_of_points(slices: list[pydicom.FileDataset]) -> pydicom.Dataset:
    dataset = structure_set(slices, {"Lesion": [circle(slices, 3, 6)]})
    dataset.ROIContourSequence[0].ContourSequence[0].NumberOfContourPoints = 399
    return dataset


def names(slices: list[pydicom.FileDataset], instance: str) -> pydicom.Dataset:
    drawing = structure_set(slices, {"Lesion": [circle(slices, 2, 5.03)]})
    image = pydicom.Dataset()
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = slices[0].SOPClassUID, instance
    drawing.ROIContourSequence[0].ContourSequence[0].ContourImageSequence = [image]
    return drawing


@pytest.mark.parametrize(
    ("draw", "reason"),
    [
        (cross, "contours of one region that cross each other"),
        (twice, "contours of one region that cross each other"),
        (never_drawn, "region without a closed contour"),
        (a_point, "region without a closed contour"),
        (an_open_end, "region that is not closed"),
        (figure_of_eight, "contour that crosses itself"),
        (between_the_centres, "region that covers no voxel"),
        (another_number_of_points, "unreadable structure set"),
        (lambda slices: names(slices, generate_uid()), "label was made on slices that are missing"),
        (lambda slices: names(slices, slices[3].SOPInstanceUID), "contour that lies in another slice than it names"),
    ],
)
def test_contours_that_nobody_can_be_sure_of_are_refused(
    draw: Callable[[list[pydicom.FileDataset]], pydicom.Dataset], reason: str, tmp_path: Path
) -> None:
    slices = ct()
    (path,) = save([draw(slices)], tmp_path)
    with pytest.raises(Quarantine) as caught:
        upright(slices, path)
    assert str(caught.value) == reason


def test_contours_that_are_exclusive_cancel_where_they_cross(tmp_path: Path) -> None:
    slices = ct()
    drawing = cross(slices)
    for contour in drawing.ROIContourSequence[0].ContourSequence:
        contour.ContourGeometricType = "CLOSEDPLANAR_XOR"
    (path,) = save([drawing], tmp_path)
    mask = upright(slices, path)[2]
    assert mask.any()
    assert not mask[15, 17]  # inside both


def test_a_segmentation_whose_frames_were_made_on_other_images_is_refused(tmp_path: Path) -> None:
    slices = ct()
    label = seg(slices)
    frame = label.PerFrameFunctionalGroupsSequence[1].DerivationImageSequence[0].SourceImageSequence[0]
    frame.ReferencedSOPInstanceUID = generate_uid()
    (path,) = save([label], tmp_path)
    with pytest.raises(Quarantine, match="slices that are missing"):
        upright(slices, path)


def test_a_segmentation_whose_frame_lies_in_another_slice_than_it_names_is_refused(tmp_path: Path) -> None:
    slices = ct()
    label = seg(slices)
    frame = label.PerFrameFunctionalGroupsSequence[0]
    frame.PlanePositionSequence[0].ImagePositionPatient = slices[5].ImagePositionPatient
    (path,) = save([label], tmp_path)
    with pytest.raises(Quarantine, match="another slice than it names"):
        upright(slices, path)


def in_one_file(slices: list[pydicom.FileDataset]) -> pydicom.FileDataset:
    """The series as one multi-frame image. highdicom puts its frames from head to feet."""
    for dataset in slices:
        dataset.AcquisitionNumber, dataset.SeriesDate, dataset.SeriesTime = 1, "20200101", "120000"
    return LegacyConvertedEnhancedCTImage(slices, generate_uid(), 2, generate_uid(), 1)


def heights(image: pydicom.Dataset) -> list[float]:
    groups = image.PerFrameFunctionalGroupsSequence
    return [float(group.PlanePositionSequence[0].ImagePositionPatient[2]) for group in groups]


@pytest.mark.parametrize(
    ("frame", "reason"),
    [(None, None), (2, "label that lies in another slice than it names"), (7, "label of a frame that its image does")],
)
def test_a_segmentation_of_one_file_lies_in_the_frames_that_it_names(
    frame: int | None, reason: str | None, tmp_path: Path
) -> None:
    image = in_one_file(ct())
    label = seg([image], {"Lesion": lesion()[np.argsort(np.argsort(heights(image)))]})
    named = label.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence[0]
    at = float(label.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient[2])
    assert heights(image)[named.ReferencedFrameNumber - 1] == at  # so the original is checked, and is right
    assert heights(image)[1] != at
    if frame is not None:
        named.ReferencedFrameNumber = frame
    (path,) = save([label], tmp_path)
    if reason is None:
        assert np.array_equal(upright([image], path), lesion())
    else:
        with pytest.raises(Quarantine, match=reason):
            upright([image], path)


def test_contours_of_one_file_lie_in_the_frames_that_they_name(tmp_path: Path) -> None:
    slices = ct()
    outline = circle(slices, 2, 5.03)
    image = in_one_file(slices)
    right = heights(image).index(outline[0, 2]) + 1
    for frame in (right, right % 6 + 1):
        drawing = structure_set([image], {"Lesion": [outline]})
        item = pydicom.Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
        item.ReferencedFrameNumber = frame
        drawing.ROIContourSequence[0].ContourSequence[0].ContourImageSequence = [item]
        (path,) = save([drawing], tmp_path / str(frame))
        if frame == right:
            assert np.array_equal(upright([image], path)[2], disc(5.03))
        else:
            with pytest.raises(Quarantine, match="another slice than it names"):
                upright([image], path)


def test_contours_follow_an_oblique_volume(tmp_path: Path) -> None:
    slices = ct()
    turn = np.deg2rad(30)
    row, column = np.array([np.cos(turn), np.sin(turn), 0]), np.array([-np.sin(turn), np.cos(turn), 0])
    for dataset in slices:
        dataset.ImageOrientationPatient = [*row.tolist(), *column.tolist()]
    corners = np.array([[3.3, 4.3], [3.3, 12.4], [10.2, 12.4], [10.2, 4.3]])  # row, column indices
    origin = np.array([float(v) for v in slices[2].ImagePositionPatient])
    points = origin + corners[:, 1:] * COLUMN_MM * row + corners[:, :1] * ROW_MM * column
    (path,) = save([structure_set(slices, {"Lesion": [points]})], tmp_path)
    volume = read_volume(slices, Modality.CT)
    classes, _ = read_contours(path, volume, {}, spec(), {})
    at = round(float(volume.map_reference_to_indices(points[:1])[0, 0]))
    assert np.array_equal(classes[1][at], polygon2mask((32, 32), corners))


def test_a_contour_between_slices_is_refused(tmp_path: Path) -> None:
    slices = ct()
    (path,) = save([structure_set(slices, {"Lesion": [circle(slices, 2, 5) + np.array([0, 0, 1.25])]})], tmp_path)
    with pytest.raises(Quarantine, match="lies in no slice"):
        upright(slices, path)


def test_a_contour_outside_the_volume_is_refused(tmp_path: Path) -> None:
    slices = ct()
    drawing = structure_set(slices, {"Lesion": [circle(slices, 0, 5)]})
    del drawing.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence
    (path,) = save([drawing], tmp_path)
    with pytest.raises(Quarantine, match="outside the image"):
        upright(slices[1:], path)


def test_contours_of_a_series_that_lost_a_slice_are_refused_wherever_they_lie(tmp_path: Path) -> None:
    slices = ct()
    (path,) = save([structure_set(slices, {"Lesion": [circle(slices, 3, 5)]})], tmp_path)
    with pytest.raises(Quarantine, match="slices that are missing"):
        upright(slices[1:], path)


def test_contours_of_another_frame_of_reference_need_to_name_the_slices(tmp_path: Path) -> None:
    slices = ct()
    drawing = structure_set(slices, {"Lesion": [circle(slices, 2, 5.03)]})
    drawing.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = generate_uid()
    (path,) = save([drawing], tmp_path)
    with pytest.raises(Quarantine, match="another frame of reference"):
        upright(slices, path)
    image = pydicom.Dataset()
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = slices[2].SOPClassUID, slices[2].SOPInstanceUID
    drawing.ROIContourSequence[0].ContourSequence[0].ContourImageSequence = [image]
    (path,) = save([drawing], tmp_path / "named")
    assert np.array_equal(upright(slices, path)[2], disc(5.03))


def test_the_l_shape_would_show_any_turn_or_flip() -> None:
    turns = [np.rot90(lesion(), k, (1, 2)) for k in range(4)]
    variants = [flip for turn in turns for flip in (turn, turn[:, ::-1])] + [lesion()[::-1]]
    assert len({variant.tobytes() for variant in variants}) == len(variants)
    assert lesion().shape[0] == SLICES
