"""What HTTP and WSGI promise an app and its clients, through a real gateway, broker and agent."""

from __future__ import annotations

import hashlib
import io
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from wsgiref.validate import validator

import httpx
import pytest
from flask import Flask, Response, current_app, g, request, stream_with_context, url_for
from werkzeug.middleware.proxy_fix import ProxyFix

from flaskbus.routing import Mount
from flaskbus.settings import AgentSettings
from flaskbus.testing import Bus, running_bus
from flaskbus_agent.inprocess import InProcessAgent
from tests.integration.clients import HOST, Sent, by_bytes, by_curl, by_httpx, parse

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

pytestmark = pytest.mark.xdist_group("site")

PATIENCE = 20.0
BIG = bytes(range(256)) * 20480  # 5 MiB
TEXT = ("Content-Type", "text/plain")

MountApp = Callable[..., str]


@pytest.fixture
def mounted(bus: Bus) -> Iterator[MountApp]:
    """``mounted(app, prefix="/app", checked=True, **settings) -> url``, under ``wsgiref.validate``."""
    with ExitStack() as stack:

        def mount(
            app: WSGIApplication, prefix: str = "/app", *, checked: bool = True, **settings: Any
        ) -> str:
            return stack.enter_context(bus.mount(validator(app) if checked else app, prefix, **settings))

        yield mount


@pytest.fixture(scope="module")
def guarded(bus: Bus) -> Iterator[Bus]:
    """A second gateway on the same broker: it trusts no proxy near it, and takes small bodies only."""
    with running_bus(bus.broker_url, trusted_proxies="203.0.113.7", body_limit=100_000) as started:
        yield started


def simple(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [TEXT, ("Content-Length", "5")])
    return [b"hello"]


def exchanged(url: str, *requests: bytes) -> bytes:
    """All that the server sends to these requests on one connection, the last of which closes it."""
    return by_bytes(url, b"".join(requests))


def get(url: str, *lines: str, method: str = "GET", version: str = "1.1") -> bytes:
    path = urlsplit(url).path or "/"
    return "\r\n".join([f"{method} {path} HTTP/{version}", f"Host: {HOST}", *lines, "", ""]).encode()


class Closing:
    """An iterable of a body whose end can be waited for."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        self._parts = iter(parts)
        self.closed = threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._parts)

    def close(self) -> None:
        self.closed.set()


# How an app may answer


def test_write_comes_before_the_iterable(mounted: MountApp) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        write = start_response("200 OK", [TEXT])
        write(b"one ")
        write(b"two ")
        return [b"three ", b"four"]

    assert httpx.get(mounted(app)).text == "one two three four"


def test_start_response_may_come_with_the_first_iteration(mounted: MountApp) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        start_response("202 Accepted", [TEXT])
        yield b""
        yield b"late"

    # wsgiref.validate wants it earlier than PEP 3333 does.
    answer = httpx.get(mounted(app, checked=False))
    assert (answer.status_code, answer.text) == (202, "late")


def test_exc_info_replaces_what_was_not_sent(mounted: MountApp) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [TEXT, ("X-First", "yes")])
        try:
            raise RuntimeError("as it should")
        except RuntimeError:
            start_response("503 Oh No", [TEXT], sys.exc_info())
        return [b"sorry"]

    answer = httpx.get(mounted(app))
    assert (answer.status_code, answer.text) == (503, "sorry")
    assert "X-First" not in answer.headers


def test_headers_of_one_name_stay_apart_and_in_order(mounted: MountApp) -> None:
    cookies = [f"c{number}={'v' * number}; Path=/{number}" for number in range(30)]

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        headers = [("Set-Cookie", cookie) for cookie in cookies]
        start_response(
            "200 OK", [TEXT, *headers, ("Link", "<a>"), ("Link", "<b>"), ("X-Name", "Gr\xfc\xdfe")]
        )
        return [b"ok"]

    url = mounted(app)
    for fetch in (by_httpx, by_curl):
        got = fetch(url, Sent(""))
        assert got.values("set-cookie") == cookies
        assert got.values("link") == ["<a>", "<b>"]
        assert got.values("x-name") == ["Gr\xfc\xdfe"]


def test_the_reason_phrase_is_the_usual_one(mounted: MountApp) -> None:
    """ASGI, as HTTP/2, carries the number alone."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("404 Gone Fishing", [TEXT])
        return [b"away"]

    answer = httpx.get(mounted(app))
    assert (answer.status_code, answer.reason_phrase) == (404, "Not Found")


