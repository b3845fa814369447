"""Who takes part in the next round: a quorum is waited for, and so is who is about to be back."""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Mapping
from threading import Event

from medfl.server.admission import Admission, Directory
from medfl.server.reporter import Reporter
from medfl.shared.study import Study

_SETTLE_S = 30.0  # before the first round, sites that are still loading their images are awaited this long
_RETURN_S = 10.0  # after a restart, those of the last round: a site dials again within half of that
_POLL_S = 0.1


class Gathering:
    """Waits for the sites of each round, and draws among them where the study asks for some only."""

    def __init__(
        self, study: Study, admission: Admission, directory: Directory, reporter: Reporter, stop: Event
    ) -> None:
        self._study, self._admission, self._directory = study, admission, directory
        self._reporter, self._stop = reporter, stop
        self._expected: frozenset[str] = frozenset()

    def expect(self, sites: Collection[str]) -> None:
        """After a restart: these took part in the last round, and are about to be back."""
        self._expected = frozenset(sites)

    def gather(self, done: int, *, quorum: int, until: float) -> Mapping[int, str]:
        """The sites of the round after ``done``; none when no quorum came in time or the study is stopped."""
        now = time.monotonic()
        settled, returned = now + (_SETTLE_S if done == 0 else 0.0), now + _RETURN_S
        while not self._stop.is_set() and self._admission.may_still_be(quorum):
            self._admission.refresh()
            ready = self._admission.taking_part()
            now = time.monotonic()
            back = not self._expected or self._expected <= set(ready.values()) or now > returned
            if len(ready) >= quorum and back and (self._admission.awaited == 0 or now > settled):
                self._expected = frozenset()
                self._reporter.gathered(self._admission.refusals)
                return self._sample(done, ready)
            online = sorted(self._directory.online().values())
            self._reporter.waiting(online, sorted(ready.values()), quorum, self._admission.refusals)
            if now > until:
                break
            self._stop.wait(_POLL_S)
        return {}

    def _sample(self, done: int, ready: Mapping[int, str]) -> Mapping[int, str]:
        size = self._study.rounds.sites_per_round
        if size is None or size >= len(ready):
            return ready
        drawn = random.Random(f"{self._study.seed}/{done}")
        return {node: ready[node] for node in sorted(drawn.sample(list(ready), size))}
