"""WebSockets whose clients vanish, flood or sleep, and whose gateway, agent or broker goes away."""

from __future__ import annotations

import base64
import hashlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from flaskbus.broker import connect as connect_broker
from flaskbus.routing import Mount
from flaskbus.testing import Bus
from flaskbus_agent.line import ASK
from tests.conftest import Broker
from tests.faults.mortal import MortalBroker
from tests.integration.fleet import Fleet, Program, eventually
from tests.integration.test_websocket_gateway import Answer, Site, at_rest, opened
from tests.integration.websocket_client import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    Raw,
    closing,
    frame,
    rss,
)

MIB = 1024 * 1024
ROOT = Path(__file__).parents[2]
SOCKETS = "tests.integration.apps.sockets:app"


class Stubborn(Site):
    """Also speaks WebSocket by hand, to do what no library does."""

    def _by_hand(self, environ: dict[str, Any]) -> socket.socket:
        ws: socket.socket = environ["werkzeug.socket"]
        key = environ["HTTP_SEC_WEBSOCKET_KEY"].encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key).digest())
        ws.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )
        return ws

    def _read_all(self, ws: socket.socket) -> None:
        with suppress(OSError):
            while ws.recv(65536):
                pass
        self.closed.append((0, "socket"))

    def on_deaf(self, environ: dict[str, Any], start_response: Any) -> Answer:
        """Reads nothing until it may, and then all."""
        ws = self._by_hand(environ)
        self.seen.append("open")
        assert self.go.wait(60)
        self._read_all(ws)
        start_response("200 OK", [])
        return []

    def on_flood(self, environ: dict[str, Any], start_response: Any) -> Answer:
        """Sends numbered messages of 64 KiB for as long as anybody takes them."""
        ws = self._by_hand(environ)
        with suppress(OSError):
            while True:
                data = b"%08d" % len(self.seen) * 8192
                ws.sendall(frame(BINARY, data, mask=False))
                self.seen.append(len(data))
        self.closed.append((0, "socket"))
        start_response("200 OK", [])
        return []


@dataclass
class Place:
    """A gateway process, and an app in threads of the test's own process."""

    fleet: Fleet
    gateway: Program
    bus: Bus
    site: Stubborn

    @property
    def url(self) -> str:
        return f"{self.bus.url}/site"

    @property
    def worker(self) -> int:
        (pid,) = self.gateway.workers()
        return pid

    def rest(self) -> None:
        at_rest(self.bus.broker_url)


@pytest.fixture
def places(broker: Broker, tmp_path: Path) -> Iterator[Callable[..., Place]]:
    """``places(*options, url=…)``: a gateway with these options."""
    with ExitStack() as stack:
        sites = []

        def place(*options: str, url: str = broker.url) -> Place:
            fleet = stack.enter_context(Fleet(tmp_path, url))
            gateway, address = fleet.gateway(*options)
            bus, site = Bus(address, url), Stubborn()
            sites.append(site)
            stack.enter_context(bus.mount(site, "/site", threads=4, lease=2.0))
            return Place(fleet, gateway, bus, site)

        try:
            yield place
        finally:
            for site in sites:
                site.go.set()


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[MortalBroker]:
    (tmp_path / "broker").mkdir()
    mortal = MortalBroker(tmp_path / "broker")
    yield mortal
    mortal.close()


def send_until_blocked(raw: Raw, data: bytes, most: int) -> int:
    """Send copies of ``data`` until nothing is taken for a second, or ``most`` bytes went; how many did."""
    raw.sock.settimeout(1.0)
    sent = 0
    with suppress(TimeoutError):
        while sent < most:
            sent += raw.sock.send(data[sent % len(data) :])
    raw.sock.settimeout(20.0)
    return sent


