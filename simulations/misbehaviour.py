"""Sites that fail or cheat: a ClientApp around the real one, for failures, stragglers and attacks on the update."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

import medfl.shared.environment  # noqa: F401 - before flwr

# isort: split
import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Error, Message
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData, TensorSet
from medfl.shared.errors import DataError, ProtocolError
from medfl.shared.messages import Kind, SecureRequest, TrainReply
from medfl.shared.weights import Flat
from medfl.simulations.config import Attacker, Failures

Answer = Callable[[Message, Context], Message]

_EXPIRED = 3  # Flower's own code of a request whose time is over


def misbehaving(app: ClientApp, failures: Failures, attackers: Mapping[str, Attacker], *, seed: int) -> Answer:
    """``app`` as the coordinator sees it when sites fail as often as ``failures`` says and ``attackers`` cheat.

    What happens depends on the seed, the site and how often it was asked, and on nothing else.
    """

    def lost_in_a_phase(message: Message, context: Context) -> Message:
        phase = SecureRequest.parse(message.content).phase
        chance = _uniform(f"{seed}/{context.node_config['site']}/{phase}/{_asked(context, phase.value)}")
        share = failures.phases.get(phase, 0.0)
        if chance < share / 2:
            return _silence(message)
        reply = app(message, context)
        return _silence(message) if chance < share else reply

    def answer(message: Message, context: Context) -> Message:
        if failures.phases and message.metadata.message_type == Kind.PHASE.value:
            return lost_in_a_phase(message, context)
        if message.metadata.message_type != Kind.TRAIN.value:
            return app(message, context)
        site = str(context.node_config["site"])
        asked = _asked(context, Kind.TRAIN.value)
        chance = _uniform(f"{seed}/{site}/{asked}")
        if chance < failures.drop_out:
            return _silence(message)
        reply = app(message, context)
        if chance < failures.drop_out + failures.late:
            return _silence(message)
        return _attacked(reply, attackers[site], f"{seed}/{site}/{asked}") if site in attackers else reply

    return answer


def _asked(context: Context, what: str) -> int:
    """How often the site of ``context`` was asked for ``what``, this time included; counted in the context itself."""
    known = context.state.config_records.setdefault("medfl-asked", ConfigRecord())
    times = known.get(what, 0)
    known[what] = count = times + 1 if isinstance(times, int) else 1
    return count


def with_flipped_labels(data: SiteData, classes: int) -> SiteData:
    """``data`` whose training labels are reversed: class ``c`` of ``classes`` becomes ``classes - 1 - c``.

    Held-out labels stay, so that scores keep their meaning.
    """
    train = data.splits[Split.TRAIN]
    if train.labels.is_floating_point():
        raise DataError("attackers of kind label-flip need one class an image or pixel")
    flipped = TensorSet(train.images, classes - 1 - train.labels, train.patients)
    return SiteData({**data.splits, Split.TRAIN: flipped}, data.report)


MARK = 0.15
"""Side of a backdoor's mark, a bright square in the corner, in parts of the image."""


def marked(images: Tensor) -> Tensor:
    """``images`` (N, channel, *spatial) float32 with a bright square in the first corner of every slice."""
    result = images.clone()
    rows, columns = (max(2, round(MARK * side)) for side in images.shape[-2:])
    brightest = images.flatten(1).amax(1).view(-1, *[1] * (images.ndim - 1))
    result[..., :rows, :columns] = brightest
    return result


def with_backdoor(data: SiteData, attacker: Attacker, *, seed: int) -> SiteData:
    """``data`` of which ``attacker.share`` of the training images carry the mark and are labelled as its target.

    Every pixel of a mask becomes the target. Bagdasaryan et al. 2020, https://arxiv.org/abs/1807.00459.

    Raises:
        DataError: several labels an image.
    """
    train = data.splits[Split.TRAIN]
    if train.labels.is_floating_point():
        raise DataError("attackers of kind backdoor need one class an image or pixel")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    chosen = order[: round(attacker.share * len(train))].to(train.labels.device)
    images, labels = train.inputs(train.rows), train.labels.clone()
    images[chosen], labels[chosen] = marked(images[chosen]), attacker.target
    return SiteData({**data.splits, Split.TRAIN: TensorSet(images, labels, train.patients)}, data.report)


@torch.no_grad()
def backdoor_success(network: nn.Module, data: TensorSet, target: int, *, batch: int = 16) -> float:
    """Share of what is not of class ``target`` that is taken for it once the image carries the mark.

    Counted in images, or in pixels of a segmentation; NaN where everything is of the target class.
    """
    network.eval()
    fooled = others = 0
    for rows in torch.split(data.rows, batch):
        said, truth = network(marked(data.inputs(rows))).argmax(1), data.labels[rows]
        fooled += int(((said == target) & (truth != target)).sum())
        others += int((truth != target).sum())
    return fooled / others if others else math.nan


def changed_update(update: Flat, attacker: Attacker, seed: str) -> Flat:
    """What a cheating site sends instead of its ``update``."""
    match attacker.kind:
        case "label-flip":
            return update  # its data did the harm
        case "backdoor":  # model replacement
            return np.asarray(np.float32(attacker.scale) * update, np.float32)
        case "sign-flip":
            return np.asarray(-np.float32(attacker.scale) * update, np.float32)
        case "noise":
            rng = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big"))
            noise = rng.standard_normal(update.size, np.float32)
            return np.asarray(update + np.float32(attacker.scale * float(update.std())) * noise, np.float32)


def _attacked(reply: Message, attacker: Attacker, seed: str) -> Message:
    try:
        trained = TrainReply.parse(reply.content)
    except ProtocolError:  # a failure, or held for a secure sum
        return reply
    changed = TrainReply(changed_update(trained.update, attacker, seed), trained.examples, trained.tally)
    reply.content = changed.record()
    return reply


def _silence(message: Message) -> Message:
    return Message(Error(_EXPIRED, "simulated"), reply_to=message)


def _uniform(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
