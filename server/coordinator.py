"""The coordinator's life: serve the consortium's sites, run its studies one after the other, leave a folder of each."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from threading import Event

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Context
from flwr.serverapp import Grid

from medfl.server.app import build_server_app
from medfl.server.audit import Audit
from medfl.server.audited_grid import AuditedGrid
from medfl.server.checkpoint import CheckpointFolder, save_model
from medfl.server.config import ConsortiumSettings
from medfl.server.doorkeeper import Doorkeeper
from medfl.server.guard import Limits
from medfl.server.heads import HeadKeeping
from medfl.server.link import Link, LinkSettings
from medfl.server.negotiation import NegotiatingGrid
from medfl.server.reporter import MetricsFile, Reporter, Several
from medfl.server.rosters import RosterFolder
from medfl.server.rounds import Ending, Result, Rounds
from medfl.server.secagg.store import FolderStore
from medfl.server.weight_sum import SecureParts
from medfl.shared.algorithms.beginning import begin_apart
from medfl.shared.audit_log import audit_file
from medfl.shared.config import load_settings
from medfl.shared.errors import ConfigError
from medfl.shared.files import write_whole
from medfl.shared.keys import load_site_key
from medfl.shared.logs import quiet_libraries
from medfl.shared.receipt import countersign
from medfl.shared.study import Study
from medfl.shared.supervision import Supervision
from medfl.strategies.build import needs_of

log = logging.getLogger("medfl.server")


class Members:
    """Who of the roster is connected, while the roster changes."""

    def __init__(self, link: Link) -> None:
        self._link = link

    @property
    def names(self) -> Mapping[int, str]:
        """Node id -> site name, of all of them."""
        return {node: name for name, node in self._link.sites.items()}

    def online(self) -> Mapping[int, str]:
        """Node id -> site name."""
        names = self.names
        return {node: names[node] for node in self._link.online() if node in names}

    def enrolled(self) -> Collection[str]:
        """All of them."""
        return self._link.sites.keys()


def load_studies(settings: ConsortiumSettings) -> list[Study]:
    """The consortium's studies, each checked against the rest of the configuration.

    Raises:
        ConfigError: a study is wrong, or could never run in this consortium.
    """
    studies = []
    sites = len(RosterFolder.of(settings).newest().sites)
    for path in settings.studies:
        study = load_settings(path, Study)
        needs_of(study)
        if study.rounds.minimum_sites > sites:
            raise ConfigError(
                f"{path}: rounds.minimum_sites: is {study.rounds.minimum_sites}, and the consortium has {sites} sites"
            )
        studies.append(study)
    return studies


def link_settings(settings: ConsortiumSettings) -> LinkSettings:
    """How the fleet interface is served."""
    return LinkSettings(
        host=settings.listen.host,
        port=settings.listen.port,
        authority=settings.tls.authority,
        certificate=settings.tls.certificate,
        key=settings.tls.key,
        state_dir=settings.state,
        revoked=settings.trust.revoked,
        limits=Limits(max_body_bytes=int(settings.listen.max_body_mb * 1024 * 1024)),
    )


def coordinate(settings: ConsortiumSettings, studies: list[Study], *, reporter: Reporter, stop: Event) -> list[Ending]:
    """Serve and run ``studies`` until they are done or ``stop`` is set; returns how each ended."""
    endings = []
    with ExitStack() as held:
        link = held.enter_context(Link(link_settings(settings)))
        audit = held.enter_context(_open_audit(settings))
        systemd = held.enter_context(Supervision(link.alive))
        quiet_libraries()  # again: Flower sets up its logger when it is imported
        door = held.enter_context(Doorkeeper(settings, link))
        members = Members(link)
        systemd.ready()
        for study in studies:
            if stop.is_set():
                break
            endings.append(_run_study(settings, study, link, door, members, audit, reporter, stop))
        if settings.when_done == "stay" and not stop.is_set():
            log.info("all studies have ended: sites are still served until this process is stopped")
            stop.wait()
    return endings


@contextmanager
def _open_audit(settings: ConsortiumSettings) -> Iterator[Audit]:
    """The coordinator's audit log, with its start and, unless it dies, its end in it."""
    audit = Audit(audit_file(settings.state))
    try:
        roster = RosterFolder.of(settings).newest().roster
        audit.started(
            release=importlib.metadata.version("medfl"),
            configuration=hashlib.sha256(settings.model_dump_json().encode()).hexdigest(),
            roster=roster.digest.hex(),
            epoch=roster.epoch,
        )
        yield audit
        audit.stopped()
        log.info("audit log: row %d has the hash %s", audit.head.rows, audit.head.digest)
    finally:
        audit.close()


def _head_keeping(settings: ConsortiumSettings, audit: Audit) -> HeadKeeping:
    """The memory of sites' heads, in the state folder; receipts are signed where the consortium's key is at hand."""
    path = settings.state / "heads.json"
    try:
        key = load_site_key(settings.trust.signing_key)
    except ConfigError as why:
        log.warning("heads of the sites' audit logs are remembered here, and sites get no receipts for them: %s", why)
        return HeadKeeping(settings.consortium, path, audit)
    return HeadKeeping(settings.consortium, path, audit, partial(countersign, key))


def _run_study(
    settings: ConsortiumSettings,
    study: Study,
    link: Link,
    door: Doorkeeper,
    members: Members,
    audit: Audit,
    reporter: Reporter,
    stop: Event,
) -> Ending:
    folder = settings.runs / f"{study.name}-{study.digest[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "study.json", study.canonical(), mode=0o644)
    log_file = logging.FileHandler(folder / "server.log", encoding="utf-8")
    log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    logging.getLogger("medfl").addHandler(log_file)
    results: list[Result] = []
    try:
        with link.run(_series(folder), name=study.name, digest=study.digest) as run:
            write_whole(folder / "series.json", json.dumps({"series": run.series_id}).encode())

            audit.study_begun(study.digest, study.name)

            def work(grid: Grid, context: Context) -> None:
                rounds = Rounds(
                    study,
                    AuditedGrid(NegotiatingGrid(grid), audit, study=study.digest, members=members),
                    members,
                    checkpoints=CheckpointFolder(folder),
                    reporter=Several(MetricsFile(folder / "metrics.jsonl"), reporter),
                    stop=stop,
                    series=run.series_id,
                    beginning=begin_apart(study),
                    secure=_secure_parts(settings, study, folder, door),
                    keeping=_head_keeping(settings, audit),
                )
                results.append(rounds.run())

            build_server_app(work)(run.grid, run.context)
        result = results[0]
        audit.study_ended(study.digest, result.ending.value, result.round)
        if result.round:
            save_model(folder / "model.safetensors", study, result.layout, result.weights, round_number=result.round)
        ending = {"ending": result.ending.value, "round": result.round, "study": study.digest}
        write_whole(folder / "ending.json", json.dumps(ending).encode(), mode=0o644)
        return result.ending
    finally:
        logging.getLogger("medfl").removeHandler(log_file)
        log_file.close()


def _secure_parts(settings: ConsortiumSettings, study: Study, folder: Path, door: Doorkeeper) -> SecureParts | None:
    if study.secure_aggregation.mode == "none":
        return None
    return SecureParts(
        door,
        FolderStore(settings.state / "secagg"),
        folder / "sum-of-weights.json",
    )


def _series(folder: Path) -> int | None:
    """Flower's run series of the study's last run: sites keep their state by it."""
    try:
        series = json.loads((folder / "series.json").read_text("utf-8"))["series"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return series if isinstance(series, int) else None
