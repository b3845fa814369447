"""Find and fetch through DIMSE (PS3.7): C-FIND, then C-GET or C-MOVE."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)

from medfl.client.data.dicom import PLANAR, SEGMENTATIONS, STRUCTURE_SET, VOLUMES
from medfl.client.data.guard import quiet
from medfl.client.data.pacs import LABEL_MODALITIES, Pace, RemoteSeries, Store
from medfl.client.data.settings import DicomTls, DimseSettings
from medfl.shared.errors import ConfigError, DataError, NetworkError

_STORAGE = sorted(
    {uid for table in (VOLUMES, PLANAR) for classes in table.values() for uid in classes}
    | SEGMENTATIONS
    | {STRUCTURE_SET}
)
_SYNTAXES = [
    ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEG2000,
    JPEGLSLossless, JPEGLSNearLossless, JPEGLosslessSV1, JPEGLossless, JPEGBaseline8Bit, JPEGExtended12Bit,
    RLELossless, HTJ2KLossless,
]  # fmt: skip
_SUCCESS, _PENDING = 0x0000, (0xFF00, 0xFF01)
_OUT_OF_SPACE, _WRONG_OBJECT = 0xA700, 0xA900
_LONGEST_ANSWER_S = 5.0  # archives give up an association that is silent for 10 s or more


@contextmanager
def dimse(settings: DimseSettings) -> Iterator[DimseArchive]:
    """An association with the PACS, released at the end; every failure of the library is a NetworkError.

    Raises:
        NetworkError: the PACS cannot be reached or rejects the association.
    """
    archive = DimseArchive(settings, _entity(settings))
    roles: list[Any] = [build_role(uid, scp_role=True) for uid in _STORAGE] if settings.retrieve == "get" else []
    handlers: list[Any] = [(evt.EVT_C_STORE, archive.receive)] if settings.retrieve == "get" else []
    association = archive.entity.associate(
        settings.host,
        settings.pacs_port,
        ae_title=settings.called_ae_title,
        ext_neg=roles,
        evt_handlers=handlers,
        tls_args=_calling(settings),
    )
    if not association.is_established:
        rejected = association.is_rejected
        raise NetworkError(
            f"the PACS rejects the association: check that it is called {settings.called_ae_title!r} "
            f"(data.called_ae_title) and knows {settings.ae_title!r} (data.ae_title)"
            if rejected
            else "the PACS cannot be reached over DIMSE: check data.host and data.pacs_port"
            + (
                ", that it and data.tls trust each other's certificates, and that its own is for "
                "data.tls.server_name or data.host"
                if settings.tls
                else ""
            )
        )
    archive.association = association
    try:
        with quiet():
            yield archive
    except RuntimeError:  # the library asks nothing once the association is gone
        raise NetworkError("the PACS has ended the association: it may be busy, or has stopped") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise NetworkError("the PACS's answer over DIMSE is not understood: check data.query and the PACS") from None
    finally:
        if association.is_established:
            association.release()


def _calling(settings: DimseSettings) -> tuple[ssl.SSLContext, str] | None:
    """TLS of the association that we open, and the name that the PACS's certificate must have."""
    if settings.tls is None:
        return None
    return _with_own_certificate(settings.tls, ssl.PROTOCOL_TLS_CLIENT), settings.tls.server_name or settings.host


