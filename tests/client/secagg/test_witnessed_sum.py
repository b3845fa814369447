"""A secure sum in the audit log: its study is found in every phase, and only the masked input is a result."""

from pathlib import Path

import pytest
from secagg_world import STUDY, Consortium, Stage
from sites import make_site, policy_for
from tiny import classes_study

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from medfl.client.audit import Audit
from medfl.client.participant import Participant
from medfl.client.witness import Witness
from medfl.shared.chain import inspect
from medfl.shared.messages import Kind, ModelRequest, SecureReply, SecureRequest, WeightRequest
from medfl.shared.secagg.exchange import Phase, PhaseReply, PhaseRequest


def test_each_phase_belongs_to_the_study_of_its_sum_also_after_a_restart(tmp_path: Path) -> None:
    world = Consortium(5, folder=tmp_path)
    stage = Stage(world, Phase.UNMASK)
    requests = {
        Phase.ADVERTISE_KEYS: stage.announcement,
        Phase.SHARE_KEYS: stage.key_list,
        Phase.MASKED_INPUT: stage.deliveries[1],
        Phase.CONFIRM_SURVIVORS: stage.survivor_list,
        Phase.UNMASK: stage.confirmation_list,
    }
    assert list(requests) == list(Phase)
    for phase, request in requests.items():
        assert world.sites[1].study_of(phase, PhaseRequest(request.to_bytes())) == STUDY
    world.start(1)
    confirm = PhaseRequest(stage.survivor_list.to_bytes())
    assert world.sites[1].study_of(Phase.CONFIRM_SURVIVORS, confirm) == STUDY


@pytest.mark.parametrize("control", [b"", b"short", bytes(32), bytes(1000)])
def test_a_request_of_no_open_sum_belongs_to_no_study(control: bytes) -> None:
    assert Consortium(3).sites[1].study_of(Phase.UNMASK, PhaseRequest(control)) is None


def message(kind: Kind, request: ModelRequest | WeightRequest | SecureRequest) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    return Message(request.record(), dst_node_id=2, message_type=kind.value)


def test_a_masked_input_stands_under_its_study_and_the_round_that_was_trained_last(tmp_path: Path) -> None:
    study = classes_study(secure_aggregation={"mode": "msa1"})
    world = Consortium(5)
    world.hold(study=bytes.fromhex(study.digest))
    stage = Stage(world, Phase.MASKED_INPUT, study=bytes.fromhex(study.digest))
    site = make_site(study, tmp_path, policy=policy_for(study))
    site._participant = Participant(world.sites[1])
    audit = Audit(tmp_path / "audit.jsonl")
    witness = Witness(audit, site)
    witness.passage(message(Kind.TRAIN, ModelRequest(study.digest, 7, world.held[1].vector)))
    asked = SecureRequest(Phase.MASKED_INPUT, stage.deliveries[1].to_bytes())
    passage = witness.passage(message(Kind.PHASE, asked))
    witness.received(passage, asked.record())
    witness.leaves(passage, SecureReply(stage.masked[1]).record())
    witness.leaves(passage, SecureReply(PhaseReply(b"shares")).record())
    audit.close()
    came, masked, shares = inspect(tmp_path / "audit.jsonl").rows
    for row in (came, masked, shares):
        assert (row["study"], row["round"], row["phase"]) == (study.digest, 7, "masked_input")
    assert (masked["form"], shares["form"]) == ("masked", "no result")

    short = witness.passage(message(Kind.PHASE, SecureRequest(Phase.ADVERTISE_KEYS, b"short")))
    assert (short.study, short.phase) == ("", "advertise_keys")
    weight = WeightRequest(study.digest, b"")
    witness.passage(message(Kind.WEIGHT, weight))
    assert witness.passage(message(Kind.PHASE, asked)).round is None  # the sum of weights is of no round
