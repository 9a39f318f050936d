"""WebSockets at the gateway: who may open one, what the answer is, and what breaks none of the bus."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import simple_websocket
import trustme
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from flaskbus import embedded
from flaskbus.keys import Keys
from flaskbus.registry import AgentRecord, Registry
from flaskbus.routing import Mount
from flaskbus.testing import Bus, running_bus
from tests.conftest import Broker, free_port
from tests.integration.clients import Got, Sent, by_httpx
from tests.integration.fleet import Fleet, eventually
from tests.integration.websocket_client import (
    BINARY,
    CLOSE,
    CONT,
    PING,
    PONG,
    TEXT,
    Raw,
    closing,
    frame,
)

Answer = Iterable[bytes]


class Site:
    """An app with WebSockets and without; it tells what it saw, and how its WebSockets ended."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.closed: list[tuple[int, str]] = []
        self.go = threading.Event()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Answer:
        name = environ["PATH_INFO"].strip("/").partition("/")[0]
        answer: Answer = getattr(self, f"on_{name}")(environ, start_response)
        return answer

    def _socket(
        self, environ: dict[str, Any], start_response: Any, work: Callable[[Any], None], **options: Any
    ) -> Answer:
        ws = simple_websocket.Server(environ, max_message_size=None, **options)
        try:
            work(ws)
            ws.close()
        except simple_websocket.ConnectionClosed as error:
            self.closed.append((error.reason, error.message))
        start_response("200 OK", [])
        return []

    def on_echo(self, environ: dict[str, Any], start_response: Any) -> Answer:
        def work(ws: Any) -> None:
            while True:
                ws.send(ws.receive())

        return Site._socket(Site(), environ, start_response, work, subprotocols=["chat", "soup"])

    def on_silent(self, environ: dict[str, Any], start_response: Any) -> Answer:
        """Collects, and says nothing."""

        def work(ws: Any) -> None:
            while True:
                self.seen.append(ws.receive())

        return self._socket(environ, start_response, work)

    def on_environ(self, environ: dict[str, Any], start_response: Any) -> Answer:
        said = {key: value for key, value in environ.items() if isinstance(value, str)}
        return self._socket(environ, start_response, lambda ws: ws.send(json.dumps(said)))

    def on_close(self, environ: dict[str, Any], start_response: Any) -> Answer:
        code = int(environ["PATH_INFO"].rpartition("/")[2])
        return self._socket(environ, start_response, lambda ws: ws.close(code, "as asked"))

    def on_slow(self, environ: dict[str, Any], start_response: Any) -> Answer:
        """Takes the handshake when it may."""
        self.seen.append("begun")
        assert self.go.wait(30)
        return self._socket(environ, start_response, lambda ws: ws.send("late"))

    def on_answer(self, environ: dict[str, Any], start_response: Any) -> Answer:
        """No WebSocket."""
        status = environ["PATH_INFO"].rpartition("/")[2]
        headers = [
            ("X-Own", "yes"),
            ("Set-Cookie", "a=1"),
            ("Set-Cookie", "b=2"),
            ("Content-Type", "text/plain"),
        ]
        start_response(f"{status} Own", headers + [("Location", "/else")] * status.startswith("3"))
        return [] if status in ("204", "304") else [b"the app's own"]

    def on_stream(self, environ: dict[str, Any], start_response: Any) -> Answer:
        start_response("200 OK", [("Content-Type", "text/plain")])
        for number in range(20):
            yield b"%d " % number * 10_000
        if environ["PATH_INFO"].endswith("/broken"):
            raise RuntimeError("broken on purpose")

    def on_endless(self, environ: dict[str, Any], start_response: Any) -> Answer:
        start_response("200 OK", [("Content-Type", "text/plain")])
        try:
            while True:
                self.seen.append(1)
                yield b"x" * 65536
        finally:
            self.seen.append("closed")

    def on_wait(self, environ: dict[str, Any], start_response: Any) -> Answer:
        self.seen.append("waits")
        assert self.go.wait(30)
        start_response("200 OK", [])
        return [b"done"]


@pytest.fixture(scope="module")
def bus() -> Iterator[Bus]:
    with embedded.start() as broker, running_bus(broker.url) as started:
        yield started


