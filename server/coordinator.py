"""The coordinator's life: serve the consortium's sites, run its studies one after the other, leave a folder of each."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
from medfl.server.desk import Desk, StudyStop
from medfl.server.doorkeeper import Doorkeeper
from medfl.server.ending import Ending, Result
from medfl.server.fleet_tls import TlsFiles
from medfl.server.guard import Limits
from medfl.server.heads import HeadKeeping
from medfl.server.link import Link, LinkSettings
from medfl.server.negotiation import NegotiatingGrid
from medfl.server.progress import begin_folder
from medfl.server.reporter import MetricsFile, Reporter, Several
from medfl.server.rosters import RosterFolder
from medfl.server.rounds import Rounds
from medfl.server.secagg.store import FolderStore
from medfl.server.studies import Entry, Record, State
from medfl.server.submission import desk_of, initial_of, submit_listed
from medfl.server.weight_sum import SecureParts
from medfl.shared.admin import AdminSocket
from medfl.shared.algorithms.beginning import Killed, begin_once
from medfl.shared.audit_log import audit_file
from medfl.shared.errors import ConfigError, MedFLError, PolicyRefusal
from medfl.shared.files import write_whole
from medfl.shared.keys import load_site_key
from medfl.shared.logs import StudyLog, quiet_libraries
from medfl.shared.receipt import countersign
from medfl.shared.study import Study
from medfl.shared.supervision import Supervision
from medfl.shared.weights import weights_digest

log = logging.getLogger("medfl.server")

_AGAIN_S = 5.0  # until a study is tried again whose first model's process was killed
_LOOK_S = 1.0  # while no study waits: at the disk, where a command may have left one while we started


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

    def joined(self) -> Mapping[int, str]:
        """Node id -> when it came online last."""
        return self._link.joined()


def link_settings(settings: ConsortiumSettings) -> LinkSettings:
    """How the fleet interface is served."""
    return LinkSettings(
        host=settings.listen.host,
        port=settings.listen.port,
        tls=TlsFiles(settings.tls.authority, settings.tls.certificate, settings.tls.key, settings.trust.revoked),
        state_dir=settings.state,
        limits=Limits(max_body_bytes=int(settings.listen.max_body_mb * 1024 * 1024)),
    )


def coordinate(
    settings: ConsortiumSettings,
    *,
    reporter: Reporter,
    stop: Event,
    on_members: Callable[[Members], None] = lambda members: None,
) -> list[Record]:
    """Serve the sites and run the store's studies one after the other, until ``stop`` is set.

    Where ``when_done`` is ``exit``, until no study waits any more. Returns what became of the studies that the
    configuration names, and of those that ran. ``on_members`` is told once who the members are.

    Raises:
        ConfigError: another coordinator uses the state folder, or a file is missing or damaged.
    """
    with ExitStack() as held:
        link = held.enter_context(Link(link_settings(settings)))
        on_members(Members(link))
        audit = held.enter_context(_open_audit(settings))
        desk = desk_of(settings, running_with=audit)
        systemd = held.enter_context(Supervision(link.alive))
        admin = AdminSocket(settings.state)
        desk.serve(admin)  # before it listens: a command may come at once
        held.enter_context(admin)
        quiet_libraries()  # again: Flower sets up its logger when it is imported
        door = held.enter_context(Doorkeeper(settings, link, audit))
        turns = _Turns(settings, desk, link, door, audit, Several(reporter, desk.live), stop)
        ran = submit_listed(settings, desk)
        systemd.ready()
        idle = False
        while not stop.is_set():
            entry = desk.next()
            if entry is not None:
                idle = False
                ran.append(entry.digest)
                turns.take(entry)
                continue
            if settings.when_done == "exit":
                break
            if not idle:
                log.info("no study waits: sites are served, and studies are taken (medfl-server submit)")
                idle = True
            while not (stop.is_set() or desk.news.wait(_LOOK_S)):
                if desk.store.next() is not None:
                    break
    return [desk.store.entry(digest).record for digest in dict.fromkeys(ran)]


@dataclass(frozen=True)
class _Turns:
    """What every study needs that runs here."""

    settings: ConsortiumSettings
    desk: Desk
    link: Link
    door: Doorkeeper
    audit: Audit
    reporter: Reporter
    stop: Event

    def take(self, entry: Entry) -> None:
        """Run one study until it ends, is stopped, or the process is; what became of it is then on the disk.

        A study that fails does not take the coordinator with it: the next one has its turn.
        """
        store = self.desk.store
        with self.desk.turn_of(entry, self.stop) as to_end:
            try:
                result = self._run(entry, to_end)
            except (PolicyRefusal, OSError):
                raise  # this machine's disk or audit log: the study goes on when they are mended
            except Killed as error:
                log.error("%s. It is tried again in %.0f s", error, _AGAIN_S)
                to_end.wait(_AGAIN_S)
                store.mark(entry.digest, *_interrupted(to_end), round_number=entry.record.round)
                return
            except MedFLError as error:
                log.error("study %s failed: %s", entry.study.name, error)
                store.mark(entry.digest, State.ENDED, f"failed: {error}"[:200])
                return
            except Exception as error:
                log.exception("study %s failed", entry.study.name)
                reason = f"failed: unexpected {type(error).__name__}: see server.log"
                store.mark(entry.digest, State.ENDED, reason)
                return
            stopped = result.ending is Ending.STOPPED
            state, reason = _interrupted(to_end) if stopped else (State.ENDED, result.ending.value)
            store.mark(entry.digest, state, reason, round_number=result.round)

    def _run(self, entry: Entry, to_end: Event) -> Result:
        study, folder = entry.study, begin_folder(self.settings.runs, entry.study)
        write_whole(folder / "study.json", study.canonical(), mode=0o644)
        log_file = StudyLog(folder / "server.log")
        logging.getLogger("medfl").addHandler(log_file)
        results: list[Result] = []
        initial = initial_of(self.settings, study)
        try:
            with self.link.run(_series(folder), name=study.name, digest=study.digest) as run:
                write_whole(folder / "series.json", json.dumps({"series": run.series_id}).encode())

                self.audit.study_begun(study.digest, study.name)
                members = Members(self.link)

                def work(grid: Grid, context: Context) -> None:
                    rounds = Rounds(
                        study,
                        AuditedGrid(NegotiatingGrid(grid), self.audit, study=study.digest, members=members),
                        members,
                        checkpoints=CheckpointFolder(folder),
                        reporter=Several(MetricsFile(folder / "metrics.jsonl"), self.reporter),
                        stop=to_end,
                        series=run.series_id,
                        beginning=begin_once(study, folder / "first-model.safetensors", initial),
                        secure=_secure_parts(self.settings, study, folder, self.door),
                        keeping=_head_keeping(self.settings, self.audit),
                        signature=entry.signature,
                        initial=initial,
                    )
                    results.append(rounds.run())

                build_server_app(work)(run.grid, run.context)
            result = results[0]
            self.audit.study_ended(study.digest, result.ending.value, result.round)
            ending = {"ending": result.ending.value, "round": result.round, "study": study.digest}
            if result.round:
                path = folder / "model.safetensors"
                save_model(path, study, result.layout, result.weights, round_number=result.of_round, initial=initial)
                ending["model_of_round"] = result.of_round
                ending["model"] = weights_digest(result.weights)  # as sites note it of what they receive
            write_whole(folder / "ending.json", json.dumps(ending).encode(), mode=0o644)
            return result
        finally:
            logging.getLogger("medfl").removeHandler(log_file)
            log_file.close()


def _interrupted(to_end: StudyStop) -> tuple[State, str]:
    """What becomes of a study that has not come to its end: the next start, or turn, goes on with it, unless a person
    has stopped it.
    """
    return (State.STOPPED, Ending.STOPPED.value) if to_end.by_a_person else (State.WAITING, "")


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
