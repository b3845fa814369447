"""What every test shares: quick, repeatable property tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

import medfl.shared.environment  # noqa: F401 - before flwr, whichever test comes first

settings.register_profile(
    "medfl",
    deadline=None,
    max_examples=60,
    derandomize=True,  # the same examples everywhere, so that a red run can be repeated
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("medfl")
