"""Every ready-to-run file is what its command reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from medfl.client.config import SiteSettings
from medfl.server.config import ConsortiumSettings
from medfl.shared.config import load_settings
from medfl.shared.study import Study
from medfl.simulations.config import SimulationSettings
from medfl.strategies.build import needs_of

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


def model_of(path: Path) -> type[BaseModel]:
    """Which command reads a file shows in its keys."""
    keys = set(yaml.safe_load(path.read_text("utf-8")))
    match keys:
        case _ if "consortium" in keys:
            return ConsortiumSettings
        case _ if "coordinator" in keys:
            return SiteSettings
        case _ if "study" in keys:
            return SimulationSettings
        case _:
            return Study


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_ready_to_run_file_loads(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEDFL_DATA", str(tmp_path))
    settings = load_settings(path, model_of(path))
    study = settings if isinstance(settings, Study) else getattr(settings, "study", None)
    if study is not None:
        needs_of(study)


def test_there_are_files_to_run() -> None:
    assert {"demo_study.yaml", "lungs.yaml"} <= {path.name for path in CONFIGS}


def test_a_simulation_file_without_its_data_says_which_variable_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDFL_DATA", raising=False)
    path = next(path for path in CONFIGS if path.name == "lungs.yaml")
    with pytest.raises(Exception, match=r"lungs\.yaml:\d+:\d+: sites\.0\.data\.file: .*MEDFL_DATA is not set"):
        load_settings(path, SimulationSettings)
