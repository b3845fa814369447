"""A site with its images on a GPU that is only pretended: no tensor meets one of another device."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dicom_lab import KEY, hospital, spec
from pretended_gpu import GPU, pretended_gpu
from sites import evaluate, make_site, offer, policy_for, train
from tiny import masks_study
from torch import nn

from medfl.client.data import batches
from medfl.client.data.contact_sheet import write_contact_sheet
from medfl.client.data.load import load_site_data
from medfl.client.data.settings import DicomSettings
from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData
from medfl.client.privacy.bookkeeping import convolution
from medfl.client.privacy.bookkeeping.engine import clipped_sum_by_bookkeeping
from medfl.client.privacy.patient_gradient import private_gradients
from medfl.client.privacy.randomness import SecureGenerator
from medfl.shared.algorithms.travel import build_study_network
from medfl.shared.losses import build_loss
from medfl.shared.messages import EvaluateReply, TrainReply

MODEL = {"name": "unet", "channels": [4, 8], "residual_units": 0, "norm": "group"}


class AtOnce:
    """In place of a pool of threads: in another thread nothing is pretended."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done


def loaded(folder: Path, room: int | None) -> SiteData:
    settings = DicomSettings.model_validate({"source": "dicom", "folder": folder})
    return load_site_data(settings, spec(), task="segmentation", key=KEY, device=GPU, room=room)


@pytest.mark.parametrize(("room", "at"), [(None, "cuda"), (0, "cpu")])
def test_images_go_to_the_gpu_or_stay_on_the_host_and_train_alike(
    room: int | None, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital(tmp_path / "images")
    monkeypatch.setattr(batches, "ThreadPoolExecutor", AtOnce)
    data = spec()
    study = masks_study(model=MODEL, data=data.model_dump(mode="json"))
    with pretended_gpu(monkeypatch):
        found = loaded(tmp_path / "images", room)
        part = found.splits[Split.TRAIN]
        assert (part.images.device.type, part.labels.device.type, part.patients.device.type) == (at, "cuda", "cuda")
        write_contact_sheet(found, data, tmp_path / "sheet.html")
        policy = policy_for(study, release_site_metrics=True)
        site = make_site(study, tmp_path, data=found, policy=policy, device=GPU)
        offer(site, study)
        reply = TrainReply.parse(train(site, study))
        tally = EvaluateReply.parse(evaluate(site, study)).tally
    assert reply.examples == 36
    assert np.abs(reply.update).max() > 0
    assert tally
    assert (tmp_path / "sheet.html").read_text().count("<img") > 10


def test_a_step_looks_at_the_gpu_once_however_many_layers_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    for channels in ([4, 8], [4, 8, 16]):
        study = masks_study(model={**MODEL, "channels": channels})
        with pretended_gpu(monkeypatch) as operations:
            network = build_study_network(study).to(GPU)
            one, other = (torch.rand(1, 1, 8, 8, device=GPU) for _ in range(2))
            labels = torch.zeros(1, 8, 8, dtype=torch.int64, device=GPU)
            private_gradients(
                network,
                build_loss(study.training.loss),
                [(one, labels), (other, labels)],
                clip_norm=1.0,
                noise_multiplier=1.0,
                expected_patients=2.0,
                generator=SecureGenerator(),
            )
        looks.append(operations.looks)
    assert looks == [1, 1]  # whether a gradient was not finite


def test_a_sum_whose_norms_were_had_apart_from_it_is_not_rounded_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    really, allowed = convolution._backward, []

    def watched(*arguments: Any) -> Any:
        allowed.append((arguments[-1], torch.backends.cudnn.allow_tf32))
        return really(*arguments)

    monkeypatch.setattr(convolution, "_backward", watched)
    with pretended_gpu(monkeypatch):
        # 16 positions are few beside 8 x 8 x 9 weights: the second layer's norms come from products of positions
        network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten()).to(GPU)
        units = [(torch.rand(1, 1, 4, 4, device=GPU), torch.zeros(1, device=GPU)) for _ in range(2)]
        clipped_sum_by_bookkeeping(network, lambda outputs, _: outputs.square().mean(), units, 1.0)
    of_input, of_weight = (True, False, False), (False, True, False)
    assert allowed == [(of_input, True), (of_weight, True), (of_weight, False)]
    assert torch.backends.cudnn.allow_tf32


def test_the_room_of_a_gpu_decides_where_images_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hospital(tmp_path)
    with pretended_gpu(monkeypatch):
        assert loaded(tmp_path, None).report.held.endswith("of images on cuda")
