"""One consortium for all tests here, and a lab per test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from certified import Consortium, create_consortium
from federation import Lab


@pytest.fixture(scope="session")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    """Three sites."""
    folder = tmp_path_factory.mktemp("consortium")
    return create_consortium(folder, sites=["north", "south", "west"], hosts=["127.0.0.1", "localhost"])


@pytest.fixture
def lab(consortium: Consortium, tmp_path: Path) -> Iterator[Lab]:
    """Makes links and nodes; stops them all at the end."""
    with ExitStack() as stack:
        lab = Lab(tmp_path, consortium, stack)
        yield lab
        lab.stop_nodes()
