"""From site.yaml to the parts of a running node."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from medfl.client.approvals import Approvals, Standing
from medfl.client.audit import Audit
from medfl.client.checkin import CheckIns
from medfl.client.config import SiteSettings
from medfl.client.courtesy import courtesy_of
from medfl.client.data.load import load_site_data, without_opted_out
from medfl.client.data.secret import SiteKey, open_site_key
from medfl.client.data.tensors import SiteData
from medfl.client.fleet import FleetSettings
from medfl.client.node import NodeSettings
from medfl.client.notice import Notice
from medfl.client.participant import Participant
from medfl.client.pin import joined, load_pin
from medfl.client.records import FolderRecords
from medfl.client.secagg.enrolment import Rules
from medfl.client.secagg.journal import Journal
from medfl.client.secagg.live_enrolment import LiveEnrolments
from medfl.client.secagg.session import SecureSite
from medfl.client.site import Site, no_key_pinned
from medfl.client.transport import TransportSettings
from medfl.client.trust import coordinator_address, site_rosters
from medfl.client.work import Work
from medfl.client.workbench import Workbench
from medfl.shared.audit_log import audit_file
from medfl.shared.certificates import SiteFiles
from medfl.shared.consortium import Membership
from medfl.shared.errors import ConfigError
from medfl.shared.keys import load_site_key
from medfl.shared.messages import Kind
from medfl.shared.signing import Document, Signed
from medfl.shared.study import Study

log = logging.getLogger("medfl.site")


def node_settings(settings: SiteSettings) -> NodeSettings:
    """How the node reaches its coordinator."""
    files = SiteFiles(settings.keys)
    transport = TransportSettings(
        coordinator=coordinator_address(settings),
        authority=files.authority,
        certificate=files.certificate,
        key=files.key,
    )
    return NodeSettings(FleetSettings(transport, files.node_key), settings.state)


def gate_of(approvals: Approvals) -> Callable[[Notice], None]:
    """Lets offers through, and for the rest only messages of approved studies: nothing else is even fetched."""

    def gate(notice: Notice) -> None:
        if notice.message_type != Kind.OFFER.value:
            approvals.require(notice.digest)

    return gate


def verification(settings: SiteSettings) -> Callable[[Signed], bytes]:
    """How this site checks that a study is its consortium's. Raises ConfigError when the pinned key cannot be read."""
    if not joined(settings.keys):
        return no_key_pinned
    key = load_pin(settings.keys).key
    return lambda signed: signed.content(key, Document.STUDY)


def local_day(settings: SiteSettings) -> datetime.date:
    """Today, on this site's clock."""
    return settings.policy.local(datetime.datetime.now(datetime.UTC)).date()


def build_site(settings: SiteSettings, approvals: Approvals) -> Site:
    """The site with its own data, device and memory.

    Raises:
        ConfigError: the device is absent or the state folder cannot be used.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = site_device(settings)
    try:
        records = FolderRecords(settings.state)
    except OSError as error:
        raise ConfigError(f"state: {settings.state} cannot be used ({error.strerror}): choose another folder") from None
    for offered in approvals.offered():
        if approvals.standing(offered.study.digest) is Standing.WITHDRAWN:
            records.forget(offered.study.digest)  # once more: a kill may have come between the two
    courtesy = courtesy_of(settings.gpu, device)
    return Site(
        settings.site,
        policy=settings.policy,
        load_data=lambda study: load_data(settings, study, device, cache_key=records.cache_key(study.digest)),
        workbench=Workbench(device),
        records=records,
        ledger=settings.state / "ledger.jsonl",
        participant=build_participant(settings),
        approvals=approvals,
        verify=verification(settings),
        current=lambda data: without_opted_out(data, settings.data, open_site_key(settings.state / "secret")),
        device_free=(lambda: None) if courtesy is None else courtesy.permit,
        progress=None if courtesy is None else courtesy.between_batches,
    )


def build_participant(settings: SiteSettings) -> Participant | None:
    """The site's part in secure sums, or None where it has not joined a consortium.

    Raises:
        ConfigError, DataError: a key or the journal cannot be used.
    """
    if not joined(settings.keys):
        return None
    rules = Rules(settings.policy.minimum_cohort, settings.secure_aggregation.allow_shrunk_repeat)
    key = load_site_key(SiteFiles(settings.keys).site_key)
    enrolments = LiveEnrolments(site_rosters(settings), settings.site, key, rules)
    return Participant(SecureSite(enrolments, Journal(settings.state / "secagg")))


@contextmanager
def open_audit(
    settings: SiteSettings, site_file: Path, *, on_row: Callable[[Mapping[str, str | float]], None] = lambda row: None
) -> Iterator[Audit]:
    """The node's audit log, with its start and, unless it dies, its end in it. The log's head goes to the journal too.

    ``on_row`` is told each row that is written.

    Raises:
        ConfigError, PolicyRefusal: see :class:`~medfl.client.audit.Audit`.
    """
    audit = Audit(audit_file(settings.state), on_row=on_row)
    try:
        force = site_rosters(settings).in_force() if joined(settings.keys) else None
        audit.started(
            release=importlib.metadata.version("medfl"),
            configuration=hashlib.sha256(site_file.read_bytes()).hexdigest(),
            roster="" if force is None else force.roster.digest.hex(),
            epoch=None if force is None else force.epoch,
        )
        log.info("audit log: row %d has the hash %s", audit.head.rows, audit.head.digest)
        yield audit
        audit.stopped()
        log.info("audit log: row %d has the hash %s", audit.head.rows, audit.head.digest)
    finally:
        audit.close()


def dialled(settings: SiteSettings) -> Callable[[], str]:
    """Where to dial, asked anew before each attempt: the signed roster may have named another address since."""
    return partial(coordinator_address, settings)


def check_ins(settings: SiteSettings, audit: Audit, *, work: Callable[[], Work | None] = lambda: None) -> CheckIns:
    """What the node tells and hears beside all studies; ``work``: what it trains. Raises ConfigError, DataError."""

    def in_force(membership: Membership) -> None:
        roster = membership.roster
        audit.roster_confirmed(roster=roster.digest.hex(), epoch=roster.epoch, members=len(roster.members))

    files = SiteFiles(settings.keys)
    key = load_site_key(files.site_key)
    return CheckIns(settings.site, files, key, site_rosters(settings), on_force=in_force, work=work)


def load_data(
    settings: SiteSettings,
    study: Study,
    device: torch.device,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    cache_key: SiteKey | None = None,
) -> SiteData:
    """Read the site's images as ``study`` wants them, onto ``device``. Raises DataError.

    Each study has a cache of its own under ``cache_key`` (None: from the disk) and the site's secret: without either it
    cannot be read.
    """
    if cache_key is None:
        cache_key = FolderRecords(settings.state).cache_key(study.digest)
    return load_site_data(
        settings.data,
        study.data,
        task=study.task.value,
        key=open_site_key(settings.state / "secret"),
        cache_key=cache_key,
        device=device,
        cache_dir=settings.state / "cache",
        progress=progress,
        room=_room(settings, device),
    )


def _room(settings: SiteSettings, device: torch.device) -> int | None:
    """Bytes of images that the training device may hold: half of what is free there, the rest is for training."""
    if settings.device_gigabytes is not None:
        return int(settings.device_gigabytes * 1e9)
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else None


def site_device(settings: SiteSettings) -> torch.device:
    """The training device. Raises ConfigError where cuda is asked for and absent."""
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise ConfigError("device: cuda was asked for, and PyTorch finds none: use device: auto or cpu")
    return torch.device("cuda" if settings.device != "cpu" and available else "cpu")
