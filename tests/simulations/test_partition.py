"""Several sites from one data set: nobody is lost, nobody is at two sites, and skew is what was asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import classes_study, masks_study, report, site_data

from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData, TensorSet
from medfl.shared.errors import DataError
from medfl.simulations.config import Partition
from medfl.simulations.partition import partition


def whole(patients: int, classes: int = 2) -> SiteData:
    """One image a patient whose one pixel is the patient's number; classes in turn."""
    numbers = torch.arange(patients)
    part = TensorSet(numbers.float().view(-1, 1, 1, 1), numbers % classes, numbers)
    splits = {Split.TRAIN: part, Split.VALIDATION: part, Split.TEST: part}
    return SiteData(splits, report(splits))


@settings(max_examples=40, deadline=None)
@given(st.integers(20, 120), st.integers(2, 10), st.sampled_from(["iid", "labels", "quantity"]), st.integers(0, 9))
def test_every_patient_goes_to_exactly_one_site(patients: int, sites: int, by: str, seed: int) -> None:
    made = partition(whole(patients), Partition.model_validate({"sites": sites, "by": by, "alpha": 0.3}), seed=seed)
    for split in (Split.TRAIN, Split.VALIDATION):
        dealt = [p for site in made.values() for p in site.splits[split].patients.tolist()]
        assert sorted(dealt) == list(range(patients))
        assert all(len(site.splits[split]) for site in made.values())
    for site in made.values():
        part = site.splits[Split.TRAIN]
        assert part.images.flatten().tolist() == part.patients.tolist()  # rows stay together


def test_an_even_partition_is_even_and_the_same_for_the_same_seed() -> None:
    first, again, other = (partition(whole(40), Partition(sites=4), seed=s) for s in (1, 1, 2))
    assert [len(site.splits[Split.TRAIN]) for site in first.values()] == [10, 10, 10, 10]
    assert list(first) == ["site-1", "site-2", "site-3", "site-4"]
    rows = [{n: d.splits[Split.TRAIN].patients.tolist() for n, d in made.items()} for made in (first, again, other)]
    assert rows[0] == rows[1] != rows[2]


def test_images_of_a_patient_stay_at_one_site() -> None:
    data = site_data(classes_study(), patients=12, images=3)
    made = partition(data, Partition(sites=2), seed=0)
    homes = [set(site.splits[Split.TRAIN].patients.tolist()) for site in made.values()]
    assert not homes[0] & homes[1]
    assert sum(len(site.splits[Split.TRAIN]) for site in made.values()) == 36


@pytest.mark.parametrize(("alpha", "low", "high"), [(0.05, 0.75, 1.0), (1000.0, 0.5, 0.62)])
def test_small_alpha_gives_sites_of_one_class_and_large_alpha_even_ones(alpha: float, low: float, high: float) -> None:
    made = partition(whole(400), Partition(sites=5, by="labels", alpha=alpha), seed=3)
    purity = []
    for site in made.values():
        counts = np.bincount(site.splits[Split.TRAIN].labels.numpy(), minlength=2)
        purity.append((counts.max() / counts.sum(), counts.sum()))
    assert low <= np.average([p for p, _ in purity], weights=[n for _, n in purity]) <= high


def test_a_class_that_only_held_out_patients_have_is_dealt_out_too() -> None:
    data = whole(40)
    held_out = data.splits[Split.VALIDATION]
    rare = TensorSet(held_out.images, held_out.labels.clone(), held_out.patients)
    rare.labels[7] = 2
    nobody = TensorSet(held_out.images[:0], held_out.labels[:0], held_out.patients[:0])
    splits = {**data.splits, Split.VALIDATION: rare, Split.TEST: nobody}
    made = partition(SiteData(splits, data.report), Partition(sites=3, by="labels"), seed=6)
    dealt = [p for site in made.values() for p in site.splits[Split.VALIDATION].patients.tolist()]
    assert sorted(dealt) == list(range(40))


def test_quantity_skew_gives_unequal_sizes_of_the_same_mixture() -> None:
    made = partition(whole(400), Partition(sites=5, by="quantity", alpha=0.5), seed=1)
    sizes = [len(site.splits[Split.TRAIN]) for site in made.values()]
    assert max(sizes) > 3 * min(sizes)


def test_what_cannot_be_divided_is_told() -> None:
    with pytest.raises(DataError, match="3 train patients are too few for 5 sites: ask for fewer sites"):
        partition(whole(3), Partition(sites=5), seed=0)
    with pytest.raises(DataError, match="use quantity"):
        partition(site_data(masks_study()), Partition(sites=2, by="labels"), seed=0)
