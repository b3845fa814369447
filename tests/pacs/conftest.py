"""The PACS of these tests. Outside of a loopback-only namespace they skip, and ``test_in_namespace.py`` makes one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from orthanc import Pacs, alone

from medfl.simulations.demo import free_port


@pytest.fixture(scope="session")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pacs]:
    if not shutil.which("Orthanc"):
        pytest.skip("Orthanc is not installed: apt-get install orthanc orthanc-dicomweb orthanc-gdcm")
    if not alone():
        pytest.skip("needs a namespace with loopback only: see test_in_namespace.py, which makes one")
    pacs = Pacs(tmp_path_factory.mktemp("pacs"), free_port(), free_port(), free_port())
    pacs.start()
    yield pacs
    pacs.stop()


@pytest.fixture
def pacs(orthanc: Pacs) -> Pacs:
    """The PACS, running and empty."""
    if orthanc.process is None:
        orthanc.start()
    orthanc.clear()
    return orthanc
