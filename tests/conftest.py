"""What every test shares: quick, repeatable property tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

import medfl.shared.environment  # noqa: F401 - before flwr, whichever test comes first

_ONE_AT_A_TIME = {"e2e", "federation", "pacs"}

settings.register_profile(
    "medfl",
    deadline=None,
    max_examples=60,
    derandomize=True,  # the same examples everywhere, so that a red run can be repeated
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("medfl")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start processes, or talk over sockets with deadlines, run first and one after the other."""
    alone = [item for item in items if set(item.path.parts) & _ONE_AT_A_TIME or item.get_closest_marker("e2e")]
    for item in alone:
        item.add_marker(pytest.mark.xdist_group("processes"))
    items[:] = alone + [item for item in items if item not in set(alone)]


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