class TestMemory:
    def test_of_messages_that_the_app_does_not_read(self, places: Callable[..., Place]) -> None:
        place = places()
        with Raw(f"{place.url}/deaf") as raw:
            raw.opened()
            before = rss(place.worker)
            sent = send_until_blocked(raw, frame(BINARY, bytes(65536 - 14)), 256 * MIB)
            assert sent < 32 * MIB  # most of it in the kernel
            assert rss(place.worker) - before < 32 * MIB
            with connect_broker(place.bus.broker_url) as client:
                (key,) = client.scan_iter("*:inbound:*")
                assert client.memory_usage(key) < 2 * MIB
                assert client.ttl(key) > 0
        place.site.go.set()
        place.rest()

    def test_of_large_messages_that_the_app_does_not_read(self, places: Callable[..., Place]) -> None:
        place = places()
        with Raw(f"{place.url}/deaf") as raw:
            raw.opened()
            before = rss(place.worker)
            sent = send_until_blocked(raw, frame(BINARY, bytes(16 * MIB)), 512 * MIB)
            assert sent < 5 * 16 * MIB
            assert rss(place.worker) - before < 12 * 16 * MIB
        place.site.go.set()
        place.rest()

    def test_of_pings_whose_answers_are_not_read(self, places: Callable[..., Place]) -> None:
        place = places()
        with Raw(f"{place.url}/silent", receive_buffer=4096) as raw:
            raw.opened()
            before = rss(place.worker)
            assert send_until_blocked(raw, frame(PING, b"x" * 125) * 500, 256 * MIB) < 64 * MIB
            assert rss(place.worker) - before < 16 * MIB
        place.rest()

    def test_of_a_client_that_takes_nothing(self, places: Callable[..., Place]) -> None:
        place = places("--idle-timeout", "5")
        with Raw(f"{place.url}/flood", receive_buffer=4096) as raw:
            raw.opened()
            before = rss(place.worker)
            assert stands_still(place.site.seen) < 32 * MIB // 65536
            assert rss(place.worker) - before < 16 * MIB
            assert not place.site.closed
            eventually(lambda: place.site.closed, "it is given up")
        place.rest()

    def test_a_client_that_reads_late_gets_all_in_order(self, places: Callable[..., Place]) -> None:
        place = places()
        with Raw(f"{place.url}/flood", receive_buffer=4096) as raw:
            raw.opened()
            count = stands_still(place.site.seen)
            for number in range(count + 100):
                assert raw.receive()[1] == b"%08d" % number * 8192
        eventually(lambda: place.site.closed)
        place.rest()


def stands_still(growing: list[Any]) -> int:
    """The length of a list once it has not grown for a while."""
    length = -1
    while length != (length := len(growing)):
        time.sleep(0.5)
    return length


def reset(raw: Raw) -> None:
    raw.vanish()


def hang_up(raw: Raw) -> None:
    raw.sock.close()


VANISHED: dict[str, tuple[str, bytes]] = {
    "open": ("silent", b""),
    "in the middle of a header": ("silent", frame(TEXT, b"x" * 300)[:3]),
    "in the middle of a frame": ("silent", frame(TEXT, b"x" * 300)[:20]),
    "in the middle of a message": ("silent", frame(TEXT, b"x", fin=False)),
    "after a message": ("silent", frame(TEXT, b"x")),
    "after its close": ("silent", frame(CLOSE, closing(1000))),
    "while much is under way to the app": ("deaf", frame(BINARY, bytes(60_000)) * 40),
    "while much is under way from the app": ("flood", b""),
}


