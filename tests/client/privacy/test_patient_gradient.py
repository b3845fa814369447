"""One private step: what it bounds, what it adds, what it divides by, on batches of every kind."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from medfl.client.privacy import patient_gradient
from medfl.client.privacy.clipped import ClippedSum, UnitData, clip_factors
from medfl.client.privacy.patient_gradient import clipped_sum, private_gradients, sample_patients, units_at_once
from medfl.client.privacy.randomness import SecureGenerator
from medfl.shared.errors import ConfigError
from medfl.shared.privacy.settings import Engine


class Fixed:
    """Noise that is all ``value``."""

    def __init__(self, value: float) -> None:
        self.value = value

    def normal(self, count: int) -> Tensor:
        return torch.full((count,), self.value, dtype=torch.float64)

    def bernoulli(self, count: int, probability: float) -> np.ndarray:
        raise NotImplementedError


def mean(outputs: Tensor, labels: Tensor) -> Tensor:
    """Loss whose gradient is the mean input, times the label."""
    return (outputs * labels).mean()


def one_weight() -> nn.Linear:
    return nn.Linear(1, 1, bias=False)


def patient(*values: float, label: float = 1.0) -> UnitData:
    return torch.tensor([[value] for value in values]), torch.full((len(values), 1), label)


def step(network: nn.Module, patients: Sequence[UnitData], *, noise: float = 0.0, **changes: object) -> float:
    arguments = {"clip_norm": 1.0, "noise_multiplier": 1.0, "expected_patients": 4.0, "generator": Fixed(noise)}
    private_gradients(network, mean, patients, **{**arguments, **changes})  # type: ignore[arg-type]
    (gradient,) = [parameter.grad for parameter in network.parameters()]
    assert gradient is not None
    return float(gradient)


@pytest.mark.parametrize("engine", list(Engine))
def test_small_gradients_pass_and_large_ones_are_clipped(engine: Engine) -> None:
    # 0.5 passes, 30 becomes 1, -7 becomes -1: the sum is 0.5, divided by the expected 4
    assert step(one_weight(), [patient(0.5), patient(30.0), patient(-7.0)], engine=engine) == pytest.approx(
        0.125, abs=1e-4
    )


def test_a_patient_is_clipped_once_over_all_slices() -> None:
    # The mean of 3 and 0 is 1.5, clipped to 1; clipping slices one by one would give 2 or 0.5.
    assert step(one_weight(), [patient(3.0, 0.0)]) == pytest.approx(1 / 4, abs=1e-4)


def test_a_thousand_slices_of_one_patient_count_no_more_than_one() -> None:
    assert step(one_weight(), [patient(*[9.0] * 1000)]) == pytest.approx(1 / 4, abs=1e-4)


def test_the_clip_is_over_all_parameters_together() -> None:
    network = nn.Linear(3, 1)
    patients = [(torch.tensor([[2.0, 2.0, 2.0]]), torch.tensor([[1.0]]))]
    arguments = {"clip_norm": 1.0, "noise_multiplier": 1.0, "expected_patients": 1.0, "generator": Fixed(0.0)}
    private_gradients(network, mean, patients, **arguments)  # type: ignore[arg-type]
    gradients = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    # (2, 2, 2, 1) has norm sqrt(13)
    torch.testing.assert_close(gradients, torch.tensor([2.0, 2.0, 2.0, 1.0]) / math.sqrt(13), atol=2e-4, rtol=0)
    assert float(gradients.norm()) <= 1.0


def test_noise_is_multiplier_times_clip_over_the_expected_patients() -> None:
    # Noise 1 for noise multiplier 3 and clip 0.5 is 1.5; divided by the expected 4
    assert step(one_weight(), [], noise=1.0, noise_multiplier=3.0, clip_norm=0.5) == pytest.approx(0.375)


def test_the_sum_is_divided_by_the_expected_patients_and_not_by_those_drawn() -> None:
    assert step(one_weight(), [patient(0.5)]) == pytest.approx(0.5 / 4)
    assert step(one_weight(), [patient(0.5)] * 8) == pytest.approx(8 * 0.5 / 4)


def test_a_step_leaves_no_sum_without_noise_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[Tensor] = []
    really = patient_gradient.clipped_sum

    def seen(*arguments: object) -> ClippedSum:
        found = really(*arguments)  # type: ignore[arg-type]
        sums.append(found.flat)
        return found

    monkeypatch.setattr(patient_gradient, "clipped_sum", seen)
    released = step(one_weight(), [patient(0.5)], noise=1.0)
    assert sums[0].tolist() == [released] == [pytest.approx(1.5 / 4, abs=1e-4)]


def test_an_empty_batch_releases_pure_noise() -> None:
    network = nn.Linear(100, 100)
    facts = private_gradients(
        network, mean, [], clip_norm=2.0, noise_multiplier=1.5, expected_patients=4.0, generator=SecureGenerator()
    )
    assert facts.drawn == 0
    assert network.weight.grad is not None
    # 2.0 * 1.5 / 4 = 0.75; the standard error of an estimate from 10,000 draws is 0.0053
    assert float(network.weight.grad.std()) == pytest.approx(0.75, abs=5 * 0.0053)


@pytest.mark.parametrize("engine", list(Engine))
@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_a_patient_whose_gradient_is_not_finite_is_dropped_alone(value: float, engine: Engine) -> None:
    network = nn.Sequential(nn.Linear(1, 1, bias=False))
    others = [patient(0.5), patient(0.25)]
    clean = step(network, others, engine=engine)
    broken = [others[0], patient(value, label=10.0), others[1]]
    assert step(network, broken, engine=engine) == clean == pytest.approx(0.75 / 4)
    facts = private_gradients(
        network, mean, broken, clip_norm=1.0, noise_multiplier=1.0, expected_patients=4.0, generator=Fixed(0.0),
        engine=engine,
    )  # fmt: skip
    assert (facts.drawn, facts.dropped, facts.clipped) == (3, 1, 0)


def test_the_loss_is_called_for_each_patient_apart() -> None:
    # Normalising over the batch, this loss would give each patient half the gradient when two are drawn.
    def coupled(outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs * labels).sum() / labels.sum()

    for engine in Engine:
        network = one_weight()
        private_gradients(
            network, coupled, [patient(0.5), patient(0.5, label=3.0)], clip_norm=1.0, noise_multiplier=1.0,
            expected_patients=1.0, generator=Fixed(0.0), engine=engine,
        )  # fmt: skip
        assert float(network.weight.grad) == pytest.approx(1.0)  # type: ignore[arg-type]


def test_patients_of_different_shapes_share_a_step() -> None:
    network = nn.Conv2d(1, 1, 3, padding=1)
    patients = [(torch.randn(n, 1, size, size), torch.ones(n, 1, size, size)) for n, size in ((1, 4), (1, 6), (3, 5))]
    facts = private_gradients(
        network, mean, patients, clip_norm=1.0, noise_multiplier=1.0, expected_patients=3.0, generator=SecureGenerator()
    )
    assert facts.drawn == 3


def test_frozen_parameters_get_no_gradient() -> None:
    network = nn.Linear(1, 1)
    network.bias.requires_grad_(False)
    step_of = private_gradients(
        network, mean, [patient(0.5)], clip_norm=1.0, noise_multiplier=1.0, expected_patients=1.0, generator=Fixed(1.0)
    )
    assert step_of.drawn == 1
    assert network.bias.grad is None


@pytest.mark.parametrize("name", ["clip_norm", "noise_multiplier", "expected_patients"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_step_without_clip_noise_or_divisor_is_refused_and_writes_nothing(name: str, value: float) -> None:
    network = one_weight()
    with pytest.raises(ConfigError, match=f"{name} must be positive and finite"):
        step(network, [patient(1.0)], **{name: value})
    assert network.weight.grad is None


def test_momentum_and_adam_step_on_what_was_released() -> None:
    network = one_weight()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    before = float(network.weight.detach())
    step(network, [patient(0.5)])
    optimizer.step()
    assert float(network.weight.detach()) == pytest.approx(
        before - 0.1, abs=1e-5
    )  # Adam's first step is lr times the sign


def test_clip_factors_never_let_a_float32_norm_through_above_the_clip() -> None:
    norms = torch.logspace(-3, 6, 10_000)
    assert (norms.double() * clip_factors(norms, 0.7).double() <= 0.7).all()
    assert (clip_factors(norms[norms < 0.69], 0.7) == 1).all()


def test_a_gradient_of_zero_is_no_problem() -> None:
    assert step(one_weight(), [patient(0.0)]) == 0.0


def test_patients_are_drawn_independently_at_the_sampling_rate() -> None:
    generator = SecureGenerator()
    drawn = [sample_patients(50, 0.2, generator) for _ in range(2000)]
    sizes = np.array([len(batch) for batch in drawn])
    # Poisson-like spread: variance 50 * 0.2 * 0.8 = 8 (a fixed batch size would have 0); five standard errors: 1.27
    assert sizes.mean() == pytest.approx(10.0, abs=0.32)
    assert sizes.var() == pytest.approx(8.0, abs=1.27)
    counts = np.bincount(np.concatenate(drawn), minlength=50)
    assert stats.chisquare(counts).pvalue > 1e-7


def test_units_that_do_not_fit_into_one_pass_take_several_of_equal_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    together = patient_gradient.clipped_sum_by_bookkeeping

    def counted(network: nn.Module, loss: object, units: Sequence[UnitData], clip_norm: float) -> ClippedSum:
        sizes.append(len(units))
        return together(network, loss, units, clip_norm)  # type: ignore[arg-type]

    monkeypatch.setattr(patient_gradient, "clipped_sum_by_bookkeeping", counted)
    network, units = one_weight(), [patient(value) for value in (0.5, 30.0, -7.0, 0.25, 0.125, 2.0, 0.0)]
    whole = clipped_sum(network, mean, units, 1.0, Engine.BOOKKEEPING)
    monkeypatch.setattr(patient_gradient, "_VALUES_AT_ONCE", 4)
    parts = clipped_sum(network, mean, units, 1.0, Engine.BOOKKEEPING)
    assert sizes == [7, 4, 3]
    assert parts.flat.item() == pytest.approx(whole.flat.item(), abs=1e-6)
    assert parts.norms.tolist() == whole.norms.tolist()


def test_patients_of_several_images_take_turns_of_so_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    together = patient_gradient.clipped_sum_by_bookkeeping

    def counted(network: nn.Module, loss: object, units: Sequence[UnitData], clip_norm: float) -> ClippedSum:
        sizes.append((len(units), len(units[0][0])))
        return together(network, loss, units, clip_norm)  # type: ignore[arg-type]

    monkeypatch.setattr(patient_gradient, "clipped_sum_by_bookkeeping", counted)
    network = nn.Linear(1, 1)
    singles, triples = [patient(0.5), patient(-7.0)], [patient(3.0, 0.0, float(n)) for n in range(12)]
    many = [patient(*[9.0] * 9), patient(*[1.0] * 9)]
    mixed = [triples[0], singles[0], many[0], *triples[1:], singles[1], many[1], patient(2.0, 2.0)]
    by_loop = clipped_sum(network, mean, mixed, 1.0, Engine.LOOP)
    by_shape = clipped_sum(network, mean, mixed, 1.0, Engine.BOOKKEEPING)
    # 16 images are five patients of three, 12 such patients three turns; nine images, or one patient, go by themselves
    assert sizes == [(4, 3), (4, 3), (4, 3), (2, 1)]
    assert by_shape.norms.tolist() == pytest.approx(by_loop.norms.tolist(), rel=1e-5)
    assert by_shape.flat.tolist() == pytest.approx(by_loop.flat.tolist(), rel=1e-4)


def test_patients_of_several_images_go_one_by_one_where_a_layer_has_no_rule() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    pairs = [patient(0.5, 0.25), patient(30.0, 1.0)]
    by_shape = clipped_sum(Scaled(), mean, pairs, 1.0, Engine.BOOKKEEPING)
    assert by_shape.norms.tolist() == [0.375, 15.5]
    with pytest.raises(ConfigError, match="there is no per-unit gradient rule"):
        clipped_sum(Scaled(), mean, [patient(0.5), patient(30.0)], 1.0, Engine.BOOKKEEPING)


def test_a_pass_holds_gradients_of_1200_megabytes() -> None:
    assert units_at_once(nn.Linear(1000, 1000, bias=False)) == 300
    assert units_at_once(nn.Linear(100, 100, bias=False).requires_grad_(False)) > 0