@pytest.fixture(scope="module")
def shared(bus: Bus) -> Iterator[Site]:
    site = Site()
    with bus.mount(site, "/site", threads=8):
        yield site


@pytest.fixture
def site(shared: Site) -> Iterator[Site]:
    shared.seen.clear()
    shared.closed.clear()
    shared.go.clear()
    yield shared
    shared.go.set()


@pytest.fixture
def url(bus: Bus, site: Site) -> str:
    return f"{bus.url}/site"


def opened(url: str, **more: Any) -> ClientConnection:
    client: ClientConnection = connect(url.replace("http", "ws", 1), max_size=None, **more)
    return client


def said(got: Got) -> dict[str, Any]:
    assert got.values("content-type") == ["application/problem+json"], got
    document: dict[str, Any] = json.loads(got.body)
    assert document["status"] == got.status
    return document


def refused(got: Got, status: int, code: str) -> None:
    document = said(got)
    assert (got.status, document["type"], document["executed"]) == (
        status,
        f"urn:flaskbus:error:{code}",
        "no",
    )


def at_rest(url: str) -> None:
    """Nothing is left of any WebSocket."""
    from flaskbus.broker import connect as connect_broker

    with connect_broker(url) as client:
        eventually(lambda: not [*client.scan_iter("*:inbound:*"), *client.scan_iter("*:reply:*")], "no lists")
        eventually(lambda: not any(client.xlen(key) for key in client.scan_iter("*:requests")), "no entries")


class TestOrigins:
    @pytest.mark.parametrize(
        ("lines", "allowed"),
        [
            ([], True),
            (["Origin: http://{netloc}"], True),
            (["Origin: https://{netloc}"], True),
            (["Host: [::1]:5000", "Origin: http://[::1]:5000"], True),
            (["Host: example.com", "Origin: https://example.com:443"], True),
            (["Host: inner", "X-Forwarded-Host: example.com", "Origin: https://example.com"], True),
            (["Host: inner", "X-Forwarded-Host: example.com", "Origin: http://inner"], False),
            (["Origin: https://evil.example"], False),
            (["Origin: null"], False),
            (["Origin:"], False),
            (["Origin: http://{netloc}", "Origin: https://evil.example"], False),
        ],
    )
    def test_the_own_pages_and_no_others(self, bus: Bus, url: str, lines: list[str], allowed: bool) -> None:
        netloc = bus.url.removeprefix("http://")
        with Raw(f"{url}/echo", *(line.format(netloc=netloc) for line in lines)) as raw:
            if allowed:
                raw.opened().goodbye()
            else:
                refused(raw.answer(), 403, "foreign-origin")

    def test_those_that_are_listed(self, bus: Bus, url: str) -> None:
        more = {"websocket_origins": "https://a.example,http://b.example:81", "trusted_proxies": "192.0.2.1"}
        with running_bus(bus.broker_url, **more) as other:
            target = f"{other.url}/site/echo"
            for origin in ("https://a.example", "http://b.example:81", other.url):
                with Raw(target, f"Origin: {origin}") as raw:
                    raw.opened().goodbye()
            for origin in ("http://a.example", "https://c.example", "null"):
                with Raw(target, f"Origin: {origin}") as raw:
                    refused(raw.answer(), 403, "foreign-origin")
            with Raw(target, "X-Forwarded-Host: x.example", "Origin: https://x.example") as raw:
                refused(raw.answer(), 403, "foreign-origin")  # no trusted proxy

    def test_everybody(self, bus: Bus, url: str) -> None:
        with running_bus(bus.broker_url, websocket_origins="*") as other:
            for origin in ("https://evil.example", "null"):
                with Raw(f"{other.url}/site/echo", f"Origin: {origin}") as raw:
                    raw.opened().goodbye()

    def test_an_ordinary_request_has_no_such_rule(self, url: str, site: Site) -> None:
        got = by_httpx(url, Sent("/answer/200", headers={"Origin": "https://evil.example"}))
        assert got.status == 200


