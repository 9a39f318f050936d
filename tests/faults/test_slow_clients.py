"""Slowloris and its relations: clients that say nothing, or drip, or take nothing, many at a time.

Each kind has a deadline that no byte moves. Meanwhile others are served; how fast, is reported and not judged.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import statistics
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from flaskbus.errors import BodyTimeout
from flaskbus.keys import Keys
from flaskbus.routing import Mount
from flaskbus.settings import GatewaySettings
from flaskbus_gateway.app import Gateway
from flaskbus_gateway.http import Incoming
from tests.conftest import Broker
from tests.integration.fleet import Fleet, eventually

HEADER, KEEPALIVE, BODY, IDLE = 2.0, 2.5, 3.0, 3.0
"""Deadlines of the gateway in seconds."""

TICK = 1.0
"""Seconds between two looks at the deadlines."""

SLACK = 10.0
"""Seconds that a busy machine may add."""

LIMIT = 30.0
"""Seconds after which a connection counts as never closed."""

PACE = 0.25
"""Seconds between two bytes of one that drips."""

RUSHES = 4
"""How often as many slow clients come."""

SLOW = Mount.parse("/slow")

APP = """
import itertools, wsgiref.validate

@wsgiref.validate.validator
def app(environ, start_response):
    while environ["wsgi.input"].read(65536):
        pass
    start_response("200 OK", [("Content-Type", "text/plain")])
    if environ["PATH_INFO"] == "/endless":
        return endless()
    return [b"whole"]

def endless():
    try:
        for _ in itertools.count():
            yield b"x" * 65536
    finally:
        with open("closed", "a") as ledger:
            ledger.write("x")
"""


@dataclass(frozen=True)
class Kind:
    """``first`` is sent at once, then ``drip`` for ever, a byte at a time; ``statuses`` are what the server says.

    ``deadline`` is after how many seconds the server closes the connection, but for a tick.
    """

    name: str
    first: bytes
    drip: bytes
    statuses: tuple[bytes, ...]
    deadline: float
    reads: bool = True


def line(method: str, path: str, *lines: str) -> bytes:
    return "\r\n".join([f"{method} /slow{path} HTTP/1.1", "Host: test", *lines, ""]).encode()


ONE = line("GET", "/") + b"\r\n"
KINDS = [
    Kind("silent", b"", b"", (), HEADER),
    Kind("a dripping header", line("GET", "/"), b"X-A: b\r\n", (b"408",), HEADER),
    Kind("a dripping request line", b"", b"GET /slow/", (b"408",), HEADER),
    Kind("idle after an answer", ONE, b"", (b"200",), KEEPALIVE),
    Kind("a dripping second header", ONE + line("GET", "/"), b"X: y\r\n", (b"200", b"408"), HEADER),
    Kind("a body that never comes", line("POST", "/", "Content-Length: 9999") + b"\r\n", b"", (b"408",), BODY),
    Kind("a dripping body", line("POST", "/", "Content-Length: 9999") + b"\r\n", b"b", (b"408",), BODY),
    Kind("dripping chunks", line("POST", "/", "Transfer-Encoding: chunked") + b"\r\n", b"1\r\nx\r\n", (b"408",), BODY),
    Kind("an answer that is not read", line("GET", "/endless") + b"\r\n", b"", (), IDLE, reads=False),
]  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a connection ended, and after how many seconds."""

    kind: Kind
    seconds: float
    received: bytes


