"""Which studies may run at a site: what was offered, what a person decided, and what the policy allows by itself.

``studies/DIGEST/offer.signed`` holds an offered study as the consortium signed it, ``decision.json`` beside it what a
person here decided; both are durable before anything follows from them. The node, its gate and the commands all ask
the same :class:`Approvals`.
"""

from __future__ import annotations

import datetime
import threading
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pydantic import Field, ValidationError

from medfl.client.policy import Policy
from medfl.shared.config import Settings
from medfl.shared.errors import DataError, PolicyRefusal, ProtocolError
from medfl.shared.files import private_folder, write_whole
from medfl.shared.signing import Document, Signed
from medfl.shared.study import Study, Words

MOST_UNDECIDED = 100
"""Offered studies that wait for a decision; more are turned away, so that no coordinator fills the disk."""

NOT_APPROVED, WITHDRAWN = "study not approved", "study withdrawn"
"""Reasons of the refusals, as the coordinator sees them."""


class Standing(StrEnum):
    """Whether a study may run here, and why."""

    PENDING = "waits for approval"
    APPROVED = "approved"
    LISTED = "in policy.studies"
    PRE_APPROVED = "in policy.pre_approve"
    WITHDRAWN = "withdrawn"

    @property
    def runs(self) -> bool:
        """Whether it may."""
        return self in (Standing.APPROVED, Standing.LISTED, Standing.PRE_APPROVED)


class Decision(Settings):
    """What a person decided on one study."""

    approved: bool  # False: withdrawn
    by: Words = Field(min_length=1, max_length=200)
    ethics: Words = Field(default="", max_length=200)  # number of the local vote
    at: datetime.datetime


@dataclass(frozen=True, slots=True)
class Offered:
    """A study that the coordinator has offered, and since when."""

    study: Study
    since: datetime.datetime


class Approvals:
    """The decisions of one site, safe to ask from several threads. Without ``folder`` nothing outlives the process.

    ``signer`` is the fingerprint of the consortium's key that this site has pinned; pre-approvals name theirs.
    While ``changes`` is the same number, every study's standing is the same.

    Raises on construction:
        DataError: a decision on the disk is damaged. Nothing may run then: it could have been a withdrawal.
    """

    def __init__(self, policy: Policy, folder: Path | None = None, *, signer: str = "") -> None:
        self._policy, self._folder = policy, None if folder is None else folder / "studies"
        self._signer = signer
        self._lock = threading.RLock()
        self._decisions: dict[str, Decision] = {}
        self._offered: dict[str, Offered] = {}
        self.changes = 0
        if self._folder is not None and self._folder.is_dir():
            for place in sorted(self._folder.iterdir()):
                self._load(place)

    def offer(self, study: Study, signed: Signed) -> None:
        """Keep an offered study, whose signature has been checked, until a person decides.

        Raises:
            PolicyRefusal: reason ``too many studies``: so many wait already.
        """
        with self._lock:
            if study.digest in self._offered:
                return
            waiting = sum(self.standing(digest) is Standing.PENDING for digest in self._offered)
            if waiting >= MOST_UNDECIDED:
                raise PolicyRefusal(
                    f"{waiting} studies wait for a decision here: decide on some before others are offered",
                    reason="too many studies",
                )
            if self._folder is not None:
                write_whole(private_folder(self._folder / study.digest) / "offer.signed", signed.to_bytes())
            self._offered[study.digest] = Offered(study, datetime.datetime.now(datetime.UTC))
            self.changes += 1

    def decide(self, digest: str, decision: Decision) -> None:
        """Make ``decision`` durable, and let it count from now on."""
        with self._lock:
            if self._folder is not None:
                content = decision.model_dump_json().encode()
                write_whole(private_folder(self._folder / digest) / "decision.json", content)
            self._decisions[digest] = decision
            self.changes += 1

    def decision(self, digest: str) -> Decision | None:
        """What a person decided last, or None."""
        with self._lock:
            return self._decisions.get(digest)

    def offered(self) -> list[Offered]:
        """Every study that was ever offered here, the oldest first."""
        with self._lock:
            return sorted(self._offered.values(), key=lambda one: (one.since, one.study.digest))

    def approved(self) -> list[str]:
        """Digests of all studies that may run here."""
        with self._lock:
            known = {*self._decisions, *self._offered, *self._policy.studies}
        return sorted(digest for digest in known if self.standing(digest).runs)

    def standing(self, digest: str, study: Study | None = None) -> Standing:
        """Whether the study with ``digest`` may run. A withdrawal counts more than the policy's own list.

        ``study`` is only needed where it was never offered here.
        """
        with self._lock:
            decision, offered = self._decisions.get(digest), self._offered.get(digest)
        if decision is not None:
            return Standing.APPROVED if decision.approved else Standing.WITHDRAWN
        if digest in self._policy.studies:
            return Standing.LISTED
        known = study if offered is None else offered.study
        if known is not None and any(rule.covers(known, self._signer) for rule in self._policy.pre_approve):
            return Standing.PRE_APPROVED
        return Standing.PENDING

    def require(self, digest: str, study: Study | None = None) -> None:
        """Return when the study may run here as far as approval goes.

        Raises:
            PolicyRefusal: reasons ``study not approved``, ``study withdrawn``.
        """
        standing = self.standing(digest, study)
        what = f"study {digest[:12]}" if study is None else f"study {study.name}"
        if standing is Standing.WITHDRAWN:
            raise PolicyRefusal(
                f"{what} was withdrawn here: to take part again, run medfl-client with approve {digest[:12]}",
                reason=WITHDRAWN,
            )
        if not standing.runs:
            raise PolicyRefusal(
                f"{what} is not approved here: read it with medfl-client ... studies {digest[:12]}, then approve it "
                f"with approve {digest[:12]} (or add {digest} to policy.studies)",
                reason=NOT_APPROVED,
            )

    def permit(self, study: Study, *, today: datetime.date) -> None:
        """Return when ``study`` may run here today: approved, and within every ceiling of the policy.

        Raises:
            PolicyRefusal: with the rule that forbids it and what the administrator can change.
        """
        self._policy.permit_day(study, today=today)
        self.require(study.digest, study)
        self._policy.permit(study)

    def _load(self, place: Path) -> None:
        decision, offer = place / "decision.json", place / "offer.signed"
        try:
            self._decisions[place.name] = Decision.model_validate_json(decision.read_bytes())
        except FileNotFoundError:
            pass
        except (OSError, ValidationError):
            raise DataError(
                f"{decision} cannot be read: restore it from a backup, or remove it to decide on this study again"
            ) from None
        try:
            unverified = Signed.parse(offer.read_bytes()).unverified  # its signature was checked before it was kept
            since = datetime.datetime.fromtimestamp(offer.stat().st_mtime, datetime.UTC)
            self._offered[place.name] = Offered(Study.from_canonical(unverified, digest=place.name), since)
        except (OSError, ProtocolError):
            pass  # the coordinator offers it again


def signed_offer(canonical: bytes, signature: bytes) -> Signed:
    """What a :class:`~medfl.shared.messages.StudyOffer` carries, as a signed document."""
    return Signed(Document.STUDY, canonical, signature)
