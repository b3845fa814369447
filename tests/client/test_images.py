"""Images are held once: what is given out less those who have opted out takes the place of what was loaded."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import torch
from tiny import classes_study, site_data

from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData
from medfl.client.images import Images

STUDY = classes_study()


def without_patient(number: int) -> SiteData:
    """What ``current`` gives: a copy less one patient."""
    data = site_data(STUDY)
    return replace(data, splits={part: found.without([number]) for part, found in data.splits.items()})


def test_images_less_those_who_opted_out_are_made_once_and_the_others_let_go_of() -> None:
    left, given = without_patient(0), list[weakref.ref[torch.Tensor]]()

    def current(data: SiteData) -> SiteData:
        given.append(weakref.ref(data.splits[Split.TRAIN].images))
        return left

    images = Images(lambda study: site_data(study), current)
    first, again = (images.split(STUDY, Split.TRAIN) for _ in range(2))
    assert first is again is left.splits[Split.TRAIN]
    gc.collect()
    loaded, held = given
    assert loaded() is None
    assert held() is first.images


def test_images_that_are_let_go_of_meanwhile_do_not_come_back() -> None:
    def withdrawn(data: SiteData) -> SiteData:
        images.forget()
        return without_patient(0)

    loads: list[str] = []
    images = Images(lambda study: (loads.append(study.name), site_data(study))[1], withdrawn)
    for _ in range(2):
        images.split(STUDY, Split.TRAIN)
    assert len(loads) == 2
