"""Runs the tests of this folder inside a network namespace where only loopback exists."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def in_namespace(*command: str) -> list[str]:
    return ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$0" "$@"', *command]


@pytest.mark.network
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["test_fetch.py", "test_federation_from_pacs.py"])
def test_the_pacs_tests_pass_where_nothing_but_loopback_exists(name: str) -> None:
    if not shutil.which("Orthanc"):
        pytest.skip("Orthanc is not installed: apt-get install orthanc orthanc-dicomweb orthanc-gdcm")
    if not shutil.which("unshare") or subprocess.run(in_namespace("true"), capture_output=True).returncode:
        pytest.skip("network namespaces are not available (unshare -rn)")
    if len(Path("/proc/net/dev").read_text().splitlines()) == 3:
        pytest.skip("already inside a namespace with loopback only")
    here = Path(__file__)
    inside = here.with_name(name)
    result = subprocess.run(
        in_namespace(sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", str(inside)),
        cwd=here.parents[2], capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert "skipped" not in result.stdout
