"""A site's place in a roster."""

from __future__ import annotations

import pytest
from secagg_world import Consortium

from medfl.client.secagg.enrolment import Enrolment
from medfl.shared.errors import ConfigError, ProtocolError


def test_a_sum_under_any_other_roster_is_refused() -> None:
    world = Consortium(3)
    enrolment = Enrolment(1, world.keys[1], world.roster)
    assert enrolment.under(world.roster.digest) is enrolment
    with pytest.raises(ProtocolError):
        enrolment.under(bytes(32))


@pytest.mark.parametrize(("site", "keys_of"), [(9, 1), (1, 2)])
def test_a_site_is_the_one_that_the_roster_knows_under_its_key(site: int, keys_of: int) -> None:
    world = Consortium(3)
    with pytest.raises(ConfigError, match="does not have this site's key"):
        Enrolment(site, world.keys[keys_of], world.roster)
