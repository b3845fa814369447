"""Find and fetch through DICOMweb (PS3.18): QIDO-RS and WADO-RS."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import dicomweb_client.uri
import requests
import requests.auth
from dicomweb_client.api import DICOMwebClient
from pydicom.dataset import Dataset

from medfl.client.data.guard import quiet
from medfl.client.data.pacs import LABEL_MODALITIES, Pace, RemoteSeries, Store
from medfl.client.data.settings import DicomwebSettings
from medfl.shared.errors import ConfigError, NetworkError

_PAGE = 200
_AS_STORED = (("application/dicom", "*"),)  # without it Orthanc transcodes

# The library sends wildcards as %2A, which Orthanc takes literally: no match and no error.
vars(dicomweb_client.uri)["quote_plus"] = lambda text: quote_plus(text, safe="*?,")


@contextmanager
def dicomweb(settings: DicomwebSettings) -> Iterator[DicomwebArchive]:
    """An open session, closed at the end; every failure of the library is a NetworkError."""
    session = requests.Session()
    if settings.user is not None:
        session.auth = (settings.user, settings.password or "")
    if settings.token_file is not None:
        session.auth = _Bearer(settings.token_file)
    session.verify = str(settings.ca_file) if settings.ca_file else True
    session.request = _with_timeout(session.request, settings.fetch.timeout_s)  # type: ignore[method-assign]
    client = DICOMwebClient(settings.url, session=session)
    client.set_http_retry_params(False)
    try:
        with quiet():
            yield DicomwebArchive(client, settings)
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        secret = "data.token_file" if settings.token_file else "data.user and data.password"
        hint = f"check {secret}" if status in {401, 403} else "check data.url"
        raise NetworkError(f"the PACS answers {status} over DICOMweb: {hint}") from None
    except requests.exceptions.SSLError:
        raise NetworkError("the PACS's TLS certificate cannot be verified: set data.ca_file") from None
    except (requests.RequestException, OSError):
        raise NetworkError("the PACS cannot be reached over DICOMweb: check data.url and the network") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise NetworkError("the PACS's answer over DICOMweb is not understood: check data.url") from None
    finally:
        session.close()


@dataclass(frozen=True, slots=True)
class _Bearer(requests.auth.AuthBase):
    """RFC 6750. The file is read for every request: such tokens live for minutes, and something else renews them."""

    path: Path

    def __call__(self, request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {_token(self.path)}"
        return request


def _token(path: Path) -> str:
    """Content of a file that only its owner can read.

    Raises:
        ConfigError: it cannot be read, can be read by others, or holds no token. The token itself is never shown.
    """
    try:
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError("data.token_file: can be read by others: run chmod 600 on it")
        token = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigError("data.token_file: cannot be read, or is not one line of text") from None
    if not re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", token):
        raise ConfigError("data.token_file: does not hold a bearer token")
    return token


def _with_timeout(request: Any, seconds: float) -> Any:
    def send(*args: Any, **options: Any) -> Any:
        return request(*args, **{"timeout": seconds, **options})

    return send


@dataclass(frozen=True, slots=True)
class DicomwebArchive:
    """See :class:`~medfl.client.data.pacs.Archive`."""

    client: DICOMwebClient
    settings: DicomwebSettings

    def find(self) -> Iterator[RemoteSeries]:
        """Series of the matching studies, page by page."""
        query = self.settings.query
        filters = {"ModalitiesInStudy": query.modality}
        if query.study_description:
            filters["StudyDescription"] = query.study_description
        if query.from_date or query.to_date:
            filters["StudyDate"] = f"{query.from_date or ''}-{query.to_date or ''}"
        seen: set[str] = set()
        offset = 0
        while left := query.max_studies - len(seen):
            page = self.client.search_for_studies(
                fields=["PatientID"], search_filters=filters, limit=min(_PAGE, left), offset=offset
            )
            offset += len(page)
            studies = {str(study.StudyInstanceUID): study for study in map(Dataset.from_json, page)}
            new = [uid for uid in studies if uid not in seen][:left]
            if not new:  # the end, or an archive that does not know offsets and begins again
                return
            seen.update(new)
            for uid in new:
                yield from self._series(studies[uid])

    def _series(self, study: Dataset) -> Iterator[RemoteSeries]:
        fields = ["NumberOfSeriesRelatedInstances", "BodyPartExamined"]
        for item in self.client.search_for_series(study.StudyInstanceUID, fields=fields):
            series = Dataset.from_json(item)
            modality, part = str(series.get("Modality") or ""), str(series.get("BodyPartExamined") or "")
            wanted_part = self.settings.query.body_part
            is_image = modality == self.settings.query.modality and wanted_part in (None, part)
            if is_image or modality in LABEL_MODALITIES:
                count = series.get("NumberOfSeriesRelatedInstances")
                yield RemoteSeries(
                    str(study.StudyInstanceUID),
                    str(series.SeriesInstanceUID),
                    str(study.get("PatientID") or ""),
                    int(count) if count is not None else None,
                )

    def fetch(self, series: RemoteSeries, store: Store, pace: Pace) -> None:
        """Instance by instance, those that are missing."""
        seen: set[str] = set()
        offset = 0
        while page := self.client.search_for_instances(series.study, series.series, limit=_PAGE, offset=offset):
            offset += len(page)
            new = {str(Dataset.from_json(item).SOPInstanceUID) for item in page} - seen
            if not new:  # an archive that does not know offsets begins again
                break
            seen |= new
            for instance in sorted(new):
                if store.has(instance):
                    continue
                pace.check_hours()
                pace.wait()
                dataset = self.client.retrieve_instance(series.study, series.series, instance, media_types=_AS_STORED)
                buffer = BytesIO()
                dataset.save_as(buffer, enforce_file_format=True)
                store.put(instance, buffer.getvalue())
            if len(page) < _PAGE:
                break