@pytest.mark.parametrize(
    "header", [("X-Bad", "a\r\nSet-Cookie: stolen=1"), ("X Bad", "b"), ("X-Bad", "\x00")]
)
def test_a_header_that_would_break_out_is_an_error_of_the_app(
    mounted: MountApp, header: tuple[str, str]
) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [TEXT, header])
        return [b"never"]

    answer = httpx.get(mounted(app, checked=False))
    assert answer.status_code == 500
    assert "stolen" not in str(answer.headers) + answer.text


def test_framing_by_the_app_is_not_believed(mounted: MountApp) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(
            "200 OK",
            [
                TEXT,
                ("Transfer-Encoding", "chunked"),
                ("Connection", "X-Hop, close"),
                ("X-Hop", "1"),
                ("Upgrade", "x"),
            ],
        )
        return [b"plain"]

    got = by_curl(mounted(app, checked=False), Sent(""))
    assert got.body == b"plain"
    assert got.values("content-length") == ["5"]
    assert not got.values("transfer-encoding") + got.values("x-hop") + got.values("upgrade")


def test_head_is_get_without_the_body(mounted: MountApp) -> None:
    url = mounted(simple)
    data = exchanged(url, get(url, method="HEAD"), get(url, "Connection: close"))
    head, _, rest = data.partition(b"\r\n\r\n")
    assert parse(head + b"\r\n\r\n").values("content-length") == ["5"]
    assert parse(rest).body == b"hello"  # the connection is in step


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_no_body_where_there_is_none(mounted: MountApp, status: str) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(status, [("ETag", '"x"')])
        return []

    url = mounted(app)
    data = exchanged(url, get(url), get(url, "Connection: close"))
    first, second, rest = data.split(b"\r\n\r\n")
    assert rest == b""
    for head in (first, second):
        got = parse(head)
        assert got.status == int(status[:3])
        assert got.values("etag") == ['"x"']
        assert not got.values("content-length") + got.values("transfer-encoding") + got.values("content-type")


def test_http_1_0_gets_no_chunks(mounted: MountApp) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [TEXT])
        return iter([b"a" * 10, b"b" * 10])

    url = mounted(app)
    got = parse(exchanged(url, get(url, version="1.0")))
    assert got.body == b"a" * 10 + b"b" * 10
    assert not got.values("transfer-encoding")


# Bodies


def test_big_responses_are_whole(mounted: MountApp) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        kind = environ["PATH_INFO"]
        length = [("Content-Length", str(len(BIG)))] if kind in ("/one", "/file") else []
        start_response("200 OK", [("Content-Type", "application/octet-stream"), *length])
        if kind == "/file":
            file: Iterable[bytes] = environ["wsgi.file_wrapper"](io.BytesIO(BIG))
            return file
        if kind == "/generator":
            return (BIG[start : start + 99_999] for start in range(0, len(BIG), 99_999))
        return [BIG]

    url = mounted(app)
    for kind in ("/one", "/file", "/generator", "/unknown"):
        answer = httpx.get(url + kind)
        assert hashlib.sha256(answer.content).digest() == hashlib.sha256(BIG).digest(), kind
        assert by_curl(url, Sent(kind)).body == BIG, kind


