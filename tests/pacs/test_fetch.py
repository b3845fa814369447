"""A real PACS, asked and fetched from by all three ways, and what happens when it refuses or dies."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pydicom
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from dicom_lab import KEY, ct, hospital, hounsfield, save, seg, spec
from orthanc import Pacs, alone
from pydicom.uid import JPEG2000Lossless

from medfl.client.data import pacs as module
from medfl.client.data.case import Findings
from medfl.client.data.load import load_site_data
from medfl.client.data.pacs import fetch_all
from medfl.client.data.settings import DicomwebSettings, DimseSettings
from medfl.client.data.splits import Split
from medfl.shared.errors import ConfigError, DataError, NetworkError
from medfl.simulations.demo import free_port

Any_ = DicomwebSettings | DimseSettings
WAYS = ["dicomweb", "get", "move"]


def settings(way: str, pacs: Pacs, folder: Path, **changes: object) -> Any_:
    common: dict[str, object] = {
        "query": {"modality": "CT"},
        "fetch": {"folder": folder / "spool", "instances_per_minute": 1_000_000, "timeout_s": 60, "attempts": 1},
    }
    if way == "dicomweb":
        fields = {"source": "dicomweb", "url": pacs.url + "/dicom-web", "user": "reader", "password": "right"}
        return DicomwebSettings.model_validate(common | fields | changes)
    fields = {
        "source": "dimse", "host": "127.0.0.1", "pacs_port": pacs.dicom, "called_ae_title": "ORTHANC", "retrieve": way,
        "port": pacs.move_port if way == "move" else None,
    }  # fmt: skip
    return DimseSettings.model_validate(common | fields | changes)


def fetch(wanted: Any_, findings: Findings | None = None, **options: object) -> list[Path]:
    fetch_all(wanted, KEY, findings or Findings(), lambda patient: False, **options)  # type: ignore[arg-type]
    return files(wanted)


def files(wanted: Any_) -> list[Path]:
    return sorted(p for p in wanted.fetch.folder.rglob("*") if p.is_file() and not p.name.startswith("."))


@pytest.mark.parametrize("way", WAYS)
def test_images_and_labels_come_over_each_way_and_train(way: str, pacs: Pacs, tmp_path: Path) -> None:
    pacs.upload(hospital(tmp_path / "data", patients=4))
    wanted = settings(way, pacs, tmp_path, split={"min_patients": 4})
    data = load_site_data(wanted, spec(), task="segmentation", key=KEY)
    assert data.report.quarantined == {}
    assert sum(data.report.cases.values()) == 4
    train = data.splits[Split.TRAIN]
    truth = {np.maximum(hounsfield(n), -1024).astype(np.float32)[k].tobytes() for n in range(4) for k in range(6)}
    assert all(image[0].numpy().tobytes() in truth for image in train.images)


@pytest.mark.parametrize("way", WAYS)
def test_compressed_pixels_arrive_without_loss(way: str, pacs: Pacs, tmp_path: Path) -> None:
    slices = ct()
    for dataset in slices:
        dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    pacs.upload(save(slices, tmp_path / "data"))
    arrived = [pydicom.dcmread(path) for path in fetch(settings(way, pacs, tmp_path))]
    assert {d.SOPInstanceUID: d.pixel_array.tobytes() for d in arrived} == {
        d.SOPInstanceUID: d.pixel_array.tobytes() for d in slices
    }


@pytest.mark.parametrize("way", WAYS)
def test_a_second_look_fetches_only_what_is_new(way: str, pacs: Pacs, tmp_path: Path) -> None:
    wanted = settings(way, pacs, tmp_path)
    pacs.upload(save(ct(name="A"), tmp_path / "a"))
    before = {path: path.stat().st_mtime_ns for path in fetch(wanted)}
    pacs.upload(save(ct(name="B"), tmp_path / "b"))
    after = {path: path.stat().st_mtime_ns for path in fetch(wanted)}
    assert len(after) == 12
    assert before.items() <= after.items()


@pytest.mark.parametrize("way", WAYS)
def test_a_query_restricts_by_modality_dates_and_description(way: str, pacs: Pacs, tmp_path: Path) -> None:
    for name, date, description in (
        ("A", "20190101", "Abdomen native"),
        ("B", "20200601", "Abdomen"),
        ("C", "20200601", "Head"),
    ):
        series = ct(name=name)
        for dataset in series:
            dataset.StudyDate, dataset.StudyDescription = date, description
        pacs.upload(save(series, tmp_path / name))
    query = {"modality": "CT", "from_date": "20200101", "to_date": "20201231", "study_description": "Abd*"}
    arrived = [pydicom.dcmread(path) for path in fetch(settings(way, pacs, tmp_path, query=query))]
    assert {dataset.PatientID for dataset in arrived} == {"B"}
    nothing = settings(way, pacs, tmp_path / "mr", query={"modality": "MR"})
    assert fetch(nothing) == []


@pytest.mark.parametrize("way", WAYS)
def test_a_body_part_restricts_images_and_keeps_labels(way: str, pacs: Pacs, tmp_path: Path) -> None:
    series = ct()
    pacs.upload(save([*series, seg(series)], tmp_path / "data"))
    assert len(fetch(settings(way, pacs, tmp_path, query={"modality": "CT", "body_part": "ABDOMEN"}))) == 7
    chest = settings(way, pacs, tmp_path / "chest", query={"modality": "CT", "body_part": "CHEST"})
    assert len(fetch(chest)) == 1  # the label alone, which then finds no image


def test_an_opted_out_patient_is_not_even_fetched(pacs: Pacs, tmp_path: Path) -> None:
    pacs.upload(save([*ct(name="STAYS"), *ct(name="GOES")], tmp_path / "data"))
    wanted = settings("dicomweb", pacs, tmp_path)
    fetch_all(wanted, KEY, Findings(), lambda patient: patient == KEY.pseudonym("goes"))
    assert {pydicom.dcmread(path).PatientID for path in files(wanted)} == {"STAYS"}


def test_an_unknown_station_is_an_error_and_not_no_studies(pacs: Pacs, tmp_path: Path) -> None:
    pacs.upload(save(ct(), tmp_path / "data"))
    with pytest.raises(NetworkError, match="may not know 'STRANGER'"):
        fetch(settings("get", pacs, tmp_path, ae_title="STRANGER"))


def test_a_wrong_called_title_is_named(pacs: Pacs, tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=r"called 'OTHER' \(data.called_ae_title\)"):
        fetch(settings("get", pacs, tmp_path, called_ae_title="OTHER"))


def test_a_wrong_password_is_named(pacs: Pacs, tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=r"401.*data\.password"):
        fetch(settings("dicomweb", pacs, tmp_path, password="wrong"))


def test_a_move_to_a_port_that_the_pacs_does_not_know_is_named(pacs: Pacs, tmp_path: Path) -> None:
    pacs.upload(save(ct(), tmp_path / "data"))
    with pytest.raises(NetworkError, match="it must know 'MEDFL' as this host and port"):
        fetch(settings("move", pacs, tmp_path, port=free_port()))


@pytest.mark.parametrize("way", WAYS)
def test_a_pacs_that_is_down_is_one_clear_line(way: str, pacs: Pacs, tmp_path: Path) -> None:
    pacs.stop()
    with pytest.raises(NetworkError, match="the PACS cannot be reached") as caught:
        fetch(settings(way, pacs, tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", WAYS)
def test_a_pacs_that_dies_in_the_middle_is_gone_on_with(
    way: str, pacs: Pacs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pacs.upload(hospital(tmp_path / "data", patients=3))
    wanted = settings(way, pacs, tmp_path)
    original = module._fetch
    calls = iter(range(1000))

    def dying(*arguments: object) -> int:
        if next(calls) == 3:
            pacs.stop()
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_fetch", dying)
    with pytest.raises(NetworkError):
        fetch(wanted)
    monkeypatch.undo()
    before = {path: path.stat().st_mtime_ns for path in files(wanted)}
    assert 0 < len(before) < 21
    pacs.start()
    after = {path: path.stat().st_mtime_ns for path in fetch(wanted)}
    assert len(after) == 21
    assert before.items() <= after.items()


def test_a_short_failure_is_tried_again(pacs: Pacs, tmp_path: Path) -> None:
    pacs.upload(save(ct(), tmp_path / "data"))
    pacs.stop()
    gentle = {"folder": tmp_path / "spool", "attempts": 3, "instances_per_minute": 1_000_000, "timeout_s": 60}
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if pacs.process is None:
            pacs.start()

    assert len(fetch(settings("dicomweb", pacs, tmp_path, fetch=gentle), sleep=sleep)) == 6
    assert pauses[0] == 2.0


class Watch:
    """A clock that only waiting moves on."""

    def __init__(self) -> None:
        self.seconds, self.pauses = 0.0, []  # type: ignore[var-annotated]

    def read(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.seconds += seconds


@pytest.mark.parametrize("way", WAYS)
def test_the_pace_that_is_asked_for_is_kept_between_instances(way: str, pacs: Pacs, tmp_path: Path) -> None:
    pacs.upload(save([*ct(name="A"), *ct(name="B")], tmp_path / "data"))
    watch = Watch()
    gentle = {"folder": tmp_path / "spool", "instances_per_minute": 60}
    told: list[tuple[str, int, int]] = []
    wanted = settings(way, pacs, tmp_path, fetch=gentle)
    assert len(fetch(wanted, sleep=watch.sleep, clock=watch.read, progress=lambda *said: told.append(said))) == 12
    # twelve instances at one a second: a second before each but the first
    assert watch.pauses == pytest.approx([1.0] * 11)
    assert told[0] == ("asking the PACS", 0, 1)
    assert told[-2:] == [("fetching series (11 files)", 1, 2), ("fetching series", 2, 2)]


def test_hours_that_end_within_a_series_stop_it_and_the_next_night_goes_on(pacs: Pacs, tmp_path: Path) -> None:
    pacs.upload(save(ct(name="A"), tmp_path / "a"))
    night = {"folder": tmp_path / "spool", "hours": "22:00-05:30", "instances_per_minute": 60}
    wanted, watch, findings = settings("dicomweb", pacs, tmp_path, fetch=night), Watch(), Findings()
    evening = datetime(2026, 1, 1, 5, 29, 57)
    options = {"sleep": watch.sleep, "clock": watch.read}
    arrived = fetch(wanted, findings, now=lambda: evening + timedelta(seconds=watch.seconds), **options)
    # at 29:57, :58 and :59, asked for the next one at 30:00
    assert 0 < len(arrived) < 6
    assert findings.quarantined == {"not fetched: outside the allowed hours": 1}
    assert len(fetch(wanted, now=lambda: datetime(2026, 1, 1, 23, 0), **options)) == 6


def test_outside_the_allowed_hours_the_pacs_is_left_alone(pacs: Pacs, tmp_path: Path) -> None:
    pacs.upload(save(ct(name="A"), tmp_path / "a"))
    night = {"folder": tmp_path / "spool", "hours": "22:00-05:30", "instances_per_minute": 1_000_000}
    wanted = settings("dicomweb", pacs, tmp_path, fetch=night)
    noon, midnight = datetime(2026, 1, 1, 12, 0), datetime(2026, 1, 1, 0, 10)
    with pytest.raises(DataError, match="only at 22:00-05:30"):
        fetch(wanted, now=lambda: noon)
    assert len(fetch(wanted, now=lambda: midnight)) == 6
    pacs.upload(save(ct(name="B"), tmp_path / "b"))
    findings = Findings()
    assert len(fetch(wanted, findings, now=lambda: noon)) == 6
    assert findings.quarantined == {"not looked for in the PACS: outside the allowed hours": 1}


@pytest.mark.parametrize(
    ("way", "instances"),
    [
        ("dicomweb", 420),  # three pages of answers
        pytest.param("dicomweb", 1000, marks=pytest.mark.slow),
        ("get", 120),
        ("move", 120),
        pytest.param("get", 1000, marks=pytest.mark.slow),
        pytest.param("move", 1000, marks=pytest.mark.slow),
    ],
)
def test_a_large_study_arrives_whole(way: str, instances: int, pacs: Pacs, tmp_path: Path) -> None:
    values = np.zeros((instances, 16, 16), np.int16)
    values[:] = np.arange(instances)[:, None, None]
    pacs.upload(save(ct(values), tmp_path / "data"))
    arrived = fetch(settings(way, pacs, tmp_path))
    assert len(arrived) == instances


def test_what_nobody_asked_for_is_not_taken_while_a_move_runs(pacs: Pacs, tmp_path: Path) -> None:
    from pynetdicom import AE

    pacs.upload(save(ct(name="A"), tmp_path / "a"))
    wanted = settings("move", pacs, tmp_path)
    stranger, status = ct(name="STRANGER")[0], []

    def push() -> None:
        entity = AE(ae_title="STRANGER")
        entity.add_requested_context(stranger.SOPClassUID)
        for _ in range(2000):
            association = entity.associate("127.0.0.1", pacs.move_port, ae_title="MEDFL")
            if association.is_established:
                status.append(association.send_c_store(stranger).get("Status"))
                association.release()
                return

    thread = threading.Thread(target=push)
    thread.start()
    for _ in range(20):
        fetch(wanted)
        if status:
            break
        for path in wanted.fetch.folder.rglob("*"):
            if path.is_file():
                path.unlink()
    thread.join(30)
    assert status == [0xA900]
    assert {pydicom.dcmread(path).PatientID for path in files(wanted)} == {"A"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pacs]:
    """A PACS that speaks DICOM over TLS only, and asks stations for their certificates."""
    if not alone():
        pytest.skip("needs a namespace with loopback only: see test_in_namespace.py, which makes one")
    folder = tmp_path_factory.mktemp("tls")
    write_certificates(folder, "pacs", "station")
    pacs = Pacs(tmp_path_factory.mktemp("guarded"), free_port(), free_port(), free_port(), tls=folder)
    pacs.start()
    yield pacs
    pacs.stop()


def tls_of(pacs: Pacs, **changes: object) -> dict[str, object]:
    assert pacs.tls is not None
    own = {
        "ca_file": pacs.tls / "authority.pem",
        "certificate": pacs.tls / "station.pem",
        "key": pacs.tls / "station.key",
    }
    return {"tls": own | {"server_name": "localhost"} | changes}


@pytest.mark.parametrize("way", ["get", "move"])
def test_dicom_over_tls_fetches_with_both_certificates(way: str, guarded: Pacs, tmp_path: Path) -> None:
    guarded.clear()
    guarded.upload(hospital(tmp_path / "data", patients=1))
    assert len(fetch(settings(way, guarded, tmp_path, **tls_of(guarded)))) == 7


def test_a_pacs_with_another_name_or_authority_or_without_tls_is_not_asked(guarded: Pacs, tmp_path: Path) -> None:
    write_certificates(tmp_path / "other", "pacs", "station")
    for changes in (
        tls_of(guarded, server_name="elsewhere"),
        tls_of(guarded, ca_file=tmp_path / "other" / "authority.pem"),
        tls_of(guarded, certificate=tmp_path / "other" / "station.pem", key=tmp_path / "other" / "station.key"),
        {},
    ):
        with pytest.raises(NetworkError):
            fetch(settings("get", guarded, tmp_path, **changes))


def test_certificates_that_cannot_be_read_are_a_configuration_error(guarded: Pacs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.tls"):
        fetch(settings("get", guarded, tmp_path, **tls_of(guarded, key=tmp_path / "absent.key")))


def write_certificates(folder: Path, *names: str) -> None:
    """An authority, and a certificate with its key for each name, all for localhost."""
    folder.mkdir(exist_ok=True)
    now = datetime.now(UTC)

    def subject(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, name)])

    authority = rsa.generate_private_key(65537, 2048)
    for name in ("authority", *names):
        key = authority if name == "authority" else rsa.generate_private_key(65537, 2048)
        made = (
            x509.CertificateBuilder()
            .subject_name(subject(name))
            .issuer_name(subject("authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=name == "authority", path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .sign(authority, hashes.SHA256())
        )
        (folder / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
        (folder / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
        )
