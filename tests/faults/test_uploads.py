"""Processes that die, stop or run out of memory in the middle of an upload."""

from __future__ import annotations

import hashlib
import http.client
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from flaskbus import wire
from flaskbus.keys import Keys
from flaskbus.routing import Mount
from flaskbus.wire import MAX_INLINE
from tests.conftest import Broker
from tests.faults import site
from tests.integration.fleet import Fleet, Program, eventually, whole_lines

APP = '''
import hashlib, os, wsgiref.validate

ledger = os.open("takes", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def tell(what):
    os.write(ledger, f"{what}\\n".encode())

@wsgiref.validate.validator
def app(environ, start_response):
    """Reads as many bytes as the path says, and at last the whole body; tells of the end."""
    tell(f"begin {os.getpid()}")
    body, digest, length = environ["wsgi.input"], hashlib.sha256(), 0
    try:
        while part := body.read(65536):
            digest.update(part)
            if not length:
                tell("first")
            length += len(part)
    except OSError as error:
        tell(f"OSError {error}")
        raise
    tell(f"end {length}")
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{length} {digest.hexdigest()}".encode()]
'''
TAKE = Mount.parse("/take")
KEYS = Keys().of(TAKE.key)
DATA = os.urandom(1 << 20) * 4


def digest(data: bytes) -> bytes:
    return f"{len(data)} {hashlib.sha256(data).hexdigest()}".encode()


class Uploads:
    """A fleet whose app takes uploads, and what it wrote down of them."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        (fleet.directory / "takes.py").write_text(APP)

    def agent(self, name: str, *options: str) -> Program:
        agent = self.fleet.start(name, "flaskbus_agent", "takes:app=/take", "--threads", "2", *options)

        def ready() -> bool:
            records = self.fleet.registry.agents(TAKE)
            return any(each.supervisor == agent.pid and each.state == "ready" for each in records)

        eventually(lambda: ready() or agent.process.poll() is not None, f"agent {name}")
        assert agent.process.poll() is None, agent.log()
        return agent

    def said(self) -> list[str]:
        ledger = self.fleet.directory / "takes"
        return whole_lines(ledger) if ledger.exists() else []

    def says(self, start: str, count: int = 1) -> None:
        eventually(
            lambda: sum(line.startswith(start) for line in self.said()) >= count, f"{start}: {self.said()}"
        )

    def at_rest(self) -> None:
        """Nothing is left of any exchange."""
        client: Any = self.fleet.registry.client

        def left() -> list[Any]:
            lists = [*client.scan_iter("*:reply:*"), *client.scan_iter("*:inbound:*")]
            return lists + list(client.xrange(KEYS.requests))

        eventually(lambda: not left(), "the broker is at rest")


@pytest.fixture
def uploads(tmp_path: Path, broker: Broker) -> Iterator[Uploads]:
    with Fleet(tmp_path, broker.url) as fleet:
        yield Uploads(fleet)


class Sender:
    """One upload of :data:`DATA`, in as many steps as the test likes."""

    def __init__(self, url: str, method: str) -> None:
        parts = urlsplit(url)
        self.sock = socket.create_connection((parts.hostname, parts.port), 40)
        head = f"{method} /take/ HTTP/1.1\r\nHost: test\r\nContent-Length: {len(DATA)}\r\n\r\n"
        self.sock.sendall(head.encode())
        self.sent = 0

    def send(self, end: int) -> None:
        """The part of the body up to its byte ``end``."""
        self.sock.sendall(DATA[self.sent : end])
        self.sent = end

    def answer(self) -> tuple[int, bytes]:
        response = http.client.HTTPResponse(self.sock)
        with closing(response):
            response.begin()
            return response.status, response.read()


@contextmanager
def upload(url: str, method: str = "POST") -> Iterator[Sender]:
    sender = Sender(url, method)
    with sender.sock:
        yield sender


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_an_agent_that_dies_with_a_part_of_the_body(uploads: Uploads, method: str) -> None:
    """What it took is gone, so nobody else can do it: 502 ``unknown``, and at once."""
    _, url = uploads.fleet.gateway()
    agent = uploads.agent("first")
    with upload(url, method) as sender:
        sender.send(1 << 20)
        uploads.says("first")
        client: Any = uploads.fleet.registry.client
        (key,) = eventually(lambda: client.keys("*:inbound:*"), "the rest is on its way")

        def taken() -> bool:
            """Whether the first frame is gone; up to seven small ones lie there until more come."""
            first = client.lindex(key, 0)
            return first is None or wire.decode_frame(first, max_size=1 << 20).seq > 0

        eventually(taken, "it has taken some of it")
        agent.kill()
        uploads.agent("second")
        status, body = sender.answer()
        assert status == 502
        assert b'"executed": "unknown"' in body
    assert len([line for line in uploads.said() if line.startswith("begin")]) == 1
    uploads.at_rest()


def test_a_put_of_which_nothing_was_taken_runs_again(uploads: Uploads) -> None:
    """An agent that is frozen before it looks at the list, and then dies, has taken nothing."""
    _, url = uploads.fleet.gateway()
    agent = uploads.agent("first")
    with upload(url, "PUT") as sender:
        sender.send(MAX_INLINE // 2)  # goes with the entry, and the app waits for the rest
        uploads.says("first")
        worker = max(agent.workers())
        os.kill(worker, signal.SIGSTOP)
        sender.send(1 << 20)
        client: Any = uploads.fleet.registry.client
        eventually(lambda: client.keys("*:inbound:*"), "the rest is on its way")
        agent.kill()
        uploads.agent("second")
        uploads.says("begin", 2)
        sender.send(len(DATA))
        assert sender.answer() == (200, digest(DATA))
    uploads.at_rest()


def test_an_agent_that_stops_ends_its_upload_first(uploads: Uploads) -> None:
    _, url = uploads.fleet.gateway()
    agent = uploads.agent("first")
    with upload(url) as sender:
        sender.send(1 << 20)
        uploads.says("first")
        agent.signal(signal.SIGTERM)
        uploads.agent("second")
        sender.send(len(DATA))
        assert sender.answer() == (200, digest(DATA))
    assert agent.process.wait(30) == 0
    uploads.at_rest()


def test_a_gateway_that_stops_ends_its_upload_first(uploads: Uploads) -> None:
    gateway, url = uploads.fleet.gateway()
    uploads.agent("first")
    with upload(url) as sender:
        sender.send(1 << 20)
        uploads.says("first")
        gateway.signal(signal.SIGTERM)
        eventually(lambda: "waiting up to" in gateway.log(), "it is stopping")
        sender.send(len(DATA))
        assert sender.answer() == (200, digest(DATA))
    assert gateway.process.wait(30) == 0
    uploads.at_rest()


def test_a_gateway_that_dies_leaves_nothing_and_no_app_waiting(uploads: Uploads) -> None:
    gateway, url = uploads.fleet.gateway()
    uploads.fleet.gateway()
    uploads.agent("first")
    with upload(url) as sender:
        sender.send(1 << 20)
        uploads.says("first")
        gateway.kill()
        uploads.says("OSError")
    client: Any = uploads.fleet.registry.client
    eventually(lambda: not client.xlen(KEYS.requests), "the entry is withdrawn")
    assert all(client.ttl(key) > 0 for key in client.scan_iter("*:inbound:*"))


def test_a_client_that_vanishes(uploads: Uploads) -> None:
    _, url = uploads.fleet.gateway()
    uploads.agent("first")
    with upload(url) as sender:
        sender.send(1 << 20)
        uploads.says("first")
    uploads.says("OSError")
    uploads.at_rest()


@pytest.mark.parametrize("sync", ["always", "everysec"])
def test_a_broker_that_is_killed_and_comes_back(tmp_path: Path, sync: str) -> None:
    """With all that it had, the upload goes on; where it lost its last writes, it may end, and says so."""
    directory = tmp_path / "broker"
    directory.mkdir()
    with site.Broker(directory, sync=sync) as broker, Fleet(tmp_path, broker.url) as fleet:
        uploads = Uploads(fleet)
        _, url = fleet.gateway()
        uploads.agent("first")
        with upload(url) as sender:
            done = threading.Event()

            def send() -> None:
                with suppress(OSError):
                    for end in range(50_000, len(DATA), 50_000):
                        sender.send(end)
                        done.wait(0.02)
                    sender.send(len(DATA))

            sending = threading.Thread(target=send)
            sending.start()
            uploads.says("first")
            broker.kill()
            broker.start()
            status, body = sender.answer()
            done.set()
            sending.join(30)
            if sync == "always" or status == 200:
                assert (status, body) == (200, digest(DATA))
            else:
                assert (status, b"unknown" in body) in ((502, True), (500, False))
        uploads.at_rest()


def test_a_broker_out_of_memory_pauses_an_upload(uploads: Uploads, broker: Broker) -> None:
    _, url = uploads.fleet.gateway()
    uploads.agent("first")
    client: Any = uploads.fleet.registry.client
    with upload(url) as sender:
        sender.send(1 << 20)
        uploads.says("first")
        client.config_set("maxmemory", "1")
        try:
            sender.send(3 << 19)
            eventually(
                lambda: client.info("errorstats").get("errorstat_OOM", {}).get("count", 0) > 3, "it refuses"
            )
        finally:
            client.config_set("maxmemory", "0")
        sender.send(len(DATA))
        assert sender.answer() == (200, digest(DATA))
    uploads.at_rest()


# Memory

MIB = 1 << 20


def rss(pid: int) -> int:
    """The most memory that a process ever had, in bytes (proc(5))."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


