"""One site and its ClientApp, called as Flower calls it."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import signer
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from signer import offer_of
from tiny import site_data

from medfl.client.app import build_client_app
from medfl.client.approvals import Approvals
from medfl.client.data.tensors import SiteData
from medfl.client.policy import Policy
from medfl.client.records import MemoryRecords, Records
from medfl.client.site import Site
from medfl.client.workbench import Workbench
from medfl.shared.algorithms.travel import build_study_network, layouts
from medfl.shared.messages import Kind, ModelRequest
from medfl.shared.signing import Signed
from medfl.shared.study import Study
from medfl.shared.weights import Flat

CPU = torch.device("cpu")
NOON = datetime.datetime(2027, 1, 1, 12, tzinfo=datetime.UTC)
"""A Friday."""


def policy_for(study: Study, **changes: Any) -> Policy:
    """A policy that permits ``study`` without privacy and in clear, and nothing else."""
    return Policy(
        **{"studies": (study.digest,), "allow_no_privacy": True, "require_secure_aggregation": False, **changes}
    )


def make_site(
    study: Study,
    folder: Path,
    *,
    name: str = "north",
    policy: Policy | None = None,
    data: SiteData | Callable[[Study], SiteData] | None = None,
    records: Records | None = None,
    approvals: Approvals | None = None,
    verify: Callable[[Signed], bytes] = signer.verify,
    now: Callable[[], datetime.datetime] = lambda: NOON,
    device: torch.device = CPU,
) -> Site:
    """A site with made-up pictures that permits ``study``."""
    here = site_data(study) if data is None else data
    load = here if callable(here) else lambda _: here
    return Site(
        name,
        policy=policy or policy_for(study),
        load_data=load,
        workbench=Workbench(device),
        records=records or MemoryRecords(),
        ledger=folder / name / "ledger.jsonl",
        approvals=approvals,
        verify=verify,
        now=now,
    )


def call(site: Site, kind: Kind, content: RecordDict) -> RecordDict:
    """What the site's ClientApp replies to one message."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(content, dst_node_id=2, message_type=kind.value)
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    return build_client_app(lambda _: site)(message, context).content


def offer(site: Site, study: Study) -> RecordDict:
    """Offer ``study``."""
    return call(site, Kind.OFFER, offer_of(study).record())


def start(study: Study) -> Flat:
    """The weights that the study's seed gives."""
    network = build_study_network(study)
    return layouts(study, network)[0].flatten(network.state_dict())


def train(site: Site, study: Study, weights: Flat | None = None, number: int = 1) -> RecordDict:
    """Ask for one round of training."""
    request = ModelRequest(study.digest, number, start(study) if weights is None else weights)
    return call(site, Kind.TRAIN, request.record())


def evaluate(site: Site, study: Study, weights: Flat | None = None, number: int = 1) -> RecordDict:
    """Ask for scores."""
    request = ModelRequest(study.digest, number, start(study) if weights is None else weights)
    return call(site, Kind.EVALUATE, request.record())
