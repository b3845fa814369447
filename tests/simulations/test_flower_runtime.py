"""The same ClientApp and ServerApp under Flower's own machinery."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import flower_simulation
import pytest
from flower_simulation import NAMES, study
from tiny import site_data

from medfl.shared.weights import weights_digest
from medfl.simulations.federation import federate


@pytest.mark.timeout(280)
def test_flowers_own_simulation_ends_with_the_very_bits_of_ours(tmp_path: Path) -> None:
    program = Path(flower_simulation.__file__)
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(program.parent)},  # Ray's workers need it too
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    data = {name: site_data(study(), seed=number) for number, name in enumerate(NAMES)}
    ours = federate(study(), data).result
    assert done.stdout.splitlines()[-1] == f"done 2 {weights_digest(ours.weights)}"
