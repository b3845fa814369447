"""The coordinator's record of each site's privacy ledger, so that a ledger restored from a backup shows."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Message

from medfl.server.stage import Stages
from medfl.shared.errors import DataError
from medfl.shared.files import write_whole
from medfl.shared.messages import Kind, LedgerHead

log = logging.getLogger("medfl.server")

_AGREED = "agreed"
_DEADLINE_S = 60.0


class Heads:
    """Before each private round, every site compares its ledger with the head recorded of it, and tells the new one."""

    def __init__(self, study: str, stages: Stages, path: Path | None) -> None:
        """``path`` keeps the record over restarts; None keeps it in this process.

        Raises:
            DataError: the record is damaged; without it a site could spend twice unseen.
        """
        self._study = study
        self._stages = stages
        self._path = path
        self._heads: dict[str, LedgerHead] = {}
        if path is not None and path.exists():
            try:
                content = json.loads(path.read_bytes())
                self._heads = {site: LedgerHead(study, int(rows), str(head)) for site, (rows, head) in content.items()}
            except (ValueError, TypeError, AttributeError):
                raise DataError(f"{path} cannot be read: restore it from the backup of this run's folder") from None

    def agree(self, number: int, cohort: Mapping[int, str]) -> tuple[dict[int, str], dict[str, str]]:
        """The sites whose ledgers are as recorded, and a word about every other. New heads are durable on return."""
        messages = [
            Message(
                self._heads.get(site, LedgerHead(self._study, 0, "")).record(),
                dst_node_id=node,
                message_type=Kind.LEDGER.value,
                ttl=_DEADLINE_S,
            )
            for node, site in cohort.items()
        ]

        def take(site: str, reply: Message) -> str:
            self._heads[site] = LedgerHead.parse_reply(reply.content)
            return _AGREED

        outcomes: dict[str, str] = {}
        self._stages.run(number, "ledgers", messages, cohort, outcomes, take=take)
        if self._path is not None:
            heads = {site: (head.rows, head.digest) for site, head in self._heads.items()}
            write_whole(self._path, json.dumps(heads).encode())
        agreed = {node: site for node, site in cohort.items() if outcomes.get(site) == _AGREED}
        return agreed, {site: why for site, why in outcomes.items() if why != _AGREED}