class TestAnswers:
    """An app that takes no handshake answers it as any request."""

    @pytest.mark.parametrize("status", [200, 302, 400, 404, 418, 500, 599])
    def test_the_apps_own(self, url: str, status: int) -> None:
        with Raw(f"{url}/answer/{status}") as raw:
            got = raw.answer()
        assert (got.status, got.body, got.values("x-own")) == (status, b"the app's own", ["yes"])
        assert got.values("set-cookie") == ["a=1", "b=2"]
        assert got.values("connection") == ["close"]
        assert got.values("location") == ["/else"] * (status == 302)

    def test_without_a_body(self, url: str) -> None:
        with Raw(f"{url}/answer/204") as raw:
            got = raw.answer()
        assert (got.status, got.body, got.values("transfer-encoding")) == (204, b"", [])

    def test_streamed(self, url: str) -> None:
        with Raw(f"{url}/stream") as raw:
            got = raw.answer()
        assert got.values("transfer-encoding") == ["chunked"]
        assert got.body == b"".join(b"%d " % number * 10_000 for number in range(20))

    def test_one_that_breaks_off_does_not_look_whole(self, url: str) -> None:
        with Raw(f"{url}/stream/broken") as raw:
            received = raw.rest()
        assert received.startswith(b"HTTP/1.1 200 ")
        assert received.count(b"HTTP/1.1") == 1
        assert not received.endswith(b"0\r\n\r\n")

    def test_a_client_that_takes_nothing_stops_the_app(self, bus: Bus, url: str, site: Site) -> None:
        with Raw(f"{url}/endless", receive_buffer=4096):
            eventually(lambda: site.seen)
            count = 0
            while count != (count := len(site.seen)):
                time.sleep(1.0)
            # A window on the broker, and what the transport and the kernel take.
            assert count * 65536 < 16 * 1024 * 1024
        eventually(lambda: site.seen[-1] == "closed")
        at_rest(bus.broker_url)

    def test_an_unmodified_client_reads_it(self, url: str) -> None:
        with pytest.raises(InvalidStatus) as caught:
            opened(f"{url}/answer/404")
        assert caught.value.response.status_code == 404
        assert caught.value.response.body == b"the app's own"

    def test_nothing_is_left(self, bus: Bus, url: str) -> None:
        for path in ("answer/200", "stream", "stream/broken"):
            with Raw(f"{url}/{path}") as raw:
                raw.rest()
        at_rest(bus.broker_url)


class TestRefusals:
    """The bus answers a handshake as it answers any request."""

    def test_an_unknown_mount(self, bus: Bus) -> None:
        with Raw(f"{bus.url}/nowhere") as raw:
            refused(raw.answer(), 404, "unknown-mount")

    def test_held_for_the_first_agent(self, bus: Bus) -> None:
        site = Site()
        with bus.mount(site, "/later", name="later"):
            pass
        mount = Mount.parse("/later")
        with registry(bus) as known:
            known.claim(mount, AgentRecord(id="a", name="later", host="h", pid=1, beat=1, state="ready"))
            known.leave(mount, "a")
        bus.await_route(mount)
        with Raw(f"{bus.url}/later/echo") as raw:
            with registry(bus) as known:
                eventually(lambda: known.client.xlen(Keys().of(mount.key).requests))
            with bus.mount(site, "/later", name="later"):
                raw.opened()
                raw.send(TEXT, "waited")
                assert raw.receive() == (TEXT, b"waited")
                raw.goodbye()

    def test_nobody_comes(self, bus: Bus) -> None:
        mount = Mount.parse("/empty")
        with registry(bus) as known:
            known.claim(mount, AgentRecord(id="a", name="empty", host="h", pid=1, beat=1, state="ready"))
            known.leave(mount, "a")
            # Only now: it has never seen that agent.
            with running_bus(bus.broker_url, hold=0.5) as other:
                other.await_route(mount)
                with Raw(f"{other.url}/empty") as raw:
                    got = raw.answer()
            refused(got, 503, "no-agent")
            assert got.values("retry-after")
            known.unmount(mount)

    def test_a_full_queue(self, bus: Bus) -> None:
        site = Site()
        with (
            running_bus(bus.broker_url, queue_limit=1) as other,
            other.mount(site, "/busy", threads=1),
            ThreadPoolExecutor(2) as pool,
        ):
            target = f"{other.url}/busy"
            first = pool.submit(by_httpx, target, Sent("/wait"))
            eventually(lambda: site.seen)
            with Raw(f"{target}/echo") as waiting:
                with registry(other) as known:
                    stream = Keys().of(Mount.parse("/busy").key).requests
                    eventually(lambda: known.client.xlen(stream) == 2)
                with Raw(f"{target}/echo") as raw:
                    got = raw.answer()
                refused(got, 503, "queue-full")
                assert got.values("retry-after")
                site.go.set()
                assert first.result().status == 200
                waiting.opened().goodbye()

    def test_an_agent_that_is_too_old(self, bus: Bus) -> None:
        """It would take the handshake for a request, and run the app with half of an environ."""
        mount = Mount.parse("/old")
        record = AgentRecord(id="a", name="old", host="h", pid=1, beat=1, state="ready", wire=1)
        with registry(bus) as known:
            known.claim(mount, record)
            bus.await_route(mount)
            with Raw(f"{bus.url}/old") as raw:
                refused(raw.answer(), 501, "unsupported-upgrade")
            assert known.client.xlen(Keys().of(mount.key).requests) == 0
            known.claim(mount, replace(record, id="b", wire=2))
            with Raw(f"{bus.url}/old") as raw:
                refused(raw.answer(), 501, "unsupported-upgrade")  # it could be either that takes it
            known.unmount(mount)

    def test_never_a_hang(self, bus: Bus, site: Site) -> None:
        with running_bus(bus.broker_url, head_timeout=0.5) as other, Raw(f"{other.url}/site/slow") as raw:
            got = raw.answer()
            assert (got.status, said(got)["executed"]) == (504, "unknown")
            site.go.set()
        at_rest(bus.broker_url)


