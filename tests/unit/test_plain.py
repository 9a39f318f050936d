"""What is read as a plain request is read as gunicorn reads it; what is written is what gunicorn writes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn.asgi import protocol
from gunicorn.asgi.parser import ParseError, PythonProtocol
from hypothesis import example, given
from hypothesis import strategies as st

from flaskbus.messages import Reply
from flaskbus_gateway.connection import Connection
from flaskbus_gateway.http import relayed_headers
from flaskbus_gateway.plain import LARGEST_HEADER, MOST_FIELDS, Header, read, write

HELLO = b"GET /hello?a=b HTTP/1.1\r\nHost: 127.0.0.1:5000\r\n\r\n"

CHROME = (
    b"GET /shop/items?page=2 HTTP/1.1\r\n"
    b"Host: localhost:5000\r\n"
    b"Connection: keep-alive\r\n"
    b'sec-ch-ua: "Not_A Brand";v="8", "Chromium";v="120"\r\n'
    b"sec-ch-ua-mobile: ?0\r\n"
    b"Upgrade-Insecure-Requests: 1\r\n"
    b"User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Safari/537.36\r\n"
    b"Accept: text/html,application/xhtml+xml,*/*;q=0.8\r\n"
    b"Accept-Encoding: gzip, deflate, br\r\n"
    b"Cookie: session=eyJhIjoxfQ.ZZ; theme=dark\r\n"
    b"\r\n"
)

CURL = (
    b"POST /api HTTP/1.1\r\nHost: x\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\nContent-Type: text/plain\r\n"
    b"Content-Length: 5\r\n\r\nhello"
)


def with_gunicorn(data: bytes) -> tuple[bytes, bytes, list[tuple[bytes, bytes]], bytes] | None:
    """The one whole request, after which the connection goes on, that gunicorn's parser sees in these bytes."""
    body: list[bytes] = []
    parser: Any = PythonProtocol(
        on_body=body.append, limit_request_line=8190, limit_request_fields=100, limit_request_field_size=8190
    )
    try:
        parser.feed(data)
    except (ParseError, ValueError):
        return None
    if not parser.is_complete or parser.remaining() or not parser.should_keep_alive or parser.is_chunked:
        return None
    if parser.http_version != (1, 1):
        return None
    return parser.method, parser.path, parser.headers, b"".join(body)


@pytest.mark.parametrize("data", [HELLO, CHROME, CURL])
def test_what_clients_send_is_plain(data: bytes) -> None:
    plain = read(data)
    assert plain is not None
    assert (plain.method, plain.target, list(plain.header.fields), plain.body) == with_gunicorn(data)


def request(*lines: bytes, body: bytes = b"", start: bytes = b"GET / HTTP/1.1") -> bytes:
    return b"\r\n".join([start, *lines, b"", body])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET",
        HELLO[:-1],
        HELLO + b"G",
        HELLO + HELLO,
        b"\r\n" + HELLO,
        HELLO.replace(b"\r\n", b"\n"),
        request(b"Host: a", start=b"GET / HTTP/1.0"),
        request(b"Host: a", start=b"HEAD / HTTP/1.1"),
        request(b"Host: a", start=b"CONNECT /a HTTP/1.1"),
        request(b"Host: a", start=b"GET http://a/ HTTP/1.1"),
        request(b"Host: a", start=b"OPTIONS * HTTP/1.1"),
        request(b"Host: a", start=b"get / HTTP/1.1"),
        request(b"Host: a", start=b"GET  / HTTP/1.1"),
        request(b"Host: a", start=b"GET /\xe4 HTTP/1.1"),
        request(b"Host: a", b"Connection: close"),
        request(b"Host: a", b"Connection: keep-alive, X-A"),
        request(b"Host: a", b"Connection: Upgrade", b"Upgrade: websocket"),
        request(b"Host: a", b"Upgrade: h2c"),
        request(b"Host: a", b"HTTP2-Settings: AAMAAABk"),
        request(b"Host: a", b"Expect: 100-continue", b"Content-Length: 1", body=b"a"),
        request(b"Host: a", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
        request(b"Host: a", b"Transfer-Encoding: identity"),
        request(b"Host: a", b"Content-Length: 2", body=b"a"),
        request(b"Host: a", b"Content-Length: 1", body=b"ab"),
        request(b"Host: a", b"Content-Length: +1", body=b"a"),
        request(b"Host: a", b"Content-Length: 1", b"Content-Length: 1", body=b"a"),
        request(b"Host: a", b"Content-Length: " + b"9" * 5000),
        request(b"Host: a", b"Host: a"),
        request(b"Host: a", b"Content-Type: a", b"content-type: b"),
        request(b"Host: a", b"A : b"),
        request(b"Host: a", b"A"),
        request(b"Host: a", b"A: b", b" folded"),
        request(b"Host: a", b"A: b\0"),
        request(b"Host: a", b"A: b\rc"),
        request(b"Host: a", b"\xe4: b"),
        request(b"Host: a", *[b"A: b"] * MOST_FIELDS),
        request(b"Host: a", b"A: " + b"b" * LARGEST_HEADER),
    ],
)
def test_all_else_is_not(data: bytes) -> None:
    assert read(data) is None
    for other in (data[: data.find(b"\r\n\r\n") + 4], HELLO, CURL):
        if (last := read(other)) is not None:
            assert read(data, last.header) is None