class TestClientsThatVanish:
    @pytest.mark.parametrize("leave", [reset, hang_up])
    @pytest.mark.parametrize("phase", VANISHED)
    def test_once_it_is_open(
        self, places: Callable[..., Place], phase: str, leave: Callable[[Raw], None]
    ) -> None:
        place = places("--websocket-ping", "0.5")
        path, sent = VANISHED[phase]
        raw = Raw(f"{place.url}/{path}").opened()
        raw.sock.setblocking(False)
        with suppress(BlockingIOError):
            raw.sock.send(sent)
        if path != "silent":
            eventually(lambda: place.site.seen)
        leave(raw)
        if path == "deaf":
            place.rest()  # though the app has not noticed
            place.site.go.set()
        eventually(lambda: place.site.closed, "the app's end closes")
        place.rest()

    @pytest.mark.parametrize("leave", [reset, hang_up])
    def test_before_the_app_has_begun(
        self, places: Callable[..., Place], leave: Callable[[Raw], None]
    ) -> None:
        place = places()
        waiting = [Raw(f"{place.url}/slow") for _ in range(4)]
        eventually(lambda: len(place.site.seen) == 4)
        fifth = Raw(f"{place.url}/silent")
        with connect_broker(place.bus.broker_url) as client:
            stream = "flaskbus:{/site}:requests"
            eventually(lambda: client.xlen(stream) == 5)
            leave(fifth)
            eventually(lambda: client.xlen(stream) == 4, "it is taken back")
        place.site.go.set()
        for raw in waiting:
            assert raw.opened().receive() == (TEXT, b"late")
            raw.sock.close()
        place.rest()
        assert place.site.seen == ["begun"] * 4

    @pytest.mark.parametrize("leave", [reset, hang_up])
    def test_before_the_app_has_answered(
        self, places: Callable[..., Place], leave: Callable[[Raw], None]
    ) -> None:
        place = places()
        raw = Raw(f"{place.url}/slow")
        eventually(lambda: place.site.seen)
        leave(raw)
        place.rest()
        place.site.go.set()
        with opened(f"{place.url}/echo") as client:
            client.send("x")
            assert client.recv() == "x"
        place.rest()

    @pytest.mark.parametrize("leave", [reset, hang_up])
    def test_while_the_app_takes_the_handshake(
        self, places: Callable[..., Place], leave: Callable[[Raw], None]
    ) -> None:
        """Its agent says that it was taken just when its gateway gives it up, and neither says more by itself."""
        place = places()

        def open_ones() -> list[threading.Thread]:
            return [each for each in threading.enumerate() if "simple_websocket" in each.name]

        for number in range(150):
            raw = Raw(f"{place.url}/silent")
            time.sleep(number % 50 / 5000)
            leave(raw)
        eventually(lambda: not open_ones(), "the apps' ends close", ASK / 2)
        place.rest()


