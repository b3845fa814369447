"""What a federation has to beat: no training at all, each site alone, all images in one place."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medfl.client.data.splits import Split
from medfl.client.data.tensors import SiteData, TensorSet
from medfl.client.training.evaluate import evaluate
from medfl.client.training.plain import train_plain
from medfl.client.workbench import make_bench
from medfl.server.reporter import Reporter
from medfl.shared.algorithms.settings import FedAvgSettings
from medfl.shared.errors import TrainingError
from medfl.shared.metrics import headline, patient_dice, read
from medfl.shared.privacy.settings import ClientLevel, DpSgd, NoPrivacy
from medfl.shared.safeguards import Safeguards
from medfl.shared.study import SecureAggregation, Study
from medfl.shared.weights import Flat
from medfl.shared.zoo import ModelTask
from medfl.simulations.federation import Federation, federate

log = logging.getLogger("medfl.simulations")

_CANDIDATES = 64
_PATIENCE_S = 5.0  # for a site that refuses, which it does for ever


def score(
    study: Study,
    weights: Flat,
    sites: Mapping[str, SiteData],
    kept: Mapping[str, Flat] | None = None,
    *,
    device: torch.device,
) -> dict[str, float]:
    """Headline score of one model, with what each site has ``kept`` of its own, on each site's held-out patients."""
    if not sites:
        return {}
    bench = make_bench(study, device)
    scores: dict[str, float] = {}
    for name, data in sites.items():
        bench.load_for_patients(study, weights, (kept or {}).get(name))
        scores[name] = headline_or_nan(read(evaluate(bench.network, data.splits[Split.VALIDATION], study)))
    return scores


def score_at_the_end(
    study: Study, federation: Federation, sites: Mapping[str, SiteData], *, device: torch.device
) -> dict[str, float]:
    """Headline score of the model that ``federation`` ended with on the held-out patients of each of its sites.

    Those that the round loop has scored already by that very model are not scored again.
    """
    known = {name: headline_or_nan(scores) for name, scores in federation.site_scores.items()}
    others = {name: data for name, data in sites.items() if name not in known}
    scores = known | score(study, federation.result.weights, others, federation.kept, device=device)
    return {name: scores[name] for name in sites}


def initial_model(study: Study, device: torch.device) -> Flat:
    """What the study begins with."""
    bench = make_bench(study, device)
    return bench.layout.flatten(bench.network.state_dict())


@dataclass(frozen=True, slots=True)
class Trained:
    """The study that a baseline was trained by, its scores by site, and by site the model that is used there.

    No model where it is no single one, or where training did not come to its end: the score is NaN there.
    """

    study: Study
    scores: dict[str, float]
    models: dict[str, Flat]


def alone_and_ensemble(
    study: Study,
    sites: Mapping[str, SiteData],
    elsewhere: Mapping[str, SiteData] | None = None,
    *,
    device: torch.device,
    reporter: Reporter | None = None,
) -> tuple[Trained, Trained]:
    """Each site by itself, scored at home, and the mean prediction of all their models at every site.

    Each site trains in every round. ``elsewhere`` are sites that do not train: alone is scored there by the mean over
    the others' models. A site whose training diverges has no score, and no part in the means. The ensemble is
    federated learning in one round (Guha et al. 2019, https://arxiv.org/abs/1902.11175).
    """
    by_itself = one_place(study)
    scores: dict[str, float] = {}
    models: dict[str, Flat] = {}
    for number, (name, data) in enumerate(sites.items(), 1):
        log.info("alone, site %d of %d: %s", number, len(sites), name)
        federation = federate(by_itself, {name: data}, device=device, reporter=reporter)
        if federation.complete:
            scores |= score_at_the_end(by_itself, federation, {name: data}, device=device)
            models[name] = federation.result.weights
        else:
            scores[name] = _no_score(f"alone, site {name}", federation)
    abroad = [score(by_itself, weights, elsewhere or {}, device=device) for weights in models.values()]
    scores |= {name: _mean([there[name] for there in abroad]) for name in elsewhere or {}}
    ensemble = _Ensemble(by_itself, list(models.values()), device)
    together = {
        name: headline_or_nan(read(evaluate(ensemble, data.splits[Split.VALIDATION], by_itself)))
        if models
        else math.nan
        for name, data in {**sites, **(elsewhere or {})}.items()
    }
    return Trained(by_itself, scores, models), Trained(by_itself, together, {})


