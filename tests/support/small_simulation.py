"""The example of docs/examples, made small: one data set of drawn pictures among four sites."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]


def example() -> Any:
    spec = importlib.util.spec_from_file_location("example", ROOT / "docs" / "examples" / "compare_algorithms.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def simulation(folder: Path, **changes: Any) -> Path:
    loaded = example()
    loaded.draw_pictures(folder, 80)
    small = {
        "partition": {"sites": 4},
        "seeds": [0, 1],
        "variants": {"fedavg": {}, "fedprox": {"strategy": {"name": "fedprox"}}},
    }
    content = loaded.SIMULATION | small | changes
    content["study"] = content["study"] | {"rounds": {"count": 2, "minimum_sites": 2}}
    path = folder / "simulation.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