class TestSilence:
    """A WebSocket may be silent for as long as it likes; who does not answer a ping is gone."""

    SHORT = ("--websocket-ping", "0.5", "--idle-timeout", "0.5", "--keepalive", "0.5", "--header-timeout", "0.5",
             "--head-timeout", "0.5", "--body-timeout", "0.5")  # fmt: skip

    def test_no_time_out_ends_one_that_answers(self, places: Callable[..., Place]) -> None:
        place = places(*self.SHORT)
        with opened(f"{place.url}/echo", ping_interval=None) as client:
            with pytest.raises(TimeoutError):
                client.recv(timeout=4.0)
            client.send("still there")
            assert client.recv() == "still there"

    def test_its_lists_do_not_expire_under_it(self, places: Callable[..., Place]) -> None:
        """Frames are trimmed some at a time; lists that nobody writes to live for two hours."""
        place = places(*self.SHORT)
        with connect_broker(place.bus.broker_url) as broker, opened(f"{place.url}/echo") as client:
            for _ in range(3):
                client.send("x")
                assert client.recv() == "x"
            for key in [*broker.scan_iter("*:inbound:*"), *broker.scan_iter("*:reply:*")]:
                broker.expire(key, 3)
            with pytest.raises(TimeoutError):
                client.recv(timeout=4.0)
            for size in (1, 100_000):  # one that rings, and one that has to be looked for
                client.send("y" * size)
                assert client.recv(timeout=10.0) == "y" * size

    def test_who_answers_nothing_is_gone(self, places: Callable[..., Place]) -> None:
        place = places(*self.SHORT)
        with Raw(f"{place.url}/silent") as raw:
            raw.opened()
            began = time.monotonic()
            assert raw.receive() == (PING, b"")
            assert raw.receive() == (CLOSE, closing(1011, b"no answer to a ping"))
            assert raw.ended()
            assert 0.9 < time.monotonic() - began < 5.0
            eventually(lambda: place.site.closed)
        place.rest()

    def test_any_word_is_an_answer(self, places: Callable[..., Place]) -> None:
        place = places(*self.SHORT)
        with Raw(f"{place.url}/silent") as raw:
            raw.opened()
            for answer in (PONG, PING, TEXT) * 2:
                opcode, _ = raw.receive()
                while opcode != PING:
                    opcode, _ = raw.receive()
                raw.send(answer)
            raw.goodbye()

    def test_an_answer_may_wait_behind_what_the_app_does_not_read(self, places: Callable[..., Place]) -> None:
        place = places(*self.SHORT)
        with Raw(f"{place.url}/deaf") as raw:
            raw.opened()
            send_until_blocked(raw, frame(BINARY, bytes(65536 - 14)), 256 * MIB)
            raw.sock.settimeout(20)
            pings = [raw.receive() for _ in range(6)]
            assert pings == [(PING, b"")] * 6
            place.site.go.set()
        eventually(lambda: place.site.closed)
        place.rest()

    def test_a_slow_reader_is_not_gone(self, places: Callable[..., Place]) -> None:
        place = places("--websocket-ping", "0.5", "--idle-timeout", "30")
        with Raw(f"{place.url}/flood", receive_buffer=4096) as raw:
            raw.opened()
            end = time.monotonic() + 5.0
            number = 0
            while time.monotonic() < end:
                opcode, data = raw.receive()
                if opcode == BINARY:
                    assert data[:8] == b"%08d" % number
                    number += 1
                    time.sleep(0.2)
                else:
                    assert opcode == PING  # and it has no time to answer
        eventually(lambda: place.site.closed)
        place.rest()

    def test_it_can_be_switched_off(self, places: Callable[..., Place]) -> None:
        place = places("--websocket-ping", "0")
        with Raw(f"{place.url}/echo") as raw:
            raw.opened()
            raw.sock.settimeout(3.0)
            with pytest.raises(TimeoutError):
                raw.receive()
            raw.goodbye()


class TestEnds:
    def test_a_gateway_that_stops_says_goodbye(self, places: Callable[..., Place]) -> None:
        place = places("--graceful-timeout", "20")
        polite = [Raw(f"{place.url}/silent").opened() for _ in range(30)]
        rude = [Raw(f"{place.url}/silent").opened() for _ in range(10)]
        began = time.monotonic()
        place.gateway.signal(signal.SIGTERM)
        for raw in polite:
            assert raw.closed() == (1001, "shutting down")
            raw.send(CLOSE, closing(1001))
        for raw in rude:
            assert raw.closed()[0] == 1001
        assert place.gateway.process.wait(20) == 0
        assert time.monotonic() - began < 10.0
        eventually(lambda: len(place.site.closed) == 40)
        assert {code for code, _ in place.site.closed} == {1001}
        for raw in polite + rude:
            assert raw.ended()
            raw.sock.close()
        place.rest()

    def test_a_gateway_that_is_killed(self, places: Callable[..., Place]) -> None:
        place = places()
        clients = [Raw(f"{place.url}/silent").opened() for _ in range(4)]
        place.gateway.kill()
        for raw in clients:
            assert raw.ended()
            raw.sock.close()
        # Another gateway finds its heartbeat missing, and frees what it held.
        place.fleet.gateway()
        eventually(lambda: len(place.site.closed) == 4, "the app's ends close")

    def test_an_agent_that_is_killed(self, places: Callable[..., Place]) -> None:
        place = places()
        agent = place.fleet.start("sockets", "flaskbus_agent", f"{SOCKETS}=/sockets", PYTHONPATH=str(ROOT))
        place.bus.await_route(Mount.parse("/sockets"))
        clients = [opened(f"{place.bus.url}/sockets/echo", legacy=True) for _ in range(3)]
        for client in clients:
            client.send("x")
            assert client.recv() == "x"
        agent.kill()
        began = time.monotonic()
        for client in clients:
            with pytest.raises(ConnectionClosed) as caught:
                client.recv(timeout=20)
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1011
        assert time.monotonic() - began < 10.0
        place.rest()