def takes(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Tell length and digest of the body, read in pieces until its end."""
    digest, length = hashlib.sha256(), 0
    while piece := environ["wsgi.input"].read(10_000):
        digest.update(piece)
        length += len(piece)
    start_response("200 OK", [TEXT])
    return [f"{length} {digest.hexdigest()}".encode()]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_big_upload_arrives(mounted: MountApp, chunked: bool) -> None:
    url = mounted(takes)
    for fetch in (by_httpx, by_curl):
        sent = Sent("", "POST", {"Content-Type": "application/octet-stream"}, BIG, chunked=chunked)
        answer = fetch(url, sent)
        assert answer.body.decode() == f"{len(BIG)} {hashlib.sha256(BIG).hexdigest()}"


@pytest.mark.parametrize("chunked", [False, True])
def test_the_limit_of_a_body(mounted: MountApp, guarded: Bus, chunked: bool) -> None:
    path = urlsplit(mounted(takes)).path
    octets = {"Content-Type": "application/octet-stream"}
    fits = Sent(path, "PUT", octets, b"x" * 100_000, chunked=chunked)
    too_large = Sent(path, "PUT", octets, b"x" * 100_001, chunked=chunked)
    for fetch in (by_httpx, by_curl):
        assert fetch(guarded.url, fits).body.startswith(b"100000 ")
        refused = fetch(guarded.url, too_large)
        assert refused.status == 413
        assert refused.values("content-type") == ["application/problem+json"]
        assert json.loads(refused.body)["executed"] == "no"


def test_curl_waits_for_100_continue(mounted: MountApp) -> None:
    url = mounted(takes)
    command = [
        "curl",
        "-sS",
        "-i",
        "--raw",
        "-H",
        "Expect: 100-continue",
        "--expect100-timeout",
        "15",
        "-d",
        "body",
        url,
    ]
    done = subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE)
    interim, _, rest = done.stdout.partition(b"\r\n\r\n")
    assert interim.startswith(b"HTTP/1.1 100 ")
    assert parse(rest).body.startswith(b"4 ")


def test_who_is_refused_need_not_send_the_body(mounted: MountApp, guarded: Bus) -> None:
    path = urlsplit(mounted(takes)).path
    lines = ["Expect: 100-continue", "Content-Length: 100001", "Connection: close"]
    got = by_bytes(guarded.url, get(guarded.url + path, *lines, method="PUT"))
    assert got.startswith(b"HTTP/1.1 413 ")


# Apps that fail


def test_an_app_that_raises_before_its_head_is_a_500(mounted: MountApp) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/fine":
            return simple(environ, start_response)
        raise RuntimeError("a secret")

    url = mounted(app)
    with httpx.Client() as client:
        answer = client.get(url)
        assert answer.status_code == 500
        assert "Internal Server Error" in answer.text
        assert "secret" not in answer.text
        assert client.get(url + "/fine").text == "hello"
    data = exchanged(url, get(url), get(url + "/fine", "Connection: close"))
    assert data.count(b"HTTP/1.1 500 ") == data.count(b"HTTP/1.1 200 ") == 1


def broken(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Break off after the first part, in the way that the path says."""
    kind = environ["PATH_INFO"]
    length = [("Content-Length", "10")] if kind in ("/short", "/length") else []
    start_response("200 OK", [TEXT, *length])

    def parts() -> Iterator[bytes]:
        yield b"12345"
        if kind == "/exc_info":
            try:
                raise RuntimeError("as it should")
            except RuntimeError:
                start_response("500 Oh No", [TEXT], sys.exc_info())
        if kind != "/short":
            raise RuntimeError("as it should")

    return parts()


@pytest.mark.parametrize("kind", ["/raise", "/short", "/length", "/exc_info"])
def test_a_response_that_breaks_off_never_looks_complete(mounted: MountApp, kind: str) -> None:
    url = mounted(broken)
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(url + kind)
    done = subprocess.run(["curl", "-sS", url + kind], capture_output=True, timeout=PATIENCE, check=False)
    assert done.returncode == 18  # a part of it
    assert not by_bytes(url, get(url + kind)).endswith(b"0\r\n\r\n")


# Time


def test_an_event_arrives_before_the_next_is_made(mounted: MountApp) -> None:
    received = [threading.Event() for _ in range(3)]

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache")])

        def events() -> Iterator[bytes]:
            for number, event in enumerate(received):
                yield b"data: %d\n\n" % number
                if not event.wait(PATIENCE):
                    raise TimeoutError("the client has not got it")

        return events()

    url = mounted(app)
    with httpx.stream("GET", url, timeout=PATIENCE) as response:
        lines = response.iter_lines()
        for number, event in enumerate(received):
            assert next(lines) == f"data: {number}"
            assert next(lines) == ""
            event.set()
        assert list(lines) == []
    for event in received:
        event.clear()
    with subprocess.Popen(["curl", "-sSN", url], stdout=subprocess.PIPE) as curl:
        assert curl.stdout is not None
        for number, event in enumerate(received):
            assert curl.stdout.readline() == b"data: %d\n" % number
            assert curl.stdout.readline() == b"\n"
            event.set()
        assert curl.wait(PATIENCE) == 0


def test_a_client_that_leaves_ends_the_stream(mounted: MountApp) -> None:
    bodies: list[Closing] = []

    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 1000

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [TEXT])
        bodies.append(Closing(endless()))
        return bodies[-1]

    url = mounted(app)
    with httpx.stream("GET", url) as response:
        assert next(response.iter_raw())
    assert bodies[0].closed.wait(PATIENCE)


