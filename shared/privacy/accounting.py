"""What a history of sampled Gaussian steps costs: tight (PLD) epsilon, Renyi cross-check, and the noise for a budget.

Adjacency is add/remove one unit everywhere; replace-one epsilon is 1.6 to 2 times larger. PLD epsilon is rounded up
(Koskela et al. 2020, https://arxiv.org/abs/1906.03049; Doroshenko et al. 2022, https://arxiv.org/abs/2207.04380).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from typing import Any

from medfl.shared.errors import ConfigError

# Width of the privacy-loss grid. Epsilon comes out at most 1.2 % above that of a five times finer grid on every row of
# the reference tables, and 100 ms of work become 20. Histories with several images a patient take seconds on it, and
# their epsilons are so large that a coarser one costs less than that.
GRID, GROUP_GRID = 5e-4, 5e-3
MAX_CELLS = 5e7  # of a composed privacy loss: 400 MB; what would need more is answered by Renyi accounting

# Orders below 2 never give the smallest epsilon at deltas of use, and their series converges badly at low noise.
_RENYI_ORDERS = [1 + order / 10 for order in range(10, 100)] + list(range(11, 64)) + [128, 256, 512]


@dataclass(frozen=True, slots=True)
class SampledGaussian:
    """``steps`` releases of a sum of clipped units plus Gaussian noise, each unit drawn with ``sampling_rate``.

    ``noise_multiplier`` is noise standard deviation over clip norm. ``images_per_patient`` above 1 says that images
    were drawn, and that one patient may own that many: the patient's epsilon then counts all of them.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int
    images_per_patient: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ConfigError(
                f"noise_multiplier must be positive, got {self.noise_multiplier}: without noise, no privacy"
            )
        if not 0 < self.sampling_rate <= 1:
            raise ConfigError(f"sampling_rate must be above 0 and at most 1, got {self.sampling_rate}")
        if self.steps < 1 or self.images_per_patient < 1:
            raise ConfigError(
                f"steps and images_per_patient must be at least 1, got {self.steps}, {self.images_per_patient}"
            )

    def times(self, count: int) -> SampledGaussian:
        """The same mechanism, ``count`` times as many steps."""
        return replace(self, steps=self.steps * count)


def epsilon(history: Iterable[SampledGaussian], delta: float) -> float:
    """Smallest PLD epsilon that covers ``history`` at ``delta``; 0 when empty. About 50 ms for each distinct mechanism.

    Where every unit is in every step, the history is one Gaussian, whose epsilon has a closed form (Balle & Wang 2018,
    https://arxiv.org/abs/1805.06530).

    >>> round(epsilon([SampledGaussian(noise_multiplier=1.0, sampling_rate=1 / 63, steps=6300)], 1e-5), 1)
    8.2
    """
    check_delta(delta)
    events = merged(history)
    if events and all(event.sampling_rate == 1 for event in events):
        return _unsampled_epsilon(events, delta)
    if any(_cells(event) > MAX_CELLS for event in events):
        return renyi_epsilon(events, delta)
    grid = GROUP_GRID if any(event.images_per_patient > 1 for event in events) else GRID
    losses = [_composed(event, grid) for event in events]
    return float(reduce(lambda a, b: a.compose(b), losses).get_epsilon_for_delta(delta)) if losses else 0.0


def _unsampled_epsilon(events: Iterable[SampledGaussian], delta: float) -> float:
    from dp_accounting import get_epsilon_gaussian

    shift = math.hypot(*(math.sqrt(e.steps) * e.images_per_patient / e.noise_multiplier for e in events))
    return float(get_epsilon_gaussian(1 / shift, delta)) * (1 + 1e-9)  # the search stops within 1e-12


