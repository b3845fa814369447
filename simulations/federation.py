"""One study among virtual sites in this process: the production ServerApp, ClientApp and round loop on a local grid."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from flwr.app import Context, RecordDict
from flwr.serverapp import Grid

from medfl.client.app import build_client_app
from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData
from medfl.client.participant import Participant
from medfl.client.policy import Policy
from medfl.client.records import MemoryRecords
from medfl.client.secagg.enrolment import Enrolment
from medfl.client.secagg.journal import Journal
from medfl.client.secagg.session import SecureSite
from medfl.client.site import Site
from medfl.client.workbench import Workbench
from medfl.server.app import build_server_app
from medfl.server.checkpoint import CheckpointFolder
from medfl.server.ending import Ending, Result
from medfl.server.reporter import Reporter, RoundReport, Several, Silent
from medfl.server.rounds import Rounds
from medfl.server.secagg.store import FolderStore, MemoryStore, Store
from medfl.server.weight_sum import OneRoster, SecureParts
from medfl.shared.initial_weights import shelved
from medfl.shared.privacy.settings import ClientLevel, NoPrivacy
from medfl.shared.secagg.limits import SMALLEST_COHORT
from medfl.shared.secagg.roster import Member, make_roster
from medfl.shared.signing import Document, Signed, sign
from medfl.shared.study import Study
from medfl.shared.weights import Flat, weights_digest
from medfl.simulations.config import Attacker, Failures
from medfl.simulations.grid import VirtualGrid
from medfl.simulations.misbehaviour import Answer, misbehaving
from medfl.simulations.pace import PacedGrid, Rhythm
from medfl.simulations.pool import PooledGrid
from medfl.simulations.together import Together
from medfl.strategies.secure_aggregation import require_sums_come_about


@dataclass
class History(Silent):
    """Keeps the reports of all rounds."""

    rounds: list[RoundReport] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    clock: Callable[[], float] | None = None

    def finished_round(self, report: RoundReport) -> None:
        """Keep it."""
        self.rounds.append(report)
        if self.clock is not None:
            self.times.append(self.clock())


@dataclass(frozen=True)
class Federation:
    """What came of a simulated study."""

    result: Result
    rounds: tuple[RoundReport, ...]
    site_rows: Mapping[str, list[dict[str, Any]]]
    """What each virtual site recorded for itself; in production this stays at the site."""
    kept: Mapping[str, Flat] = field(default_factory=dict)
    """What each site has kept of its own: personal layers, its own model."""
    times: tuple[float, ...] = ()
    """When each round ended, in training times of a usual site; empty where all sites are alike."""

    @property
    def complete(self) -> bool:
        """Whether the study came to its end, so that its model is the one that was asked for."""
        return self.result.ending in (Ending.DONE, Ending.CONVERGED)

    @property
    def site_scores(self) -> Mapping[str, Mapping[str, float]]:
        """Held-out scores by site, where the last thing it did was to score the model that the study ended with.

        No scores of a site that was not asked, nor where the study handed out an earlier model than its last.
        """
        model = weights_digest(self.result.weights)
        last = {name: rows[-1] for name, rows in self.site_rows.items() if rows}
        return {
            name: row["scores"] for name, row in last.items() if row["set"] == "validation" and row["model"] == model
        }


def federate(
    study: Study,
    sites: Mapping[str, SiteData],
    *,
    device: torch.device | None = None,
    reporter: Reporter | None = None,
    checkpoints: CheckpointFolder | None = None,
    stop: Event | None = None,
    failures: Failures | None = None,
    attackers: Mapping[str, Attacker] | None = None,
    rhythms: Mapping[str, Rhythm] | None = None,
    workers: int = 1,
    at_once: int = 1,
) -> Federation:
    """Run ``study`` among ``sites``; every virtual site approves it and releases its scores to the researcher.

    ``failures`` and ``attackers`` (by site) are what :func:`medfl.simulations.misbehaviour.misbehaving` makes of them,
    ``rhythms`` (by site) what :class:`medfl.simulations.pace.PacedGrid` does: its sites work one after the other.
    ``workers`` is the number of processes that sites are dealt to; the result has the same bits with any number.
    ``at_once`` sites of equal shapes are trained as one batched model, where the study allows it: the result is the
    same up to rounding.
    Weights that the study begins with must be on this process's shelf (:mod:`medfl.shared.initial_weights`).
    Each virtual site's ledger lives as long as the study: what a researcher tries does not add up on real patients.
    """
    device = device or torch.device("cpu")
    policy, consortium = permissive_policy(study), Consortium.signing(study)
    logging.getLogger("medfl.site").setLevel(logging.WARNING)  # a line for each virtual site and round is too much
    workbench = Workbench(device)
    ledgers = TemporaryDirectory(prefix="medfl-ledgers-")
    records = {name: MemoryRecords() for name in sites}
    initial = shelved(study.initial_weights)
    if initial is not None:
        for remembered in records.values():
            remembered.keep_initial(study.digest, initial)  # one copy for all
    # A sum that could not be opened at once is kept to be tried again, as a coordinator does, where that can happen.
    store = FolderStore(Path(ledgers.name) / "sums") if failures is not None and failures.phases else MemoryStore()
    secure, participants = _secure_parts(study, list(sites), store)
    together = Together({name: data.splits[Split.TRAIN] for name, data in sites.items()}, at_once=at_once)
    residents = {
        name: Site(
            name,
            policy=policy,
            load_data=lambda study, data=data: data,
            workbench=workbench,
            records=records[name],
            ledger=Path(ledgers.name) / name / "ledger.jsonl",
            participant=participants.get(name),
            train_locally=together.trainer_of(name),
            verify=consortium.verify,
        )
        for name, data in sites.items()
    }
    client = build_client_app(lambda context: residents[str(context.node_config["site"])])
    answer: Answer = client
    if failures or attackers:
        answer = misbehaving(client, failures or Failures(), attackers or {}, seed=study.seed)
    pool = PooledGrid(answer, records, workers=workers) if workers > 1 else None
    virtual = pool or VirtualGrid(answer, residents)
    together.companions = virtual.companions
    grid: VirtualGrid | PacedGrid = virtual
    history = History()
    if rhythms:
        waits = study.demands.asynchronous or failures is None
        grid = paced = PacedGrid(virtual, rhythms, deadline=None if waits or failures is None else failures.deadline)
        history.clock = lambda: paced.trained_at
    outcome: list[Result] = []

    def work(grid_: Grid, context: Context) -> None:
        rounds = Rounds(
            study,
            grid_,
            grid,
            checkpoints=checkpoints,
            reporter=Several(history, *([reporter] if reporter else [])),
            stop=stop or Event(),
            secure=secure,
            signature=consortium.signature,
            initial=initial,
        )
        outcome.append(rounds.run())

    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    with ledgers, ExitStack() as stack:
        for resident in residents.values():
            stack.callback(resident.close)
        if pool is not None:
            stack.enter_context(pool)
        stack.enter_context(_settled_objects())
        build_server_app(work)(grid, context)
        if pool is not None:
            pool.bring_home()
    rows = {name: kept.rows.get(study.digest, []) for name, kept in records.items()}
    kept = {name: own for name, record in records.items() if (own := record.personal(study.digest)) is not None}
    return Federation(outcome[0], tuple(history.rounds), rows, kept, tuple(history.times))


@dataclass(frozen=True, slots=True)
class Consortium:
    """A researcher's own consortium of one study, which it has signed. Can be pickled."""

    key: bytes  # public, Ed25519
    signature: bytes

    @classmethod
    def signing(cls, study: Study) -> Consortium:
        """With a new key, whose private half is forgotten."""
        signer = Ed25519PrivateKey.generate()
        signature = sign(signer, Document.STUDY, study.canonical()).signature
        return cls(signer.public_key().public_bytes_raw(), signature)

    def verify(self, signed: Signed) -> bytes:
        """As a site does. Raises SignatureRefused."""
        return _verified(self.key, signed)