def test_close_is_called_once_the_response_is_over(mounted: MountApp) -> None:
    bodies: list[Closing] = []

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [TEXT])
        bodies.append(Closing([b"a", b"b"]))
        return bodies[-1]

    assert httpx.get(mounted(app)).text == "ab"
    assert bodies[0].closed.wait(PATIENCE)


def test_fast_requests_do_not_wait_for_slow_ones(mounted: MountApp) -> None:
    release, begun = threading.Event(), threading.Semaphore(0)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"].startswith("/slow"):
            begun.release()
            assert release.wait(PATIENCE)
        start_response("200 OK", [TEXT])
        return [environ["PATH_INFO"].encode()]

    url = mounted(app, threads=6)
    with httpx.Client(timeout=PATIENCE) as client, ThreadPoolExecutor(16) as pool:

        def fetch(path: str) -> str:
            return client.get(url + path).text

        slow = [pool.submit(fetch, f"/slow/{number}") for number in range(5)]
        for _ in slow:
            assert begun.acquire(timeout=PATIENCE)
        paths = [f"/fast/{number}" for number in range(200)]
        assert list(pool.map(fetch, paths)) == paths
        assert not any(future.done() for future in slow)
        release.set()
        assert [future.result(PATIENCE) for future in slow] == [f"/slow/{number}" for number in range(5)]


def test_pipelined_requests_are_answered_in_their_order(mounted: MountApp) -> None:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [TEXT])
        return [environ["PATH_INFO"].encode() + environ["wsgi.input"].read(100)]

    url = mounted(app)
    post = get(url + "/b", "Content-Length: 4", method="POST") + b"body"
    data = exchanged(url, get(url + "/a"), post, get(url + "/c"), get(url + "/d", "Connection: close"))
    places = [data.index(part) for part in (b"/a", b"/bbody", b"/c", b"/d")]
    assert places == sorted(places)


def test_a_connection_is_kept(mounted: MountApp) -> None:
    url = mounted(simple)
    parts = urlsplit(url)
    with closing(socket.create_connection((parts.hostname, parts.port), PATIENCE)) as sock:
        for _ in range(5):
            sock.sendall(get(url))
            data = b""
            while not data.endswith(b"hello"):
                piece = sock.recv(4096)
                assert piece, "the connection was closed"
                data += piece


# Contexts


def context_app(name: str, other: Flask | None = None) -> Flask:
    app = Flask(name)
    meeting = threading.Barrier(2)

    @app.get("/mine/<value>")
    def mine(value: str) -> list[str]:
        g.value = value
        meeting.wait(PATIENCE)  # now two requests are in this view
        return [current_app.name, request.path, g.value, url_for("mine", value=value)]

    @app.get("/stream/<value>")
    def stream(value: str) -> Response:
        def lines() -> Iterator[str]:
            for _ in range(3):
                meeting.wait(PATIENCE)
                yield f"{current_app.name} {request.path} {g.value}\n"

        g.value = value
        return Response(stream_with_context(lines()))

    @app.get("/nested")
    def nested() -> list[str]:
        names = [current_app.name]
        assert other is not None
        with other.app_context():
            names.append(current_app.name)
        return [*names, current_app.name]

    return app


def test_contexts_of_two_apps_in_one_agent_stay_apart(bus: Bus) -> None:
    second = context_app("second")
    first = context_app("first", second)
    apps: dict[Mount, WSGIApplication] = {
        Mount.parse("/one"): validator(first.wsgi_app),
        Mount.parse("/two"): validator(second.wsgi_app),
    }
    names = {mount: mount.name for mount in apps}
    agent = InProcessAgent(AgentSettings(redis=bus.broker_url, threads=8), apps, names)
    agent.start()
    try:
        for mount in apps:
            bus.await_route(mount)
        with httpx.Client(base_url=bus.url, timeout=PATIENCE) as client, ThreadPoolExecutor(4) as pool:
            paths = ["/one/mine/a", "/two/mine/b", "/one/mine/c", "/two/mine/d"]
            for path, answer in zip(paths, pool.map(client.get, paths), strict=True):
                _, where, view, value = path.split("/")
                name = {"one": "first", "two": "second"}[where]
                assert answer.json() == [name, f"/{view}/{value}", value, path]
            paths = ["/one/stream/a", "/two/stream/b", "/one/stream/c", "/two/stream/d"]
            for path, answer in zip(paths, pool.map(client.get, paths), strict=True):
                _, where, view, value = path.split("/")
                name = {"one": "first", "two": "second"}[where]
                assert answer.text == f"{name} /{view}/{value} {value}\n" * 3
            assert client.get("/one/nested").json() == ["first", "second", "first"]
    finally:
        assert agent.stop(PATIENCE)


