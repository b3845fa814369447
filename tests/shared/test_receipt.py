"""A receipt says one thing in one form, and is believed only under the consortium's signature."""

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from medfl.shared.errors import ProtocolError
from medfl.shared.receipt import Receipt, countersign, read_receipt
from medfl.shared.signing import Document, SignatureRefused, sign

KEY = Ed25519PrivateKey.generate()
RECEIPT = Receipt("lungs", "north", 12, "ab" * 32, "cd" * 32, 3, "2026-11-28T12:00:00+00:00")


def test_a_receipt_is_read_back_with_the_key_that_signed_it() -> None:
    assert read_receipt(countersign(KEY, RECEIPT), KEY.public_key()) == RECEIPT


def test_another_key_or_another_kind_of_document_is_refused() -> None:
    with pytest.raises(SignatureRefused):
        read_receipt(countersign(Ed25519PrivateKey.generate(), RECEIPT), KEY.public_key())
    with pytest.raises(SignatureRefused):
        read_receipt(sign(KEY, Document.STUDY, RECEIPT.to_bytes()).to_bytes(), KEY.public_key())


@pytest.mark.parametrize(
    "change",
    [{"rows": -1}, {"rows": True}, {"rows": 2**32}, {"digest": "xy" * 32}, {"digest": "ab"}, {"site": "no\nrth"},
     {"site": 7}, {"time": "t" * 201}, {"round": 1.5}],
    ids=str,
)  # fmt: skip
def test_a_malformed_receipt_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        Receipt.parse(replace(RECEIPT, **change).to_bytes())


@given(st.binary(max_size=300) | st.recursive(st.integers() | st.text(), st.lists).map(repr).map(str.encode))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Receipt.parse(data)


def test_a_receipt_in_another_form_is_refused() -> None:
    with pytest.raises(ProtocolError):
        Receipt.parse(RECEIPT.to_bytes().replace(b",", b", "))
