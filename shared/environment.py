"""The environment of Flower, MONAI, Ray and OpenMP: nothing phones home or installs itself, idle threads sleep.

Flower reads these when it is first imported, so every module that imports flwr (or torch) starts with
``import medfl.shared.environment``. Child processes inherit them.
"""

from __future__ import annotations

import os

from medfl.shared import unused_extras

_ALWAYS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
_UNLESS_SET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # OpenMP's busy waiting made rounds 15 times slower where threads outnumber cores.
    "OMP_WAIT_POLICY": "PASSIVE",
}

os.environ.update(_ALWAYS)
for _name, _value in _UNLESS_SET.items():
    os.environ.setdefault(_name, _value)
unused_extras.install()
