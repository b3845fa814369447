"""What an installed wheel must do outside the checkout; run by .ci/run in a clean environment, not by pytest."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import pkgutil
import subprocess
import sys
from pathlib import Path

import medfl.client
import medfl.configs
import medfl.server
import medfl.shared
import medfl.simulations
import medfl.strategies

packages = (medfl.shared, medfl.strategies, medfl.server, medfl.client, medfl.simulations, medfl.configs)
for package in packages:
    assert "site-packages" in str(package.__path__[0]), f"{package.__name__} does not come from the wheel"
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        __import__(module.name)
assert (importlib.resources.files("medfl.configs") / "demo_study.yaml").is_file()
for command in ("medfl-server", "medfl-client", "medfl-sim"):
    said = subprocess.run(
        [Path(sys.executable).parent / command, "--version"], capture_output=True, text=True, check=True
    )
    assert importlib.metadata.version("medfl") in said.stdout
print(f"wheel {importlib.metadata.version('medfl')}: {len(packages)} packages import, three commands answer")
