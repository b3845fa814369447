"""Secret sharing: known answers, every large enough subset, and nothing from a smaller one."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfl.shared.errors import ProtocolError
from medfl.shared.secagg.shamir import PRIME, SHARE_BYTES, evaluate, join, split, weights_at_zero


def test_the_shares_of_42_on_a_known_polynomial_are_known() -> None:
    # 42 + 5 x + 7 x^2 at 1, 2, 3
    assert [int.from_bytes(share, "little") for share in evaluate([42, 5, 7], [1, 2, 3])] == [54, 80, 120]
    assert join(weights_at_zero([1, 2, 3]), evaluate([42, 5, 7], [1, 2, 3])) == (42).to_bytes(32, "little")


def test_the_prime_is_prime() -> None:
    assert PRIME == 2**256 + 297
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in (2, 3, 5, 7, 11, 13))


@settings(max_examples=50, deadline=None)
@given(
    secret=st.binary(min_size=32, max_size=32),
    points=st.lists(st.integers(1, 65535), min_size=1, max_size=12, unique=True),
    data=st.data(),
)
def test_any_threshold_of_shares_give_the_secret(secret: bytes, points: list[int], data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, len(points)))
    shares = dict(zip(points, split(secret, threshold, points), strict=True))
    chosen = data.draw(st.permutations(points))[:threshold]
    assert join(weights_at_zero(chosen), [shares[x] for x in chosen]) == secret
    assert all(len(share) == SHARE_BYTES for share in shares.values())


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32], ids=["zero", "largest"])
def test_the_smallest_and_largest_secrets_come_back(secret: bytes) -> None:
    shares = split(secret, 3, [1, 2, 3, 4])
    for some in itertools.combinations(range(4), 3):
        assert join(weights_at_zero([i + 1 for i in some]), [shares[i] for i in some]) == secret


def test_fewer_shares_than_the_threshold_fit_every_secret_equally_well() -> None:
    """Two of three shares, and any secret whatever: there is a polynomial through both, so they tell nothing."""
    shares = split(b"s" * 32, 3, [1, 2, 3])
    first, second = (int.from_bytes(share, "little") for share in shares[:2])
    for secret in (0, 1, 2**255, 2**256 - 1):
        # c1 + c2 = first - secret; 2 c1 + 4 c2 = second - secret
        c2 = (second - secret - 2 * (first - secret)) * pow(2, -1, PRIME) % PRIME
        c1 = (first - secret - c2) % PRIME
        assert evaluate([secret, c1, c2], [1, 2]) == shares[:2]


def test_too_few_or_altered_shares_do_not_give_the_secret() -> None:
    secret = b"s" * 32
    shares = split(secret, 3, [1, 2, 3])

    def opens(points: list[int], given: list[bytes]) -> bool:
        try:
            return join(weights_at_zero(points), given) == secret
        except ProtocolError:
            return False

    assert not opens([1, 2], shares[:2])
    assert not opens([1, 2, 3], [shares[0], shares[1], bytes(SHARE_BYTES)])


def test_two_sharings_of_one_secret_differ_in_every_share() -> None:
    assert not set(split(bytes(32), 3, [1, 2, 3])) & set(split(bytes(32), 3, [1, 2, 3]))


@pytest.mark.parametrize(("secret", "threshold"), [(bytes(31), 2), (bytes(32), 0), (bytes(32), 4)])
def test_impossible_sharings_are_refused(secret: bytes, threshold: int) -> None:
    with pytest.raises(ValueError, match="threshold"):
        split(secret, threshold, [1, 2, 3])


def test_a_secret_is_shared_among_a_hundred_sites_within_two_milliseconds() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        split(bytes(32), 67, range(1, 101))
        return time.perf_counter() - start

    assert min(seconds() for _ in range(200)) < 0.002  # the best of many: on a busy machine most are slower
