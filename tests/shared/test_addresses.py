"""One IPv6 address, with and without brackets."""

from medfl.shared.addresses import address, without_brackets
from medfl.shared.config import LocalPort


def test_an_ipv6_address_has_brackets_before_a_port_and_nothing_else_has() -> None:
    assert [address(host, 443) for host in ("::1", "127.0.0.1", "fl.example.org")] == [
        "[::1]:443",
        "127.0.0.1:443",
        "fl.example.org:443",
    ]


def test_brackets_are_taken_off_where_they_are() -> None:
    assert [without_brackets(host) for host in ("[::1]", "::1", "localhost")] == ["::1", "::1", "localhost"]


def test_a_port_takes_its_host_in_either_form() -> None:
    assert LocalPort(host="[::1]", port=1) == LocalPort(host="::1", port=1)
