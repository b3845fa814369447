"""The environment that Flower and OpenMP find."""

from __future__ import annotations

import os
import subprocess
import sys


def value_of(name: str, **environment: str) -> str:
    code = f"import medfl.shared.environment, os; print(os.environ[{name!r}])"
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_telemetry_cannot_be_switched_on_from_outside() -> None:
    assert value_of("FLWR_TELEMETRY_ENABLED", FLWR_TELEMETRY_ENABLED="1") == "0"


def test_threads_wait_passively_unless_the_administrator_says_otherwise() -> None:
    assert value_of("OMP_WAIT_POLICY", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"


def test_flower_has_read_the_setting_when_it_is_imported_through_us() -> None:
    code = "import medfl.client.fleet, flwr.supercore.telemetry as t; print(t.FLWR_TELEMETRY_ENABLED)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
