"""Addresses of callers: those of connections, and forwarded ones from trusted proxies alone."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atspeed.security.peers import FORWARDED_HEADER, Peers, networks

PROXY = "ipv4:10.0.0.3:4711"
addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)


def described(trusted: str, connection: str, *forwarded: str) -> dict[str, str]:
    return Peers(networks(trusted)).describe(connection, [(FORWARDED_HEADER, one) for one in forwarded])


@pytest.mark.parametrize(
    ("connection", "peer"),
    [
        ("ipv4:127.0.0.1:5000", "127.0.0.1:5000"),
        ("ipv6:%5B::1%5D:5000", "[::1]:5000"),
        ("ipv6:[::ffff:10.0.0.3]:5000", "[::ffff:10.0.0.3]:5000"),
        ("ipv6:[fe80::1%25eth0]:5000", "[fe80::1%eth0]:5000"),
        ("unix:/run/a.sock", "unix:/run/a.sock"),
        ("", ""),
    ],
)
@pytest.mark.parametrize("trusted", ["", "192.0.2.0/24"])
def test_a_forwarded_address_is_not_believed_by_default(connection: str, peer: str, trusted: str) -> None:
    assert described(trusted, connection, "203.0.113.7") == {"peer": peer}


@pytest.mark.parametrize(
    ("forwarded", "caller"),
    [
        (["203.0.113.7"], "203.0.113.7"),
        (["1.2.3.4, 203.0.113.7"], "203.0.113.7"),  # the caller sent the first one itself
        (["1.2.3.4", "203.0.113.7"], "203.0.113.7"),
        (["203.0.113.7, 10.0.0.9"], "203.0.113.7"),  # two proxies
        (["10.0.0.8,10.0.0.9"], "10.0.0.8"),
        (["2001:db8::7"], "2001:db8::7"),
        (["::ffff:203.0.113.7"], "203.0.113.7"),
        (["nonsense, 10.0.0.9"], "10.0.0.9"),
        ([], None),
        ([""], None),
        (["203.0.113.7, nonsense"], None),
        (["fe80::1%\nforged=line"], None),
    ],
)
@pytest.mark.parametrize("connection", [PROXY, "ipv6:%5B::ffff:10.0.0.3%5D:4711"])
def test_a_trusted_proxy_is_believed_up_to_the_first_that_is_none(
    connection: str, forwarded: list[str], caller: str | None
) -> None:
    direct = "10.0.0.3:4711" if connection == PROXY else "[::ffff:10.0.0.3]:4711"
    expected = {"peer": direct} if caller is None else {"peer": caller, "proxy": direct}
    assert described("10.0.0.0/8,fd00::/8", connection, *forwarded) == expected


@given(st.lists(addresses | st.text(max_size=20), max_size=5), addresses)
def test_nothing_that_a_caller_sends_changes_what_the_proxy_saw(sent: list[str], seen: str) -> None:
    address = ipaddress.ip_address(seen)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    if (mapped or address) in ipaddress.ip_network("10.0.0.0/8"):
        return
    assert described("10.0.0.0/8", PROXY, ", ".join([*sent, seen]))["peer"] == str(mapped or address)


@pytest.mark.parametrize("text", ["10.0.0.1/8", "localhost", "10.0.0.0/8,", "10.0.0.0/8 10.0.0.1", "300.0.0.1"])
def test_a_text_that_is_no_list_of_networks_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        networks(text)