@lru_cache(maxsize=1)
def _verified(key: bytes, signed: Signed) -> bytes:
    """All virtual sites are offered the same study: its signature is checked once."""
    return signed.content(Ed25519PublicKey.from_public_bytes(key), Document.STUDY)


@contextmanager
def _settled_objects() -> Iterator[None]:
    """Inside, the garbage collector does not look at what is there now: for all objects of PyTorch and of a thousand
    sites it takes a tenth of a second each time.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _secure_parts(
    study: Study, names: Sequence[str], store: Store
) -> tuple[SecureParts | None, dict[str, Participant]]:
    """Keys, a roster and a journal in memory for every virtual site, where the study sums securely."""
    if study.secure_aggregation.mode == "none":
        return None, {}
    keys = {name: Ed25519PrivateKey.generate() for name in names}
    members = [
        Member(number, name, key.public_key().public_bytes_raw()) for number, (name, key) in enumerate(keys.items(), 1)
    ]
    roster = make_roster("simulation", 1, members, minimum_cohort=max(SMALLEST_COHORT, study.rounds.minimum_sites))
    require_sums_come_about(study, roster)
    participants = {
        member.name: Participant(SecureSite(Enrolment(member.id, keys[member.name], roster), Journal(None)))
        for member in members
    }
    return SecureParts(OneRoster(roster), store, None), participants


def permissive_policy(study: Study) -> Policy:
    """The policy of a researcher's virtual site: this study may do all it says, and scores are released."""
    private = not isinstance(study.privacy, NoPrivacy)
    # What client-level privacy promises a site is less than what it charges the site's patients.
    ceiling = 1e9 if isinstance(study.privacy, ClientLevel) else getattr(study.privacy, "epsilon", 0.0)
    return Policy(
        studies=(study.digest,),
        allow_no_privacy=not private,
        require_secure_aggregation=False,
        max_epsilon_per_study=ceiling,
        max_epsilon_total=ceiling,
        max_delta=getattr(study.privacy, "delta", 1e-5),
        unit="image",
        release_site_metrics=True,
    )
