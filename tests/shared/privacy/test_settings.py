"""The privacy section of a study, as YAML and as a plan."""

import pytest

from medfl.shared.config import Settings, parse_settings
from medfl.shared.errors import ConfigError
from medfl.shared.privacy.accounting import SampledGaussian, epsilon
from medfl.shared.privacy.plan import plan_client_level, plan_training, warnings
from medfl.shared.privacy.settings import ClientLevel, DpSgd, NoPrivacy, PrivacySettings, Unit


class Holder(Settings):
    privacy: PrivacySettings


def parse(text: str) -> NoPrivacy | DpSgd | ClientLevel:
    return parse_settings(f"privacy: {text}\n", Holder, name="study.yaml").privacy


def dp_sgd(**changes: object) -> DpSgd:
    return DpSgd.model_validate({"mode": "dp-sgd", "epsilon": 8.0, **changes})


def test_each_mode_is_read_as_its_own_section() -> None:
    assert isinstance(parse("{mode: none}"), NoPrivacy)
    assert parse("{mode: dp-sgd, epsilon: 8}") == dp_sgd()
    assert isinstance(parse("{mode: client-level, epsilon: 8, noise_multiplier: 6}"), ClientLevel)


def test_the_patient_is_the_unit_unless_the_study_says_otherwise() -> None:
    assert dp_sgd().unit is Unit.PATIENT


def test_images_as_the_unit_must_say_how_many_a_patient_has() -> None:
    with pytest.raises(ConfigError, match="images_per_patient is required with unit: image"):
        parse("{mode: dp-sgd, epsilon: 8, unit: image}")
    with pytest.raises(ConfigError, match="goes with unit: image only"):
        parse("{mode: dp-sgd, epsilon: 8, images_per_patient: 5}")


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "{mode: off}",
        "{mode: dp-sgd}",
        "{mode: dp-sgd, epsilon: 0}",
        "{mode: dp-sgd, epsilon: .nan}",
        "{mode: dp-sgd, epsilon: .inf}",
        "{mode: dp-sgd, epsilon: 8, delta: 0}",
        "{mode: dp-sgd, epsilon: 8, delta: 1}",
        "{mode: dp-sgd, epsilon: 8, noise_multiplier: 0}",
        "{mode: dp-sgd, epsilon: 8, noise_multiplier: -1}",
        "{mode: dp-sgd, epsilon: 8, clip_norm: 0}",
        "{mode: dp-sgd, epsilon: 8, sampling_rate: 1.1}",
        "{mode: dp-sgd, epsilon: 8, engine: fast}",
        "{mode: none, epsilon: 8}",
    ],
)
def test_values_that_promise_nothing_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"study\.yaml:1"):
        parse(text)


def test_the_plan_solves_noise_for_the_whole_study() -> None:
    plan = plan_training(dp_sgd(), units=120, patients=120, rounds=40)
    assert plan.sampling_rate == pytest.approx(8 / 120)
    assert plan.expected_batch == 8
    assert 7.9 < epsilon([plan.round_cost.times(40)], 1e-5) <= 8.0


def test_a_given_rate_fixes_the_divisor_by_the_planned_patients() -> None:
    plan = plan_training(dp_sgd(sampling_rate=0.1, noise_multiplier=2), units=50, patients=50, rounds=1)
    assert (plan.sampling_rate, plan.expected_batch) == (0.1, 5.0)


def test_a_site_smaller_than_a_step_draws_everyone() -> None:
    plan = plan_training(dp_sgd(expected_batch=64, noise_multiplier=4), units=30, patients=30, rounds=1)
    assert (plan.sampling_rate, plan.expected_batch) == (1.0, 30.0)


def test_given_noise_that_is_too_small_for_epsilon_is_refused_with_the_cost() -> None:
    with pytest.raises(ConfigError, match=r"costs epsilon .* above privacy\.epsilon 8"):
        plan_training(dp_sgd(noise_multiplier=0.5), units=120, patients=120, rounds=40)


def test_given_noise_that_is_enough_is_kept() -> None:
    plan = plan_training(dp_sgd(noise_multiplier=3.0), units=120, patients=120, rounds=4)
    assert plan.round_cost == SampledGaussian(3.0, 8 / 120, 10)


def test_delta_above_one_over_the_patients_is_refused() -> None:
    with pytest.raises(ConfigError, match="above one over 50 patients"):
        plan_training(dp_sgd(delta=0.05), units=50, patients=50, rounds=1)


def test_an_empty_site_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one patient"):
        plan_training(dp_sgd(), units=0, patients=0, rounds=1)


def test_a_large_site_that_protects_patients_is_told_nothing() -> None:
    plan = plan_training(dp_sgd(noise_multiplier=2), units=500, patients=500, rounds=5)
    assert warnings(dp_sgd(), plan, patients=500, rounds=5) == []


def test_below_a_hundred_patients_the_numbers_are_told() -> None:
    plan = plan_training(dp_sgd(noise_multiplier=3), units=40, patients=40, rounds=10)
    (told,) = warnings(dp_sgd(), plan, patients=40, rounds=10)
    assert told.startswith("only 40 patients: epsilon 8 needs noise multiplier 3 with 8 units a step over 100 steps")


def test_images_as_the_unit_are_told_the_patients_epsilon() -> None:
    settings = dp_sgd(unit="image", images_per_patient=4, noise_multiplier=2.0)
    plan = plan_training(settings, units=800, patients=200, rounds=5)
    (told,) = warnings(settings, plan, patients=200, rounds=5)
    # 50 steps at rate 0.01 cost one image 0.42 and a patient with four of them 2.06
    patient = epsilon([SampledGaussian(2.0, 0.01, 50, 4)], 1e-5)
    assert f"A patient with 4 images has epsilon {patient:.3g}" in told
    assert patient > 3 * epsilon([SampledGaussian(2.0, 0.01, 50)], 1e-5)


def client_level(**changes: object) -> ClientLevel:
    return ClientLevel.model_validate({"mode": "client-level", "epsilon": 8.0, "noise_multiplier": 6.0, **changes})


def test_client_level_privacy_charges_a_patient_half_the_noise_without_amplification() -> None:
    plan = plan_client_level(client_level(), rounds=50, patients=100)
    assert plan.round_cost == SampledGaussian(3.0, 1.0, 1)
    assert plan.epsilon == epsilon([SampledGaussian(3.0, 1.0, 50)], 1e-5)
    assert plan.unit is Unit.PATIENT


def test_client_level_noise_must_keep_the_promise_over_all_rounds() -> None:
    # 50 Gaussian rounds at 6 have mu = sqrt(50) / 6 = 1.18; 500 have 3.73, which is far above epsilon 8
    plan_client_level(client_level(), rounds=50, patients=100)
    with pytest.raises(ConfigError, match="raise noise_multiplier or plan fewer rounds"):
        plan_client_level(client_level(), rounds=500, patients=100)
    with pytest.raises(ConfigError, match="above one over"):
        plan_client_level(client_level(delta=0.1), rounds=1, patients=100)
