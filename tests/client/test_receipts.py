"""A log that was cut after the coordinator had signed what it saw: it shows at the site, and at the coordinator."""

import json
from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sites import make_site
from tiny import classes_study

from medfl.client.audit import Audit
from medfl.client.pin import Pin
from medfl.client.receipts import Read, Receipts, check_receipt, reader_of, receipt_file
from medfl.client.witness import Witness
from medfl.shared.chain import Head, inspect
from medfl.shared.errors import PolicyRefusal, ProtocolError
from medfl.shared.messages import HeadsReply, HeadsRequest, Log
from medfl.shared.receipt import Receipt, countersign, read_receipt
from medfl.shared.signing import SignatureRefused

STUDY = "cd" * 32
KEY = Ed25519PrivateKey.generate()
READ: Read = partial(read_receipt, key=KEY.public_key())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "audit.jsonl"


def write(path: Path, rows: int) -> Head:
    audit = Audit(path)
    for _ in range(rows):
        audit.stopped()
    head = audit.head
    audit.close()
    return head


def signed(head: Head, *, site: str = "north", key: Ed25519PrivateKey = KEY) -> bytes:
    return countersign(key, Receipt("lungs", site, head.rows, head.digest, STUDY, 4, "2026-11-28T12:00:00+00:00"))


def keep(path: Path, receipt: bytes, read: Read | None = READ) -> None:
    audit = Audit(path)
    try:
        Receipts(path, read, site="north").keep(receipt, audit)
    finally:
        audit.close()


def verify(path: Path, read: Read | None = READ) -> str:
    return check_receipt(path, inspect(path), read)


def cut(path: Path, rows: int) -> None:
    """As somebody would who knows how the log works: both files as they were earlier."""
    lines = path.read_bytes().splitlines(keepends=True)[:rows]
    path.write_bytes(b"".join(lines))
    path.with_name("audit.jsonl.head").write_bytes(lines[-1])
    assert inspect(path).problem is None


def test_a_log_that_holds_what_was_signed_verifies_also_when_it_has_grown(path: Path) -> None:
    keep(path, signed(write(path, 3)))
    write(path, 2)
    assert verify(path).startswith("row 3 was countersigned by lungs at 2026-11-28T12:00:00+00:00 (round 4")


def test_a_log_that_was_cut_with_all_its_own_files_is_noticed(path: Path) -> None:
    keep(path, signed(write(path, 3)))
    cut(path, 2)
    with pytest.raises(PolicyRefusal, match="saw row 3 with the hash") as refusal:
        verify(path)
    assert (refusal.value.reason, refusal.value.exit_status) == ("audit log cut", 3)
    audit = Audit(path)
    audit.started(release="2", configuration="ab" * 32)  # as long as before, with another third row
    audit.close()
    with pytest.raises(PolicyRefusal, match="cut or written anew"):
        verify(path)


def test_a_receipt_for_rows_that_are_not_here_does_not_replace_the_one_that_is_kept(path: Path) -> None:
    keep(path, signed(write(path, 3)))
    kept = receipt_file(path).read_bytes()
    keep(path, signed(Head(9, "ab" * 32)))
    assert receipt_file(path).read_bytes() == kept


def test_a_receipt_of_somebody_else_or_for_another_site_is_refused(path: Path) -> None:
    head = write(path, 3)
    with pytest.raises(SignatureRefused):
        keep(path, signed(head, key=Ed25519PrivateKey.generate()))
    with pytest.raises(PolicyRefusal, match="another site's"):
        keep(path, signed(head, site="south"))
    with pytest.raises(ProtocolError):
        keep(path, b"not a receipt")
    assert not receipt_file(path).exists()


def test_a_receipt_that_was_put_there_or_damaged_is_noticed(path: Path) -> None:
    head = write(path, 3)
    for content in (signed(head, key=Ed25519PrivateKey.generate()), b"damaged"):
        receipt_file(path).write_bytes(content)
        with pytest.raises(PolicyRefusal, match="not a receipt signed with the consortium's key"):
            verify(path)


def test_without_a_pinned_key_nothing_is_kept_and_verification_says_what_it_cannot_tell(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = write(path, 3)
    assert "rows cut from the end would not show" in verify(path)
    keep(path, signed(head), read=None)
    assert "has not pinned its consortium's key" in caplog.text
    assert not receipt_file(path).exists()
    keep(path, signed(head))
    assert "cannot be checked" in verify(path, read=None)


def test_the_key_is_the_one_that_was_pinned_when_the_site_joined(tmp_path: Path, path: Path) -> None:
    assert reader_of(tmp_path) is None
    Pin("lungs", KEY.public_key()).save(tmp_path)
    read = reader_of(tmp_path)
    assert read is not None
    assert read(signed(Head(3, "ab" * 32))).rows == 3


def test_the_site_tells_its_head_keeps_the_receipt_and_says_when_a_seen_row_is_gone(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(path, 2)
    audit = Audit(path)
    site = make_site(classes_study(), tmp_path)
    witness = Witness(audit, site, Receipts(path, READ, site="north"))
    head = audit.head
    told = witness.countersigned(HeadsRequest(STUDY, 1), HeadsReply({Log.LEDGER: Head(1, "ab" * 32)}))
    assert told == HeadsReply({Log.LEDGER: Head(1, "ab" * 32), Log.AUDIT: head})
    audit.stopped()
    told = witness.countersigned(HeadsRequest(STUDY, 2, {Log.AUDIT: head}, signed(head)), HeadsReply())
    assert told == HeadsReply({Log.AUDIT: audit.head})
    assert read_receipt(receipt_file(path).read_bytes(), KEY.public_key()).rows == 2
    gone = Head(3, "ab" * 32)
    told = witness.countersigned(HeadsRequest(STUDY, 3, {Log.AUDIT: gone}, signed(gone)), HeadsReply())
    audit.close()
    site.close()
    assert told.audit_held is False
    assert "row 3 of this site's audit log, which is not in it" in caplog.text
    row = inspect(path).rows[-1]
    assert (row["event"], row["rows"], row["head"]) == ("head not held", 3, "ab" * 32)
    assert json.loads(path.read_bytes().splitlines()[-1]) == row