class TestBrokers:
    """What a broker does to WebSockets that are open."""

    def test_one_that_comes_back_with_its_data(
        self, mortal: MortalBroker, places: Callable[..., Place]
    ) -> None:
        place = places(url=mortal.url)
        with opened(f"{place.url}/echo") as client, Raw(f"{place.url}/silent") as raw:
            raw.opened()
            client.send("before")
            assert client.recv() == "before"
            mortal.kill()
            for number in range(50):
                client.send(f"{number} meanwhile")
            raw.send(TEXT, "meanwhile")
            mortal.revive()
            for number in range(50):
                assert client.recv(timeout=20) == f"{number} meanwhile"
            assert eventually(lambda: place.site.seen) == ["meanwhile"]
            raw.goodbye()
        eventually(lambda: place.site.closed)
        place.rest()

    def test_many_that_speak_at_once(self, mortal: MortalBroker, places: Callable[..., Place]) -> None:
        """What their apps say travels together; what did not arrive so, arrives alone, in order and once."""
        place = places(url=mortal.url)
        with ExitStack() as stack:
            clients = [stack.enter_context(Raw(f"{place.url}/echo")).opened() for _ in range(16)]

            def say(words: str) -> None:
                for raw in clients:
                    raw.sock.sendall(b"".join(frame(TEXT, f"{words} {n}".encode()) for n in range(5)))

            def heard(words: str) -> None:
                for raw in clients:
                    assert [raw.receive() for _ in range(5)] == [
                        (TEXT, f"{words} {n}".encode()) for n in range(5)
                    ]

            with connect_broker(mortal.url) as broker:
                for number in range(5):
                    broker.script_flush()
                    say(f"flushed {number}")
                    heard(f"flushed {number}")
            mortal.kill()
            say("killed")
            mortal.revive()
            heard("killed")
            say("after")
            heard("after")
            for raw in clients:
                raw.goodbye()
        place.rest()

    def test_one_that_forgets(self, places: Callable[..., Place]) -> None:
        place = places()
        with opened(f"{place.url}/echo") as client:
            client.send("x")
            assert client.recv() == "x"
            with connect_broker(place.bus.broker_url) as broker:
                broker.flushall()
            began = time.monotonic()
            with pytest.raises(ConnectionClosed) as caught:
                client.recv(timeout=30)
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1011
            assert time.monotonic() - began < 15.0
        place.rest()

    def test_one_that_is_full(self, places: Callable[..., Place]) -> None:
        place = places()
        with connect_broker(place.bus.broker_url) as broker, opened(f"{place.url}/echo") as client:
            client.send("x")
            assert client.recv() == "x"
            broker.config_set("maxmemory", 1)
            try:
                with Raw(f"{place.url}/echo") as raw:
                    assert raw.answer().status == 503
                client.send("waits")
                with pytest.raises(TimeoutError):
                    client.recv(timeout=1.0)
            finally:
                broker.config_set("maxmemory", 0)
            assert client.recv(timeout=20) == "waits"
        place.rest()

    def test_a_client_that_vanishes_while_it_is_away(
        self, mortal: MortalBroker, places: Callable[..., Place]
    ) -> None:
        place = places(url=mortal.url)
        raw = Raw(f"{place.url}/silent").opened()
        mortal.kill()
        raw.vanish()
        mortal.revive()
        eventually(lambda: place.site.closed)
        place.rest()
