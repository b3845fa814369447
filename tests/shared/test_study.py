from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import classes_study, labels_study, masks_study

from medfl.shared.algorithms.settings import ScaffoldSettings
from medfl.shared.errors import ProtocolError
from medfl.shared.metrics import Scoring
from medfl.shared.study import MAX_STUDY_BYTES, Study

DP = {"mode": "dp-sgd", "epsilon": 4.0}
CLIENT_LEVEL = {"mode": "client-level", "epsilon": 8, "noise_multiplier": 6}
HEAD = {"training": {"train_only": "head"}}


def narrow(bits: int) -> dict[str, Any]:
    return {"mode": "msa1", "ring_bits": bits}


def leaves(value: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where each scalar of nested dicts and lists stands."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in leaves(item, (*where, key))]
    if isinstance(value, list):
        return [leaf for index, item in enumerate(value) for leaf in leaves(item, (*where, index))]
    return [where]


CHANGED: dict[tuple[Any, ...], Any] = {  # values that are words need another word that is allowed
    ("task",): None,  # changes with the model only
    ("model", "name"): None,
    ("training", "loss"): None,
    ("training", "optimizer"): "adamw",
    ("training", "steps"): None,  # either of steps and epochs
    ("data", "dimensions"): None,
    ("data", "modality"): "ct",
    ("data", "preprocessing", "orientation"): "HPR",
    ("data", "preprocessing", "normalise"): "zscore",
    ("data", "preprocessing", "fit"): "resize",
    ("data", "preprocessing", "spacing_mm"): [1.0, 1.0],
    ("data", "preprocessing", "window"): None,
    ("data", "preprocessing", "slices", "per_case"): 3,
    ("data", "preprocessing", "slices", "held_out"): "same",
    ("data", "preprocessing", "size", 0): 16,
    ("data", "preprocessing", "size", 1): 16,
    ("model", "norm"): "group",
    ("training", "train_only"): "head",
    ("model", "strides"): [1],
    ("secure_aggregation", "mode"): "msa1",
    ("secure_aggregation", "ring_bits"): 16,
    ("privacy", "mode"): None,
    ("strategy", "name"): None,
    ("rounds", "sites_per_round"): 7,
}


def test_every_value_is_in_the_digest() -> None:
    study = masks_study()
    before, seen, tried = study.model_dump(mode="json"), {study.digest}, 0
    for where in leaves(before):
        changed = json.loads(json.dumps(before))
        section = changed
        for part in where[:-1]:
            section = section[part]
        old = section[where[-1]]
        if where in CHANGED and CHANGED[where] is None:
            continue
        if where in CHANGED:
            section[where[-1]] = CHANGED[where]
        elif isinstance(old, bool):
            section[where[-1]] = not old
        elif isinstance(old, int | float):
            section[where[-1]] = old + 1 if isinstance(old, int) else old / 2 + 0.01
        else:
            section[where[-1]] = f"{old}x"
        try:
            seen.add(Study.model_validate(changed).digest)
        except ValidationError:
            assert isinstance(old, str), f"{where} has no other value in this test"  # a choice of words
            continue
        tried += 1
    assert len(seen) == tried + 1
    assert tried > 35


def test_a_study_is_the_same_after_its_canonical_form() -> None:
    for study in (classes_study(), labels_study(), masks_study(privacy=DP, strategy={"name": "fedprox", "mu": 0.5})):
        again = Study.from_canonical(study.canonical(), digest=study.digest)
        assert again == study
        assert again.canonical() == study.canonical()
        assert study.digest == hashlib.sha256(study.canonical()).hexdigest()


def test_the_order_of_keys_and_the_way_of_writing_a_number_do_not_change_the_digest() -> None:
    study = classes_study()
    backwards = dict(reversed(study.model_dump(mode="json").items()))
    assert Study.model_validate(backwards).digest == study.digest
    assert classes_study(training={"learning_rate": 1}).digest == classes_study(training={"learning_rate": 1.0}).digest


def test_how_a_study_is_scored_follows_from_its_task() -> None:
    assert masks_study().scoring is Scoring.DICE
    assert classes_study().scoring is Scoring.CONFUSION
    assert labels_study().scoring is Scoring.PER_LABEL


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (masks_study, {"model": {"name": "unet", "channels": [4, 8], "norm": "batch"}, "privacy": DP}, "norm: group"),
        (masks_study, {"training": {"loss": "cross-entropy"}}, "training.loss must be dice-ce"),
        (classes_study, {"training": {"loss": "dice-ce"}}, "training.loss must be dice-ce"),
        (classes_study, {"training": {"loss": "binary-cross-entropy"}}, "data.multi_label"),
        (classes_study, {"data": {"multi_label": True}}, "binary-cross-entropy"),
        (classes_study, {"model": {"name": "unet"}}, "cannot do classification"),
        (masks_study, {"model": {"name": "densenet121"}}, "cannot do segmentation"),
        (masks_study, {"strategy": {"name": "fedbn"}}, "model.norm: batch or group"),
        (classes_study, {"strategy": {"name": "fedbn"}}, "model.norm: batch or group"),
        (classes_study, {"training": {"epochs": 1}}, "exactly one of epochs and steps"),
        (classes_study, {"training": {"steps": None}}, "exactly one of epochs and steps"),
        (classes_study, {"model": {"name": "logistic", "inputs": 15}}, "model.inputs must be 16"),
        (masks_study, {"data": {"preprocessing": {"normalise": "none", "size": [8, 9]}}}, "multiples of 2"),
        (masks_study, {"model": {"name": "unet", "channels": [4, 8, 8, 8], "norm": "instance"}}, "one pixel"),
        (classes_study, {"rounds": {"count": 1, "sites_per_round": 2, "minimum_sites": 3}}, "sites_per_round"),
        (classes_study, {"rounds": {"count": 2, "average_last": 3}}, "average_last must be at most count"),
        (
            classes_study,
            {"rounds": {"count": 2, "average_last": 2, "average_decay": 0.9}},
            "average_decay goes neither",
        ),
        (classes_study, {"rounds": {"converged": {"rounds": 2}, "average_decay": 0.9}}, "average_decay goes neither"),
        (classes_study, {"rounds": {"average_decay": 1.0}}, "less than 1"),
        (classes_study, {"rounds": {"count": 1, "patience_s": float("inf")}}, "finite"),
        (classes_study, {"data": {"classes": ["a/b", "c"]}}, "classes must"),
        (classes_study, {"data": {"classes": ["a\nb", "c"]}}, "classes must"),
        (classes_study, {"data": {"classes": ["GTV-1", "gtv 1"]}}, "letters and digits"),
        (classes_study, {"data": {"classes": ["?", "c"]}}, "letters and digits"),
        (masks_study, {"data": {"label_map": {"GTV": "spot", "gtv.": "background"}}}, "to two classes"),
        (classes_study, {"privacy": {}}, "mode"),
        (classes_study, {"privacy": CLIENT_LEVEL}, "mode: msa1"),
        (classes_study, {"privacy": CLIENT_LEVEL, "secure_aggregation": narrow(16)}, "use ring_bits: 32"),
        (classes_study, {"privacy": CLIENT_LEVEL, "secure_aggregation": narrow(20)}, "use ring_bits: 32"),
        (masks_study, {**HEAD, "model": {"name": "unet", "channels": [4, 8], "norm": "batch"}}, "group or instance"),
        (masks_study, {**HEAD, "strategy": {"name": "personal-layers"}}, "or train_only: all"),
        (classes_study, {"name": "Not A Name"}, "pattern"),
        (classes_study, {"purpose": "harmless\x1b[8m, and hidden"}, "control character"),
        (classes_study, {"ethics": "2026\u202e321"}, "control character"),
        (classes_study, {"model": {"name": "os.system"}}, "name"),
        (classes_study, {"code": "print()"}, "Extra inputs"),
    ],
)
def test_what_could_never_run_is_refused_with_the_way_out(make: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        make(**changes)


def test_privacy_and_secure_aggregation_must_be_written() -> None:
    for section in ("privacy", "secure_aggregation"):
        content = classes_study().model_dump(mode="json")
        del content[section]
        with pytest.raises(ValidationError, match=f"{section}\n  Field required"):
            Study.model_validate(content)


def from_bytes(data: bytes) -> Study:
    return Study.from_canonical(data, digest=hashlib.sha256(data).hexdigest())


def test_a_received_study_with_another_digest_is_refused() -> None:
    study = classes_study()
    with pytest.raises(ProtocolError, match="digest"):
        Study.from_canonical(study.canonical(), digest="0" * 64)
    with pytest.raises(ProtocolError, match="digest"):
        Study.from_canonical(study.canonical().replace(b"tiny", b"tinx"), digest=study.digest)


def test_a_received_study_that_is_too_large_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(ProtocolError, match="larger than"):
        from_bytes(b" " * (MAX_STUDY_BYTES + 1))


def test_a_received_study_that_is_not_canonical_is_refused() -> None:
    content = json.loads(classes_study().canonical())
    with pytest.raises(ProtocolError, match="canonical"):
        from_bytes(json.dumps(content).encode())
    content["training"]["learning_rate"] = "0.5"  # pydantic would take the text as a number
    with pytest.raises(ProtocolError, match="canonical"):
        from_bytes(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def test_a_network_this_release_does_not_know_is_told_with_those_it_knows() -> None:
    data = classes_study().canonical().replace(b'"name":"logistic"', b'"name":"resnet-9000"')
    with pytest.raises(ProtocolError, match=r"cannot build the study: model: .*'unet', 'densenet121'"):
        from_bytes(data)


@given(st.one_of(st.binary(max_size=200), st.integers(0, len(classes_study().canonical()) - 1)))
def test_damaged_bytes_are_a_protocol_error_or_another_valid_study(cut: bytes | int) -> None:
    data = cut if isinstance(cut, bytes) else classes_study().canonical()[:cut]
    with pytest.raises(ProtocolError):
        from_bytes(data)


@given(st.sampled_from([b"NaN", b"Infinity", b"-Infinity", b"1e999"]))
def test_numbers_that_are_not_finite_are_a_protocol_error(number: bytes) -> None:
    data = classes_study().canonical()
    assert b'"patience_s":5.0' in data
    with pytest.raises(ProtocolError):
        from_bytes(data.replace(b'"patience_s":5.0', b'"patience_s":' + number))


def test_a_changed_copy_has_a_digest_of_its_own() -> None:
    study = classes_study()
    before = study.digest
    assert study.model_copy(update={"seed": 5}).digest == classes_study(seed=5).digest != before
    assert study.model_copy().digest == before
    assert not study.demands.site_state
    assert study.model_copy(update={"strategy": ScaffoldSettings()}).demands.site_state
    assert study == classes_study()  # knowing its digest does not make a study another one
