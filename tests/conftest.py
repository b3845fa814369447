"""What every test shares: quick, repeatable property tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

import medfl.shared.environment  # noqa: F401 - before flwr, whichever test comes first

_LONG = {"e2e", "federation", "pacs"}

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
    """The longest tests first, those that start processes: then no worker is left alone with one at the end."""
    items.sort(key=lambda item: not set(item.path.parts) & _LONG)


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
