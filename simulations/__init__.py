"""Many virtual sites on one machine, phantoms, baselines.

from medfl.simulations import load_simulation, run_experiment

experiment = run_experiment(load_simulation("configs/vessels.yaml"))
experiment.to_dataframe()
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medfl.simulations.config import SimulationSettings
    from medfl.simulations.experiment import run_experiment
    from medfl.simulations.results import Experiment

__all__ = ["Experiment", "load_simulation", "run_experiment"]


def load_simulation(path: str | Path) -> SimulationSettings:
    """The simulation that the YAML file ``path`` describes. Raises ConfigError, one line per mistake."""
    from medfl.shared.config import load_settings
    from medfl.simulations.config import SimulationSettings

    return load_settings(Path(path), SimulationSettings)


def __getattr__(name: str) -> Any:
    """PyTorch and Flower are imported when something is run, not when ``medfl-sim --help`` is asked."""
    if name == "run_experiment":
        from medfl.simulations.experiment import run_experiment

        return run_experiment
    if name == "Experiment":
        from medfl.simulations.results import Experiment

        return Experiment
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
