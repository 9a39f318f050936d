"""Whose pages may open a WebSocket, and what a handshake has to be."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from flaskbus.errors import ForeignOrigin
from flaskbus_gateway.forwarding import TrustedProxies
from flaskbus_gateway.handshake import is_handshake, mistake
from flaskbus_gateway.http import Incoming
from flaskbus_gateway.websocket import Origins

Pairs = list[tuple[bytes, bytes]]

OWN = "shop.example.com"


def allows(
    allowed: str, host: str, *origins: str, more: Pairs | None = None, peer: str = "192.0.2.1"
) -> bool:
    headers = [(b"host", host.encode()), *(more or [])]
    headers += [(b"origin", origin.encode("latin-1")) for origin in origins]
    scope: dict[str, Any] = {
        "type": "websocket", "path": "/", "query_string": b"", "http_version": "1.1", "headers": headers,
        "client": (peer, 1),
    }  # fmt: skip
    try:
        Origins(allowed).check(Incoming(scope, TrustedProxies("10.0.0.1")))
    except ForeignOrigin:
        return False
    return True


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        (OWN, "https://shop.example.com"),
        (OWN, "http://shop.example.com"),
        ("Shop.Example.com", "https://SHOP.example.com"),
        ("localhost:5000", "http://localhost:5000"),
        ("[::1]:5000", "http://[::1]:5000"),
        ("[2001:db8::1]", "https://[2001:db8::1]"),
        ("shop.example.com:443", "https://shop.example.com"),
        ("shop.example.com:80", "http://shop.example.com"),
        (OWN, "https://shop.example.com:443"),
        (OWN, "http://shop.example.com:80"),
    ],
)
def test_the_hosts_own_pages(host: str, origin: str) -> None:
    assert allows("", host, origin)


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        (OWN, "https://evil.example"),
        (OWN, "https://shop.example.com.evil.example"),
        (OWN, "https://evil.example/shop.example.com"),
        (OWN, "https://shop.example.com/"),
        (OWN, "https://shop.example.com@evil.example"),
        (OWN, "https://example.com"),
        (OWN, "https://shop.example.com:8443"),
        (OWN, "http://shop.example.com:443"),
        ("shop.example.com:443", "http://shop.example.com"),
        ("shop.example.com:8443", "https://shop.example.com"),
        ("[::1]:5000", "http://[::1]:5001"),
        (OWN, "file://shop.example.com"),
        (OWN, "chrome-extension://shop.example.com"),
        (OWN, "shop.example.com"),
        (OWN, "://shop.example.com"),
        (OWN, "null"),
        (OWN, ""),
        ("null", "null"),
        ("", ""),
        (OWN, "https://shop.example.com https://evil.example"),
        (OWN, "https://shop.example.c\xf6m"),
    ],
)
def test_other_pages(host: str, origin: str) -> None:
    assert not allows("", host, origin)


def test_what_is_no_page_in_a_browser_says_no_origin() -> None:
    assert allows("", OWN)


def test_of_several_origins_each_must_be_allowed() -> None:
    own, evil = f"https://{OWN}", "https://evil.example"
    assert allows("", OWN, own, own)
    assert not allows("", OWN, own, evil)
    assert not allows("", OWN, evil, own)


def test_a_list_is_beside_the_own_pages() -> None:
    allowed = "https://a.example, HTTP://B.example:8080,https://c.example:443"
    for origin in ("https://a.example", "http://b.example:8080", "https://C.example", f"https://{OWN}"):
        assert allows(allowed, OWN, origin), origin
    for origin in ("http://a.example", "http://b.example", "https://b.example:8080", "null", "", "*"):
        assert not allows(allowed, OWN, origin), origin


def test_a_star_is_everybody() -> None:
    for origin in ("https://evil.example", "null", "", "x"):
        assert allows("*", OWN, origin)
        assert allows("https://a.example, *", OWN, origin)


@pytest.mark.parametrize(("peer", "allowed"), [("10.0.0.1", True), ("192.0.2.1", False)])
def test_the_host_that_a_trusted_proxy_was_asked_for(peer: str, allowed: bool) -> None:
    more = [(b"x-forwarded-host", OWN.encode())]
    assert allows("", "backend:5000", f"https://{OWN}", more=more, peer=peer) is allowed
    assert allows("", "backend:5000", "http://backend:5000", more=more, peer=peer) is not allowed


# Handshakes

KEY = base64.b64encode(b"0123456789abcdef")


def handshake(**changed: bytes | None) -> Pairs:
    right: dict[str, bytes | None] = {
        "upgrade": b"websocket", "connection": b"Upgrade", "sec-websocket-version": b"13",
        "sec-websocket-key": KEY,
    }  # fmt: skip
    for name, value in changed.items():
        right[name.replace("_", "-")] = value
    return [(name.encode(), value) for name, value in right.items() if value is not None]


@pytest.mark.parametrize(
    "headers",
    [
        handshake(),
        handshake(upgrade=b"WebSocket"),
        handshake(connection=b"keep-alive, Upgrade"),
        handshake(connection=b"keep-alive,upgrade"),
        handshake(upgrade=b"h2c, websocket"),
        [*handshake(connection=b"keep-alive"), (b"connection", b"upgrade")],
    ],
)
def test_a_handshake(headers: Pairs) -> None:
    assert is_handshake("GET", (1, 1), headers)
    assert mistake(headers) is None


@pytest.mark.parametrize(
    ("method", "version", "headers"),
    [
        ("POST", (1, 1), handshake()),
        ("GET", (1, 0), handshake()),
        ("GET", (1, 1), handshake(upgrade=b"h2c")),
        ("GET", (1, 1), handshake(upgrade=b"websockets")),
        ("GET", (1, 1), handshake(upgrade=None)),
        ("GET", (1, 1), handshake(connection=None)),
        ("GET", (1, 1), handshake(connection=b"no-upgrade")),
        ("GET", (1, 1), handshake(connection=b"keep-alive")),
    ],
)
def test_an_ordinary_request(method: str, version: tuple[int, int], headers: Pairs) -> None:
    assert not is_handshake(method, version, headers)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (handshake(sec_websocket_version=None), 426),
        (handshake(sec_websocket_version=b"7"), 426),
        (handshake(sec_websocket_version=b"13, 8"), 426),
        ([*handshake(), (b"sec-websocket-version", b"13")], 426),
        (handshake(sec_websocket_key=None), 400),
        (handshake(sec_websocket_key=b""), 400),
        (handshake(sec_websocket_key=b"c2hvcnQ="), 400),
        (handshake(sec_websocket_key=KEY[:-1]), 400),
        (handshake(sec_websocket_key=b"\xff" + KEY[1:]), 400),
        (handshake(sec_websocket_key=b"*" + KEY), 400),
        ([*handshake(), (b"sec-websocket-key", KEY)], 400),
        (handshake(content_length=b"5"), 400),
        (handshake(content_length=b"00"), 400),
        (handshake(transfer_encoding=b"chunked"), 400),
    ],
)
def test_what_is_wrong_with_a_handshake(headers: Pairs, status: int) -> None:
    wrong = mistake(headers)
    assert wrong is not None
    assert wrong.status == status
    assert (("Sec-WebSocket-Version", "13") in wrong.headers) is (status == 426)


def test_a_length_of_nothing_is_no_body() -> None:
    assert mistake(handshake(content_length=b"0")) is None
