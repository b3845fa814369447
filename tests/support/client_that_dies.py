"""``medfl-client`` that kills itself once in a given phase of the sum of its next update, its answer still unsent.

Used as a module: ``main([PHASE, *arguments of medfl-client])``. The answer is worked out and in the journal by then:
that is when most could be lost, or answered twice.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from medfl.client import cli
from medfl.client.participant import Participant
from medfl.client.secagg.session import SecureSite
from medfl.shared.secagg.exchange import Phase, PhaseReply, PhaseRequest


def main(arguments: list[str]) -> int:
    """Run the command, until it is killed."""
    last, armed = Phase(arguments[0]), False
    hold_update, answer = Participant.hold_update, SecureSite.answer

    def holds(self: Participant, *update: Any, **more: Any) -> Any:
        nonlocal armed
        armed = True
        return hold_update(self, *update, **more)

    def answers(self: SecureSite, phase: Phase, request: PhaseRequest, **more: Any) -> PhaseReply:
        reply = answer(self, phase, request, **more)
        if armed and phase is last:
            os.kill(os.getpid(), signal.SIGKILL)
        return reply

    Participant.hold_update = holds  # type: ignore[method-assign]
    SecureSite.answer = answers  # type: ignore[method-assign]
    return cli.main(arguments[1:])
