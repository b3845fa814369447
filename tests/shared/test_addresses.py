"""One IPv6 address, with and without brackets."""

import pytest

from medfl.shared.addresses import address, dialled, without_brackets
from medfl.shared.config import LocalPort


def test_an_ipv6_address_has_brackets_before_a_port_and_nothing_else_has() -> None:
    assert [address(host, 443) for host in ("::1", "127.0.0.1", "fl.example.org")] == [
        "[::1]:443",
        "127.0.0.1:443",
        "fl.example.org:443",
    ]


def test_brackets_are_taken_off_where_they_are() -> None:
    assert [without_brackets(host) for host in ("[::1]", "::1", "localhost")] == ["::1", "::1", "localhost"]


@pytest.mark.parametrize("written", ["fl.example.org:1", "[::1]:65535", "10.0.0.7:443"])
def test_what_can_be_dialled_is_an_address(written: str) -> None:
    assert dialled(written) == written


@pytest.mark.parametrize("written", ["fl.example.org", "a:0", "a:65536", "a:99999", "a:123456", "a b:1", "::1:443x"])
def test_what_cannot_be_dialled_is_refused_in_words(written: str) -> None:
    with pytest.raises(ValueError, match=r"write host:port, .* from 1 to 65535"):
        dialled(written)


def test_a_port_takes_its_host_in_either_form() -> None:
    assert LocalPort(host="[::1]", port=1) == LocalPort(host="::1", port=1)