def _called(settings: DimseSettings) -> ssl.SSLContext | None:
    """TLS of the association that the PACS opens for a C-MOVE: it must show a certificate too."""
    if settings.tls is None:
        return None
    context = _with_own_certificate(settings.tls, ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _with_own_certificate(tls: DicomTls, role: int) -> ssl.SSLContext:
    context = ssl.SSLContext(role)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(tls.ca_file)
        context.load_cert_chain(tls.certificate, tls.key)
    except (OSError, ssl.SSLError):
        raise ConfigError(
            "data.tls: ca_file, certificate or key cannot be read, are not PEM, or do not belong together"
        ) from None
    return context


def _entity(settings: DimseSettings) -> AE:
    entity = AE(ae_title=settings.ae_title)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = settings.fetch.timeout_s
    entity.connection_timeout = settings.fetch.timeout_s
    entity.add_requested_context(StudyRootQueryRetrieveInformationModelFind)
    if settings.retrieve == "get":
        entity.add_requested_context(StudyRootQueryRetrieveInformationModelGet)
        for uid in _STORAGE:
            entity.add_requested_context(uid, _SYNTAXES)
    else:
        entity.add_requested_context(StudyRootQueryRetrieveInformationModelMove)
        for uid in _STORAGE:
            entity.add_supported_context(uid, _SYNTAXES)
        entity.require_called_aet = True
    return entity


@dataclass(slots=True)
class DimseArchive:
    """See :class:`~medfl.client.data.pacs.Archive`. Receives one series at a time."""

    settings: DimseSettings
    entity: AE
    association: Any = None
    _store: Store | None = field(default=None, repr=False)
    _wanted: str = field(default="", repr=False)  # series that is being fetched
    _pace: Pace | None = field(default=None, repr=False)
    _refused: DataError | None = field(default=None, repr=False)  # by this machine's disk, and no fault of the PACS

    def find(self) -> Iterator[RemoteSeries]:
        """Series of the matching studies. Some archives answer once for each instance: each UID counts once."""
        query = self.settings.query
        study = Dataset()
        study.QueryRetrieveLevel, study.StudyInstanceUID, study.PatientID = "STUDY", "", ""
        study.ModalitiesInStudy = query.modality
        study.StudyDescription = query.study_description or ""
        study.StudyDate = f"{query.from_date or ''}-{query.to_date or ''}" if query.from_date or query.to_date else ""
        studies = {str(item.StudyInstanceUID): str(item.get("PatientID") or "") for item in self._matches(study)}
        for uid, patient in list(studies.items())[: query.max_studies]:
            request = Dataset()
            request.QueryRetrieveLevel, request.StudyInstanceUID, request.SeriesInstanceUID = "SERIES", uid, ""
            request.Modality = request.BodyPartExamined = ""
            request.NumberOfSeriesRelatedInstances = None
            seen = set()
            for item in self._matches(request):
                modality = str(item.get("Modality") or "")
                part = str(item.get("BodyPartExamined") or "")
                is_image = modality == query.modality and query.body_part in (None, part)
                series = str(item.SeriesInstanceUID)
                if series in seen or not (is_image or modality in LABEL_MODALITIES):
                    continue
                seen.add(series)
                count = item.get("NumberOfSeriesRelatedInstances")
                yield RemoteSeries(uid, series, patient, int(count) if count is not None else None)

    def _matches(self, query: Dataset) -> list[Dataset]:
        """Answers to a C-FIND. Without a final success the list is not complete: that is an error, not "no studies"."""
        self._need("C-FIND", StudyRootQueryRetrieveInformationModelFind)
        out = []
        for status, identifier in self.association.send_c_find(query, StudyRootQueryRetrieveInformationModelFind):
            code = status.get("Status")
            if code in _PENDING and identifier is not None:
                out.append(identifier)
            elif code == _SUCCESS:
                return out
            else:
                break
        raise NetworkError(
            f"the PACS ends a search without success: it may not know {self.settings.ae_title!r} (data.ae_title), "
            "or has stopped"
        )

    def fetch(self, series: RemoteSeries, store: Store, pace: Pace) -> None:
        """The whole series, also where the allowed hours end; instances that are here already come and are dropped."""
        self._store, self._wanted, self._pace = store, series.series, pace
        request = Dataset()
        request.QueryRetrieveLevel = "SERIES"
        request.StudyInstanceUID, request.SeriesInstanceUID = series.study, series.series
        if self.settings.retrieve == "get":
            self._need("C-GET", StudyRootQueryRetrieveInformationModelGet)
            self._finish(self.association.send_c_get(request, StudyRootQueryRetrieveInformationModelGet))
            return
        self._need("C-MOVE", StudyRootQueryRetrieveInformationModelMove)
        assert self.settings.port is not None  # noqa: S101 - the settings guarantee it
        try:
            server: Any = self.entity.start_server(
                (self.settings.bind, self.settings.port),
                block=False,
                evt_handlers=[(evt.EVT_C_STORE, self.receive)],
                ssl_context=_called(self.settings),
            )
        except OSError as error:
            raise NetworkError(
                f"cannot listen on {self.settings.bind}:{self.settings.port} for the PACS ({error.strerror}): "
                "check data.bind and data.port"
            ) from None
        try:
            model = StudyRootQueryRetrieveInformationModelMove
            self._finish(self.association.send_c_move(request, self.settings.ae_title, model))
        finally:
            server.shutdown()

    def _finish(self, answers: Any) -> None:
        code = None
        for status, _ in answers:
            code = status.get("Status")
        if self._refused is not None:
            raise self._refused
        if code == _SUCCESS:
            return
        hint = (
            f"it must know {self.settings.ae_title!r} as this host and port {self.settings.port}"
            if self.settings.retrieve == "move"
            else "it may not allow C-GET: try data.retrieve: move"
        )
        raise NetworkError(f"the PACS does not send a series (status {code if code is None else hex(code)}): {hint}")

    def _need(self, service: str, model: str) -> None:
        """Raise NetworkError where the PACS has not accepted ``service``, which the library would not even ask for."""
        if any(context.abstract_syntax == model for context in self.association.accepted_contexts):
            return
        hint = (
            "try data.retrieve: move"
            if service == "C-GET"
            else f"have it allowed for {self.settings.ae_title!r} (data.ae_title)"
        )
        raise NetworkError(f"the PACS does not offer {service}: {hint}")

    def receive(self, event: Any) -> int:
        """Keep one instance as it came, without decoding it. Answers the status of the C-STORE."""
        # While a C-MOVE is under way anybody may connect: only what was asked for is taken.
        if self._store is None or str(event.dataset.get("SeriesInstanceUID")) != self._wanted:
            return _WRONG_OBJECT
        instance = str(event.request.AffectedSOPInstanceUID)
        if self._pace is not None:
            self._pace.wait(_LONGEST_ANSWER_S)  # the PACS sends the next one when this one is answered
        try:
            if not self._store.has(instance):
                self._store.put(instance, event.encoded_dataset())
        except DataError as refused:
            self._refused = refused
            return _OUT_OF_SPACE
        return _SUCCESS
