"""The secure sum of all sites' weights, by which each scales its update; summed again when a new site takes part."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flwr.app import Message

from medfl.server.collector import TRAINED
from medfl.server.secagg.outcome import SumPlan, SumVoid
from medfl.server.secagg.round import summed
from medfl.server.secagg.store import Store
from medfl.server.secure_exchange import GridExchange
from medfl.server.stage import Stages
from medfl.shared.errors import ConfigError
from medfl.shared.files import write_whole
from medfl.shared.messages import Kind, Ready, WeightRequest
from medfl.shared.secagg.announcement import Purpose
from medfl.shared.secagg.encoding import Encoding
from medfl.shared.secagg.rings import Ring
from medfl.shared.secagg.roster import Roster
from medfl.shared.study import Study

log = logging.getLogger("medfl.server")

_NO_MODEL = bytes(32)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The roster of a secure sum, and the sites at which it is in force."""

    roster: Roster
    sites: frozenset[str]


class Rosters(Protocol):
    """The consortium's rosters, which may change while a study runs."""

    def choose(self, sites: Collection[str]) -> Chosen:
        """The roster to sum ``sites`` under, and which of them accept it."""
        ...

    def with_digest(self, digest: bytes) -> Roster | None:
        """The roster that a sum was begun with, None where it is unknown."""
        ...


@dataclass(frozen=True, slots=True)
class OneRoster:
    """A consortium that never changes, as a simulated one."""

    roster: Roster

    def choose(self, sites: Collection[str]) -> Chosen:
        """It, for all of them."""
        return Chosen(self.roster, frozenset(sites))

    def with_digest(self, digest: bytes) -> Roster | None:
        """It, if it is asked for."""
        return self.roster if digest == self.roster.digest else None


@dataclass(frozen=True)
class SecureParts:
    """What secure aggregation needs beside the study."""

    rosters: Rosters
    store: Store
    memory: Path | None  # file for the sum of all weights; None keeps it in this process


class WeightSum:
    """Remembers the sum and the sites in it. Within one roster it may only grow: a sum over fewer sites, beside the
    one over more, would tell what the difference weighs.
    """

    def __init__(self, study: Study, stages: Stages, parts: SecureParts) -> None:
        self._study = study
        self._stages = stages
        self._parts = parts
        self._roster = parts.rosters.choose(()).roster
        self._weight, self._sites = self._remembered()

    def of(self, number: int, cohort: Mapping[int, str], roster: Roster) -> tuple[int, Mapping[int, str]]:
        """The sum under ``roster``, and the part of ``cohort`` that it counts.

        A site that is not in it waits until all that are in it are there.

        Raises:
            SumVoid: a sum was needed and did not come about.
        """
        if roster.digest != self._roster.digest:
            self._roster = roster
            self._weight, self._sites = self._remembered()
        names = set(cohort.values())
        if self._weight == 0:
            self._sum(number, cohort)
        elif not names <= self._sites and self._sites <= names:
            try:
                self._sum(number, cohort)
            except SumVoid as void:
                self._stages.void("the weights are those of the last sum, as a new one did not come about: %s", void)
        if waiting := sorted(names - self._sites):
            log.info("%s: weight not yet summed, as a site of the last sum is away", ", ".join(waiting))
        return self._weight, {node: site for node, site in cohort.items() if site in self._sites}

    def _sum(self, number: int, cohort: Mapping[int, str]) -> None:
        encoding = Encoding(Ring.BITS_32, (), 0, ())
        request = WeightRequest(self._study.digest, encoding.to_bytes()).record()
        deadline = self._study.secure_aggregation.phase_deadline_s
        messages = [Message(request, dst_node_id=node, message_type=Kind.WEIGHT.value, ttl=deadline) for node in cohort]
        outcomes: dict[str, str] = {}
        self._stages.run(number, "weights", messages, cohort, outcomes, take=is_ready)
        ids = {member.name: member.id for member in self._roster.members}
        nodes = {ids[site]: node for node, site in cohort.items() if outcomes.get(site) == TRAINED and site in ids}
        plan = SumPlan(bytes.fromhex(self._study.digest), Purpose.SETUP, tuple(sorted(nodes)), encoding, _NO_MODEL)
        try:
            total = summed(
                plan,
                roster=self._roster,
                store=self._parts.store,
                exchange=GridExchange(self._stages, nodes, deadline_s=deadline),
            )
        except ConfigError as error:
            raise SumVoid(str(error), confirmed=False) from None
        self._weight = round(total.weight)
        self._sites = frozenset(self._roster.name(site) for site in total.survivors)
        if self._parts.memory is not None:
            content = {
                "weight": self._weight,
                "sites": sorted(self._sites),
                "roster": self._roster.digest.hex(),
            }
            write_whole(self._parts.memory, json.dumps(content).encode())

    def _remembered(self) -> tuple[int, frozenset[str]]:
        if self._parts.memory is not None:
            try:
                content = json.loads(self._parts.memory.read_bytes())
                if content["roster"] == self._roster.digest.hex():
                    return int(content["weight"]), frozenset(content["sites"])
            except (OSError, ValueError, KeyError, TypeError):
                pass  # summed again
        return 0, frozenset()


def is_ready(site: str, reply: Message) -> str:
    """Outcome of a site that says its result is held ready. Raises ProtocolError for any other reply."""
    Ready.parse(reply.content)
    return TRAINED
