"""What a comparison's table says in words, favourable or not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from medfl.simulations.inversion import RECOGNISABLE_DB
from medfl.simulations.results import Experiment

_FEW = 5
"""Scores of fewer held-out patients are told to rest on few."""


def findings(experiment: Experiment) -> list[str]:
    """What the table says in words, favourable or not."""
    federated, said = experiment.methods_of("federated"), []
    everything = sorted(experiment.methods, key=lambda m: -np.nan_to_num(experiment.interval(m).mean, nan=-1.0))
    said.append(f"Highest mean over sites: {everything[0]} ({experiment.interval(everything[0])}).")
    if "alone" in experiment.methods and federated:
        said += _against_alone(experiment, federated)
    floor = [m for m in experiment.methods_of("trivial")]
    for method in federated:
        below = [s for s in experiment.sites if any(experiment.mean(method, s) <= experiment.mean(f, s) for f in floor)]
        if below:
            said.append(f"{method} does not beat a predictor without any training at: {', '.join(below)}.")
    if few := [f"{site} ({n})" for site, n in experiment.scored.items() if n < _FEW]:
        said.append(
            f"Few patients are held out at {', '.join(few)}: a difference there may be the difference of one patient."
        )
    said += _unscored(experiment)
    for site, reasons in experiment.left_out.items():
        said.append(f"Left out at {site}: {counted(reasons)}.")
    return [*said, *promises(experiment), *reconstructions(experiment)]


def counted(reasons: Mapping[str, int]) -> str:
    """Why so many images or labels are left out, in words, the most frequent first.

    >>> counted({"opted out": 1, "no label": 3})
    'no label (3), opted out (1)'
    """
    return ", ".join(f"{why} ({count})" for why, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])))


def reconstructions(experiment: Experiment) -> list[str]:
    """For each attacked method what a curious coordinator has made of a patient's image: the best of all seeds."""
    said = []
    for method in experiment.methods:
        made = [c.reconstruction for c in experiment.cells if c.method == method and c.reconstruction is not None]
        if made:
            found, grey = max(made)
            verdict = "the patient's picture" if found >= RECOGNISABLE_DB else f"not recognisable ({RECOGNISABLE_DB:g})"
            said.append(
                f"{method}: from one step on a single image a curious coordinator makes a picture of {found:.1f} dB, "
                f"where plain grey has {grey:.1f}: {verdict}."
            )
    return said


def promises(experiment: Experiment) -> list[str]:
    """For each private method what was spent, what that assumes of the sites' patients, and what else leaves."""
    said = []
    for method in dict.fromkeys(cell.method for cell in experiment.cells if cell.spent):
        cells = [cell for cell in experiment.cells if cell.method == method and cell.spent]
        most = max(spent[-1] for cell in cells for spent in cell.spent.values())
        together = max(sum(spent[-1] for spent in cell.spent.values()) for cell in cells)
        said.append(
            f"{method}: epsilon {most:.2f} is the most that a site has spent. This assumes that no patient was treated "
            f"at two of these sites: the figures add, and whoever was at all of them has spent {together:.2f}."
        )
        said += [f"{method}, what leaves a site: {cells[0].leaves}."] if cells[0].leaves else []
    return said


def _against_alone(experiment: Experiment, federated: list[str]) -> list[str]:
    """For each site what federation gains it, and which methods no site has to regret."""
    said, alone = [], {site: experiment.mean("alone", site) for site in experiment.sites}
    alone = {site: home for site, home in alone.items() if not math.isnan(home)}
    for site, home in alone.items():
        champion = best_at(experiment, federated, site)
        gain = experiment.mean(champion, site) - home
        if math.isnan(gain):
            continue
        verb = "gains" if gain >= 0 else "loses"
        over = "the mean of the others' own models" if site in experiment.held_out else "training alone"
        said.append(f"{site}: the best federated method ({champion}) {verb} {abs(gain):.3f} over {over}.")
    if not (training := [site for site in alone if site not in experiment.held_out]):
        return said
    lost = {m: [s for s in training if not experiment.mean(m, s) >= alone[s]] for m in federated}
    if content := [method for method, sites in lost.items() if not sites]:
        return [*said, f"At least as good as training alone at every site: {', '.join(content)}."]
    nobody = "No method is as good as training alone everywhere."
    scored = [m for m in federated if not any(math.isnan(experiment.mean(m, s)) for s in training)]
    if not scored:
        return [*said, nobody]
    nearest = min(scored, key=lambda m: max(alone[s] - experiment.mean(m, s) for s in lost[m]))
    words = ", ".join(
        f"{site} (by {alone[site] - experiment.mean(nearest, site):.3f}{_size(experiment, site)})"
        for site in lost[nearest]
    )
    return [*said, f"{nobody} {nearest} comes nearest, and loses at {words}."]


def _unscored(experiment: Experiment) -> list[str]:
    """Where no method has a score, and for which seeds if there is one for others."""
    seeds, said = sorted({cell.seed for cell in experiment.cells}), []
    for site in experiment.sites:
        without = [seed for seed in seeds if (site, seed) not in experiment.measured]
        which = f" (seed {', '.join(map(str, without))})" if len(without) < len(seeds) else ""
        said += [f"{site}{which}"] if without else []
    if not said:
        return []
    return [f"No method has a score at {', '.join(said)}: every mean is over what is left."]


def _size(experiment: Experiment, site: str) -> str:
    """Why a site may gain least: it has most patients itself."""
    patients = experiment.patients
    if not patients or patients.get(site, 0) < max(patients.values()):
        return ""
    return f"; with {patients[site]} of {sum(patients.values())} patients it has most to learn from by itself"


def best_at(experiment: Experiment, methods: Iterable[str], site: str) -> str:
    """The method with the highest mean at ``site``; one without a score only where all have none."""
    return max(methods, key=lambda method: float(np.nan_to_num(experiment.mean(method, site), nan=-1.0)))
