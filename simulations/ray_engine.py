"""Flower's own simulation runtime on Ray, for more machines than one: the same apps, each site wherever Ray has room.

The one file that touches Flower's simulation and Ray. A site's messages land in different processes, so what it
remembers travels with it, in its Flower ``Context``; what must lie on a disk or stay secret (privacy ledgers, keys of
secure sums) does not travel, and such studies are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Event
from typing import Any

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from medfl.client.app import build_client_app
from medfl.client.data.tensors import SiteData
from medfl.client.records import MemoryRecords
from medfl.client.site import Site
from medfl.client.workbench import Workbench
from medfl.server.app import build_server_app
from medfl.server.ending import Result
from medfl.server.passing_grid import PassingGrid
from medfl.server.reporter import Reporter, Several
from medfl.server.rounds import Rounds
from medfl.shared.arrays import as_array, as_numpy
from medfl.shared.errors import ConfigError, MedFLError
from medfl.shared.study import Study
from medfl.shared.weights import Flat
from medfl.simulations.config import Attacker, Failures, unfit_for_ray
from medfl.simulations.federation import Consortium, Federation, History, permissive_policy
from medfl.simulations.grid import FIRST_NODE
from medfl.simulations.misbehaviour import misbehaving

_ASKED_S = 600.0  # Ray starts a process for each place, which imports PyTorch; a dead one answers with an error
_ROWS, _KEPT, _MADE = "medfl-rows", "medfl-kept", "medfl-made"  # a site's memory in its Context


def federate_on_ray(
    study: Study,
    sites: Mapping[str, SiteData],
    *,
    reporter: Reporter | None = None,
    stop: Event | None = None,
    failures: Failures | None = None,
    attackers: Mapping[str, Attacker] | None = None,
    address: str | None = None,
    cpus: int | None = None,
    gpus_per_site: float = 0.0,
) -> Federation:
    """Run ``study`` among ``sites`` on the Ray cluster at ``address`` (absent: one is started here, of ``cpus``).

    Each site that works takes one CPU and ``gpus_per_site``. The same study gives the same bits as in this process:
    nodes, which Flower numbers at random, are known to the rounds by their place among ``sites``.

    Raises:
        ConfigError: the study cannot run there, or Ray is not installed.
    """
    if (why := unfit_for_ray(study)) is not None:
        raise ConfigError(why)
    try:
        import ray
        from flwr.simulation import run_simulation
    except ImportError:
        raise ConfigError("engine: ray needs Ray: pip install 'medfl[sim]'") from None

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray tells at each start that it will change
    consortium = Consortium.signing(study)
    start = {"address": address} if address else {"num_cpus": cpus or os.cpu_count() or 1}
    ray.init(**start, include_dashboard=False, log_to_driver=False)
    history, outcome = History(), list[Result]()
    records: dict[str, MemoryRecords] = {}
    try:
        hospital = _Hospitals(
            study,
            {name: ray.put(data) for name, data in sites.items()},
            ray.get,
            "cuda" if gpus_per_site else "cpu",
            consortium,
            failures or Failures(),
            dict(attackers or {}),
        )

        def work(grid: Grid, context: Context) -> None:
            numbered = _NumberedGrid(grid, list(sites))
            numbered.online()  # Ray's start may take longer than rounds wait for sites that load their images
            rounds = Rounds(
                study,
                numbered,
                numbered,
                checkpoints=None,
                reporter=Several(history, *([reporter] if reporter else [])),
                stop=stop or Event(),
                signature=consortium.signature,
            )
            outcome.append(rounds.run())
            records.update(numbered.memories(study))

        run_simulation(
            build_server_app(work),
            _Travelling(hospital),
            num_supernodes=len(sites),
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": gpus_per_site}},
        )
    finally:
        ray.shutdown()
    if not outcome:
        raise MedFLError("Flower's simulation ended without a result: see what it logged before this line")
    rows = {name: records[name].rows.get(study.digest, []) for name in sites}
    kept = {name: own for name in sites if (own := records[name].personal(study.digest)) is not None}
    return Federation(outcome[0], tuple(history.rounds), rows, kept)


@dataclass(frozen=True)
class _Hospitals:
    """All that any process needs to be any of the sites."""

    study: Study
    places: Mapping[str, Any]
    """Where Ray keeps each site's images."""
    fetch: Callable[[Any], SiteData]
    device: str
    consortium: Consortium
    failures: Failures
    attackers: Mapping[str, Attacker]

    def answer(self, message: Message, context: Context) -> Message:
        """Let the site of ``context`` answer, with the memory that it finds there and leaves there."""
        torch.set_num_threads(1)
        name = list(self.places)[int(context.node_config["partition-id"])]
        context.node_config["site"] = name
        records = _CarriedRecords(context.state, self.study)
        site = Site(
            name,
            policy=permissive_policy(self.study),
            load_data=lambda _: self.fetch(self.places[name]),
            workbench=_workbench(self.device),
            records=records,
            ledger=Path(os.devnull),  # no study here charges anything
            verify=self.consortium.verify,
        )
        app = build_client_app(lambda _: site)

        @app.query("who")
        def who(message: Message, context: Context) -> Message:
            return Message(RecordDict({"site": ConfigRecord({"name": name})}), reply_to=message)

        @app.query("memory")
        def memory(message: Message, context: Context) -> Message:
            return Message(records.content(), reply_to=message)

        return misbehaving(app, self.failures, self.attackers, seed=self.study.seed)(message, context)


