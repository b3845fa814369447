"""The five commands from nothing to a node that trains, as each of them shows where one stands."""

from __future__ import annotations

from collections.abc import Sequence

STEPS = (
    ("coordinator", "medfl-server init FOLDER --host HOST"),
    ("each site", "medfl-client --site site.yaml enroll --name NAME"),
    ("coordinator", "medfl-server --config FILE approve request.json"),
    ("each site", "medfl-client --site site.yaml join invitation.json"),
    ("each site", "medfl-client --site site.yaml"),
)
"""Who, and what. The coordinator's own ``medfl-server --config FILE`` runs meanwhile."""


def checklist(steps: Sequence[tuple[str, str]], *, done: int) -> str:
    """``steps`` with those that are ``done`` ticked, and the next one pointed at."""
    lines = []
    for number, (who, command) in enumerate(steps, 1):
        mark = "x" if number <= done else " "
        arrow = "  <- next" if number == done + 1 else ""
        lines.append(f"  [{mark}] {number}. {who + ':':13}{command}{arrow}")
    return "\n".join(lines)
