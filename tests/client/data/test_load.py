"""From a site's settings to tensors: what comes out, what is left out and counted, what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from dicom_lab import KEY, ROWS, SLICES, ct, hospital, hounsfield, lesion, save, seg, spec
from PIL import Image
from pydicom.config import IGNORE
from pydicom.dataelem import DataElement
from pydicom.uid import generate_uid
from real_data import DATA, needs

from medfl.client.data.case import Findings
from medfl.client.data.dicom import find_dicom
from medfl.client.data.ingest import Block, Job
from medfl.client.data.load import load_site_data
from medfl.client.data.secret import SiteKey
from medfl.client.data.settings import DicomSettings, TableLabels, TableSettings
from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData
from medfl.shared.config import parse_settings
from medfl.shared.data_spec import DataSpec
from medfl.shared.errors import ConfigError, DataError

Slices = list[pydicom.FileDataset]


def load(folder: Path, study: DataSpec | None = None, room: int | None = None, **changes: object) -> SiteData:
    settings = DicomSettings.model_validate({"source": "dicom", "folder": folder} | changes)
    return load_site_data(settings, study or spec(), task="segmentation", key=KEY, room=room)


def test_a_folder_of_dicom_becomes_tensors_split_by_patient(tmp_path: Path) -> None:
    hospital(tmp_path)
    data = load(tmp_path)
    # 10 patients: 15 % of 10 is 1.5, rounded to 2 for each held-out part; 6 slices each
    assert {part: len(found) for part, found in data.splits.items()} == {"train": 36, "validation": 12, "test": 12}
    train = data.splits[Split.TRAIN]
    assert train.images.shape == (36, 1, ROWS, ROWS)
    assert train.labels.shape == (36, ROWS, ROWS)
    assert train.labels.dtype == torch.uint8
    patients = [set(part.patients.tolist()) for part in data.splits.values()]
    assert not patients[0] & patients[1] | patients[0] & patients[2] | patients[1] & patients[2]
    report = data.report
    assert (report.patients, report.studies, report.series, report.labels) == (10, 10, 10, 10)
    assert report.class_balance["lesion"] == pytest.approx(lesion().mean())
    assert [r.low for r in report.spacing_mm] == pytest.approx([2.5, 0.7, 0.9])


def test_each_label_stays_with_its_image(tmp_path: Path) -> None:
    hospital(tmp_path)
    truth = {np.maximum(hounsfield(n), -1024).astype(np.float32)[k].tobytes(): k for n in range(10) for k in range(6)}
    for part in load(tmp_path).splits.values():
        for image, label in zip(part.images, part.labels, strict=True):
            index = truth[image[0].numpy().tobytes()]
            assert np.array_equal(label.numpy(), lesion()[index])


def test_a_part_of_a_volume_does_not_keep_the_volume_in_memory(tmp_path: Path) -> None:
    hospital(tmp_path, 1)
    settings = DicomSettings(source="dicom", folder=tmp_path)
    for study in (
        spec(preprocessing={"normalise": "none", "size": (8, 8)}),
        spec(preprocessing={"normalise": "none", "size": (32, 32), "slices": {"per_case": 1}}),
    ):
        (case,) = find_dicom(settings, tmp_path, study, "segmentation", KEY, Findings(), lambda pseudonym: False)
        block = Job(case, study, held_out=False).run()
        assert isinstance(block, Block)
        assert block.masks is not None
        for tensor in (block.images, block.masks):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_the_same_secret_gives_the_same_split_and_another_secret_another(tmp_path: Path) -> None:
    hospital(tmp_path)
    first, again = (load(tmp_path).splits[Split.TRAIN].images for _ in range(2))
    assert torch.equal(first, again)
    settings = DicomSettings(source="dicom", folder=tmp_path)
    other = load_site_data(settings, spec(), task="segmentation", key=SiteKey(b"another secret of 32 bytes or so!"))
    assert not torch.equal(first, other.splits[Split.TRAIN].images)


def test_every_kind_of_mess_is_left_out_and_counted_and_the_rest_is_used(tmp_path: Path) -> None:
    hospital(tmp_path)
    gap = ct(name="GAP")
    save([*gap[:2], *gap[3:], seg(gap)], tmp_path / "gap")
    save(ct(name="NOLABEL"), tmp_path / "nolabel")
    lost = seg(ct(name="LOST"))
    save([lost], tmp_path / "lost")
    other = ct(name="OTHER")
    (path,) = save([seg(other)], tmp_path / "other")
    theirs = pydicom.dcmread(path)
    theirs.PatientID = "P01"
    theirs.save_as(path)
    save(other, tmp_path / "other")
    burned = ct(name="BURNED")
    for dataset in burned:
        dataset.BurnedInAnnotation = "YES"
    save([*burned, seg(burned)], tmp_path / "burned")
    nobody = ct(name="X")
    for dataset in nobody:
        dataset.PatientID = ""
    save(nobody, tmp_path / "nobody")
    (tmp_path / "notes.txt").write_text("not DICOM")
    (tmp_path / "DICOMDIR").write_bytes(b"ignored")
    data = load(tmp_path)
    assert data.report.quarantined == {
        "missing slices": 1,
        "no label": 1,
        "label without image": 1,
        "label of another patient": 1,
        "burned-in annotation": 1,
        "no patient identifier": SLICES,
        "not a DICOM file": 1,
    }
    assert sum(data.report.cases.values()) == 10


def test_where_no_segment_is_a_class_their_names_are_told_beside_the_error(tmp_path: Path) -> None:
    for number in range(10):
        source = ct(hounsfield(number), name=f"P{number:02d}")
        save([*source, seg(source, {"Tumeur foie": lesion()})], tmp_path / str(number))
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert str(caught.value).endswith("left out: no segment is a class of the study (10)")
    assert caught.value.__notes__ == ["    10  'Tumeur foie'"]
    assert load(tmp_path, aliases={"tumeur-foie": "Lesion"}).report.quarantined == {}


def test_two_series_in_one_folder_are_two_cases(tmp_path: Path) -> None:
    hospital(tmp_path)
    for number in range(2):
        series = ct(hounsfield(50 + number), name="P00", seed=f"second {number}")
        for dataset in series:
            dataset.StudyInstanceUID = "1.2.3"
        save([*series, seg(series)], tmp_path / "00")
    assert sum(load(tmp_path).report.cases.values()) == 12


def test_a_series_split_over_folders_is_one_case(tmp_path: Path) -> None:
    hospital(tmp_path)
    for number, path in enumerate(sorted((tmp_path / "00").iterdir())):
        (tmp_path / f"elsewhere{number}").mkdir()
        path.rename(tmp_path / f"elsewhere{number}" / "x")
    assert sum(load(tmp_path).report.cases.values()) == 10


def test_a_patient_on_the_opt_out_list_is_never_read(tmp_path: Path) -> None:
    hospital(tmp_path / "data", patients=11)
    (tmp_path / "opt-out.txt").write_text("# left on 3 May\n p03 \n")
    data = load(tmp_path / "data", opt_out=tmp_path / "opt-out.txt")
    assert data.report.quarantined == {"opted out": 7}  # six slices and a label
    assert data.report.patients == 10


def test_a_missing_opt_out_list_stops_everything(tmp_path: Path) -> None:
    hospital(tmp_path / "data")
    with pytest.raises(DataError, match="opt-out list cannot be read"):
        load(tmp_path / "data", opt_out=tmp_path / "gone.txt")


def test_too_few_patients_are_refused(tmp_path: Path) -> None:
    hospital(tmp_path, patients=9)
    with pytest.raises(DataError, match="only 9 patients can be used, at least 10"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["absent", "empty", "text", "unlabelled"])
def test_a_folder_without_cases_is_one_clear_line(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    if kind != "absent":
        folder.mkdir()
    if kind == "text":
        (folder / "MUSTERMANN^ERIKA.txt").write_text("x")
    if kind == "unlabelled":
        save(ct(name="MUSTERMANN"), folder / "MUSTERMANN")
    with pytest.raises(DataError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert "MUSTERMANN" not in message
    assert ("data.folder" in message) or ("no label (1)" in message)


def test_nothing_of_a_header_reaches_logs_report_or_objects(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "SECRETNAME"
    for number in range(10):
        series = ct(hounsfield(number), name=f"{secret}{number}")
        label = seg(series)
        for dataset in series:
            dataset.ReferringPhysicianName = dataset.AccessionNumber = dataset.StudyDescription = secret
            dataset.add(DataElement("PatientBirthDate", "DA", f"no date {secret}", validation_mode=IGNORE))
        save([*series, label], tmp_path / str(number))
    broken = ct(name=f"{secret}X")
    broken[2].PixelData = b"\0\0"
    save([*broken, seg(broken)], tmp_path / "broken")
    with caplog.at_level(logging.DEBUG):
        data = load(tmp_path)
    seen = caplog.text + "".join(capsys.readouterr()) + repr(data.report) + "\n".join(data.report.lines())
    assert secret not in seen
    assert data.report.quarantined == {"pixel data of a wrong length": 1}


def test_ages_are_bands_and_patients_are_counted_once(tmp_path: Path) -> None:
    hospital(tmp_path)
    subgroups = load(tmp_path).report.subgroups
    assert subgroups["manufacturer"] == {"Lab": 10}
    assert all(band.count("-") == 1 for band in subgroups["age"])
    assert sum(subgroups["age"].values()) == 10


def test_classes_of_a_table_by_series_train_a_classification(tmp_path: Path) -> None:
    rows = ["series;finding"]
    for number in range(10):
        series = ct(hounsfield(number), name=f"P{number}")
        save(series, tmp_path / "data" / str(number))
        rows.append(f"{series[0].SeriesInstanceUID};{'sick' if number % 2 else '0'}")
    (tmp_path / "labels.csv").write_text("\ufeff" + "\n".join(rows))
    labels = TableLabels(kind="table", file=tmp_path / "labels.csv", key="series", label_column="finding")
    settings = DicomSettings(source="dicom", folder=tmp_path / "data", labels=labels)
    study = spec(classes=("well", "sick"), dimensions=3, preprocessing={"normalise": "none", "size": (6, 32, 32)})
    data = load_site_data(settings, study, task="classification", key=KEY)
    assert data.splits[Split.TRAIN].images.shape == (6, 1, 6, 32, 32)
    labels_seen = torch.cat([part.labels for part in data.splits.values()])
    assert labels_seen.dtype == torch.int64
    assert labels_seen.sum() == 5


def test_a_classification_without_a_table_is_a_configuration_error(tmp_path: Path) -> None:
    hospital(tmp_path)
    settings = DicomSettings(source="dicom", folder=tmp_path)
    with pytest.raises(ConfigError, match="kind: table"):
        load_site_data(settings, spec(), task="classification", key=KEY)


def two_phases(folder: Path, drawn_on: Callable[[Slices, Slices], list[pydicom.Dataset]], patients: int = 10) -> None:
    """Patients with two series each, and the labels that ``drawn_on`` makes of them."""
    for number in range(patients):
        first, second = (ct(hounsfield(n), name=f"P{number}") for n in (number, 100 + number))
        uid, series = generate_uid(), generate_uid()
        for one, two in zip(first, second, strict=True):
            one.StudyInstanceUID = two.StudyInstanceUID = uid
            one.SeriesDescription, two.SeriesDescription = "native phase", "Venous 3.0"
            two.SeriesInstanceUID, two.SOPInstanceUID = series, generate_uid()
        save([*first, *second, *drawn_on(first, second)], folder / str(number))


PHASES = {"plain": "native", "venous": "^venous"}


def test_two_series_of_a_study_become_channels_on_the_first_ones_grid(tmp_path: Path) -> None:
    two_phases(tmp_path, lambda first, second: [seg(first)])
    data = load(tmp_path, spec(channels=2, series=("plain", "venous")), series=PHASES)
    images = data.splits[Split.TRAIN].images
    assert images.shape[1] == 2
    pairs = {np.maximum(hounsfield(n), -1024).tobytes(): n for n in [*range(10), *range(100, 110)]}
    volume = images.reshape(-1, 6, 2, 32, 32).numpy().astype(np.int16)
    assert all(
        pairs[np.ascontiguousarray(v[:, 1]).tobytes()] - pairs[np.ascontiguousarray(v[:, 0]).tobytes()] == 100
        for v in volume
    )


def test_labels_may_be_drawn_on_any_channel(tmp_path: Path) -> None:
    two_phases(tmp_path, lambda first, second: [seg(first), seg(second, {"Vessel": lesion()[::-1]})])
    study = spec(channels=2, series=("plain", "venous"), classes=("background", "lesion", "vessel"))
    labels = load(tmp_path, study, series=PHASES).splits[Split.TRAIN].labels
    expected = np.where(lesion()[::-1], 2, lesion())
    assert all(np.array_equal(volume, expected) for volume in labels.reshape(-1, 6, 32, 32).numpy())


def test_one_class_drawn_on_two_channels_is_left_out(tmp_path: Path) -> None:
    two_phases(tmp_path, lambda first, second: [seg(first), seg(second)], patients=3)
    with pytest.raises(DataError, match=r"two label objects for one class \(3\)"):
        load(tmp_path, spec(channels=2, series=("plain", "venous")), series=PHASES, split={"min_patients": 3})


def test_settings_from_yaml_name_the_key_that_is_wrong(tmp_path: Path) -> None:
    text = "source: dicom\nfolder: x\nsplit: {validation: 0.6, test: 0.5}\n"
    with pytest.raises(ConfigError, match=r"split: .*below 0.9"):
        parse_settings(text, DicomSettings, name="site.yaml", folder=tmp_path)


def pictures(folder: Path, patients: int = 10, **columns: str) -> TableSettings:
    """A table of pictures of one bright square each; image, mask and class."""
    lines = ["site,patient,image,mask,label"]
    rng = np.random.default_rng(0)
    for number in range(patients):
        pixels = rng.integers(0, 100, (24, 20), np.uint8)
        pixels[4:9, 5:15] += 100
        Image.fromarray(pixels).save(folder / f"i{number}.png")
        Image.fromarray((pixels >= 100).astype(np.uint8) * 255).save(folder / f"m{number}.png")
        lines.append(f"here,p{number},i{number}.png,m{number}.png,{number % 2}")
    (folder / "sites.csv").write_text("\n".join(lines))
    return TableSettings(source="table", file=folder / "sites.csv")


XRAY = spec(modality="xray", preprocessing={"normalise": "scale_255", "size": (24, 20)})


def test_a_table_of_pictures_is_held_as_bytes_where_that_is_exact(tmp_path: Path) -> None:
    data = load_site_data(pictures(tmp_path), XRAY, task="segmentation", key=KEY)
    train = data.splits[Split.TRAIN]
    assert train.images.dtype == torch.uint8
    assert torch.equal(train.images[:, 0] >= 100, train.labels.bool())


def test_a_table_gives_classes_too(tmp_path: Path) -> None:
    data = load_site_data(pictures(tmp_path), XRAY, task="classification", key=KEY)
    assert data.splits[Split.TRAIN].labels.dtype == torch.int64
    assert data.report.class_balance == {"background": 0.5, "lesion": 0.5}


def test_several_classes_at_once_are_rows_of_zero_and_one(tmp_path: Path) -> None:
    settings = pictures(tmp_path)
    table = settings.file.read_text().splitlines()
    settings.file.write_text("\n".join([table[0]] + [line[:-1] + "a|c" for line in table[1:6]] + [
        line[:-1] + "-" for line in table[6:]]))  # fmt: skip
    study = XRAY.model_copy(update={"classes": ("a", "b", "c"), "multi_label": True})
    data = load_site_data(settings, study, task="classification", key=KEY)
    labels = torch.cat([part.labels for part in data.splits.values()])
    assert labels.sum(0).tolist() == [5, 0, 5]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("here,p9,../outside.png,m9.png,0", "file name leads out of the folder"),
        ("here,p9,/etc/hostname,m9.png,0", "file name leads out of the folder"),
        ("here,p9,gone.png,m9.png,0", "file is missing"),
        (f"here,p9,{'x' * 300}.png,m9.png,0", "file is missing"),
        ("here,p9,i\09.png,m9.png,0", "file is missing"),
        ("here,,i9.png,m9.png,0", "no patient identifier"),
        ("here,p9,i9.png,,0", "no label"),
        ("here,p9,broken.png,m9.png,0", "unreadable picture"),
        ("here,p9,small.png,m9.png,0", "mask and image differ in size"),
        ("here,p9,colour.png,m9.png,0", "colour picture, but the study has one channel"),
    ],
)
def test_a_row_that_cannot_be_used_is_left_out_with_its_reason(change: str, reason: str, tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    settings = pictures(folder, patients=11)
    for path in (tmp_path / "outside.png", folder / "small.png"):
        Image.new("L", (8, 8)).save(path)
    (folder / "broken.png").write_bytes((folder / "i9.png").read_bytes()[:60])
    Image.effect_noise((20, 24), 50).convert("RGB").transform((20, 24), 0, (1, 0, 1, 0, 1, 0)).save(folder / "c.png")
    colour = np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.uint8)
    Image.fromarray(colour).save(folder / "colour.png")
    lines = settings.file.read_text().splitlines()
    settings.file.write_text("\n".join([*lines[:10], change, *lines[11:]]))
    data = load_site_data(settings, XRAY, task="segmentation", key=KEY)
    assert data.report.quarantined == {reason: 1}


def test_a_site_that_the_table_does_not_have_is_refused(tmp_path: Path) -> None:
    settings = pictures(tmp_path).model_copy(update={"site": "there"})
    with pytest.raises(DataError, match="no row has 'there'"):
        load_site_data(settings, XRAY, task="segmentation", key=KEY)


@needs("lungs")
@pytest.mark.data
def test_real_chest_radiographs_load_without_loss() -> None:
    settings = TableSettings(source="table", file=DATA / "lungs" / "sites.csv", site="montgomery")
    study = XRAY.model_copy(update={"preprocessing": XRAY.preprocessing.model_copy(update={"size": (192, 192)})})
    data = load_site_data(settings, study, task="segmentation", key=KEY)
    assert sum(data.report.examples.values()) == 111
    assert 0.15 < data.report.class_balance["lesion"] < 0.35  # lungs fill a quarter of a chest radiograph


@needs("vessels")
@pytest.mark.data
def test_real_fundus_photographs_keep_both_eyes_of_a_patient_together() -> None:
    settings = TableSettings(source="table", file=DATA / "vessels" / "sites.csv", site="chase")
    changes = {"channels": 3, "modality": "fundus", "preprocessing": {"normalise": "scale_255", "size": (492, 512)}}
    data = load_site_data(settings, spec(**changes), task="segmentation", key=KEY)
    assert data.report.patients == 10
    assert all(len(part) == 2 * len(set(part.patients.tolist())) for part in data.splits.values())


def test_what_the_device_has_no_room_for_stays_on_the_host_training_last(tmp_path: Path) -> None:
    hospital(tmp_path)
    whole = load(tmp_path)
    bytes_of = {part: found.images.numel() * found.images.element_size() for part, found in whole.splits.items()}
    some = load(tmp_path, room=bytes_of[Split.TRAIN])
    assert [some.splits[part].streamed for part in Split] == [False, True, True]
    assert torch.equal(some.splits[Split.TEST].images, whole.splits[Split.TEST].images)
    none = load(tmp_path, room=0)
    assert all(found.streamed for found in none.splits.values())
    assert "in the host's memory" in none.report.held
    assert "host" not in whole.report.held
