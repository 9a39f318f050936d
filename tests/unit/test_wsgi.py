"""Environ and response of PEP 3333, with a list in the place of the bus."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from wsgiref.validate import validator

import flask
import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.wrappers import Request as WerkzeugRequest
from werkzeug.wsgi import ClosingIterator

from flaskbus import wire
from flaskbus.messages import Headers, Request
from flaskbus.wire import MAX_CHUNK
from flaskbus_agent.environ import build_environ, plain_environ
from flaskbus_agent.wsgi import APP_ERROR, Cancelled, ClientDisconnected, respond

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

GET = Request(
    id="r1",
    method="GET",
    target="/shop/cart?x=%20&y",
    gateway="g1",
    ttl=30_000,
    script_name="/shop",
    client=("192.0.2.7", 4711),
    server=("shop.example.com", 5000),
    headers=((b"host", b"shop.example.com:5000"), (b"accept", b"*/*")),
)


def environ_of(request: Request, **options: bool) -> WSGIEnvironment:
    settings = {"multithread": True, "multiprocess": False, **options}
    errors = io.StringIO()
    environ = build_environ(request, errors=errors, **settings)
    plain = wire.peek_plain(
        [part if isinstance(part, bytes) else str(part).encode() for part in wire.encode_request(request)]
    )
    if plain is not None:
        same = plain_environ(plain, errors=errors, **settings)
        assert same.pop("wsgi.input").getvalue() == environ["wsgi.input"].getvalue()
        assert same == {key: value for key, value in environ.items() if key != "wsgi.input"}
    return environ


def with_headers(*headers: tuple[bytes, bytes], body: bytes = b"") -> WSGIEnvironment:
    return environ_of(replace(GET, headers=headers, body=body))


# The request


def test_environ() -> None:
    environ = environ_of(GET, multiprocess=True)
    assert environ["REQUEST_METHOD"] == "GET"
    assert (environ["SCRIPT_NAME"], environ["PATH_INFO"]) == ("/shop", "/cart")
    assert environ["QUERY_STRING"] == "x=%20&y"
    assert environ["REQUEST_URI"] == environ["RAW_URI"] == "/shop/cart?x=%20&y"
    assert environ["SERVER_PROTOCOL"] == "HTTP/1.1"
    assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == ("shop.example.com", "5000")
    assert (environ["REMOTE_ADDR"], environ["REMOTE_PORT"]) == ("192.0.2.7", "4711")
    assert environ["HTTP_HOST"] == "shop.example.com:5000"
    assert environ["HTTP_ACCEPT"] == "*/*"
    assert environ["wsgi.url_scheme"] == "http"
    assert environ["wsgi.input"].read() == b""
    assert environ["wsgi.input_terminated"] is True
    assert environ["wsgi.multithread"] is True
    assert environ["wsgi.multiprocess"] is True
    assert environ["flaskbus.request_id"] == "r1"
    assert environ["flaskbus.attempt"] == 1
    assert "CONTENT_LENGTH" not in environ
    assert "CONTENT_TYPE" not in environ


@pytest.mark.parametrize(("version", "protocol"), [("1.0", "HTTP/1.0"), ("1.1", "HTTP/1.1"), ("2", "HTTP/2")])
def test_protocol(version: str, protocol: str) -> None:
    assert environ_of(replace(GET, http_version=version))["SERVER_PROTOCOL"] == protocol


@pytest.mark.parametrize(
    ("script_name", "target", "expected"),
    [
        ("", "/", ("", "/")),
        ("", "/a//b/", ("", "/a//b/")),
        ("", "//a", ("", "//a")),
        ("/shop", "/shop", ("/shop", "")),
        ("/shop", "/shop?q=/x", ("/shop", "")),
        ("/shop", "/shop/", ("/shop", "/")),
        ("/shop", "/shop//x", ("/shop", "//x")),
        ("/a/b", "/a/b/c/d", ("/a/b", "/c/d")),
        # The client may spell the prefix with escapes of its own.
        ("/caf%C3%A9", "/caf%c3%a9/x", ("/caf\xc3\xa9", "/x")),
        ("/api", "/%61pi/x", ("/api", "/x")),
        ("/api", "/api/a%2Fb%20c", ("/api", "/a/b c")),
        ("", "/%E2%82%AC%FF", ("", "/\xe2\x82\xac\xff")),
        ("", "/100%", ("", "/100%")),
    ],
)
def test_paths(script_name: str, target: str, expected: tuple[str, str]) -> None:
    environ = environ_of(replace(GET, script_name=script_name, target=target))
    assert (environ["SCRIPT_NAME"], environ["PATH_INFO"]) == expected


@given(st.lists(st.text(min_size=1), min_size=1, max_size=4), st.lists(st.text(), max_size=4))
def test_script_name_and_path_info_are_the_path(prefix: list[str], rest: list[str]) -> None:
    script_name = "".join(f"/{quote(segment, safe='')}" for segment in prefix)
    path_info = "".join(f"/{quote(segment, safe='')}" for segment in rest)
    environ = environ_of(replace(GET, script_name=script_name, target=script_name + path_info))
    decoded = [environ[name].encode("latin-1").decode() for name in ("SCRIPT_NAME", "PATH_INFO")]
    assert decoded == ["".join(f"/{segment}" for segment in segments) for segments in (prefix, rest)]


@pytest.mark.parametrize(
    ("scheme", "host", "expected"),
    [
        ("http", b"example.com:8080", ("example.com", "8080")),
        ("http", b"example.com", ("example.com", "80")),
        ("https", b"example.com", ("example.com", "443")),
        ("https", b"[::1]", ("[::1]", "443")),
        ("http", b"[::1]:8080", ("[::1]", "8080")),
        ("http", b"", ("localhost", "80")),
    ],
)
def test_a_unix_socket_has_the_name_that_the_client_asked_for(
    scheme: str, host: bytes, expected: tuple[str, str]
) -> None:
    environ = environ_of(replace(GET, server=("", 0), scheme=scheme, headers=((b"host", host),)))
    assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == expected


def test_repeated_headers() -> None:
    environ = with_headers(
        (b"x-a", b"1"), (b"cookie", b"a=1"), (b"x-a", b"2"), (b"cookie", b"b=2"), (b"x-a", b"3"),
        (b"content-type", b"text/plain"), (b"content-type", b"text/html"),
    )  # fmt: skip
    assert environ["HTTP_X_A"] == "1,2,3"
    assert environ["HTTP_COOKIE"] == "a=1; b=2"
    assert environ["CONTENT_TYPE"] == "text/html"


def test_headers_that_an_app_must_not_see() -> None:
    environ = with_headers((b"x_user", b"root"), (b"X-User", b"me"), (b"transfer-encoding", b"chunked"))
    assert environ["HTTP_X_USER"] == "me"
    assert "HTTP_TRANSFER_ENCODING" not in environ


def test_a_value_is_latin_1() -> None:
    assert with_headers((b"x-name", "é".encode()))["HTTP_X_NAME"] == "Ã©"


@pytest.mark.parametrize(
    ("headers", "body", "length"),
    [
        (((b"content-length", b"3"),), b"abc", "3"),
        (((b"content-length", b"0"),), b"", "0"),
        (((b"transfer-encoding", b"chunked"),), b"abcd", "4"),
        ((), b"abcde", "5"),  # HTTP/2 need not say
    ],
)
def test_content_length(headers: Headers, body: bytes, length: str) -> None:
    environ = with_headers(*headers, body=body)
    assert environ["CONTENT_LENGTH"] == length
    assert environ["wsgi.input"].read() == body


def test_werkzeug_reads_the_request() -> None:
    body = b"a=1&b=2"
    environ = environ_of(
        replace(
            GET,
            method="POST",
            target="/shop/caf%C3%A9?q=%C3%A9",
            headers=(*GET.headers, (b"content-type", b"application/x-www-form-urlencoded")),
            body=body,
        )
    )
    request = WerkzeugRequest(environ)
    assert request.url == "http://shop.example.com:5000/shop/café?q=é"
    assert dict(request.form) == {"a": "1", "b": "2"}


# The response


class Recorder:
    """A sink that remembers; ``at`` is the number of its call that raises ``error``."""

    def __init__(self, at: int = -1, error: BaseException | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.at = at
        self.error = error or Cancelled()
        self.raised = False

    def _record(self, *call: object) -> None:
        assert not self.raised, f"{call} after an error"
        if len(self.calls) == self.at:
            self.raised = True
            raise self.error
        self.calls.append(call)

    def reply(self, status: int, headers: Headers, body: bytes, /) -> None:
        self._record("reply", status, headers, body)

    def head(self, status: int, headers: Headers, /) -> None:
        self._record("head", status, headers)

    def chunk(self, data: bytes, /) -> None:
        self._record("chunk", data)

    def end(self) -> None:
        self._record("end")

    def fail(self, code: str, detail: str, /) -> None:
        self._record("fail", code, detail)


def run(
    app: WSGIApplication, method: str = "GET", sink: Recorder | None = None, reply_limit: int = MAX_CHUNK
) -> list[tuple[Any, ...]]:
    sink = sink or Recorder()
    environ = environ_of(replace(GET, method=method))
    respond(app, environ, sink, method=method, reply_limit=reply_limit)
    return sink.calls


class Body:
    """An iterable that runs steps, and counts its closings; a step is bytes, an error or a function."""

    def __init__(self, *steps: object) -> None:
        self.steps = iter(steps)
        self.closed = 0
        self.taken = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> Any:
        step = next(self.steps)
        self.taken += 1
        if isinstance(step, BaseException):
            raise step
        return step() if callable(step) else step

    def close(self) -> None:
        self.closed += 1


def answering(
    body: Iterable[bytes], *headers: tuple[str, str], status: str = "200 OK"
) -> Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(status, list(headers))
        return body

    return app


LENGTH_5 = ("Content-Length", "5")
SENT_5 = ((b"Content-Length", b"5"),)
SENT_0 = ((b"Content-Length", b"0"),)


@pytest.mark.parametrize(
    ("body", "headers", "calls"),
    [
        # whole
        ([b"hello"], [LENGTH_5], [("reply", 200, SENT_5, b"hello")]),
        ([b"hello"], [], [("reply", 200, SENT_5, b"hello")]),
        ((b"hello",), [], [("reply", 200, SENT_5, b"hello")]),
        (Body(b"hello"), [LENGTH_5], [("reply", 200, SENT_5, b"hello")]),
        (Body(b"", b"hello", b""), [LENGTH_5], [("reply", 200, SENT_5, b"hello")]),
        ([], [], [("reply", 200, SENT_0, b"")]),
        (Body(b"", b""), [], [("reply", 200, SENT_0, b"")]),
        ([b""], [], [("reply", 200, SENT_0, b"")]),
        ([], [("content-length", "0")], [("reply", 200, ((b"content-length", b"0"),), b"")]),
        # streamed
        (Body(b"hello"), [], [("head", 200, ()), ("chunk", b"hello"), ("end",)]),
        ([b"he", b"llo"], [], [("head", 200, ()), ("chunk", b"he"), ("chunk", b"llo"), ("end",)]),
        ([b"he", b"llo"], [LENGTH_5], [("head", 200, SENT_5), ("chunk", b"he"), ("chunk", b"llo"), ("end",)]),
        (Body(b"a", b"", b"b"), [], [("head", 200, ()), ("chunk", b"a"), ("chunk", b"b"), ("end",)]),
    ],
)  # fmt: skip
def test_a_response(
    body: Iterable[bytes], headers: list[tuple[str, str]], calls: list[tuple[Any, ...]]
) -> None:
    assert run(answering(body, *headers)) == calls
    if isinstance(body, Body):
        assert body.closed == 1


def test_who_writes_after_the_end_is_told_and_nothing_is_sent() -> None:
    """A thread that an app left behind."""
    writers = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        writers.append(start_response("200 OK", []))
        return [b"who", b"le"]

    sink = Recorder()
    calls = run(app, sink=sink)[:]
    with pytest.raises(Cancelled):
        writers[0](b"more")
    assert sink.calls == calls


def test_a_chunk_leaves_before_the_next_is_asked_for() -> None:
    sink = Recorder()

    def look(*expected: object) -> Callable[[], bytes]:
        def step() -> bytes:
            assert sink.calls[-1] == expected
            return b"next"

        return step

    body = Body(b"first", look("chunk", b"first"), look("chunk", b"next"))
    run(answering(body), sink=sink)
    assert [call[0] for call in sink.calls] == ["head", "chunk", "chunk", "chunk", "end"]


def test_the_reply_is_sent_before_close() -> None:
    sink = Recorder()
    seen: list[int] = []
    closing = ClosingIterator([b"hello"], lambda: seen.append(len(sink.calls)))
    run(answering(closing, LENGTH_5), sink=sink)
    assert seen == [1]


@pytest.mark.parametrize("headers", [[], [("Content-Length", str(MAX_CHUNK * 2 + 1))]])
def test_a_large_reply_is_split(headers: list[tuple[str, str]]) -> None:
    body = b"x" * (MAX_CHUNK * 2 + 1)
    head, *chunks, end = run(answering([body], *headers))
    assert head == ("head", 200, ((b"Content-Length", str(len(body)).encode()),))
    assert [len(chunk[1]) for chunk in chunks] == [MAX_CHUNK, MAX_CHUNK, 1]
    assert end == ("end",)


def test_a_large_chunk_is_split() -> None:
    calls = run(answering(Body(b"a", b"x" * (MAX_CHUNK + 1))))
    assert [len(call[1]) for call in calls if call[0] == "chunk"] == [1, MAX_CHUNK, 1]


@pytest.mark.parametrize(("limit", "first"), [(5, "reply"), (4, "head")])
def test_the_limit_of_a_reply(limit: int, first: str) -> None:
    assert run(answering([b"hello"]), reply_limit=limit)[0][0] == first


@pytest.mark.parametrize(
    ("method", "status", "headers", "sent"),
    [
        ("HEAD", "200 OK", [LENGTH_5], SENT_5),
        ("HEAD", "200 OK", [], ()),
        ("GET", "204 No Content", [("Content-Length", "0"), ("X-A", "b")], ((b"X-A", b"b"),)),
        ("GET", "304 Not Modified", [LENGTH_5], SENT_5),
        ("GET", "304 Not Modified", [], ()),
    ],
)
@pytest.mark.parametrize("chunks", [(), (b"hello", b"more")])
def test_responses_without_a_body(
    method: str,
    status: str,
    headers: list[tuple[str, str]],
    sent: Headers,
    chunks: tuple[bytes, ...],
    caplog: pytest.LogCaptureFixture,
) -> None:
    body = Body(*chunks)
    assert run(answering(body, *headers, status=status), method) == [("reply", int(status[:3]), sent, b"")]
    # It may be endless.
    assert body.taken <= 1
    assert body.closed == 1
    warned = "the app sent a body with status" in caplog.text
    assert warned is (bool(chunks) and method != "HEAD")


@pytest.mark.parametrize(
    ("body", "calls"),
    [
        (Body(b"hello world", b"never asked for"), [("reply", 200, SENT_5, b"hello")]),
        (Body(b"hello", b" world", b"never asked for"), [("reply", 200, SENT_5, b"hello")]),
        (
            Body(b"he", b"llo world", b"never asked for"),
            [("head", 200, SENT_5), ("chunk", b"he"), ("chunk", b"llo"), ("end",)],
        ),
        ([b"hello world"], [("reply", 200, SENT_5, b"hello")]),
    ],
)
def test_more_than_the_content_length_is_dropped(
    body: Iterable[bytes], calls: list[tuple[Any, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    assert run(answering(body, LENGTH_5)) == calls
    assert "GET /shop/cart?x=%20&y (request r1): the app sent more than its Content-Length 5" in caplog.text
    if isinstance(body, Body):
        assert next(body) == b"never asked for"
        assert body.closed == 1


@pytest.mark.parametrize(
    ("body", "sent"), [([b"hel"], [b"hel"]), (Body(b"he", b"l"), [b"he", b"l"]), ([], [])]
)
def test_less_than_the_content_length_does_not_look_complete(
    body: Iterable[bytes], sent: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    detail = f"the app sent {len(b''.join(sent))} bytes of a Content-Length of 5"
    assert run(answering(body, LENGTH_5)) == [
        ("head", 200, SENT_5),
        *(("chunk", data) for data in sent),
        ("fail", APP_ERROR, detail),
    ]
    assert detail in caplog.text


# start_response and write


def test_start_response_may_come_with_the_first_iteration() -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("201 Created", [])
        yield b"x"

    assert run(app) == [("head", 201, ()), ("chunk", b"x"), ("end",)]


def test_write() -> None:
    sink = Recorder()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        write = start_response("200 OK", [])
        write(b"")
        assert sink.calls == []
        write(b"a")
        assert sink.calls == [("head", 200, ()), ("chunk", b"a")]
        return [b"b"]

    assert run(app, sink=sink)[2:] == [("chunk", b"b"), ("end",)]


def test_write_of_a_whole_response() -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [LENGTH_5])(b"hello")
        return []

    assert run(app) == [("reply", 200, SENT_5, b"hello")]


def test_write_of_too_much(caplog: pytest.LogCaptureFixture) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        write = start_response("200 OK", [LENGTH_5])
        for _ in range(3):
            write(b"hello")
        return [b"and more"]

    assert run(app) == [("reply", 200, SENT_5, b"hello")]
    assert caplog.text.count("more than its Content-Length") == 1


def failing(environ: WSGIEnvironment, start_response: StartResponse, *before: bytes) -> Iterator[bytes]:
    """Error handling as PEP 3333 shows it, after the app gave ``before``."""
    start_response("200 OK", [LENGTH_5])
    yield from before
    try:
        raise ValueError("broken")
    except ValueError:
        start_response("500 Oops", [("X-Error", "yes")], sys.exc_info())
        yield b"sorry"


def test_exc_info_replaces_what_was_not_sent() -> None:
    calls = run(failing)
    assert calls == [("head", 500, ((b"X-Error", b"yes"),)), ("chunk", b"sorry"), ("end",)]


def test_exc_info_is_raised_again_after_the_head(caplog: pytest.LogCaptureFixture) -> None:
    calls = run(lambda environ, start_response: failing(environ, start_response, b"he"))
    assert calls == [
        ("head", 200, SENT_5),
        ("chunk", b"he"),
        ("fail", APP_ERROR, "the app raised ValueError"),
    ]
    assert "ValueError: broken" in caplog.text


def test_exc_info_is_raised_again_after_the_end(caplog: pytest.LogCaptureFixture) -> None:
    calls = run(lambda environ, start_response: failing(environ, start_response, b"hello"))
    assert calls == [("reply", 200, SENT_5, b"hello")]
    assert "ValueError: broken" in caplog.text


def test_exc_info_of_no_error_is_no_error() -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        yield b"a"
        start_response("200 OK", [], sys.exc_info())
        yield b"b"

    assert run(app) == [("head", 200, ()), ("chunk", b"a"), ("chunk", b"b"), ("end",)]


def test_headers_keep_their_order_and_lose_what_is_hop_by_hop() -> None:
    headers = [
        ("Set-Cookie", "b=2"),
        ("Connection", "close, X-Private"),
        ("X-Private", "1"),
        ("Keep-Alive", "timeout=5"),
        ("Transfer-Encoding", "chunked"),
        ("TE", "trailers"),
        ("Trailer", "X"),
        ("Upgrade", "h2c"),
        ("Proxy-Connection", "close"),
        ("Proxy-Authenticate", "Basic"),
        ("X-Latin", " \xe9\t"),
        ("Set-Cookie", "a=1"),
    ]
    assert run(answering([], *headers, status="407 Proxy Authentication Required"))[0][2] == (
        (b"Set-Cookie", b"b=2"),
        (b"Proxy-Authenticate", b"Basic"),
        (b"X-Latin", b"\xe9"),
        (b"Set-Cookie", b"a=1"),
        (b"Content-Length", b"0"),
    )


def test_connection_cannot_name_the_content_length() -> None:
    headers = [LENGTH_5, ("Connection", "content-length")]
    assert run(answering([b"hello"], *headers)) == [("reply", 200, SENT_5, b"hello")]


@pytest.mark.parametrize("status", ["200 OK", "200", "200 ", "404 Ça va", "599 x"])
def test_statuses(status: str) -> None:
    assert run(answering([], status=status))[0][1] == int(status[:3])


# Errors


def assert_500(calls: list[tuple[Any, ...]]) -> None:
    ((kind, status, headers, body),) = calls
    assert (kind, status) == ("reply", 500)
    assert dict(headers) == {
        b"Content-Type": b"text/html; charset=utf-8",
        b"Content-Length": str(len(body)).encode(),
    }
    assert b"<h1>Internal Server Error</h1>" in body


BAD: Any = None
"""Of whatever type a bad app wants."""


@pytest.mark.parametrize(
    ("app", "message"),
    [
        (answering([], status="OK"), "'OK' is not a final HTTP status"),
        (answering([], status="200OK"), "is not a final HTTP status"),
        (answering([], status="100 Continue"), "is not a final HTTP status"),
        (answering([], status="200 OK\r\nX: y"), "is not a final HTTP status"),
        (answering([], status=BAD), "the status is NoneType, not str"),
        (answering([], ("X", "a\r\nb")), "the value of the header 'X' has a character"),
        (answering([], ("X", "a\0b")), "the value of the header 'X' has a character"),
        (answering([], ("X", "€")), "the value of the header 'X' has a character"),
        (answering([], ("X Y", "a")), "'X Y' is not a header's name"),
        (answering([], ("", "a")), "'' is not a header's name"),
        (answering([], ("É", "a")), "'É' is not a header's name"),
        (answering([], (BAD, "a")), "name and value of the header None must be str"),
        (answering([], ("X", BAD)), "name and value of the header 'X' must be str"),
        (answering([], ("Content-Length", "-1")), "Content-Length must be one number"),
        (answering([], ("Content-Length", "٣")), "the value of the header 'Content-Length' has a character"),
        (answering([], LENGTH_5, LENGTH_5), "Content-Length must be one number"),
        (answering(["text"]), "the app gave str as a part of the body, not bytes"),  # type: ignore[list-item]
        (answering(BAD), "'NoneType' object is not iterable"),
        (answering(Body(ValueError("first"))), "ValueError: first"),
        (answering(Body(SystemExit(3))), "SystemExit: 3"),
        (answering(Body(KeyboardInterrupt())), "KeyboardInterrupt"),
        (answering(Body(Cancelled())), "Cancelled"),
        (lambda environ, start_response: [], "the app returned without calling start_response"),
        (lambda environ, start_response: [b"x"], "a part of the body before it called start_response"),
    ],
)  # fmt: skip
def test_an_app_that_fails_before_the_head(
    app: WSGIApplication, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert_500(run(app))
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("flaskbus.agent", logging.ERROR)
    assert "GET /shop/cart?x=%20&y (request r1): the app failed" in caplog.text
    assert "Traceback" in caplog.text
    assert message in caplog.text


def test_the_500_of_a_head_request_has_no_body() -> None:
    ((_, status, headers, body),) = run(answering(Body(ValueError())), "HEAD")
    assert (status, body) == (500, b"")
    assert int(dict(headers)[b"Content-Length"]) > 0


def test_a_response_leaves_when_its_stated_length_is_there() -> None:
    """PEP 3333, "Buffering and Streaming": the app may go on behind it."""
    sink = Recorder()
    calls = sink.calls

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Length", "4")])
        yield b"done"
        calls.append(("the app goes on",))

    def large(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Length", str(MAX_CHUNK + 1))])
        yield b"x" * (MAX_CHUNK + 1)
        calls.append(("the app goes on",))
        yield b"and on"

    run(app, sink=sink)
    assert [call[0] for call in calls] == ["reply", "the app goes on"]
    calls.clear()
    run(large, sink=sink)
    assert [call[0] for call in calls] == ["head", "chunk", "chunk", "end", "the app goes on"]


@pytest.mark.parametrize("late", [ValueError("late"), SystemExit()])
def test_what_an_app_does_wrong_behind_its_response_is_logged(
    late: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Length", "4")])
        yield b"done"
        raise late

    ((kind, status, _, body),) = run(app)
    assert (kind, status, body) == ("reply", 200, b"done")
    assert "failed after its response was complete" in caplog.text


def test_a_body_that_breaks_off_is_no_error_of_the_app(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert_500(run(answering(Body(ClientDisconnected("the client went away")))))
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "the body broke off: the client went away" in caplog.text
    assert "Traceback" not in caplog.text


def test_start_response_twice(caplog: pytest.LogCaptureFixture) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        start_response("200 OK", [])
        return []

    assert_500(run(app))
    assert "start_response was called a second time, without exc_info" in caplog.text


@pytest.mark.parametrize("error", [ValueError("private"), SystemExit(), KeyboardInterrupt(), TypeError()])
def test_an_app_that_fails_after_the_head(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    body = Body(b"a", error)
    assert run(answering(body)) == [
        ("head", 200, ()),
        ("chunk", b"a"),
        ("fail", APP_ERROR, f"the app raised {type(error).__name__}"),
    ]
    assert body.closed == 1
    assert "the app failed after the head was sent" in caplog.text


@pytest.mark.parametrize("error", [ValueError("at the end"), SystemExit()])
def test_close_that_raises_is_logged(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    def close() -> None:
        raise error

    assert run(answering(ClosingIterator([b"hello"], close), LENGTH_5)) == [("reply", 200, SENT_5, b"hello")]
    assert "(request r1): close() of the response raised" in caplog.text


# What the sink raises


@pytest.mark.parametrize(
    ("steps", "headers", "at"),
    [
        ((b"hello",), [LENGTH_5], 0),  # reply
        ((b"a", b"b"), [], 0),  # head
        ((b"a", b"b"), [], 1),  # chunk
        ((b"a", b"b"), [], 3),  # end
        ((b"a",), [LENGTH_5], 2),  # fail
        ((b"a", ValueError()), [], 2),  # fail of an app that raised
        ((ValueError(),), [], 0),  # the 500
    ],
)
@pytest.mark.parametrize("error", [Cancelled(), ConnectionError("the broker is away")])
def test_a_sink_that_raises_ends_the_run(
    steps: tuple[object, ...],
    headers: list[tuple[str, str]],
    at: int,
    error: BaseException,
    caplog: pytest.LogCaptureFixture,
) -> None:
    body = Body(*steps)
    sink = Recorder(at, error)
    if isinstance(error, Cancelled):
        run(answering(body, *headers), sink=sink)
    else:
        with pytest.raises(ConnectionError, match="the broker is away"):
            run(answering(body, *headers), sink=sink)
    assert len(sink.calls) == at
    assert body.closed == 1
    # It is not the app's fault.
    assert "ConnectionError" not in caplog.text


def test_iteration_stops_when_cancelled() -> None:
    body = Body(b"a", b"b", b"c")
    run(answering(body), sink=Recorder(2))
    assert body.taken == 2


@pytest.mark.parametrize("error", [Cancelled(), ConnectionError("the broker is away")])
@pytest.mark.parametrize("then", ["write", "return", "raise"])
def test_an_app_cannot_swallow_what_the_sink_raised(error: BaseException, then: str) -> None:
    sink = Recorder(1, error)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        write = start_response("200 OK", [])
        try:
            write(b"a")
        except BaseException:
            if then == "write":
                write(b"b")
            if then == "raise":
                raise ValueError from None
        return []

    if isinstance(error, Cancelled):
        run(app, sink=sink)
    else:
        with pytest.raises(ConnectionError):
            run(app, sink=sink)
    assert sink.calls == [("head", 200, ())]


# Other people's code


def test_the_validator_of_wsgiref_has_no_objection() -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(100) + environ["PATH_INFO"].encode()
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
        return [body]

    request = replace(GET, method="POST", body=b"sent to ")
    sink = Recorder()
    respond(validator(app), environ_of(request), sink, method="POST")
    assert [call[0] for call in sink.calls] == ["reply"]
    assert sink.calls[0][3] == b"sent to /cart"


def test_a_flask_app_is_one_reply() -> None:
    app = flask.Flask("shop")

    @app.get("/cart")
    def cart() -> dict[str, str]:
        return {"url": flask.url_for("cart"), "q": flask.request.args["x"]}

    ((kind, status, _, body),) = run(app)
    assert (kind, status) == ("reply", 200)
    assert flask.json.loads(body) == {"url": "/shop/cart", "q": " "}


def test_a_flask_stream_is_chunks_and_keeps_its_context() -> None:
    app = flask.Flask("shop")

    @app.get("/cart")
    def cart() -> flask.Response:
        def events() -> Iterator[str]:
            for number in range(2):
                yield f"{flask.request.path} {number}"

        return flask.Response(flask.stream_with_context(events()))

    calls = run(app)
    assert [call for call in calls if call[0] == "chunk"] == [("chunk", b"/cart 0"), ("chunk", b"/cart 1")]
    assert calls[-1] == ("end",)


@pytest.mark.parametrize(
    ("byte_range", "status", "expected"),
    [("", 200, [MAX_CHUNK, 36 * 1024]), ("bytes=-10", 206, [10]), ("bytes=5-14", 206, [10])],
)
def test_files_are_read_in_large_blocks(byte_range: str, status: int, expected: list[int]) -> None:
    content = bytes(range(256)) * 400
    file = io.BytesIO(content)
    app = flask.Flask("shop")

    @app.get("/cart")
    def cart() -> flask.Response:
        return flask.send_file(file, "application/zip", conditional=True)

    headers = ((b"range", byte_range.encode()),) if byte_range else ()
    sink = Recorder()
    respond(app, environ_of(replace(GET, headers=headers)), sink, method="GET")
    assert sink.calls[0][1] == status
    bodies = [call[-1] for call in sink.calls if call[0] in ("reply", "chunk")]
    assert [len(body) for body in bodies] == expected
    start = {"": 0, "bytes=-10": len(content) - 10, "bytes=5-14": 5}[byte_range]
    assert b"".join(bodies) == content[start : start + sum(expected)]
    assert file.closed
