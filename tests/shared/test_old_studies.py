"""Studies as release 0.1 wrote and signed them, and as people wrote them for it: both mean the same in this release.

A digest that changes here is an approval that sites lose. A new field of a study is a ``later(...)`` one
(medfl.shared.config); never change a file of ``old_studies``, and add the new release's.
"""

from __future__ import annotations

import datetime
import hashlib
from pathlib import Path

import pytest
from tiny import classes_study

from medfl.shared.config import load_settings
from medfl.shared.errors import ProtocolError
from medfl.shared.study import Study

FOLDER = Path(__file__).parent / "old_studies"
DIGESTS = {
    "demo": "ffcbaa69f1e157d0356e7d120403d06a774ff60bfe1df20c340dd9fca115e3b8",
    "labels": "665384ec479a65ab5b4c5a4c1b038cc618cdd82546980a7ec89fa3089d4d2342",
    "liver": "9414b256a10346b1fb102c3f230b4e83c8374a88f1b0c7c655f5f45c2d04483c",
    "liver-private": "d30764730e481c7621b232a4f89d285268414857983d37f6e20ef6d95d43992e",
    "tuberculosis": "f0def0f9e857305586ef9c6cdea4576b87d807951d78ac78eb1a02126e757fd5",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_a_study_that_was_signed_earlier_is_still_that_study(name: str) -> None:
    content = (FOLDER / f"{name}.json").read_bytes()
    study = Study.from_canonical(content, digest=DIGESTS[name])
    assert study.digest == DIGESTS[name] == hashlib.sha256(study.canonical()).hexdigest()


def test_a_study_file_that_was_approved_earlier_still_has_its_digest() -> None:
    assert load_settings(FOLDER / "liver.yaml", Study).digest == DIGESTS["liver"]


def test_a_later_field_is_in_the_digest_where_it_is_used() -> None:
    plain = classes_study()
    digests = {
        plain.digest,
        classes_study(responsible="Dr A. Example, North").digest,
        classes_study(legal_basis="Art. 9(2)(j) GDPR").digest,
        classes_study(ethics="2026-123").digest,
        classes_study(recipients="University of North, DE").digest,
        classes_study(last_day="2027-06-30").digest,
    }
    assert len(digests) == 6
    assert b"ethics" not in plain.canonical()
    used = classes_study(last_day=datetime.date(2027, 6, 30), ethics="2026-123")
    assert b'"ethics":"2026-123"' in used.canonical()
    assert b'"last_day":"2027-06-30"' in used.canonical()
    assert Study.from_canonical(used.canonical(), digest=used.digest) == used


def test_a_later_field_at_its_default_is_no_canonical_form() -> None:
    content = classes_study(ethics="x").canonical().replace(b'"ethics":"x"', b'"ethics":""')
    with pytest.raises(ProtocolError, match="canonical form"):
        Study.from_canonical(content, digest=hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(("section", "named"), [(b'"training":{', "training.warm_up"), (b'{"data"', "warm_up")])
def test_a_field_of_a_later_release_is_named_with_what_to_do(section: bytes, named: str) -> None:
    added = b'{"warm_up":1,"data"' if section.startswith(b"{") else section + b'"warm_up":1,'
    content = classes_study().canonical().replace(section, added, 1)
    with pytest.raises(ProtocolError, match=f"the study uses {named}, which this release does not know: update"):
        Study.from_canonical(content, digest=hashlib.sha256(content).hexdigest())
