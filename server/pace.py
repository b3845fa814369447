"""How long each site is waited for: generously by how long it took before, never beyond the study's deadline."""

from __future__ import annotations

from collections import defaultdict, deque

_GENEROUS = 5.0  # times the longest of a site's last answers
_AT_LEAST_S = 30.0  # a restart, a page-out, a neighbour's backup
_REMEMBERED = 5


class Pace:
    """What stages took at each site, and from that how long the next may take there.

    A site that has not answered a stage yet may take the whole deadline, as may one that has missed what it was given
    twice or so: whose work has grown is late once, and not for ever.
    """

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self._took: defaultdict[tuple[str, int], deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))

    def allows(self, stage: str, node: int) -> float:
        """Seconds that ``node`` may take for ``stage``.

        >>> pace = Pace(deadline_s=3600)
        >>> pace.allows("training", 1)
        3600
        >>> pace.took("training", 1, 20.0)
        >>> pace.allows("training", 1)
        100.0
        """
        took = self._took.get((stage, node))
        if not took:
            return self.deadline_s
        return min(self.deadline_s, max(_AT_LEAST_S, _GENEROUS * max(took)))

    def took(self, stage: str, node: int, seconds: float) -> None:
        """``node`` has answered ``stage`` after ``seconds``."""
        self._took[stage, node].append(seconds)

    def missed(self, stage: str, node: int) -> None:
        """``node`` has not answered ``stage`` within what it was allowed: it may take longer the next time."""
        self._took[stage, node].append(self.allows(stage, node))