class _Ensemble(nn.Module):
    """The logarithm of the mean probability over models; as logits for several yes-or-no labels."""

    def __init__(self, study: Study, models: Sequence[Flat], device: torch.device) -> None:
        super().__init__()
        self._bench = make_bench(study, device)
        self._models = models
        self._yes_or_no = study.data.multi_label

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, class, ...)."""
        total: Tensor | None = None
        for weights in self._models:
            self._bench.load(weights, None)
            logits = self._bench.network.eval()(images)
            part = logits.sigmoid() if self._yes_or_no else logits.softmax(1)
            total = part if total is None else total + part
        assert total is not None  # noqa: S101 - at least one site
        mean = (total / len(self._models)).clamp(1e-7, 1 - 1e-7)
        return mean.logit() if self._yes_or_no else mean.log()


def cyclic(
    study: Study,
    sites: Mapping[str, SiteData],
    elsewhere: Mapping[str, SiteData] | None = None,
    *,
    device: torch.device,
) -> Trained:
    """One model handed from site to site, trained at each as in a round, as often around as there are rounds.

    Without privacy, also where the study has it, with as many steps at each site: :func:`unprotected`.
    Cyclic weight transfer: Chang et al. 2018, https://doi.org/10.1093/jamia/ocy017.
    """
    plain, everyone = one_place(unprotected(study)), {**sites, **(elsewhere or {})}
    bench = make_bench(plain, device)
    for number in range(1, study.rounds.count + 1):
        log.info("cyclic, time around %d of %d", number, study.rounds.count)
        for name, data in sites.items():
            seed = int.from_bytes(hashlib.sha256(f"cyclic/{study.seed}/{name}/{number}".encode()).digest()[:7], "big")
            generator = torch.Generator(device).manual_seed(seed)
            try:
                train_plain(bench.network, data.splits[Split.TRAIN], plain, generator=generator, round_number=number)
            except TrainingError as error:
                log.warning("cyclic has no score: time around %d, site %s: %s", number, name, error)
                return Trained(plain, dict.fromkeys(everyone, math.nan), {})
    weights = bench.layout.flatten(bench.network.state_dict())
    return _everywhere(plain, weights, everyone, device)


def pooled(
    study: Study,
    sites: Mapping[str, SiteData],
    elsewhere: Mapping[str, SiteData] | None = None,
    *,
    device: torch.device,
    reporter: Reporter | None = None,
) -> Trained:
    """One model trained on all images together, with as many steps as all sites take together; scored at each site."""
    together = SiteData(
        splits={split: _concatenate([data.splits[split] for data in sites.values()]) for split in Split},
        report=next(iter(sites.values())).report,
    )
    plain, everyone = one_place(study, times=len(sites)), {**sites, **(elsewhere or {})}
    federation = federate(plain, {"pooled": together}, device=device, reporter=reporter)
    if not federation.complete:
        return Trained(plain, dict.fromkeys(everyone, _no_score("pooled", federation)), {})
    return _everywhere(plain, federation.result.weights, everyone, device)


def _everywhere(study: Study, weights: Flat, sites: Mapping[str, SiteData], device: torch.device) -> Trained:
    return Trained(study, score(study, weights, sites, device=device), dict.fromkeys(sites, weights))


def _no_score(what: str, federation: Federation) -> float:
    """NaN, and a line that says why."""
    log.warning(
        "%s has no score: training ended after round %d: %s: see the warnings before this line",
        what,
        federation.result.round,
        federation.result.ending.value,
    )
    return math.nan


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else math.nan


def unprotected(study: Study) -> Study:
    """``study`` without differential privacy, with as many optimizer steps a round."""
    changes: dict[str, object] = {"privacy": NoPrivacy(mode="none")}
    if isinstance(study.privacy, DpSgd):
        changes["training"] = study.training.model_copy(update={"steps": study.privacy.steps_per_round, "epochs": None})
    return study.model_copy(update=changes)


def trivial(
    study: Study, sites: Mapping[str, SiteData], elsewhere: Mapping[str, SiteData] | None = None
) -> dict[str, dict[str, float]]:
    """Predictors without a network: method -> site -> score.

    They are fitted on each site's training part; ``elsewhere``, at sites that do not train, on those of all others.
    """
    everyone = {**sites, **(elsewhere or {})}
    if study.task is ModelTask.SEGMENTATION:
        methods: dict[str, Callable[[TensorSet, TensorSet, int], float]] = {
            "best threshold": best_threshold,
            "mean mask": mean_mask,
        }
        classes = len(study.data.classes)
        fitted_on = {name: data.splits[Split.TRAIN] for name, data in sites.items()}
        if elsewhere:
            fitted_on |= dict.fromkeys(elsewhere, _concatenate(list(fitted_on.values())))
        return {
            method: {
                name: predictor(fitted_on[name], data.splits[Split.VALIDATION], classes)
                for name, data in everyone.items()
            }
            for method, predictor in methods.items()
        }
    labels = {name: data.splits[Split.TRAIN].labels for name, data in sites.items()}
    labels |= dict.fromkeys(elsewhere or {}, torch.cat(list(labels.values())))
    scores = {}
    for name, data in everyone.items():
        tally = evaluate(_Constant(labels[name], study), data.splits[Split.VALIDATION], study)
        scores[name] = headline_or_nan(read(tally))
    return {"commonest class": scores}


class _Constant(nn.Module):
    """Says of every image what is commonest among ``labels``: one class, or of each label whether most have it."""

    def __init__(self, labels: Tensor, study: Study) -> None:
        super().__init__()
        if study.data.multi_label:
            self._said = labels.mean(0) - 0.5
        else:
            self._said = torch.bincount(labels, minlength=len(study.data.classes)).float()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, class)."""
        return self._said.expand(len(images), -1)