class _Travelling(ClientApp):
    """What Ray carries to its processes."""

    def __init__(self, hospitals: _Hospitals) -> None:
        super().__init__()
        self._hospitals = hospitals

    def __call__(self, message: Message, context: Context) -> Message:
        return self._hospitals.answer(message, context)


@lru_cache(maxsize=1)
def _workbench(device: str) -> Workbench:
    """The one network of a Ray process."""
    return Workbench(torch.device(device))


class _NumberedGrid(PassingGrid):
    """Flower's grid, and which site each node is; sites have the numbers that they have in this process's own grid."""

    def __init__(self, grid: Grid, names: Iterable[str]) -> None:
        super().__init__(grid)
        self._names = dict(enumerate(names, start=FIRST_NODE))
        self._nodes: dict[int, int] = {}  # our number -> Flower's
        self._numbers: dict[int, int] = {}

    def online(self) -> Mapping[int, str]:
        """Number -> site name, of all."""
        if len(self._nodes) < len(self._names):
            ours = {name: number for number, name in self._names.items()}
            for node, said in self._ask(self._grid.get_node_ids(), "who").items():
                number = ours[str(said.config_records["site"]["name"])]
                self._nodes[number], self._numbers[node] = node, number
        return {number: name for number, name in self._names.items() if number in self._nodes}

    def joined(self) -> Mapping[int, str]:
        """Nobody ever leaves."""
        return dict.fromkeys(self.online(), "")

    def enrolled(self) -> Collection[str]:
        """All of them."""
        return self._names.values()

    def memories(self, study: Study) -> dict[str, MemoryRecords]:
        """What every site remembers of ``study``, by its name. Raises MedFLError where one does not say."""
        said = self._ask(self._nodes.values(), "memory")
        if len(said) < len(self._names):
            raise MedFLError("a site's process on Ray ended before it said what it has recorded: see Ray's own logs")
        return {self._names[self._numbers[node]]: _CarriedRecords(content, study) for node, content in said.items()}

    def get_node_ids(self) -> Iterable[int]:
        """All numbers."""
        return list(self.online())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """To the node of each number."""
        return self._grid.push_messages(self._addressed(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Each from its number."""
        return [self._known(reply) for reply in self._grid.pull_messages(message_ids)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Both."""
        replies = self._grid.send_and_receive(self._addressed(messages), timeout=timeout)
        return [self._known(reply) for reply in replies]

    def _addressed(self, messages: Iterable[Message]) -> list[Message]:
        sent = list(messages)
        for message in sent:
            message.metadata.dst_node_id = self._nodes[message.metadata.dst_node_id]
        return sent

    def _known(self, reply: Message) -> Message:
        node = reply.metadata.src_node_id
        reply.metadata.__dict__["_src_node_id"] = self._numbers.get(node, node)
        return reply

    def _ask(self, nodes: Iterable[int], what: str) -> dict[int, RecordDict]:
        """Flower's node -> what it says."""
        asked = [Message(RecordDict(), dst_node_id=node, message_type=f"query.{what}") for node in nodes]
        replies = self._grid.send_and_receive(asked, timeout=_ASKED_S)
        return {r.metadata.src_node_id: r.content for r in replies if not r.has_error()}


class _CarriedRecords(MemoryRecords):
    """A virtual site's records of one study, which lie in ``state`` and move with it from process to process."""

    def __init__(self, state: RecordDict, study: Study) -> None:
        super().__init__()
        self._state = state
        self.remember(study)
        if (noted := state.config_records.get(_ROWS)) is not None:
            self.rows[study.digest] = json.loads(str(noted["rows"]))
        if (kept := state.array_records.get(_KEPT)) is not None:
            before = as_numpy(kept["before"]) if "before" in kept else None
            self._personal[study.digest] = (
                str(state.config_records[_MADE]["asked"]),
                as_numpy(kept["weights"]),
                before,
            )

    def note(self, digest: str, row: dict[str, Any]) -> None:
        """Append one row."""
        super().note(digest, row)
        self._state[_ROWS] = ConfigRecord({"rows": json.dumps(self.rows[digest])})

    def keep_personal(self, digest: str, weights: Flat, *, asked: str = "", counted: int | None = None) -> None:
        """Replace the personal tensors."""
        super().keep_personal(digest, weights, asked=asked, counted=counted)
        asked, weights, before = self._personal[digest]
        kept = {"weights": as_array(weights)} | ({} if before is None else {"before": as_array(before)})
        self._state[_KEPT], self._state[_MADE] = ArrayRecord(kept), ConfigRecord({"asked": asked})

    def content(self) -> RecordDict:
        """A copy of all of it, for a message."""
        return RecordDict({key: value for key, value in self._state.items() if key in (_ROWS, _KEPT, _MADE)})
