"""Several virtual sites from one data set, always by patient: evenly, by label or by size."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData, TensorSet
from medfl.shared.errors import DataError
from medfl.simulations.config import Partition


def partition(data: SiteData, how: Partition, *, seed: int) -> dict[str, SiteData]:
    """Sites ``site-001`` ... with the patients of ``data``; the same for the same ``seed``.

    Every site gets at least one patient of each split that has as many patients as there are sites.

    Raises:
        DataError: fewer patients than sites, or skew by label where images have no single class.
    """
    rng = np.random.default_rng([seed, how.sites])
    shares = _shares(data, how, rng)
    parts: list[dict[Split, TensorSet]] = [{} for _ in range(how.sites)]
    for split, whole in data.splits.items():
        owners = _deal(whole, shares, rng)
        for number, part in enumerate(parts):
            rows = torch.from_numpy(np.flatnonzero(owners == number)).to(whole.labels.device)
            part[split] = TensorSet(
                whole.images.index_select(0, rows),
                whole.labels.index_select(0, rows),
                whole.patients.index_select(0, rows),
            )
    for split in (Split.TRAIN, Split.VALIDATION):
        if any(len(part[split]) == 0 for part in parts):
            patients = len(torch.unique(data.splits[split].patients))
            raise DataError(
                f"partition: {patients} {split.value} patients are too few for {how.sites} sites: ask for fewer sites, "
                "or change data.split of the site they come from"
            )
    return {name: SiteData(part, data.report) for name, part in zip(how.names, parts, strict=True)}


def _shares(data: SiteData, how: Partition, rng: np.random.Generator) -> NDArray[np.float64]:
    """Share of each class (row; one row where classes do not matter) that each site (column) gets; rows sum to 1."""
    match how.by:
        case "iid":
            return np.full((1, how.sites), 1 / how.sites)
        case "quantity":
            return rng.dirichlet([how.alpha] * how.sites, size=1)
        case "labels":
            labels = data.splits[Split.TRAIN].labels
            if labels.ndim != 1 or labels.is_floating_point():
                raise DataError("partition.by: labels needs a classification with one class an image: use quantity")
            last = max(int(part.labels.max()) for part in data.splits.values() if len(part))
            return rng.dirichlet([how.alpha] * how.sites, size=last + 1)


def _deal(whole: TensorSet, shares: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Which site each row goes to: patients of a class in random order, cut at the cumulated shares."""
    patients = whole.patients.cpu().numpy()
    owner: dict[int, int] = {}
    groups = _groups(whole, classes=len(shares))
    for row, members in zip(shares, groups, strict=False):
        order = rng.permutation(members)
        ends = np.rint(np.cumsum(row) * len(order)).astype(int)
        for rank, patient in enumerate(order.tolist()):
            owner[patient] = int(np.searchsorted(ends, rank, side="right"))
    _fill_empty(owner, shares.shape[1])
    return np.array([min(owner[patient], shares.shape[1] - 1) for patient in patients.tolist()], np.int64)


def _groups(whole: TensorSet, *, classes: int) -> list[NDArray[np.int64]]:
    """Patients by class (the commonest of their images); all together where classes do not matter."""
    patients = whole.patients.cpu().numpy()
    every = np.unique(patients)
    if classes == 1:
        return [every]
    labels = whole.labels.cpu().numpy()
    commonest = {p: int(np.bincount(labels[patients == p]).argmax()) for p in every.tolist()}
    return [np.array([p for p in every.tolist() if commonest[p] == label], np.int64) for label in range(classes)]


def _fill_empty(owner: dict[int, int], sites: int) -> None:
    """Give each site without a patient one of the site that has most, as long as that one keeps one itself."""
    for site in range(sites):
        if site in owner.values():
            continue
        counts = np.bincount(list(owner.values()), minlength=sites)
        richest = int(counts.argmax())
        if counts[richest] < 2:
            return
        owner[next(patient for patient, of in owner.items() if of == richest)] = site
