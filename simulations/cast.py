"""Which virtual sites cheat, are slow, join late or do not train."""

from __future__ import annotations

from collections.abc import Sequence

from medfl.simulations.config import Attacker, SimulationSettings
from medfl.simulations.pace import Rhythm


def attackers_of(settings: SimulationSettings, names: Sequence[str]) -> dict[str, Attacker]:
    """Which sites cheat, and how."""
    if (how := settings.partition) is not None:
        return dict.fromkeys(names[: how.attackers], how.attacker)
    return {site.name: site.attacker for site in settings.sites if site.attacker is not None and not site.held_out}


def held_out_of(settings: SimulationSettings, names: Sequence[str]) -> tuple[str, ...]:
    """Sites that do not train."""
    if (how := settings.partition) is not None:
        return tuple(names[len(names) - how.held_out :])
    return tuple(site.name for site in settings.sites if site.held_out)


def rhythms_of(settings: SimulationSettings, names: Sequence[str]) -> dict[str, Rhythm]:
    """How fast each site is and when it joins; empty where all are alike, and time need not be reckoned."""
    if (how := settings.partition) is not None:
        training = names[: len(names) - how.held_out]
        return {name: Rhythm(how.slowness) for name in training[len(training) - how.stragglers :]}
    rhythms = {site.name: Rhythm(site.slowness, site.joins) for site in settings.sites if not site.held_out}
    return rhythms if set(rhythms.values()) != {Rhythm()} else {}
