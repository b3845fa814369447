"""What every test shares: quick, repeatable property tests; a second try for tests of real processes and clocks."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

import medfl.shared.environment  # noqa: F401 - before flwr, whichever test comes first

_LONG = ("tests/e2e/", "tests/federation/", "tests/pacs/")
# They kill and time real processes: on a machine that is busy with something else one may fail by chance.
_BUSY = (
    *_LONG,
    "tests/client/privacy/test_ledger_kill.py",
    "tests/server/test_longpoll.py",
    "tests/shared/test_admin.py",
    "tests/shared/test_lifeline.py",
    "tests/shared/test_supervision.py",
    "tests/simulations/test_flower_runtime.py",
    "tests/simulations/test_pool.py",
    "tests/simulations/test_processes.py",
    "tests/simulations/test_ray_engine.py",
)

settings.register_profile(
    "medfl",
    deadline=None,
    max_examples=60,
    derandomize=True,  # the same examples everywhere, so that a red run can be repeated
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("medfl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, those that start processes: then no worker is left alone with one at the end.

    Tests of processes and clocks, and only these, are tried once more when they fail, and named: any other test that
    fails by chance is a fault.
    """
    items.sort(key=lambda item: not item.nodeid.startswith(_LONG))
    for item in items:
        if item.nodeid.startswith(_BUSY):
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    """Commands send the log to the standard error of their moment, which pytest takes away after each test."""
    loggers = [logging.getLogger(name) for name in ("medfl", "medfl.site", "medfl.server", "flwr", "pydicom")]
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    yield
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate = propagate
        logger.handlers[:] = handlers
