"""From site.yaml to the parts of a running node."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from medfl.client.audit import Audit, audit_file
from medfl.client.config import SiteSettings
from medfl.client.courtesy import courtesy_of
from medfl.client.data.load import load_site_data, without_opted_out
from medfl.client.data.secret import open_site_key
from medfl.client.data.tensors import SiteData
from medfl.client.fleet import FleetSettings
from medfl.client.node import NodeSettings, Notice
from medfl.client.participant import Participant
from medfl.client.policy import Policy
from medfl.client.records import FolderRecords
from medfl.client.secagg.confirmed_roster import ConfirmedRoster
from medfl.client.secagg.enrolment import Enrolment, Rules
from medfl.client.secagg.journal import Journal
from medfl.client.secagg.session import SecureSite
from medfl.client.site import Site
from medfl.client.transport import TransportSettings
from medfl.client.workbench import Workbench
from medfl.shared.certificates import SiteFiles
from medfl.shared.errors import ConfigError, PolicyRefusal
from medfl.shared.keys import load_site_key
from medfl.shared.messages import Kind
from medfl.shared.secagg.roster import load_roster
from medfl.shared.study import Study

log = logging.getLogger("medfl.site")


def node_settings(settings: SiteSettings) -> NodeSettings:
    """How the node reaches its coordinator."""
    files = SiteFiles(settings.keys)
    transport = TransportSettings(
        coordinator=settings.coordinator, authority=files.authority, certificate=files.certificate, key=files.key
    )
    return NodeSettings(FleetSettings(transport, files.node_key), settings.state)


def gate_of(policy: Policy) -> Callable[[Notice], None]:
    """Lets offers through, and for the rest only messages of approved studies: nothing else is even fetched."""

    def gate(notice: Notice) -> None:
        if notice.message_type != Kind.OFFER.value and notice.digest not in policy.studies:
            raise PolicyRefusal("a message of a study that is not approved here", reason="study not approved")

    return gate


def build_site(settings: SiteSettings) -> Site:
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
    courtesy = courtesy_of(settings.gpu, device)
    return Site(
        settings.site,
        policy=settings.policy,
        load_data=lambda study: load_data(settings, study, device),
        workbench=Workbench(device),
        records=records,
        ledger=settings.state / "ledger.jsonl",
        participant=build_participant(settings),
        current=lambda data: without_opted_out(data, settings.data, open_site_key(settings.state / "secret")),
        device_free=(lambda: None) if courtesy is None else courtesy.permit,
        progress=None if courtesy is None else courtesy.between_batches,
    )


def build_participant(settings: SiteSettings) -> Participant | None:
    """The site's part in secure sums, or None where it has no roster.

    Raises:
        ConfigError, PolicyRefusal, DataError: the roster is malformed, nobody here has confirmed it, it lacks this
            site's key, or the journal cannot be used.
    """
    if settings.secure_aggregation is None:
        return None
    roster = load_roster(settings.secure_aggregation.roster)
    confirmed_rosters(settings).check(roster)
    member = next((member for member in roster.members if member.name == settings.site), None)
    if member is None:
        raise ConfigError(f"{settings.secure_aggregation.roster}: lacks site {settings.site}: ask for the current one")
    rules = Rules(settings.policy.minimum_cohort, settings.secure_aggregation.allow_shrunk_repeat)
    enrolment = Enrolment(member.id, load_site_key(SiteFiles(settings.keys).site_key), roster, rules)
    return Participant(SecureSite(enrolment, Journal(settings.state / "secagg")))


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
        secure = settings.secure_aggregation
        roster = None if secure is None else load_roster(secure.roster)
        audit.started(
            release=importlib.metadata.version("medfl"),
            configuration=hashlib.sha256(site_file.read_bytes()).hexdigest(),
            roster="" if roster is None else roster.digest.hex(),
            epoch=None if roster is None else roster.epoch,
        )
        log.info("audit log: row %d has the hash %s", audit.head.rows, audit.head.digest)
        yield audit
        audit.stopped()
        log.info("audit log: row %d has the hash %s", audit.head.rows, audit.head.digest)
    finally:
        audit.close()


def confirmed_rosters(settings: SiteSettings) -> ConfirmedRoster:
    """The keys this site's administrator has confirmed."""
    return ConfirmedRoster(settings.state / "roster")


def load_data(
    settings: SiteSettings, study: Study, device: torch.device, progress: Callable[[str, int, int], None] | None = None
) -> SiteData:
    """Read the site's images as ``study`` wants them, onto ``device``. Raises DataError."""
    return load_site_data(
        settings.data,
        study.data,
        task=study.task.value,
        key=open_site_key(settings.state / "secret"),
        device=device,
        cache_dir=settings.state / "cache",
        progress=progress,
    )


def site_device(settings: SiteSettings) -> torch.device:
    """The training device. Raises ConfigError where cuda is asked for and absent."""
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise ConfigError("device: cuda was asked for, and PyTorch finds none: use device: auto or cpu")
    return torch.device("cuda" if settings.device != "cpu" and available else "cpu")