def renyi_epsilon(history: Iterable[SampledGaussian], delta: float) -> float:
    """Epsilon by Renyi accounting (Mironov et al. 2019, https://arxiv.org/abs/1908.10530): always above PLD's.

    A patient with several images is bounded by one who moves the sum by all of them whenever one is drawn.
    """
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, rdp

    check_delta(delta)
    accountant = rdp.RdpAccountant(_RENYI_ORDERS)
    events = merged(history)
    for event in events:
        any_drawn = 1 - (1 - event.sampling_rate) ** event.images_per_patient
        noise = GaussianDpEvent(event.noise_multiplier / event.images_per_patient)
        accountant.compose(PoissonSampledDpEvent(any_drawn, noise), event.steps)
    return float(accountant.get_epsilon(delta)) if events else 0.0


def solve_noise_multiplier(target_epsilon: float, delta: float, *, sampling_rate: float, steps: int) -> float:
    """Smallest noise multiplier, to four digits and rounded up, whose PLD epsilon is at most ``target_epsilon``.

    Raises:
        ConfigError: epsilon or delta is out of range, or no multiplier below 10,000 is enough.
    """
    check_delta(delta)
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ConfigError(f"epsilon must be positive, got {target_epsilon}")

    def enough(noise: float, spend: Any = epsilon) -> bool:
        return bool(spend([SampledGaussian(noise, sampling_rate, steps)], delta) <= target_epsilon)

    low, high = 0.2, 1e4
    if enough(low, renyi_epsilon):
        return low
    if not enough(high, renyi_epsilon):
        raise ConfigError(f"epsilon {target_epsilon:g} cannot be reached in {steps} steps: plan fewer rounds or steps")
    while high / low > 1.02:  # Renyi is fast and an upper bound: it brackets from above
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle, renyi_epsilon) else (middle, high)
    low = 0.7 * high  # PLD needs less noise than Renyi, by a few percent
    while enough(low):
        low, high = 0.7 * low, low
    while high / low > 1.0002:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    digits = 3 - math.floor(math.log10(high))
    return float(math.ceil(high * 10**digits) / 10**digits)


def merged(history: Iterable[SampledGaussian]) -> list[SampledGaussian]:
    """The history with equal mechanisms added up: a study of 100 equal rounds is one event."""
    steps: Counter[SampledGaussian] = Counter()
    for event in history:
        steps[replace(event, steps=1)] += event.steps
    return [event.times(count) for event, count in steps.items()]


def check_delta(delta: float, patients: int | None = None) -> None:
    """Raise ConfigError when ``delta`` is no probability, or is above one over ``patients``.

    At delta = 1/patients, publishing one patient's whole record at random would count as private.
    """
    if not 0 < delta < 1:
        raise ConfigError(f"delta must be between 0 and 1, got {delta}")
    if patients is not None and delta > 1 / max(patients, 1):
        raise ConfigError(
            f"delta {delta:g} is above one over {patients} patients: "
            f"set privacy.delta to {0.1 / max(patients, 1):.0e} or less"
        )


def _cells(event: SampledGaussian) -> float:
    """About how many grid cells the composed privacy loss of ``event`` spans; grows with the root of the steps."""
    shift = event.images_per_patient / event.noise_multiplier
    grid = GRID if event.images_per_patient == 1 else GROUP_GRID
    return 2 * (10 * shift + shift**2 / 2) / grid * 5 * math.sqrt(event.steps)


@lru_cache(maxsize=64)
def _composed(event: SampledGaussian, grid: float) -> Any:
    loss = _one_step(replace(event, steps=1), grid)
    return loss if event.steps == 1 else loss.self_compose(event.steps)


@lru_cache(maxsize=64)
def _one_step(event: SampledGaussian, grid: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution as pld

    noise, rate, images = event.noise_multiplier, event.sampling_rate, event.images_per_patient
    if images == 1:
        return pld.from_gaussian_mechanism(noise, sampling_prob=rate, value_discretization_interval=grid)
    # A patient's images are drawn independently: with j of them in the step, the sum moves by up to j clip norms.
    drawn = [math.comb(images, j) * rate**j * (1 - rate) ** (images - j) for j in range(images + 1)]
    return pld.from_mixture_gaussian_mechanism(
        noise, [float(j) for j in range(images + 1)], drawn, value_discretization_interval=grid
    )
