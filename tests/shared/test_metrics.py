from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medfl.shared.metrics import Scoring, add, headline, patient_dice, read, tally_names


def dice(predicted: list[int], truth: list[int], classes: int = 3) -> list[float]:
    rows = [torch.tensor(values).view(2, 1, 3) for values in (predicted, truth)]  # two slices of 1x3 pixels
    result: list[float] = patient_dice(rows[0], rows[1], classes).tolist()
    return result


def test_dice_is_twice_the_overlap_over_the_sum_of_both() -> None:
    # class 1: overlap 1, sizes 2 and 3: 2 / 5; class 2: overlap 2, sizes 3 and 2: 4 / 5
    assert dice([1, 1, 0, 2, 2, 2], [1, 0, 1, 2, 2, 1]) == pytest.approx([0.4, 0.8])


def test_dice_is_over_all_slices_of_a_patient_together() -> None:
    # one slice right, one wrong: 2 * 3 / (6 + 3), not the mean of 1 and 0
    assert dice([1] * 6, [1, 1, 1, 0, 0, 0], 2) == pytest.approx([2 / 3])


def test_a_class_in_neither_has_no_score_and_one_that_is_only_predicted_has_none_right() -> None:
    absent, invented = dice([0, 0, 0, 2, 0, 0], [0] * 6)
    assert math.isnan(absent)
    assert invented == 0


def test_a_class_that_is_missed_scores_zero() -> None:
    assert dice([0] * 6, [1, 0, 0, 0, 0, 0], 2) == [0]


def test_labels_may_be_bytes() -> None:
    a = torch.tensor([[[1, 0]]], dtype=torch.uint8)
    assert patient_dice(a, a, 2).tolist() == [1]


def test_the_sums_a_site_reports_have_public_names_in_a_fixed_order() -> None:
    assert tally_names(Scoring.DICE, ["background", "a"]) == ("loss", "examples", "dice/a", "patients/a")
    assert tally_names(Scoring.CONFUSION, ["a", "b"])[2:] == (
        "confusion/a/a", "confusion/a/b", "confusion/b/a", "confusion/b/b"
    )  # fmt: skip
    assert tally_names(Scoring.PER_LABEL, ["a"])[2:] == ("tp/a", "fn/a", "fp/a", "tn/a")


def test_tallies_add_up_name_by_name() -> None:
    assert add([{"a": 1.0, "b": 2.0}, {"b": 3.0, "c": 4.0}]) == {"a": 1.0, "b": 5.0, "c": 4.0}
    assert add([]) == {}


def test_mean_dice_is_over_patients_then_over_classes() -> None:
    tally = {"loss": 6.0, "examples": 4.0, "dice/a": 1.5, "patients/a": 3.0, "dice/b": 0.9, "patients/b": 1.0}
    assert read(tally) == pytest.approx({"loss": 1.5, "dice/a": 0.5, "dice/b": 0.9, "dice": 0.7})


def test_a_class_that_no_patient_has_is_left_out_of_the_mean() -> None:
    tally = {"dice/a": 1.0, "patients/a": 2.0, "dice/b": 0.0, "patients/b": 0.0}
    assert read(tally) == {"dice/a": 0.5, "dice": 0.5}


def test_accuracy_counts_images_and_balanced_accuracy_counts_classes() -> None:
    # class a: 8 of 9 right; class b: 1 of 1 right
    tally = {"confusion/a/a": 8.0, "confusion/a/b": 1.0, "confusion/b/a": 0.0, "confusion/b/b": 1.0}
    assert read(tally) == pytest.approx({"accuracy": 0.9, "balanced_accuracy": (8 / 9 + 1) / 2})


def test_a_class_without_images_does_not_lower_balanced_accuracy() -> None:
    tally = {"confusion/a/a": 3.0, "confusion/a/b": 1.0, "confusion/b/a": 0.0, "confusion/b/b": 0.0}
    assert read(tally)["balanced_accuracy"] == 0.75


def test_each_label_has_the_mean_of_its_two_rates() -> None:
    tally = {"tp/a": 3.0, "fn/a": 1.0, "fp/a": 1.0, "tn/a": 1.0, "tp/b": 2.0, "fn/b": 0.0, "fp/b": 0.0, "tn/b": 0.0}
    # a: (3/4 + 1/2) / 2; b occurs one way only and has no score
    assert read(tally) == {"balanced_accuracy/a": 0.625, "balanced_accuracy": 0.625}


def test_an_empty_tally_has_no_scores() -> None:
    assert read({}) == {}
    assert headline({}) is None
    assert read({"loss": 0.0, "examples": 0.0}) == {}


def test_the_headline_is_dice_or_else_balanced_accuracy() -> None:
    assert headline({"accuracy": 1.0, "balanced_accuracy": 0.5, "dice": 0.25}) == ("dice", 0.25)
    assert headline({"accuracy": 1.0, "balanced_accuracy": 0.5}) == ("balanced_accuracy", 0.5)
    assert headline({"accuracy": 1.0}) is None


sites = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=5)


@given(sites)
def test_scores_of_a_federation_are_those_of_all_images_in_one_place(right_and_wrong: list[tuple[int, int]]) -> None:
    def tally(right: int, wrong: int) -> dict[str, float]:
        return {
            "confusion/a/a": float(right), "confusion/a/b": float(wrong), "confusion/b/a": 0.0, "confusion/b/b": 1.0
        }  # fmt: skip

    right, wrong = sum(r for r, _ in right_and_wrong), sum(w for _, w in right_and_wrong)
    together = read(add(tally(r, w) for r, w in right_and_wrong))
    assert together["accuracy"] == pytest.approx(
        (right + len(right_and_wrong)) / (right + wrong + len(right_and_wrong))
    )
