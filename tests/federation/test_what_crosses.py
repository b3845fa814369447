"""Every byte that sites send over the wire, recorded behind TLS: no update, count or score is in it under MSA-1."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import numpy as np
import pytest
from federation import Lab, until
from signer import signature_of
from sites import make_site, policy_for
from tiny import masks_study, site_data

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split

from medfl.client import participant
from medfl.client.app import build_client_app
from medfl.server import link as links
from medfl.server.guard import Guard
from medfl.server.link import Link
from medfl.server.reporter import Silent
from medfl.server.rounds import Rounds
from medfl.server.secagg.store import MemoryStore
from medfl.shared.messages import TrainReply
from medfl.simulations import federation

PATIENTS = {"north": 3, "south": 5, "west": 7}  # with two pictures each: weights 6, 10, 14


@dataclass
class Crossed:
    """What came in over the wire, request by request, and what the sites had to say, before any mask."""

    bodies: list[bytes] = field(default_factory=list)
    held: list[Any] = field(default_factory=list)
    updates: list[TrainReply] = field(default_factory=list)

    @property
    def wire(self) -> bytes:
        return b"".join(self.bodies)


@dataclass(frozen=True)
class Everybody:
    link: Link
    ids: Mapping[str, int]

    def online(self) -> Mapping[int, str]:
        return {node: name for name, node in self.ids.items() if node in self.link.online()}

    def joined(self) -> Mapping[int, str]:
        return self.link.joined()

    def enrolled(self) -> Collection[str]:
        return list(self.ids)


@pytest.fixture
def crossed(lab: Lab, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Crossed:
    """A run of one round over real TLS, in the mode that the test asks for."""
    what = Crossed()

    class Tap(Guard):
        """Sees each request as it comes out of TLS, before anybody has read it."""

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            body = bytearray()

            async def tapped() -> Any:
                message = await receive()
                body.extend(message.get("body", b""))
                return message

            await super().__call__(scope, tapped, send)
            what.bodies.append(bytes(body))

    class Keeper(participant.SecureSite):
        def hold(self, contribution: Any) -> None:
            what.held.append(contribution)
            super().hold(contribution)

    monkeypatch.setattr(links, "Guard", Tap)
    monkeypatch.setattr(federation, "SecureSite", Keeper)
    study = masks_study(
        secure_aggregation={"mode": request.param},
        rounds={"count": 1, "minimum_sites": 3, "deadline_s": 120, "patience_s": 60},
        training={"batch_size": 64},
    )
    link = lab.link()
    ids = link.enrol(lab.roster())
    secure, participants = federation._secure_parts(study, list(PATIENTS), MemoryStore())
    for number, (name, patients) in enumerate(PATIENTS.items()):
        site = make_site(
            study,
            lab.folder / "state",
            name=name,
            data=site_data(study, seed=number, patients=patients),
            policy=policy_for(study, release_site_metrics=request.param == "none"),
        )
        site._participant = participants.get(name)
        train = site._trainer.train

        def kept(*args: Any, train: Any = train, **more: Any) -> Any:
            result = train(*args, **more)
            what.updates.append(result[0])
            return result

        monkeypatch.setattr(site._trainer, "train", kept)
        lab.node(name, link.port, build_client_app(lambda _, site=site: site))
    until(lambda: link.online() == set(ids.values()))
    with link.run(None, name="study", digest=study.digest) as run:
        everybody = Everybody(link, ids)
        rounds = Rounds(
            study,
            run.grid,
            everybody,
            checkpoints=None,
            reporter=Silent(),
            stop=Event(),
            secure=secure,
            signature=signature_of(study),
        )
        assert rounds.run().round == 1
    return what


def pieces(data: bytes) -> list[bytes]:
    """Sixteen-byte pieces with at least eight different bytes: long enough to be no coincidence."""
    cut = [data[start : start + 16] for start in range(0, len(data) - 15, 16)]
    return [piece for piece in cut if len(set(piece)) >= 8]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("crossed", ["none"], indirect=True)
def test_in_clear_the_recording_has_every_update_and_number(crossed: Crossed) -> None:
    assert len(crossed.updates) == 3
    for result in crossed.updates:
        found = [piece in crossed.wire for piece in pieces(result.update.tobytes())]
        assert len(found) > 50
        assert np.mean(found) > 0.9  # the rest lies across two chunks or two buffers
        assert np.float64(result.tally["loss"]).tobytes() in crossed.wire


@pytest.mark.timeout(180)
@pytest.mark.parametrize("crossed", ["msa1"], indirect=True)
def test_under_secure_aggregation_it_has_none_of_them(crossed: Crossed) -> None:
    assert len(crossed.held) == 3 * 3  # weights, updates, scores
    assert {contribution.weight for contribution in crossed.held} >= {6, 10, 14}
    wire = crossed.wire
    for result in crossed.updates:
        assert not any(piece in wire for piece in pieces(result.update.tobytes()))
        assert not any(np.float64(number).tobytes() in wire for number in result.tally.values() if number % 1)
    for contribution in crossed.held:
        encoded = contribution.encode()
        assert not any(piece in wire for piece in pieces(encoded.vector.tobytes()))
        assert encoded.scalars.tobytes() not in wire
        numbers = [number.tobytes() for number in encoded.scalars if len(set(number.tobytes())) > 4]
        assert not any(number in wire for number in numbers)
    # The recording is whole: three sites, one masked vector each of 4 bytes a parameter, three sums.
    assert len(wire) > sum(4 * result.update.size for result in crossed.updates)
    assert wire.count(b"masked") >= 3 * 3