@contextmanager
def watched(look: Callable[[], int]) -> Iterator[list[int]]:
    """The greatest value of ``look`` while the block runs."""
    most, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            most[0] = max(most[0], look())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()


@pytest.mark.slow
@pytest.mark.parametrize("framing", ["stated", "chunked"])
def test_two_gibibytes_in_bounded_memory(uploads: Uploads, framing: str) -> None:
    """The bounds of docs/howto/uploads.md."""
    gateway, url = uploads.fleet.gateway()
    agent = uploads.agent("first")
    client: Any = uploads.fleet.registry.client
    parts = urlsplit(url)

    def post(size: int) -> bytes:
        block = bytes(MIB)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=300)
        with closing(connection):
            headers = {"Content-Length": str(size)} if framing == "stated" else {}
            body = (block for _ in range(size // MIB))
            connection.request("POST", "/take/", body, headers, encode_chunked=framing == "chunked")
            return connection.getresponse().read()

    assert post(8 * MIB).startswith(b"8388608 ")
    processes = [*gateway.workers(), *agent.workers()]
    before = {pid: rss(pid) for pid in processes}
    at_rest = client.info("memory")["used_memory"]
    with watched(lambda: client.info("memory")["used_memory"]) as used:
        assert post(2048 * MIB).startswith(b"2147483648 ")
    grown = {pid: rss(pid) - before[pid] for pid in processes}
    print(f"{framing}: grown by {[f'{each / MIB:.1f} MiB' for each in grown.values()]},", end=" ")
    print(f"broker {(used[0] - at_rest) / MIB:.1f} MiB")
    assert max(grown.values()) < 8 * MIB, grown
    assert used[0] - at_rest < 4 * MIB
    uploads.at_rest()
