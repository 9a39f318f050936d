"""ASGI's scope -> what the gateway knows of a request, and errors -> problem documents."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flaskbus import errors
from flaskbus_gateway.forwarding import TrustedProxies
from flaskbus_gateway.http import Incoming, add_date, has_body, problem, relayed_headers, stated_length

LOOPBACK = TrustedProxies("127.0.0.1")


def scope(*headers: tuple[bytes, bytes], **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "type": "http",
        "method": "GET",
        "http_version": "1.1",
        "scheme": "http",
        "path": "/shop/a b",
        "raw_path": b"/shop/a%20b",
        "query_string": b"x=%41&y",
        "headers": [(b"host", b"example.com"), *headers],
        "client": ("203.0.113.7", 4711),
        "server": ("127.0.0.1", 5000),
    }
    return {**base, **changes}


def incoming(*headers: tuple[bytes, bytes], **changes: Any) -> Incoming:
    return Incoming(scope(*headers, **changes), LOOPBACK)


class TestTargets:
    def test_the_raw_bytes_count(self) -> None:
        assert incoming().target == "/shop/a%20b?x=%41&y"
        assert incoming(query_string=b"").target == "/shop/a%20b"
        assert incoming(query_string=b"\xff").target == "/shop/a%20b?\xff"

    def test_a_server_that_gives_no_raw_path(self) -> None:
        found = incoming(raw_path=None, path="/ü/a b%2F")
        assert found.path == "/%C3%BC/a%20b%252F"

    def test_absolute_form_names_the_host(self) -> None:
        found = incoming(raw_path=b"http://other.example/p")
        assert (found.path, found.host) == ("/p", "other.example")
        assert [value for name, value in found.headers if name == b"host"] == [b"other.example"]
        with pytest.raises(errors.InvalidRequest):
            Incoming(scope(raw_path=b"http://other.example/p", headers=[(b"host", b"a/b@c")]), LOOPBACK)

    def test_what_a_server_may_leave_out(self) -> None:
        found = incoming(client=None, server=None)
        assert (found.client, found.server) == (("", 0), ("", 0))
        assert incoming(server=("/run/bus.sock", None)).server == ("", 0)

    @pytest.mark.parametrize(
        ("said", "meant"), [("https", "https"), ("http", "http"), ("javascript", "http")]
    )
    def test_the_scheme_is_one_of_two(self, said: str, meant: str) -> None:
        assert incoming(scheme=said).scheme == meant


class TestHeaders:
    def test_what_is_not_relayed(self) -> None:
        found = incoming(
            (b"connection", b"Keep-Alive, X-Mine, Host"),
            (b"x-mine", b"1"),
            (b"te", b"trailers"),
            (b"transfer-encoding", b"chunked"),
            (b"upgrade", b"h2c"),
            (b"expect", b"100-continue"),
            (b"x_forwarded_for", b"6.6.6.6"),
            (b"proxy", b"http://evil.example"),
            (b"accept", b"*/*"),
            (b"accept", b"text/html"),
        )
        assert found.headers == [(b"host", b"example.com"), (b"accept", b"*/*"), (b"accept", b"text/html")]

    @pytest.mark.parametrize(
        "headers",
        [
            [],
            [(b"host", b"a"), (b"host", b"b")],
        ],
    )
    def test_exactly_one_host(self, headers: list[tuple[bytes, bytes]]) -> None:
        with pytest.raises(errors.InvalidRequest, match="exactly one Host"):
            incoming(headers=headers)

    def test_http_1_0_may_have_none(self) -> None:
        assert incoming(headers=[], http_version="1.0").host == ""

    @pytest.mark.parametrize("values", [[b"-1"], [b"1", b"1"], [b"1a"], [b""]])
    def test_a_content_length_that_is_none(self, values: list[bytes]) -> None:
        with pytest.raises(errors.InvalidRequest, match="Content-Length"):
            incoming(*((b"content-length", value) for value in values))


@pytest.mark.parametrize(
    ("value", "taken"), [("00-" + "a" * 32 + "-" + "b" * 16 + "-01", True), ("x", False)]
)
def test_trace_context(value: str, taken: bool) -> None:
    found = incoming((b"traceparent", value.encode()))
    assert found.traceparent == (value if taken else "")
    assert (b"traceparent", value.encode()) in found.headers


class TestForwarding:
    SAID = (
        (b"x-forwarded-for", b"198.51.100.4"),
        (b"x-forwarded-proto", b"https"),
        (b"x-forwarded-host", b"shop.example.com"),
        (b"x-forwarded-port", b"443"),
        (b"x-forwarded-prefix", b"/outer"),
        (b"forwarded", b"for=6.6.6.6"),
    )

    def test_a_strangers_word_is_removed(self) -> None:
        found = incoming(*self.SAID)
        assert found.headers == [(b"host", b"example.com")]
        assert (found.client, found.scheme, found.prefix) == (("203.0.113.7", 4711), "http", "")

    def test_a_trusted_proxys_word_becomes_one_hop(self) -> None:
        found = incoming(*self.SAID, client=("127.0.0.1", 1))
        assert found.client == ("198.51.100.4", 0)
        assert (found.scheme, found.host, found.prefix) == ("https", "shop.example.com", "/outer")
        assert found.target.startswith("/outer/shop/")
        assert found.headers == [
            (b"host", b"shop.example.com"),
            (b"x-forwarded-for", b"198.51.100.4"),
            (b"x-forwarded-proto", b"https"),
            (b"x-forwarded-host", b"shop.example.com"),
            (b"x-forwarded-port", b"443"),
        ]

    def test_a_proxy_that_says_little(self) -> None:
        found = incoming((b"x-forwarded-proto", b"https"), client=("127.0.0.1", 1))
        assert (found.client, found.scheme) == (("127.0.0.1", 1), "https")
        assert (b"x-forwarded-for", b"127.0.0.1") in found.headers


@pytest.mark.parametrize(
    ("headers", "version", "body"),
    [
        ([], "1.1", False),
        ([(b"content-length", b"0")], "1.1", False),
        ([(b"content-length", b"5")], "1.1", True),
        ([(b"transfer-encoding", b"chunked")], "1.1", True),
        ([], "2", True),
    ],
)
def test_whether_a_body_follows(headers: list[tuple[bytes, bytes]], version: str, body: bool) -> None:
    given = scope(*headers, http_version=version)
    assert has_body(given, Incoming(given, LOOPBACK)) is body


def test_relayed_headers() -> None:
    headers = (
        (b"Set-Cookie", b"a=1"),
        (b"Connection", b"close"),
        (b"Set-Cookie", b"b=2"),
        (b"X", b"a\r\nB: c"),
        (b"X: y", b"z"),
        (b"", b"z"),
    )
    assert relayed_headers(headers) == [(b"Set-Cookie", b"a=1"), (b"Set-Cookie", b"b=2")]


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [([b"2"], 1), ([], 0), ([b"2", b"3"], 0), ([b"2", b"2"], 0), ([b"2, 2"], 0), ([b"+2"], 0), ([b""], 0)],
)
def test_only_one_length_is_relayed(lengths: list[bytes], kept: int) -> None:
    headers = ((b"X", b"y"), *((b"Content-Length", length) for length in lengths))
    assert relayed_headers(headers) == list(headers[: 1 + kept])


def test_a_length_that_is_stated() -> None:
    assert stated_length([(b"X", b"1"), (b"Content-Length", b"20")]) == 20
    assert stated_length([(b"X", b"1")]) is None


def test_a_date_is_added_once() -> None:
    headers = [(b"x", b"y")]
    add_date(headers)
    add_date(headers)
    assert [name for name, _ in headers] == [b"x", b"date"]


def test_problem() -> None:
    status, headers, body = problem(errors.QueueFull("full", retry_after=2), "r1")
    assert (status, dict(headers)[b"retry-after"]) == (503, b"2")
    assert dict(headers)[b"content-length"] == str(len(body)).encode()
    assert json.loads(body)["request_id"] == "r1"
    _, headers, _ = problem(errors.UnknownMount("no"))
    assert b"retry-after" not in dict(headers)