@contextmanager
def registry(bus: Bus) -> Iterator[Registry]:
    from flaskbus.broker import connect as connect_broker

    with connect_broker(bus.broker_url) as client:
        yield Registry(client, Keys())


class TestHandshakes:
    @pytest.mark.parametrize(
        ("lines", "without", "status"),
        [
            ([], "Sec-WebSocket-Key", 400),
            (["Sec-WebSocket-Key: c2hvcnQ="], "", 400),
            (["Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==", "Sec-WebSocket-Key: x"], "", 400),
            (["Content-Length: 5"], "", 400),
            (["Transfer-Encoding: chunked"], "", 400),
            (["Host: a", "Host: b"], "", 400),
            (["Sec-WebSocket-Version: 7"], "", 426),
            ([], "Sec-WebSocket-Version", 426),
        ],
    )
    def test_wrong(self, url: str, site: Site, lines: list[str], without: str, status: int) -> None:
        with Raw(f"{url}/environ", *lines, without=without, after=b"hello") as raw:
            got = raw.answer()
        refused(got, status, "invalid-request")
        assert got.values("sec-websocket-version") == ["13"] * (status == 426)
        assert site.seen == []

    @pytest.mark.parametrize(
        ("lines", "more"),
        [
            (["Upgrade: h2c"], {}),
            (["Upgrade: TLS/1.0"], {}),
            (["Connection: keep-alive"], {}),
            ([], {"without": "Upgrade"}),
            ([], {"version": "HTTP/1.0"}),
            ([], {"method": "POST"}),
        ],
    )
    def test_no_handshake_is_an_ordinary_request(self, url: str, lines: list[str], more: Any) -> None:
        with Raw(f"{url}/answer/200", *lines, **more) as raw:
            raw.sock.settimeout(20)
            received = b""
            while b"the app's own" not in received:
                received += raw.sock.recv(65536)
        assert received.partition(b" ")[2].startswith(b"200 ")

    @pytest.mark.parametrize(
        "lines", [["Connection: keep-alive, Upgrade"], ["Upgrade: WebSocket"], ["Content-Length: 0"]]
    )
    def test_right(self, url: str, lines: list[str]) -> None:
        with Raw(f"{url}/echo", *lines) as raw:
            raw.opened().goodbye()

    def test_the_answer(self, url: str) -> None:
        with Raw(
            f"{url}/echo",
            "Sec-WebSocket-Protocol: soup, chat",
            "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
        ) as raw:
            got = raw.answer()
            assert got.status == 101
            assert got.values("sec-websocket-accept") == ["BACScCJPNqyz+UBoqMH89VmURoA="]
            assert got.values("sec-websocket-protocol") == ["soup"]
            assert got.values("sec-websocket-extensions") == got.values("content-length") == []
            assert [got.values(name) for name in ("upgrade", "connection")] == [["websocket"], ["Upgrade"]]
            raw.goodbye()

    def test_what_the_app_sees(self, bus: Bus, url: str) -> None:
        headers = {"Cookie": "a=1", "X-Own": "y", "X_Own": "z", "Connection": "Upgrade, X-Hop", "X-Hop": "1"}
        with Raw(f"{url}/environ", *(f"{name}: {value}" for name, value in headers.items())) as raw:
            environ = json.loads(raw.opened().receive()[1])
        assert environ["HTTP_COOKIE"] == "a=1"
        assert environ["HTTP_X_OWN"] == "y"
        assert "HTTP_X_HOP" not in environ
        assert (environ["SCRIPT_NAME"], environ["PATH_INFO"]) == ("/site", "/environ")
        assert environ["HTTP_UPGRADE"] == "websocket"

    def test_frames_right_behind_it_are_not_lost(self, url: str) -> None:
        early = frame(TEXT, b"early") + frame(PING, b"?") + frame(TEXT, b"bird")
        for cut in (0, 3, len(early)):
            with Raw(f"{url}/echo", after=early[:cut]) as raw:
                raw.sock.sendall(early[cut:])
                raw.opened()
                got = [raw.receive() for _ in range(3)]
            assert sorted(got) == sorted([(TEXT, b"early"), (TEXT, b"bird"), (PONG, b"?")])

    @pytest.mark.parametrize("early", [frame(PING, b"?"), frame(3), frame(TEXT, mask=False)])
    def test_nothing_is_said_to_a_frame_before_the_answer(self, url: str, early: bytes) -> None:
        with Raw(f"{url}/answer/200", after=early) as raw:
            got = raw.answer()
        assert (got.status, got.body) == (200, b"the app's own")

    def test_a_request_behind_it_is_not_served(self, url: str, site: Site) -> None:
        smuggled = b"GET /site/wait HTTP/1.1\r\nHost: a\r\n\r\n"
        with Raw(f"{url}/answer/404", after=smuggled) as raw:
            received = raw.rest()
        assert received.count(b"HTTP/1.1") == 1
        with Raw(f"{url}/echo", after=smuggled) as raw:
            assert raw.opened().closed()[0] == 1002
        assert site.seen.count("waits") == 0


