"""What happens to bytes: a table of what clients send, and what the server makes of it before the app has a say.

``status`` 0 means that the request reaches the app.
"""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus

import pytest

from tests.integration.probe import Client, Server

PASSES = 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("probe")) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.connect() as client:
        yield client


def get(target: bytes = b"/", *lines: bytes, version: bytes = b"HTTP/1.1", method: bytes = b"GET") -> bytes:
    head = b" ".join((method, target, version)) + b"\r\n"
    return head + b"".join(line + b"\r\n" for line in (b"Host: test", *lines)) + b"\r\n"


def chunked(body: bytes, *lines: bytes) -> bytes:
    return get(b"/", b"Transfer-Encoding: chunked", *lines, method=b"POST") + body


CASES = [
    # Request line
    ("a plain request", get(), PASSES),
    ("an empty line before it", b"\r\n" + get(), PASSES),
    ("two spaces", b"GET  / HTTP/1.1\r\nHost: test\r\n\r\n", 400),
    ("tabs", b"GET\t/\tHTTP/1.1\r\nHost: test\r\n\r\n", 400),
    ("HTTP/0.9", b"GET /\r\n\r\n", 400),
    ("HTTP/2.0 without TLS", get(version=b"HTTP/2.0"), 400),
    ("another version", get(version=b"HTTP/1.2"), 400),
    ("HTTP/2's preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ("a NUL in the target", get(b"/\0"), 400),
    ("UTF-8 that is not encoded", get("/é".encode()), 400),
    ("a relative target", get(b"a/b"), 400),
    ("a target of only a query", get(b"?a"), 400),
    ("an asterisk with GET", get(b"*"), 400),
    ("a target of 8,000 bytes", get(b"/" + b"a" * 8000), PASSES),
    ("a target of 9,000 bytes", get(b"/" + b"a" * 9000), 414),
    ("a target without end", b"GET /" + b"a" * 100_000, 414),
    # Methods
    ("WebDAV's methods", get(method=b"PROPFIND"), PASSES),
    ("a method with a hyphen", get(method=b"VERSION-CONTROL"), PASSES),
    ("a method that nobody knows", get(method=b"FROBNICATE"), PASSES),
    ("a method in lower case", get(method=b"get"), 400),
    ("a method that is no token", get(method=b"GE(T"), 400),
    # Header fields
    ("a line that ends with LF", b"GET / HTTP/1.1\nHost: test\n\n", 400),
    ("a field that ends with LF", b"GET / HTTP/1.1\r\nHost: test\nX: y\r\n\r\n", 400),
    ("a bare CR", get(b"/", b"X: a\rb"), 400),
    ("a NUL", get(b"/", b"X: a\0b"), 400),
    ("a control character", get(b"/", b"X: a\x01b"), 400),
    ("a folded field", get(b"/", b"X: a", b" b"), 400),
    ("a first field that begins with a space", b"GET / HTTP/1.1\r\n X: a\r\nHost: test\r\n\r\n", 400),
    ("a space before the colon", get(b"/", b"X : a"), 400),
    ("a field without a name", get(b"/", b": a"), 400),
    ("a field without a colon", get(b"/", b"X"), 400),
    ("bytes above ASCII", get(b"/", b"X: \xff"), PASSES),
    ("two Hosts", get(b"/", b"Host: test"), 400),
    ("two Content-Types", get(b"/", b"Content-Type: a/b", b"Content-Type: a/b"), 400),
    ("a field of 8,000 bytes", get(b"/", b"X: " + b"a" * 8000), PASSES),
    ("a field of 9,000 bytes", get(b"/", b"X: " + b"a" * 9000), 431),
    ("99 fields", get(b"/", *[b"X: a"] * 99), PASSES),
    ("101 fields", get(b"/", *[b"X: a"] * 101), 431),
    ("a header of 640,000 bytes", get(b"/", *[b"X: " + b"a" * 8000] * 80), 431),
    # Framing
    ("length and chunks", chunked(b"0\r\n\r\n", b"Content-Length: 3"), 400),
    ("chunks twice", chunked(b"0\r\n\r\n", b"Transfer-Encoding: chunked"), 400),
    ("chunks in HTTP/1.0", get(b"/", b"Transfer-Encoding: chunked", version=b"HTTP/1.0"), 400),
    ("a coding that nobody knows", get(b"/", b"Transfer-Encoding: xchunked"), 501),
    ("a coding before the chunks", get(b"/", b"Transfer-Encoding: gzip, chunked"), 501),
    ("no coding before the chunks", get(b"/", b"Transfer-Encoding: identity, chunked"), 501),
    ("a coding without chunks", get(b"/", b"Transfer-Encoding: gzip"), 400),
    ("a coding after a vertical tab", get(b"/", b"Transfer-Encoding: \x0bchunked"), 400),
    ("the same length twice", get(b"/", b"Content-Length: 1", b"Content-Length: 1") + b"x", 400),
    ("a list of lengths", get(b"/", b"Content-Length: 1, 1") + b"x", 400),
    ("a signed length", get(b"/", b"Content-Length: +1") + b"x", 400),
    ("an empty length", get(b"/", b"Content-Length:"), 400),
    ("a length of 5,000 digits", get(b"/", b"Content-Length: " + b"9" * 5000), 400),
    ("a chunk", chunked(b"3\r\nabc\r\n0\r\n\r\n"), PASSES),
    ("a chunk with an extension", chunked(b"3;a=b\r\nabc\r\n0\r\n\r\n"), PASSES),
    ("a chunk with a trailer", chunked(b"0\r\nX: y\r\n\r\n"), PASSES),
    ("a trailer that frames", chunked(b"0\r\nContent-Length: 3\r\n\r\n"), 400),
    ("a chunk of no size", chunked(b"zz\r\n"), 400),
    ("a chunk of 0x1", chunked(b"0x1\r\nx\r\n0\r\n\r\n"), 400),
    ("a chunk that is longer than its size", chunked(b"1\r\nxy\r\n0\r\n\r\n"), 400),
]


@pytest.mark.parametrize(("data", "status"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_bytes(client: Client, data: bytes, status: int) -> None:
    client.send(data)
    answer = client.answer()
    if status == PASSES:
        assert answer.status == 200
        assert answer.json()["method"] == data.split(maxsplit=1)[0].decode()
    else:
        assert answer.status == status
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["connection"] == "close"
        assert answer.json()["status"] == status
        assert answer.json()["executed"] == "no"
        assert client.rest() == b""


def test_every_byte_alone_is_the_same(client: Client) -> None:
    for byte in chunked(b"3\r\nabc\r\n0\r\n\r\n"):
        client.send(bytes([byte]))
    assert client.answer().json()["body"] == "abc"


def test_underscores_and_forwarding(client: Client) -> None:
    """A name with an underscore is dropped; whom to believe about the scheme is the gateway's decision."""
    lines = [b"X_Y: 1", b"Script_Name: /x", b"X-Forwarded-Proto: https", b"X-Forwarded-For: 192.0.2.1"]
    client.send(get(b"/", *lines))
    seen = client.answer().json()
    assert dict(seen["headers"]) == {
        "host": "test",
        "x-forwarded-proto": "https",
        "x-forwarded-for": "192.0.2.1",
    }
    assert seen["scheme"] == "http"
    assert seen["client"][0] == "127.0.0.1"


def test_pipelined_requests_are_answered_in_order(client: Client) -> None:
    client.send(get(b"/1") + get(b"/2") + chunked(b"1\r\nx\r\n0\r\n\r\n") + get(b"/3")[:-2])
    assert [client.answer().json()["path"] for _ in range(3)] == ["/1", "/2", "/"]
    client.send(b"\r\n")
    assert client.answer().json()["path"] == "/3"


def test_expect_continue(client: Client) -> None:
    client.send(get(b"/", b"Expect: 100-continue", b"Content-Length: 4", method=b"POST"))
    assert client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue"
    client.send(b"body")
    assert client.answer().json()["body"] == "body"


def test_http_1_0_ends_with_the_connection(client: Client) -> None:
    """Also where the client asks to keep it: only its end says where a body without length ends."""
    client.send(get(b"/stream?10", b"Connection: keep-alive", version=b"HTTP/1.0"))
    head, _, body = client.rest().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 OK\r\n")
    assert body == b"x" * 640


def test_server_and_date(client: Client) -> None:
    answer = client.request("/")
    assert answer.headers["server"] == "flaskbus"
    assert answer.headers["date"].endswith(" GMT")


def test_a_bad_chunk_does_not_answer_in_the_middle_of_a_response(client: Client) -> None:
    client.send(chunked(b"").replace(b" / ", b" /open "))
    client.read_until(b"open")
    client.send(b"zz\r\n")
    assert b"HTTP/1.1" not in client.rest()


def test_whoever_waits_for_the_client_to_leave_is_told_that_the_response_is_over(
    server: Server, client: Client
) -> None:
    """Also where the connection stays open, or a task for every request would stay with it."""
    assert client.request("/watch").status == 200
    server.logged("probe heard the end of the response")
    assert client.request("/").status == 200


def test_a_status_is_said_in_words(client: Client) -> None:
    """Without help gunicorn says Unknown for WebDAV's 207 and for a 416."""
    words = {200: b"OK", 207: b"Multi-Status", 416: HTTPStatus(416).phrase.encode(), 418: b"I'm a Teapot"}
    for status, phrase in words.items():
        client.send(get(b"/status?%d" % status))
        assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 %d %s\r\n" % (status, phrase))


def test_an_app_that_fails_is_a_problem_document(client: Client) -> None:
    answer = client.request("/fail")
    assert answer.status == 500
    assert answer.json()["executed"] == "unknown"


def test_a_response_that_breaks_off_closes_the_connection(server: Server, client: Client) -> None:
    client.send(get(b"/half"))
    assert client.rest().endswith(b"half.")
    assert "without completing" not in server.log()


def test_a_refusal_arrives_while_the_body_is_still_on_its_way(client: Client) -> None:
    size = 20_000_000
    client.send(get(b"/early", b"Content-Length: %d" % size, method=b"POST"))
    client.send(b"x" * 1_000_000)
    answer = client.answer()
    assert (answer.status, answer.body) == (413, b"too large")
    assert answer.headers["connection"] == "close"  # else the client would send its next request, in vain
    client.send(b"x" * 1_000_000)  # a reset would raise here, or have destroyed the answer
    assert client.rest() == b""