def best_threshold(train: TensorSet, held_out: TensorSet, classes: int) -> float:
    """Mean Dice by patient of ``channel 0 above (or below) t``, with t and the side chosen on the training part."""
    brightness = train.inputs(train.rows)[:, 0]
    some = brightness.flatten()[:: max(1, brightness.numel() // 100_000)]
    marks = torch.quantile(some, torch.linspace(0, 1, _CANDIDATES, device=some.device))
    test = held_out.inputs(held_out.rows)[:, 0]
    scores = []
    for label in range(1, classes):
        candidates = [(t, above) for t in marks.tolist() for above in (True, False)]
        best = max(candidates, key=lambda c: _pixel_dice((brightness > c[0]) == c[1], train.labels == label))
        scores.append(_by_patient(((test > best[0]) == best[1]), held_out, label))
    return sum(scores) / len(scores)


def mean_mask(train: TensorSet, held_out: TensorSet, classes: int) -> float:
    """Mean Dice by patient of one fixed mask: where the class is commoner than t in the training part, best t."""
    scores = []
    for label in range(1, classes):
        frequency = (train.labels == label).float().mean(0)
        steps = torch.linspace(0, float(frequency.max()), _CANDIDATES)[:-1].tolist()
        truth = train.labels == label
        best = max(steps, key=lambda t: _pixel_dice((frequency > t).expand_as(truth), truth))
        scores.append(_by_patient((frequency > best).expand_as(held_out.labels), held_out, label))
    return sum(scores) / len(scores)


def _pixel_dice(predicted: Tensor, truth: Tensor) -> float:
    both = (predicted & truth).sum()
    return float(2 * both / (predicted.sum() + truth.sum()).clamp(min=1))


def _by_patient(predicted: Tensor, data: TensorSet, label: int) -> float:
    dice = torch.stack(
        [
            patient_dice(
                predicted[data.patients == patient].long(), (data.labels[data.patients == patient] == label).long(), 2
            )[0]
            for patient in torch.unique(data.patients)
        ]
    )
    return float(dice.nanmean())


def one_place(study: Study, *, times: int = 1) -> Study:
    """``study`` for one place, with ``times`` as many steps a round where it says how many.

    There is nothing to aggregate, so that no strategy matters, and nobody to distrust. Without client-level privacy,
    whose noise is on a sum over sites. A site in this process takes part at once or never.
    """
    lonely = {"minimum_sites": 1, "sites_per_round": None, "converged": None, "patience_s": _PATIENCE_S}
    changes: dict[str, object] = {
        "rounds": study.rounds.model_copy(update=lonely),
        "secure_aggregation": SecureAggregation(mode="none"),
        "strategy": FedAvgSettings(),
        "safeguards": Safeguards(),
    }
    if study.training.steps is not None:
        changes["training"] = study.training.model_copy(update={"steps": study.training.steps * times})
    match study.privacy:
        case ClientLevel():
            changes["privacy"] = NoPrivacy(mode="none")
        case DpSgd(steps_per_round=steps):
            changes["privacy"] = study.privacy.model_copy(update={"steps_per_round": steps * times})
    return Study.model_validate(study.model_copy(update=changes).model_dump(mode="json"))


def _concatenate(sets: Sequence[TensorSet]) -> TensorSet:
    numbers, first = [], 0
    for part in sets:
        numbers.append(part.patients + first)
        first += int(part.patients.max()) + 1 if len(part) else 0
    images = [part.images for part in sets]
    if len({block.dtype for block in images}) > 1:
        images = [part.inputs(part.rows) for part in sets]
    return TensorSet(torch.cat(images), torch.cat([part.labels for part in sets]), torch.cat(numbers))


def headline_or_nan(scores: Mapping[str, float]) -> float:
    """The headline score, or NaN where there is none: training diverged, or no held-out patient can be scored."""
    found = headline(scores)
    return found[1] if found else float("nan")
