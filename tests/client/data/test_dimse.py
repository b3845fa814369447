"""Archives over DIMSE that do not offer a service, go away, or answer what cannot be understood."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from dicom_lab import KEY
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)

from medfl.client.data.case import Findings
from medfl.client.data.dimse import dimse
from medfl.client.data.pacs import fetch_all
from medfl.client.data.settings import DimseSettings
from medfl.shared.errors import NetworkError

FIND, GET, MOVE = (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)
Answers = Iterator[tuple[int, Dataset]]


def one_series(event: Any) -> Answers:
    """One study of one series of three instances."""
    answer = Dataset()
    answer.QueryRetrieveLevel = event.identifier.QueryRetrieveLevel
    answer.StudyInstanceUID, answer.PatientID = "1.2.1", "P1"
    if answer.QueryRetrieveLevel == "SERIES":
        answer.SeriesInstanceUID, answer.Modality, answer.NumberOfSeriesRelatedInstances = "1.2.2", "CT", "3"
    yield 0xFF00, answer


def nameless(event: Any) -> Answers:
    """Studies without an identifier."""
    answer = Dataset()
    answer.QueryRetrieveLevel, answer.PatientID = "STUDY", "MUSTERMANN"
    yield 0xFF00, answer


@contextmanager
def archive(*services: str, find: Callable[[Any], Answers] = one_series) -> Iterator[int]:
    """The port of a PACS that offers ``services`` only."""
    entity = AE("PACS")
    for service in services:
        entity.add_supported_context(service)
    server: Any = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_FIND, find)])
    try:
        yield server.socket.getsockname()[1]
    finally:
        server.shutdown()


def settings(pacs_port: int, folder: Path, **changes: object) -> DimseSettings:
    fields: dict[str, object] = {
        "source": "dimse", "host": "127.0.0.1", "pacs_port": pacs_port, "called_ae_title": "PACS",
        "query": {"modality": "CT"}, "fetch": {"folder": folder / "spool", "timeout_s": 5, "attempts": 1},
    }  # fmt: skip
    return DimseSettings.model_validate(fields | changes)


def fetch(wanted: DimseSettings) -> None:
    fetch_all(wanted, KEY, Findings(), lambda patient: False)


def test_an_archive_without_c_get_is_told_with_the_other_way_to_fetch(tmp_path: Path) -> None:
    with (
        archive(FIND) as port,
        pytest.raises(NetworkError, match=r"does not offer C-GET: try data\.retrieve: move$"),
    ):
        fetch(settings(port, tmp_path))


def test_an_archive_without_c_find_or_c_move_is_told_which_to_allow_for_whom(tmp_path: Path) -> None:
    with archive(GET) as port, pytest.raises(NetworkError, match=r"does not offer C-FIND: .*'MEDFL' \(data\.ae_title"):
        fetch(settings(port, tmp_path))
    move = {"retrieve": "move", "port": 11112}
    with archive(FIND) as port, pytest.raises(NetworkError, match=r"does not offer C-MOVE: .*'MEDFL'"):
        fetch(settings(port, tmp_path, **move))


def find_without_association(wanted: DimseSettings) -> None:
    with dimse(wanted) as opened:
        opened.association.release()
        list(opened.find())


def test_an_association_that_is_gone_is_the_networks_failure(tmp_path: Path) -> None:
    with archive(FIND, GET) as port, pytest.raises(NetworkError, match="the PACS has ended the association"):
        find_without_association(settings(port, tmp_path))


def test_an_answer_that_is_not_understood_is_told_without_what_it_says(tmp_path: Path) -> None:
    with (
        archive(FIND, GET, find=nameless) as port,
        pytest.raises(NetworkError, match=r"not understood: check data\.query") as caught,
    ):
        fetch(settings(port, tmp_path))
    assert "MUSTERMANN" not in str(caught.value)
