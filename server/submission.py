"""Submitting a study: would it ever run in this consortium, and the signature without which no site looks at it."""

from __future__ import annotations

import datetime
from contextlib import closing
from pathlib import Path

from medfl.server.audit import Audit, Event
from medfl.server.config import ConsortiumSettings
from medfl.server.desk import FINISHED, Checks, Desk, Named, Submission
from medfl.server.rosters import RosterFolder
from medfl.server.studies import State, StudyStore
from medfl.shared.algorithms.beginning import begin_apart
from medfl.shared.audit_log import audit_file
from medfl.shared.config import load_settings
from medfl.shared.errors import ConfigError
from medfl.shared.initial_weights import digest_of, read_initial
from medfl.shared.keys import load_site_key
from medfl.shared.signing import Document, Signed, load_signing_public_key, sign
from medfl.shared.study import Study
from medfl.strategies.build import needs_of
from medfl.strategies.secure_aggregation import require_sums_come_about

CONFIGURATION = "the configuration"
"""Who submits the studies that it names."""


def check_study(settings: ConsortiumSettings, study: Study, *, source: str) -> None:
    """Return when ``study`` could run in this consortium; ``source`` stands before what is wrong.

    Raises:
        ConfigError: it could not.
    """
    needs_of(study)
    if study.initial_weights is not None:
        begin_apart(study, initial_of(settings, study))
    roster = RosterFolder.of(settings).newest().roster
    sites = len(roster.members)
    if study.rounds.minimum_sites > sites:
        raise ConfigError(
            f"{source}: rounds.minimum_sites: is {study.rounds.minimum_sites}, and the consortium has {sites} sites"
        )
    try:
        require_sums_come_about(study, roster)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    if study.last_day is not None and study.last_day < datetime.datetime.now(datetime.UTC).date():
        raise ConfigError(f"{source}: last_day: {study.last_day} is over: no site would train")


def initial_of(settings: ConsortiumSettings, study: Study) -> bytes | None:
    """The file of the weights ``study`` begins with; None where it begins with its seed's, or no file is the one.

    Raises:
        ConfigError: a file that is named cannot be read.
    """
    if study.initial_weights is None:
        return None
    files = (read_initial(path) for path in settings.initial_weights)
    return next((content for content in files if digest_of(content) == study.initial_weights), None)


def sign_study(settings: ConsortiumSettings, study: Study, *, source: Path) -> Signed:
    """``study``, checked, under the consortium's signature.

    Raises:
        ConfigError: it could never run here, or the signing key cannot be had.
    """
    check_study(settings, study, source=str(source))
    return sign(load_site_key(settings.trust.signing_key), Document.STUDY, study.canonical())


def desk_of(settings: ConsortiumSettings, *, running_with: Audit | None = None) -> Desk:
    """The administrator's functions over this consortium's files; ``running_with``: in the coordinator, its audit log.

    Raises:
        ConfigError: the consortium's public key cannot be read.
    """
    private = settings.trust.signing_key
    key = load_signing_public_key(private.with_name(f"{private.name}.pub"))
    checks = Checks(
        verify=lambda signed: signed.content(key, Document.STUDY),
        fits=lambda study: check_study(settings, study, source=f"study {study.name}"),
    )

    def note(event: Event, study: Study, by: str) -> None:
        if running_with is not None:
            running_with.commanded(event, study.digest, study.name, by=by)
            return
        with closing(Audit(audit_file(settings.state))) as audit:
            audit.commanded(event, study.digest, study.name, by=by)

    return Desk(StudyStore(settings.state), settings.runs, checks, note=note, running=running_with is not None)


def submit_listed(settings: ConsortiumSettings, desk: Desk) -> list[str]:
    """Submit the studies that the configuration names, and let those of them that failed try again; their digests.

    Raises:
        ConfigError: a study is wrong, or the signing key is needed and cannot be had.
    """
    known = {entry.digest: entry.record for entry in desk.store.entries()}
    digests = []
    for path in settings.studies:
        study = load_settings(path, Study)
        digests.append(study.digest)
        record = known.get(study.digest)
        if record is None:
            signed = sign_study(settings, study, source=path).to_bytes().decode()
            desk.submit(Submission(signed=signed, by=CONFIGURATION))
        elif record.state is State.ENDED and record.reason not in FINISHED:
            desk.resume(Named(digest=study.digest, by=CONFIGURATION))
    return digests


def listed_studies(settings: ConsortiumSettings) -> list[Study]:
    """The studies that the configuration names, each checked that was not submitted yet. Raises ConfigError.

    One that is in the store stood the checks when it came: a site that has left since, or a day that is over, is a
    matter of its own rounds and must not keep the coordinator from the others.
    """
    store = StudyStore(settings.state)
    studies = [load_settings(path, Study) for path in settings.studies]
    for path, study in zip(settings.studies, studies, strict=True):
        if store.find(study.digest) is None:
            check_study(settings, study, source=str(path))
    return studies
