"""The streaming app behind the bus, over HTTP/1 and HTTP/2, and under gunicorn: all in processes of their own."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import Broker, free_port, start_broker, stop_broker
from tests.integration.fleet import Fleet, Program, eventually, whole_lines
from tests.integration.test_gateway_process import make_certificate, trusting

ROOT = Path(__file__).parents[2]
APP = "tests.integration.apps.streams:checked"
WINDOW = 256 * 1024
PATIENCE = 20.0

HTTP1, HTTP2, GUNICORN = "http/1.1", "http/2", "gunicorn"
WAYS = (HTTP1, HTTP2)


@dataclass
class Place:
    """One mount, ``/s``, of one agent process with four threads; the same app under gunicorn's threads."""

    fleet: Fleet
    agent: Program
    urls: dict[str, str]
    """The app's URL, by the way that leads there."""
    trusted: ssl.SSLContext
    broker: Broker
    held: list[socket.socket] = field(default_factory=list)
    """Connections that are to be closed at the end of a test."""

    @property
    def url(self) -> str:
        return self.urls[HTTP1]

    def client(self, way: str = HTTP1) -> httpx.Client:
        return httpx.Client(
            base_url=self.urls[way], http2=way == HTTP2, verify=self.trusted, timeout=PATIENCE
        )

    def noted(self, token: str) -> list[dict[str, Any]]:
        lines = whole_lines(self.fleet.ledger)
        return [fact for line in lines if (fact := json.loads(line))["token"] == token]

    def made(self, token: str) -> int:
        """How many events were made."""
        return sum("made" in fact for fact in self.noted(token))

    def at_last(self, token: str, key: str) -> dict[str, Any]:
        """The first fact of this kind, as soon as it is noted."""

        def found() -> dict[str, Any] | None:
            return next((fact for fact in self.noted(token) if key in fact), None)

        result: dict[str, Any] = eventually(found, f"{key} of {token}")
        return result

    def go(self, token: str, way: str = HTTP1) -> None:
        """Let a response of this token take its next step."""
        httpx.post(f"{self.urls[way]}/go/{token}", verify=self.trusted, timeout=PATIENCE).raise_for_status()

    def on_lists(self) -> int:
        """Bytes of frames that lie on the broker."""
        with self.broker.client() as client:
            keys: Any = client.scan_iter("*:reply:*")
            return sum(len(element) for key in keys for element in client.lrange(key, 0, -1))

    def at_rest(self) -> None:
        """Nothing is left of any request."""

        def rested() -> bool:
            with self.broker.client() as client:
                streams: Any = client.scan_iter("*:requests")
                return not any(client.xlen(key) for key in streams) and not any(
                    True for _ in client.scan_iter("*:reply:*")
                )

        eventually(rested, "the broker is at rest")

    def trickling(self, path: str, url: str = "") -> socket.socket:
        """A client that has sent its request and reads nothing."""
        where = httpx.URL(url or self.url)
        sock = socket.socket()
        self.held.append(sock)
        sock.settimeout(PATIENCE)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        sock.connect((where.host, where.port))
        sock.sendall(f"GET {where.path}{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return sock


@contextmanager
def streaming(folder: Path, *options: str) -> Iterator[Place]:
    """Everything started; ``options`` are the agent's."""
    cert, key = make_certificate(folder)
    broker = start_broker("valkey", folder)
    try:
        with Fleet(folder, broker.url) as fleet:
            _, url = fleet.gateway()
            secure = ("--certfile", str(cert), "--keyfile", str(key), "--http2")
            _, url2 = fleet.gateway(*secure)
            agent = serve(fleet, "/s", *options)
            direct = f"127.0.0.1:{free_port()}"
            gunicorn(fleet, direct)
            urls = {
                HTTP1: f"{url}/s",
                HTTP2: f"{url2.replace('http:', 'https:')}/s",
                GUNICORN: f"http://{direct}",
            }
            place = Place(fleet, agent, urls, trusting(cert), broker)
            for way in urls:
                wait_for(place, way)
            yield place
    finally:
        stop_broker(broker)


def serve(fleet: Fleet, prefix: str, *options: str) -> Program:
    """An agent of the app."""
    return fleet.start("agent", "flaskbus_agent", f"{APP}={prefix}", *options, PYTHONPATH=str(ROOT))


def gunicorn(fleet: Fleet, address: str) -> Program:
    """The app without the bus, with as many threads as it needs for a stream in each."""
    program = Program(
        fleet.directory / f"{len(fleet.programs)}-gunicorn.log",
        "gunicorn", "--worker-class=gthread", "--threads=16", f"--bind={address}", APP,
        LEDGER=str(fleet.ledger), PYTHONPATH=str(ROOT),
    )  # fmt: skip
    fleet.programs.append(program)
    return program


def wait_for(place: Place, way: str) -> None:
    with place.client(way) as client:
        eventually(lambda: answers(client), way)


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/plain").status_code == 200
    except httpx.TransportError:
        return False


def vanish(sock: socket.socket) -> None:
    """Close with a reset, as a client that dies does, or a router that forgets it."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def resting(place: Place, token: str) -> int:
    """How much an app has made when it makes no more."""

    def made() -> int:
        facts = place.noted(token)
        return int(facts[-1]["made"]) if facts else 0

    eventually(made, "something")
    seen, since = made(), time.monotonic()
    while time.monotonic() - since < 0.5:
        if (now := made()) != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.02)
    return seen


def raw(url: str, path: str, method: str = "GET", version: str = "1.1", **headers: str) -> bytes:
    """All that a server sends until it closes the connection."""
    where = httpx.URL(url)
    more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"{method} {where.path.rstrip('/')}{path} HTTP/{version}\r\nHost: x\r\nConnection: close\r\n{more}\r\n"
    with socket.create_connection((where.host, where.port), PATIENCE) as sock:
        sock.sendall(head.encode())
        received = b""
        while data := sock.recv(65536):
            received += data
    return received