class Attackers:
    """Many slow connections to one address."""

    def __init__(self, address: tuple[str, int], count: int) -> None:
        self.address = address
        # An endless answer costs its app something, so there are fewer of these.
        talking = [kind for kind in KINDS if kind.reads]
        unread = [kind for kind in KINDS if not kind.reads] * max(2, count // 50)
        self.kinds = [*itertools.islice(itertools.cycle(talking), count - len(unread)), *unread]

    async def run(self) -> list[Ended]:
        # All at once: whom the backlog does not hold would be reset, or come again a second later.
        return await asyncio.gather(*map(self._one, self.kinds))

    async def _one(self, kind: Kind) -> Ended:
        try:
            return await asyncio.wait_for(self._connection(kind), LIMIT)
        except TimeoutError:
            return Ended(kind, LIMIT, b"")

    async def _connection(self, kind: Kind) -> Ended:
        loop = asyncio.get_running_loop()
        with socket.socket() as sock:
            sock.setblocking(False)
            if not kind.reads:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            begun = loop.time()
            await loop.sock_connect(sock, self.address)
            await loop.sock_sendall(sock, kind.first)
            dripping = asyncio.create_task(self._drip(sock, kind.drip))
            received = b""
            try:
                if kind.reads:
                    with suppress(ConnectionError):
                        while data := await loop.sock_recv(sock, 65536):
                            received += data
                else:
                    while established(sock):
                        await asyncio.sleep(0.1)
                return Ended(kind, loop.time() - begun, received)
            finally:
                dripping.cancel()
                await asyncio.wait([dripping])

    async def _drip(self, sock: socket.socket, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        with suppress(ConnectionError):
            for byte in itertools.cycle(data):
                await loop.sock_sendall(sock, bytes([byte]))
                await asyncio.sleep(PACE)


def established(sock: socket.socket) -> bool:
    """Whether the other side has not closed (tcp(7): ``tcpi_state`` is the first byte of TCP_INFO)."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x01"


class Others:
    """Honest clients, one request after the other on a connection each."""

    def __init__(self, address: tuple[str, int], count: int = 6) -> None:
        self.address = address
        self.count = count
        self.latencies: list[float] = []
        self.statuses: Counter[bytes] = Counter()
        self._numbers = itertools.count()

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """While the block runs."""
        done = asyncio.Event()
        workers = [asyncio.create_task(self._work(done)) for _ in range(self.count)]
        try:
            yield
        finally:
            done.set()
            await asyncio.gather(*workers)

    async def _work(self, done: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        reader, writer = await asyncio.open_connection(*self.address)
        while not done.is_set():
            token = f"honest-{next(self._numbers)}"
            begun = loop.time()
            writer.write(f"GET /fleet/{token} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(each[15:]) for each in head.lower().split(b"\r\n") if each.startswith(b"content-length:")
            )
            body = await reader.readexactly(length)
            self.latencies.append(loop.time() - begun)
            self.statuses[head.split()[1]] += 1
            assert body.startswith(token.encode() + b" ")
        writer.close()
        await writer.wait_closed()

    def take(self) -> str:
        """The distribution of latencies since the last call, for people."""
        taken, self.latencies = self.latencies, []
        cuts = statistics.quantiles(taken, n=100)
        shown = ", ".join(f"p{at} {cuts[at - 1] * 1000:.1f} ms" for at in (50, 90, 99))
        return f"{len(taken)} requests, {shown}, most {max(taken) * 1000:.1f} ms"


@pytest.fixture
def fleet(tmp_path: Path, broker: Broker) -> Iterator[Fleet]:
    (tmp_path / "slow.py").write_text(APP)
    with Fleet(tmp_path, broker.url) as fleet:
        yield fleet


def memory(pid: int) -> int:
    """Bytes that a process has to itself."""
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(fields[name].split()[0]) for name in ("Private_Clean", "Private_Dirty")) * 1024


def sockets(pid: int) -> int:
    """How many sockets a process has open."""
    count = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since
            count += str(link.readlink()).startswith("socket:")
    return count


def test_no_byte_swallows_the_deadline_of_a_body() -> None:
    """A server whose receive() brings a byte at the very moment in which it is cancelled."""
    calls: list[None] = []

    async def receive() -> dict[str, Any]:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.01)
        calls.append(None)
        return {"type": "http.request", "body": b"b", "more_body": len(calls) < 100}

    async def read() -> None:
        scope = {
            "type": "http",
            "method": "POST",
            "http_version": "1.1",
            "scheme": "http",
            "path": "/",
            "raw_path": b"/",
        }
        more = {"query_string": b"", "headers": [(b"host", b"test")], "client": None, "server": None}
        gateway = Gateway(GatewaySettings(body_timeout=0.1))
        await gateway._read_body(Incoming({**scope, **more}, gateway.proxies), receive, streams=False)

    with pytest.raises(BodyTimeout, match="bytes came, and then too little"):
        asyncio.run(read())


@pytest.mark.slow
@pytest.mark.parametrize("count", [90, 1000])
def test_slow_clients_are_closed_and_others_are_served(fleet: Fleet, count: int) -> None:
    gateway, url = fleet.gateway(
        "--header-timeout", f"{HEADER}", "--keepalive", f"{KEEPALIVE}", "--body-timeout", f"{BODY}",
        "--idle-timeout", f"{IDLE}", "--window", "65536",
        "--queue-age", "60",  # what is to be seen here are deadlines, and not that a rush is shed
    )  # fmt: skip
    fleet.agent("fast")
    fleet.start(
        "slow", "flaskbus_agent", "slow:app=/slow", "--streams", "200", "--threads", "8", "--window", "65536"
    )
    keys = Keys().of(SLOW.key)
    client = fleet.registry.client
    eventually(lambda: any(one.state == "ready" for one in fleet.registry.agents(SLOW)), "the slow agent")
    (worker,) = gateway.workers()
    parts = urlsplit(url)
    address = (str(parts.hostname), int(parts.port or 0))
    idle_sockets = sockets(worker)
    others = Others(address)
    used = []
    for _ in range(RUSHES):
        ended = asyncio.run(attack(address, count, others))
        judge(ended, count)
        eventually(lambda: sockets(worker) == idle_sockets, "every socket is closed")
        eventually(lambda: client.xlen(keys.requests) == 0, "nothing is left of their requests")
        used.append(memory(worker))
    assert set(others.statuses) == {b"200"}
    # A rush may need more than those before it have given back. What leaks is more after every one of them.
    assert min(more - before for before, more in itertools.pairwise(used)) < 2**20, f"memory grows: {used}"
    unread = RUSHES * sum(not kind.reads for kind in Attackers(address, count).kinds)
    eventually(
        lambda: (fleet.directory / "closed").read_text() == "x" * unread, "the streams are closed in the app"
    )
    eventually(lambda: not list(client.scan_iter("*:reply:*")), "no list is left")


async def attack(address: tuple[str, int], count: int, others: Others) -> Sequence[Ended]:
    async with others.at_work():
        await asyncio.sleep(2)
        print(f"alone: {others.take()}")
        ended = await Attackers(address, count).run()
        print(f"beside {count} slow clients: {others.take()}")
    return ended


def judge(ended: Sequence[Ended], count: int) -> None:
    assert len(ended) == count
    for one in ended:
        kind, what = one.kind, f"{one.kind.name} after {one.seconds:.1f} s: {one.received[:300]!r}"
        # What the kernel takes counts as taken: it takes megabytes for a client that reads nothing, some at a time.
        spans = 1 if kind.reads else 5
        assert one.seconds <= spans * kind.deadline + TICK + SLACK, what
        statuses = [part.split()[0] for part in one.received.split(b"HTTP/1.1 ")[1:]]
        assert statuses == list(kind.statuses), what
        assert one.seconds >= kind.deadline - 0.1, what
    slowest = {kind.name: max(one.seconds for one in ended if one.kind is kind) for kind in KINDS}
    print("closed after at most:", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in slowest.items()))
