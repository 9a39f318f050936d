"""Who is believed, and what of it the app gets to see."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaskbus_gateway.forwarding import Origin, TrustedProxies, read_origin

LOOPBACK = TrustedProxies("127.0.0.1,::1")


@pytest.mark.parametrize(
    ("text", "host", "trusted"),
    [
        ("127.0.0.1,::1", "127.0.0.1", True),
        ("127.0.0.1, ::1", "::1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "::ffff:10.1.2.3", True),
        ("10.0.0.1/8", "11.0.0.1", False),
        ("fe80::/10", "fe80::1%eth0", True),
        ("*", "203.0.113.7", True),
        ("", "127.0.0.1", False),
        ("127.0.0.1", "not an address", False),
        ("10.0.0.0/8", "", True),
    ],
)
def test_trusted_proxies(text: str, host: str, trusted: bool) -> None:
    proxies = TrustedProxies(text)
    assert (host in proxies) is trusted
    assert (host in proxies) is trusted  # from the cache


def test_the_cache_is_bounded() -> None:
    proxies = TrustedProxies("10.0.0.0/8")
    for number in range(5000):
        assert f"10.0.{number // 256}.{number % 256}" in proxies
    assert len(proxies._cache) <= 4097


def origin(proxies: TrustedProxies = LOOPBACK, /, **headers: str) -> Origin:
    pairs = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return read_origin(pairs, "127.0.0.1", "http", proxies)


@pytest.mark.parametrize(
    ("value", "client"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("203.0.113.7:4711", "203.0.113.7"),
        ("[2001:db8::1]:4711", "2001:db8::1"),
        ("2001:db8::1", "2001:db8::1"),
        ("6.6.6.6, 203.0.113.7", "203.0.113.7"),
        ("6.6.6.6, 203.0.113.7, 127.0.0.1", "203.0.113.7"),
        ("203.0.113.7, unknown", "127.0.0.1"),
        ("unknown, 127.0.0.1", "127.0.0.1"),
        ("", "127.0.0.1"),
    ],
)
def test_the_client_is_the_rightmost_address_that_is_no_proxy(value: str, client: str) -> None:
    assert origin(x_forwarded_for=value).client == client


def test_several_headers_are_one_list() -> None:
    pairs = [(b"x-forwarded-for", b"6.6.6.6"), (b"x-forwarded-for", b"203.0.113.7")]
    assert read_origin(pairs, "127.0.0.1", "http", LOOPBACK).client == "203.0.113.7"


def test_all_proxies_are_trusted_and_all_are_proxies() -> None:
    assert origin(TrustedProxies("*"), x_forwarded_for="1.1.1.1, 2.2.2.2").client == "1.1.1.1"


def test_the_nearest_proxys_word_counts() -> None:
    found = origin(
        x_forwarded_proto="http, HTTPS",
        x_forwarded_host="evil.example, shop.example.com",
        x_forwarded_port="443",
        x_forwarded_prefix="/outer/",
        other="x",
    )
    assert found == Origin("127.0.0.1", "https", "shop.example.com", "443", "/outer")


@pytest.mark.parametrize(
    "headers",
    [
        {"x_forwarded_proto": "gopher"},
        {"x_forwarded_port": "44e3"},
        {"x_forwarded_prefix": "outer"},
        {"x_forwarded_prefix": "/a b"},
        {"x_forwarded_prefix": "//x"},
    ],
)
def test_what_makes_no_sense_is_left_out(headers: dict[str, str]) -> None:
    assert origin(**headers) == Origin("127.0.0.1", "http", "", "", "")


@given(
    st.lists(st.tuples(st.sampled_from([b"x-forwarded-for", b"x-forwarded-host"]), st.binary(max_size=40)))
)
def test_any_bytes_are_an_origin(headers: list[tuple[bytes, bytes]]) -> None:
    assert read_origin(headers, "127.0.0.1", "http", LOOPBACK).scheme == "http"
