"""Memory, device and disk give out: what is answered, and what is tried first."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sites import make_site, offer, policy_for, start, train
from tiny import classes_study, masks_study, site_data
from torch import Tensor, nn

from medfl.client import trouble
from medfl.client.data.splits import Split
from medfl.client.privacy.clipped import clipped_sum_by_loop
from medfl.client.privacy.patient_gradient import clipped_sum
from medfl.client.records import FolderRecords
from medfl.client.training.evaluate import evaluate
from medfl.client.training.plain import train_plain
from medfl.shared.algorithms.travel import build_study_network
from medfl.shared.errors import Code, TrainingError
from medfl.shared.losses import build_loss
from medfl.shared.messages import Failure, TrainReply
from medfl.shared.privacy.settings import Engine
from medfl.shared.study import Study


class Narrow(nn.Module):
    """A network that has memory for so many images at once."""

    def __init__(self, network: nn.Module, images: int) -> None:
        super().__init__()
        self.network, self.images, self.seen = network, images, []

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.images:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.seen.append(len(images))
        return self.network(images)  # type: ignore[no-any-return]


def trained(study: Study, network: nn.Module) -> Tensor:
    data = site_data(study).splits[Split.TRAIN]
    train_plain(network, data, study, generator=torch.Generator().manual_seed(0))
    return torch.cat([value.flatten() for value in network.state_dict().values()])


MASKS = masks_study(training={"optimizer": "sgd"})  # Adam would make steps of the rounding of gradients that are 0


@pytest.mark.parametrize("study", [classes_study(training={"steps": 3, "batch_size": 8}), MASKS])
def test_where_memory_runs_out_a_batch_is_computed_in_pieces_to_the_same_gradient(
    study: Study, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trained(study, build_study_network(study))
    narrow = Narrow(build_study_network(study), 2)
    assert torch.allclose(trained(study, narrow), whole, atol=1e-6)
    assert max(narrow.seen) == 2
    assert caplog.text.count("memory ran out") == 2  # 8 images, 4, 2: and 2 from then on


def test_where_images_see_each_other_or_one_is_too_much_the_site_is_out_with_a_word() -> None:
    batch_norm = masks_study(model={"name": "unet", "channels": [4, 8], "residual_units": 0, "norm": "batch"})
    for study, images in ((batch_norm, 4), (classes_study(), 0)):
        with pytest.raises(TrainingError) as caught:
            trained(study, Narrow(build_study_network(study), images))
        assert caught.value.reason == trouble.OUT_OF_MEMORY


def test_scores_are_the_same_where_memory_is_short() -> None:
    study = masks_study()
    network, data = build_study_network(study), site_data(study).splits[Split.TRAIN]
    narrow = Narrow(network, 1)
    short, long = evaluate(narrow, data, study), evaluate(network, data, study)
    assert short == pytest.approx(long, rel=1e-5)
    assert max(narrow.seen) == 1


def test_a_private_step_takes_patients_one_by_one_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    study = classes_study()
    network, loss, draw = build_study_network(study), build_loss(study.training.loss), torch.Generator().manual_seed(1)
    patients = [(torch.rand((1, 1, 4, 4), generator=draw), torch.tensor([n % 2])) for n in range(4)]
    slow = clipped_sum_by_loop(network, loss, patients, 1.0)
    monkeypatch.setattr("medfl.client.privacy.patient_gradient.clipped_sum_by_bookkeeping", full)
    short = clipped_sum(network, loss, patients, 1.0, Engine.BOOKKEEPING)
    assert all(torch.equal(a, b) for a, b in zip(slow.sums, short.sums, strict=True))


DEVICE = getattr(torch, "AcceleratorError", RuntimeError)
REFUSALS: list[tuple[Exception, Code, str]] = [
    (torch.OutOfMemoryError("CUDA out of memory"), Code.TRAINING, "out of memory"),
    (MemoryError(), Code.TRAINING, "out of memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), Code.TRAINING, "out of memory"),
    (DEVICE("CUDA error: unspecified launch failure"), Code.TRAINING, "device lost"),
    (RuntimeError("CUDA error: device-side assert triggered"), Code.TRAINING, "device lost"),
    (OSError(errno.ENOSPC, "No space left on device", "/data/NAME"), Code.DATA, "disk full"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), Code.DATA, "disk full"),
    (OSError(errno.EROFS, "Read-only file system"), Code.DATA, "disk read-only"),
    (OSError(errno.EIO, "Input/output error"), Code.DATA, "disk fails"),
]


@pytest.mark.parametrize(("error", "code", "reason"), REFUSALS, ids=[f"{type(e).__name__} {r}" for e, _, r in REFUSALS])
def test_what_the_machine_refuses_is_answered_as_a_code_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: Code, reason: str
) -> None:
    study = classes_study()
    site = make_site(study, tmp_path)
    offer(site, study)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(site._trainer, "_train_local", fail)
    assert Failure.parse(train(site, study)) == Failure(code, reason)
    monkeypatch.undo()
    assert TrainReply.parse(train(site, study)).examples == 8  # it passes, and the site goes on


def test_errors_that_are_none_of_these_are_not_explained() -> None:
    for error in (RuntimeError("shapes differ"), OSError(errno.ENOENT, "x"), ValueError("disk full")):
        assert trouble.in_words(error) is None


def test_words_for_the_person_name_no_file() -> None:
    said = str(trouble.in_words(OSError(errno.ENOSPC, "No space left on device", "/data/Smith^John")))
    assert "No space left" in said
    assert "Smith" not in said


def test_a_lost_device_is_told_to_the_node_which_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sites import call

    from medfl.client.app import build_client_app
    from medfl.shared.messages import Kind, ModelRequest

    study, told = classes_study(), []
    site = make_site(study, tmp_path)
    offer(site, study)

    def gone(*_: object, **__: object) -> None:
        raise DEVICE("CUDA error: the GPU has fallen off the bus")

    monkeypatch.setattr(site._trainer, "_train_local", gone)
    monkeypatch.setattr(
        "sites.build_client_app", lambda site_of: build_client_app(site_of, on_device_lost=lambda: told.append("lost"))
    )
    call(site, Kind.TRAIN, ModelRequest(study.digest, 1, start(study)).record())
    assert told == ["lost"]


def test_a_strategys_state_survives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = classes_study(strategy={"name": "scaffold"})
    records = FolderRecords(tmp_path)
    site = make_site(study, tmp_path, policy=policy_for(study), records=records)
    offer(site, study)
    both = np.concatenate([start(study), np.zeros_like(start(study))])
    train(site, study, both)
    before = records.personal(study.digest)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("medfl.client.records.write_whole", full)
    assert Failure.parse(train(site, study, both, number=2)).reason == "disk full"
    monkeypatch.undo()
    assert before is not None
    assert np.array_equal(FolderRecords(tmp_path).personal(study.digest), before)
    assert TrainReply.parse(train(site, study, both, number=2)).examples == 8
