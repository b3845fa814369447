from __future__ import annotations

import subprocess
import sys

import pytest
from tiny import classes_study, masks_study

from medfl.shared.algorithms.beginning import begin, begin_apart
from medfl.shared.errors import ConfigError
from medfl.shared.study import Study


@pytest.mark.parametrize("study", [classes_study(seed=3), masks_study()])
def test_the_first_model_has_the_same_bits_from_a_process_of_its_own(study: Study) -> None:
    here, there = begin(study), begin_apart(study)
    assert here.layout == there.layout
    assert here.weights.tobytes() == there.weights.tobytes()


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
