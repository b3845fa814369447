"""Every simulation among the ready-made files is one, and what it compares can be built."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from medfl.shared.algorithms.travel import build_study_network, layouts
from medfl.shared.initial_weights import read_initial
from medfl.simulations import load_simulation
from medfl.strategies.build import build_strategy

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SIMULATIONS = [path for path in sorted(CONFIGS.glob("*.yaml")) if "study" in yaml.safe_load(path.read_text())]


def test_there_are_simulations() -> None:
    assert {"lungs.yaml", "tuberculosis.yaml", "vessels.yaml", "vessels_strategies.yaml"} <= {
        path.name for path in SIMULATIONS
    }


@pytest.mark.parametrize("path", SIMULATIONS, ids=lambda path: path.stem)
def test_each_variant_has_a_network_and_a_strategy(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDFL_DATA", "/nowhere")
    simulation = load_simulation(path)
    begins_with = simulation.initial_weights and read_initial(simulation.initial_weights)
    for study in simulation.studies().values():
        travel, _ = layouts(study, build_study_network(study, begins_with))
        assert travel.length > 0
        build_strategy(study)
