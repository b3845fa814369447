"""Approving and withdrawing a study: in the running node through its socket, or on the disk while none runs."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from contextlib import closing
from typing import TypeVar

from pydantic import Field

from medfl.client.approvals import Approvals, Decision
from medfl.client.audit import Audit
from medfl.client.config import SiteSettings
from medfl.client.policy import Digest
from medfl.client.records import FolderRecords
from medfl.client.trust import approvals_of
from medfl.shared.admin import AdminSocket, Nothing, NotRunning, Verb, ask
from medfl.shared.audit_log import audit_file
from medfl.shared.config import Settings
from medfl.shared.study import Words

Q = TypeVar("Q", bound=Settings)


class Approval(Settings):
    """A person of the site approves a study."""

    study: Digest
    by: Words = Field(min_length=1, max_length=200)
    ethics: Words = Field(default="", max_length=200)


class Withdrawal(Settings):
    """A person of the site takes the site out of a study."""

    study: Digest
    by: Words = Field(min_length=1, max_length=200)


APPROVE = Verb("approve", Approval, Nothing)
WITHDRAW = Verb("withdraw", Withdrawal, Nothing)


class Decisions:
    """What both do, in whichever process holds the site's state.

    ``forget`` lets go of what was kept for a study; ``take_up`` undoes that after an approval, and ``changed`` is told.
    """

    def __init__(
        self,
        approvals: Approvals,
        audit: Audit,
        *,
        forget: Callable[[str], None],
        take_up: Callable[[str], None] = lambda digest: None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._approvals, self._audit, self._changed = approvals, audit, changed
        self._forget, self._take_up = forget, take_up

    def serve(self, admin: AdminSocket) -> None:
        """Do it when asked through ``admin``."""
        admin.serve(APPROVE, self.approve)
        admin.serve(WITHDRAW, self.withdraw)

    def approve(self, asked: Approval) -> Nothing:
        """Write it to the audit log, then to the disk; it counts when both are done. Raises PolicyRefusal."""
        self._audit.decided(asked.study, approved=True, by=asked.by, ethics=asked.ethics)
        self._approvals.decide(asked.study, _decision(approved=True, by=asked.by, ethics=asked.ethics))
        self._take_up(asked.study)
        self._changed()
        return Nothing()

    def withdraw(self, asked: Withdrawal) -> Nothing:
        """Stop first: from here on nothing leaves and training ends. Then delete, then write the audit log."""
        self._approvals.decide(asked.study, _decision(approved=False, by=asked.by))
        self._forget(asked.study)
        self._audit.decided(asked.study, approved=False, by=asked.by)
        return Nothing()


def approve(settings: SiteSettings, asked: Approval) -> bool:
    """Approve a study at this site; whether a node runs, in which it counts already.

    Raises:
        ConfigError, DataError, NetworkError, PolicyRefusal: why it could not be done.
    """
    return _put(settings, APPROVE, asked, Decisions.approve)


def withdraw(settings: SiteSettings, asked: Withdrawal) -> bool:
    """Withdraw a study at this site; as :func:`approve`."""
    return _put(settings, WITHDRAW, asked, Decisions.withdraw)


def _put(settings: SiteSettings, verb: Verb[Q, Nothing], asked: Q, do: Callable[[Decisions, Q], Nothing]) -> bool:
    """Ask the running node (True), or ``do`` it here where none runs."""
    try:
        ask(settings.state, verb, asked)
    except NotRunning:
        with closing(Audit(audit_file(settings.state))) as audit:
            forget = FolderRecords(settings.state).forget
            do(Decisions(approvals_of(settings), audit, forget=forget), asked)
        return False
    return True


def _decision(*, approved: bool, by: str, ethics: str = "") -> Decision:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return Decision(approved=approved, by=by, ethics=ethics, at=now)