# Mounts


def named(name: str) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [TEXT])
        return [f"{name} {environ['SCRIPT_NAME']}|{environ['PATH_INFO']}".encode()]

    return validator(app)


def test_host_pattern_first_then_the_longest_prefix(bus: Bus) -> None:
    mounts = {
        "/": "default",
        "/api": "api",
        "/api/v2": "api2",
        "shop.example.com/": "shop",
        "shop.example.com/api": "shop-api",
        "*.example.com/": "any",
    }
    expected = {
        ("other.test", "/"): "default |/",
        ("other.test", "/apis"): "default |/apis",
        ("other.test", "/api"): "api /api|",
        ("other.test", "/api/"): "api /api|/",
        ("other.test", "/api/v2/x"): "api2 /api/v2|/x",
        ("other.test", "/api/v20"): "api /api|/v20",
        ("shop.example.com", "/api/v2/x"): "shop-api /api|/v2/x",
        ("SHOP.Example.COM:8080", "/cart"): "shop |/cart",
        ("www.example.com", "/api"): "any |/api",
        ("a.b.example.com", "/"): "any |/",
        ("example.com", "/api"): "api /api|",
    }
    apps = {Mount.from_name(place): named(name) for place, name in mounts.items()}
    # A broker's only mount at the root may be the whole site's, so this bus is its own.
    agent = InProcessAgent(
        AgentSettings(redis=bus.broker_url, namespace="mounts"), apps, {mount: mount.name for mount in apps}
    )
    agent.start()
    try:
        with running_bus(bus.broker_url, namespace="mounts") as own:
            for (host, path), answer in expected.items():
                got = httpx.get(own.url + path, headers={"Host": host})
                assert got.text == answer, (host, path)
    finally:
        assert agent.stop(PATIENCE)


# Proxies


def where_app() -> Flask:
    app = Flask("where")

    @app.get("/where")
    def where() -> dict[str, Any]:
        return {
            "remote": request.remote_addr,
            "scheme": request.scheme,
            "host": request.host,
            "root": request.script_root,
            "url": url_for("where", _external=True),
            "forwarded": sorted(key for key, _ in request.headers if key.lower().startswith("x-")),
        }

    return app


SAID = {
    "X-Forwarded-For": "198.51.100.9, 192.0.2.44",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "shop.example.com",
    "X-Forwarded-Prefix": "/outer",
}


def test_proxyfix_changes_nothing_behind_a_trusted_proxy(mounted: MountApp) -> None:
    plain, fixed = where_app(), where_app()
    fix = ProxyFix(fixed.wsgi_app, x_for=1, x_proto=1, x_host=1, x_port=1, x_prefix=1)
    answers = []
    for app, prefix in ((plain.wsgi_app, "/plain"), (fix, "/fixed")):
        told = httpx.get(mounted(app, prefix) + "/where", headers=SAID).json()
        assert told.pop("root") == f"/outer{prefix}"
        assert told.pop("url") == f"https://shop.example.com/outer{prefix}/where"
        answers.append(told)
    assert answers[0] == answers[1]
    assert answers[0]["remote"] == "192.0.2.44"
    assert (answers[0]["scheme"], answers[0]["host"]) == ("https", "shop.example.com")


def test_proxyfix_believes_nobody_else(mounted: MountApp, guarded: Bus) -> None:
    fixed = where_app()
    fix = ProxyFix(fixed.wsgi_app, x_for=1, x_proto=1, x_host=1, x_port=1, x_prefix=1)
    path = urlsplit(mounted(fix, "/fixed")).path + "/where"
    spoofed = {**SAID, "Forwarded": "for=198.51.100.9;proto=https", "X-Real-IP": "198.51.100.9"}
    told = httpx.get(guarded.url + path, headers={"Host": HOST, **spoofed}).json()
    assert told == {
        "remote": "127.0.0.1",
        "scheme": "http",
        "host": HOST,
        "root": "/fixed",
        "url": f"http://{HOST}/fixed/where",
        "forwarded": [],
    }
