from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import classes_study, masks_study

from medfl.server.checkpoint import Checkpoint, CheckpointFolder, Metrics, save_model
from medfl.server.convergence import Best
from medfl.shared.algorithms.travel import build_study_network, layouts
from medfl.shared.initial_weights import digest_of, read_initial
from medfl.shared.study import Study

STUDY = classes_study()


def checkpoint(number: int) -> Checkpoint:
    return Checkpoint(
        STUDY.digest,
        number,
        np.array([number, -number, 1 / 3], np.float32),
        {"m_t": np.array([0.5], np.float32), "v_t": np.array([number], np.float32)},
        series=2**60 + number,
        average=np.array([number / 3], np.float32),
        epoch=number + 1,
        metrics=Metrics({"a": "trained"}, {"loss": 0.1 * number}, 40 * number, Best(1 / 3, number)),
    )


def same(one: Checkpoint | None, other: Checkpoint) -> bool:
    return (
        one is not None
        and (one.study, one.round, one.series, one.epoch) == (other.study, other.round, other.series, other.epoch)
        and one.metrics == other.metrics
        and one.average is not None
        and other.average is not None
        and one.average.tobytes() == other.average.tobytes()
        and one.weights.tobytes() == other.weights.tobytes()
        and {k: v.tolist() for k, v in one.strategy.items()} == {k: v.tolist() for k, v in other.strategy.items()}
    )


def newest(folder: Path) -> Path:
    return folder / "checkpoint.safetensors"


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    CheckpointFolder(tmp_path).save(checkpoint(3))
    assert same(CheckpointFolder(tmp_path).load(STUDY), checkpoint(3))


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path).load(STUDY) is None


def test_the_newest_is_used_and_the_one_before_is_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for number in (1, 2, 3):
        folder.save(checkpoint(number))
    assert same(folder.load(STUDY), checkpoint(3))
    newest(tmp_path).unlink()
    assert same(folder.load(STUDY), checkpoint(2))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_coordinator_killed_between_the_two_renames_goes_on_from_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(checkpoint(1))

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("medfl.server.checkpoint.write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.save(checkpoint(2))
    monkeypatch.undo()
    assert not newest(tmp_path).exists()
    assert same(CheckpointFolder(tmp_path).load(STUDY), checkpoint(1))
    folder.save(checkpoint(2))
    assert same(folder.load(STUDY), checkpoint(2))


@pytest.mark.parametrize(
    "damage", ["cut", "flip", "flip state", "flip number", "empty", "other file", "no metadata", "list"]
)
def test_a_damaged_newest_is_told_and_the_one_before_is_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.numpy import save

    folder = CheckpointFolder(tmp_path)
    folder.save(checkpoint(1))
    folder.save(checkpoint(2))
    content = newest(tmp_path).read_bytes()
    weights = checkpoint(2).weights.tobytes()
    momentum = np.array([0.5], np.float32).tobytes()
    newest(tmp_path).write_bytes(
        {
            "cut": content[:-3],
            "flip": content.replace(weights, bytes([weights[0] ^ 1]) + weights[1:]),
            "flip state": content.replace(momentum, bytes([momentum[0] ^ 1]) + momentum[1:]),
            "flip number": content.replace(b'\\"received_bytes\\": 80', b'\\"received_bytes\\": 81'),
            "empty": b"",
            "other file": b"not a safetensors file at all",
            "no metadata": save({"weights": checkpoint(2).weights}),
            "list": save({"weights": checkpoint(2).weights}, metadata={"medfl": "[]"}),
        }[damage]
    )
    assert newest(tmp_path).read_bytes() != content
    assert same(CheckpointFolder(tmp_path).load(STUDY), checkpoint(1))
    assert "damaged" in caplog.text


def test_a_damaged_newest_never_takes_the_place_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(checkpoint(1))
    folder.save(checkpoint(2))
    newest(tmp_path).write_bytes(b"damaged")
    assert same(folder.load(STUDY), checkpoint(1))

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("medfl.server.checkpoint.write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.save(checkpoint(2))
    assert same(CheckpointFolder(tmp_path).load(STUDY), checkpoint(1))


def test_a_checkpoint_of_another_study_is_not_used(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(checkpoint(1))
    assert folder.load(classes_study(seed=1)) is None


@pytest.mark.parametrize(
    "study",
    [classes_study(), masks_study(), masks_study(training={"train_only": "head"})],
    ids=["classes", "masks", "head"],
)
def test_the_finished_model_loads_into_the_network_by_its_own_names(tmp_path: Path, study: Study) -> None:
    network = build_study_network(study)
    layout, _ = layouts(study, network)
    weights = np.linspace(-1, 1, layout.length, dtype=np.float32)
    save_model(tmp_path / "model.safetensors", study, layout, weights, round_number=4)
    again = build_study_network(study)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    layout.load(weights, network)
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_the_finished_model_names_its_study_and_round(tmp_path: Path) -> None:
    layout, _ = layouts(STUDY, build_study_network(STUDY))
    save_model(tmp_path / "m", STUDY, layout, np.zeros(layout.length, np.float32), round_number=4)
    with safe_open(tmp_path / "m", framework="numpy") as file:
        about = file.metadata()
    assert about["round"] == "4"
    assert Study.from_canonical(about["study"].encode(), digest=about["digest"]) == STUDY


def test_equal_models_are_equal_files_and_begin_a_study_by_one_name(tmp_path: Path) -> None:
    study = classes_study(purpose="Ein Modell für alle Kliniken")  # two bytes of one letter
    layout, _ = layouts(study, build_study_network(study))
    weights = np.linspace(-1, 1, layout.length, dtype=np.float32)
    for number in range(12):  # three entries have six orders
        save_model(tmp_path / f"{number}", study, layout, weights, round_number=4)
    assert len({digest_of(read_initial(tmp_path / f"{number}")) for number in range(12)}) == 1
    header = (tmp_path / "0").read_bytes()
    assert int.from_bytes(header[:8], "little") % 8 == 0
    with safe_open(tmp_path / "0", framework="numpy") as file:
        assert sorted(file.metadata()) == ["digest", "round", "study"]
        assert Study.from_canonical(file.metadata()["study"].encode(), digest=file.metadata()["digest"]) == study
    network = build_study_network(study)
    network.load_state_dict(load_file(tmp_path / "0"))
    assert layout.flatten(network.state_dict()).tobytes() == weights.tobytes()


def test_what_kills_left_of_unfinished_checkpoints_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = tmp_path / f".checkpoint.safetensors.{dead.pid}.part"
    left.write_bytes(b"half a checkpoint")
    others = tmp_path / ".checkpoint.safetensors.1.part"  # of a process that lives
    others.write_bytes(b"another's")
    CheckpointFolder(tmp_path).save(checkpoint(1))
    assert (left.exists(), others.exists()) == (False, True)


def test_scores_are_marked_with_the_best_of_them(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    assert folder.evaluated() == (0, None)
    folder.mark_evaluated(3)
    assert folder.evaluated() == (3, None)
    folder.mark_evaluated(4, Best(1 / 3, 2))
    assert CheckpointFolder(tmp_path).evaluated() == (4, Best(1 / 3, 2))
    (tmp_path / "evaluated.json").write_bytes(b"[]")
    assert folder.evaluated() == (0, None)