class TestFrames:
    """What breaks RFC 6455 ends the WebSocket with the code that it names, and the app hears of it."""

    @pytest.mark.parametrize(
        ("sent", "code"),
        [
            (frame(TEXT, b"x", mask=False), 1002),
            (frame(TEXT, b"x", rsv=4), 1002),
            (frame(TEXT, b"x", rsv=1), 1002),
            (frame(3, b"x"), 1002),
            (frame(11, b"x"), 1002),
            (frame(PING, b"x", fin=False), 1002),
            (frame(PING, b"x" * 126), 1002),
            (frame(CONT, b"x"), 1002),
            (frame(TEXT, b"x", fin=False) + frame(TEXT, b"y"), 1002),
            (b"\x81\xfe\x00\x05", 1002),
            (b"\x82\xff\xff" + bytes(7), 1002),
            (frame(TEXT, b"\xff"), 1007),
            (frame(TEXT, b"\xc3", fin=False) + frame(CONT, b"\x28"), 1007),
            (frame(CLOSE, b"\x03"), 1002),
            (frame(CLOSE, closing(999)), 1002),
            (frame(CLOSE, closing(1005)), 1002),
            (frame(CLOSE, closing(1006)), 1002),
            (frame(CLOSE, closing(1015)), 1002),
            (frame(CLOSE, closing(2999)), 1002),
            (frame(CLOSE, closing(1000, b"\xff")), 1007),
            (b"\x82\xff" + (1 << 30).to_bytes(8) + bytes(4), 1009),
            (frame(BINARY, bytes(1 << 20), fin=False) + frame(CONT, bytes(1 << 24), fin=False), 1009),
        ],
    )
    def test_wrong(self, bus: Bus, url: str, site: Site, sent: bytes, code: int) -> None:
        with Raw(f"{url}/silent") as raw:
            raw.opened()
            raw.sock.sendall(sent)
            assert raw.closed()[0] == code
            began = time.monotonic()
            assert raw.ended()
            assert time.monotonic() - began < 5.0
        eventually(lambda: site.closed, "the app's end")
        at_rest(bus.broker_url)
        with opened(f"{url}/echo") as client:  # and others' go on
            client.send("x")
            assert client.recv() == "x"

    @pytest.mark.parametrize("code", [1000, 1001, 1003, 1008, 1011, 1013, 3000, 4999])
    def test_codes_of_clients(self, url: str, site: Site, code: int) -> None:
        with Raw(f"{url}/silent") as raw:
            raw.opened()
            raw.send(CLOSE, closing(code, "gr\xfc\xdfe".encode()))
            assert raw.closed() == (code, "gr\xfc\xdfe")
            assert raw.ended()
        assert eventually(lambda: site.closed) == [(code, "gr\xfc\xdfe")]

    def test_no_code_of_a_client(self, url: str, site: Site) -> None:
        with Raw(f"{url}/silent") as raw:
            raw.opened()
            raw.send(CLOSE)
            assert raw.closed()[0] in (1000, 1005)
        assert eventually(lambda: site.closed)[0][0] == 1005

    @pytest.mark.parametrize("code", [1000, 1001, 1008, 1011, 3000, 4999])
    def test_codes_of_apps(self, url: str, code: int) -> None:
        with Raw(f"{url}/close/{code}") as raw:
            assert raw.opened().closed() == (code, "as asked")
            raw.send(CLOSE, closing(code))
            assert raw.ended()

    @pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 2000, 5000, 65535])
    def test_codes_that_no_app_may_send(self, url: str, code: int) -> None:
        with Raw(f"{url}/close/{code}") as raw:
            assert raw.opened().closed()[0] in (1000, 1011, 1005)

    def test_a_control_frame_between_fragments(self, url: str) -> None:
        with Raw(f"{url}/echo") as raw:
            raw.opened()
            raw.send(TEXT, b"gr\xc3", fin=False)
            raw.send(PING, b"now")
            assert raw.receive() == (PONG, b"now")
            raw.send(CONT, b"\xbc\xc3", fin=False)
            raw.send(PONG, b"unasked")
            raw.send(CONT, b"\x9fe")
            assert raw.receive() == (TEXT, "gr\xfc\xdfe".encode())
            raw.send(TEXT, b"", fin=False)
            raw.send(CLOSE, closing(1000))
            assert raw.closed()[0] == 1000

    @pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 1 << 20, 16 << 20])
    def test_sizes(self, url: str, size: int) -> None:
        data = os.urandom(1024) * (size // 1024 + 1)
        with opened(f"{url}/echo") as client:
            client.send(data[:size])
            assert client.recv() == data[:size]
            client.send("\u20ac" * (size // 3))
            assert client.recv() == "\u20ac" * (size // 3)

    def test_what_was_said_before_the_close_arrives(self, url: str, site: Site) -> None:
        with Raw(f"{url}/silent") as raw:
            raw.opened()
            many = b"".join(frame(TEXT, b"%d" % number) for number in range(1000))
            raw.sock.sendall(many + frame(CLOSE, closing(1000)))
            assert raw.closed()[0] == 1000
            eventually(lambda: site.closed, "all of it")
        assert site.seen == [str(number) for number in range(1000)]
        assert site.closed == [(1000, "")]


class TestAccessLog:
    def test_a_line_for_each(self, broker: Broker, tmp_path: Path) -> None:
        with Fleet(tmp_path, broker.url) as fleet:
            gateway, address = fleet.gateway("--access-log", "-")
            with Bus(address, broker.url).mount(Site(), "/site") as url:
                with Raw(f"{url}/echo?a=b") as raw:
                    raw.opened()
                    raw.send(TEXT, "x" * 100)
                    assert raw.receive() == (TEXT, b"x" * 100)
                    raw.goodbye()
                with Raw(f"{url}/answer/404") as raw:
                    raw.answer()
                with Raw(f"{url}/echo", "Origin: null") as raw:
                    raw.answer()
                eventually(lambda: gateway.log().count('"GET /site/') == 3, gateway.log())
        # Written when each is over, and its client may know that first.
        for line in ('echo?a=b HTTP/1.1" 101 100 ', 'answer/404 HTTP/1.1" 404 13 ', 'echo HTTP/1.1" 403 '):
            assert f'"GET /site/{line}' in gateway.log()


class TestTls:
    def test_over_tls(self, broker: Broker, tmp_path: Path) -> None:
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1")
        file = tmp_path / "gateway.pem"
        certificate.private_key_and_cert_chain_pem.write_to_path(str(file))
        context = ssl.create_default_context()
        authority.configure_trust(context)
        with (
            Fleet(tmp_path, broker.url) as fleet,
            Bus(fleet.gateway("--certfile", str(file))[1].replace("http", "https"), broker.url).mount(
                site := Site(), "/site"
            ) as url,
        ):
            with opened(f"{url}/environ", ssl=context, origin=url.removesuffix("/site")) as client:
                assert json.loads(client.recv())["wsgi.url_scheme"] == "https"
            with opened(f"{url}/echo", ssl=context) as client:
                data = os.urandom(3 << 20)
                client.send(data)
                assert client.recv() == data
                began = time.monotonic()
                client.close(3000, "bye")
                assert time.monotonic() - began < 0.9  # not by a time-out
            with opened(f"{url}/silent", ssl=context) as client:
                with suppress(ssl.SSLError):  # broken already, which is what this is for
                    client.socket.sendall(b"junk")  # no TLS: the connection breaks
                eventually(lambda: site.closed)
            at_rest(broker.url)


@pytest.fixture(scope="module", params=["websockets", "wsproto"])
def uvicorn(
    request: pytest.FixtureRequest, bus: Bus, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The gateway under another ASGI server, with each of its implementations of WebSocket."""
    port = free_port()
    log = tmp_path_factory.mktemp("uvicorn") / "log"
    program = [
        sys.executable, "-m", "uvicorn", "flaskbus_gateway.asgi:app", "--no-proxy-headers", "--lifespan", "on",
        "--ws", request.param, "--port", str(port),
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            program, env=os.environ | {"FLASKBUS_REDIS_URL": bus.broker_url}, stdout=output, stderr=output
        )
    try:
        eventually(lambda: b"Uvicorn running" in log.read_bytes() or process.poll() is not None)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)
    # Its websockets implementation is of that library's past.
    assert "Traceback" not in log.read_text(), log.read_text()


class TestAnotherServer:
    def test_messages(self, uvicorn: str, bus: Bus, site: Site) -> None:
        with opened(f"{uvicorn}/site/echo", subprotocols=["soup"]) as client:
            assert client.subprotocol == "soup"
            for message in ("text \u20ac", b"bytes", "", b"", os.urandom(1 << 20), "\u20ac" * 100_000):
                client.send(message)
                assert client.recv() == message
        at_rest(bus.broker_url)

    @pytest.mark.parametrize("code", [1000, 1001, 3000, 1005])
    def test_codes(self, uvicorn: str, bus: Bus, site: Site, code: int) -> None:
        with Raw(f"{uvicorn}/site/silent") as raw:
            raw.opened()
            raw.send(CLOSE, b"" if code == 1005 else closing(code, b"bye"))
            raw.closed()
        assert eventually(lambda: site.closed)[0][0] == code
        if code != 1005:
            with Raw(f"{uvicorn}/site/close/{code}") as raw:
                assert raw.opened().closed() == (code, "as asked")
        at_rest(bus.broker_url)

    def test_a_client_that_vanishes(self, uvicorn: str, bus: Bus, site: Site) -> None:
        for path in ("silent", "slow"):
            raw = Raw(f"{uvicorn}/site/{path}")
            if path == "silent":
                raw.opened()
            else:
                eventually(lambda: site.seen)
            raw.vanish()
            site.go.set()
            if path == "silent":
                eventually(lambda: site.closed)
            at_rest(bus.broker_url)

    def test_answers(self, uvicorn: str, bus: Bus, site: Site) -> None:
        with Raw(f"{uvicorn}/site/answer/404") as raw:
            got = raw.answer()
        assert (got.status, got.body, got.values("set-cookie")) == (404, b"the app's own", ["a=1", "b=2"])
        with Raw(f"{uvicorn}/nowhere") as raw:
            refused(raw.answer(), 404, "unknown-mount")
        with Raw(f"{uvicorn}/site/echo", "Origin: https://evil.example") as raw:
            refused(raw.answer(), 403, "foreign-origin")
        at_rest(bus.broker_url)
