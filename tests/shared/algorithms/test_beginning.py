from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save
from tiny import classes_study, masks_study

from medfl.shared.algorithms import beginning
from medfl.shared.algorithms.beginning import begin, begin_apart, begin_once
from medfl.shared.algorithms.travel import build_study_network
from medfl.shared.errors import ConfigError
from medfl.shared.initial_weights import digest_of
from medfl.shared.study import Study


@pytest.mark.parametrize("study", [classes_study(seed=3), masks_study()])
def test_the_first_model_has_the_same_bits_from_a_process_of_its_own(study: Study) -> None:
    here, there = begin(study), begin_apart(study)
    assert here.layout == there.layout
    assert here.weights.tobytes() == there.weights.tobytes()


@pytest.mark.parametrize("train_only", ["all", "head"])
def test_initial_weights_reach_the_process_of_its_own(train_only: str) -> None:
    content = save({name: t + 1 for name, t in build_study_network(masks_study()).state_dict().items()})
    study = masks_study(initial_weights=digest_of(content), training={"train_only": train_only})
    here, there = begin(study, content), begin_apart(study, content)
    assert here.layout == there.layout
    assert here.weights.tobytes() == there.weights.tobytes()
    assert here.weights.tobytes() != begin(masks_study(training={"train_only": train_only})).weights.tobytes()
    with pytest.raises(ConfigError, match="begins with weights of its own"):
        begin_apart(study)


def test_a_study_that_leaves_nothing_to_send_is_refused_there_as_here() -> None:
    study = classes_study(strategy={"name": "personal-layers", "layers": ["9"]})
    with pytest.raises(ConfigError) as here:
        begin(study)
    with pytest.raises(ConfigError) as there:
        begin_apart(study)
    assert str(here.value) in str(there.value)


def test_a_coordinator_does_not_import_pytorch() -> None:
    code = "import sys, medfl.server.coordinator; assert not {'torch', 'monai'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_first_model_is_made_once_and_again_where_it_is_damaged_or_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, other, made = classes_study(), classes_study(seed=1), []

    def make(study: Study, initial: bytes | None) -> bytes:
        made.append(study.seed)
        return beginning._in_bytes(begin(study, initial), study)

    monkeypatch.setattr(beginning, "_made_apart", make)
    path = tmp_path / "first"
    for _ in range(2):
        assert begin_once(study, path).weights.tobytes() == begin(study).weights.tobytes()
    assert made == [0]
    assert begin_once(other, path).weights.tobytes() == begin(other).weights.tobytes()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    begin_once(other, path)
    path.write_bytes(b"")
    begin_once(other, path)
    assert made == [0, 1, 1, 1]
