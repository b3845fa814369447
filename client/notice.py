"""What a site's node tells of a message before it fetches it: the ground on which it is let in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Notice:
    """What is known of a message before anything of its content is fetched."""

    message_type: str
    group: str  # the round, where the sender says
    study: str
    digest: str  # the study's, as the coordinator claims
    run_id: int
    series_id: int