def test_limits_are_not_plain_only_beyond_them() -> None:
    assert read(request(b"Host: a", *[b"A: b"] * (MOST_FIELDS - 1)))
    room = LARGEST_HEADER - len(request(b"Host: a", b"A: "))
    assert read(request(b"Host: a", b"A: " + b"b" * room))
    assert not read(request(b"Host: a", b"A: " + b"b" * (room + 1)))


tokens = st.sampled_from(
    [
        b"Host",
        b"host",
        b"Content-Length",
        b"content-length",
        b"Connection",
        b"Transfer-Encoding",
        b"X-A",
        b"A",
        b"a_b",
    ]
) | st.binary(max_size=6)
values = st.sampled_from(
    [b"a", b"", b"0", b"1", b"5", b"keep-alive", b"close", b"chunked", b" a ", b"\ta\t"]
) | st.binary(max_size=8)
lines = st.builds(
    lambda name, colon, value: name + colon + value,
    tokens,
    st.sampled_from([b": ", b":", b" :", b""]),
    values,
)
starts = st.builds(
    lambda method, target, version: b" ".join((method, target, version)),
    st.sampled_from([b"GET", b"POST", b"PROPFIND", b"M-SEARCH", b"A", b"get"]),
    st.sampled_from([b"/", b"/a?b", b"//", b"*", b"/%00", b"http://a/b"]) | st.binary(max_size=6),
    st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2", b"HTTP/1.1 "]),
)
requests = st.builds(
    lambda start, host, rest, end, body: b"\r\n".join([start, *host, *rest, b""]) + end + body,
    starts,
    st.sampled_from([[b"Host: a"], []]),
    st.lists(lines, max_size=4),
    st.sampled_from([b"\r\n", b"\n", b""]),
    st.binary(max_size=6),
)


@given(requests, requests)
@example(CURL, CURL)
@example(CURL, CURL.replace(b"hello", b"world"))
@example(CHROME, CHROME.replace(b"page=2", b"page=3"))
@example(HELLO, HELLO.replace(b"GET", b"PUT"))
def test_what_is_plain_is_what_gunicorn_reads(first: bytes, second: bytes) -> None:
    last: Header | None = None
    for data in (first, second, first):
        plain = read(data, last)
        if plain is not None:
            assert (plain.method, plain.target, list(plain.header.fields), plain.body) == with_gunicorn(data)
            assert read(data) == plain
            last = plain.header


# Responses

DATE = b"Date: Sat, 21 Nov 2026 12:00:00 GMT\r\n"


def by_gunicorn(reply: Reply, *, close: bool) -> bytes:
    connection: Any = SimpleNamespace()
    headers = relayed_headers(reply.headers)
    send: Any = vars(protocol.ASGIProtocol)["_send_response_start"]
    send(connection, reply.status, headers, SimpleNamespace(version=(1, 1)), close=close)
    return bytes(connection._response_buffer + reply.body)


names = st.sampled_from(
    [
        b"Content-Type",
        b"Content-Length",
        b"content-length",
        b"Server",
        b"Date",
        b"X-A",
        b"Connection",
        b"Bad Name",
        b"",
    ]
)
contents = st.sampled_from([b"", b"0", b"2", b"text/plain", b"a\r\nb", b"\0", b"\x7f", b"caf\xe9", b"\t"])


@given(
    st.sampled_from([200, 201, 204, 205, 206, 304, 404, 413, 414, 418, 500, 599, 999]),
    st.lists(st.tuples(names, contents), max_size=4),
    st.sampled_from([b"", b"ab"]),
    st.booleans(),
)
def test_what_is_written_is_what_gunicorn_writes(
    status: int, headers: list[tuple[bytes, bytes]], body: bytes, close: bool
) -> None:
    assert issubclass(Connection, protocol.ASGIProtocol)  # it gives gunicorn our name and reason phrases
    reply = Reply(1, 0, status, (*headers, (b"Content-Length", b"%d" % len(body))), body)
    pieces = write(reply, DATE, close=close)
    if pieces is not None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(protocol, "_get_cached_date_header", lambda: DATE)
            assert b"".join(pieces) == by_gunicorn(reply, close=close)


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (200, ()),
        (101, ((b"Content-Length", b"2"),)),
        (200, ((b"Content-Length", b"3"),)),
        (200, ((b"Content-Length", b"2"), (b"content-length", b"2"))),
        (200, ((b"Content-Length", b"02"),)),
        (204, ()),
        (304, ((b"Content-Length", b"2"),)),
        (200, ((b"Content-Length", b"2"), (b"Transfer-Encoding", b"chunked"))),
        (200, ((b"Content-Length", b"2"), (b"Connection", b"close"))),
        (200, ((b"Content-Length", b"2"), (b"A", b"b\r\nC: d"))),
        (200, ((b"Content-Length", b"2"), (b"A b", b"c"))),
    ],
)
def test_what_is_not_plainly_framed_is_not_written(
    status: int, headers: tuple[tuple[bytes, bytes], ...]
) -> None:
    assert write(Reply(1, 0, status, headers, b"ab"), DATE, close=False) is None
