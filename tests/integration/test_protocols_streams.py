"""Clients that stream both ways at the same time, that are slow, and that vanish: the same as without the bus."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import random
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.integration.apps.protocols import EVENTS
from tests.integration.fleet import eventually
from tests.integration.protocols import CUT, THREADS, Both, Served, both, needs, run, same

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    with both(tmp_path_factory.mktemp("streams")) as found:
        yield found


@pytest.fixture
def pair(started: Both) -> Iterator[Both]:
    """Both, and afterwards nothing is left: no list in the broker, no run of an app, no thread."""
    yield started
    started.at_rest()
    for served in started:
        url = f"{served.url}/small/open"
        with httpx.Client() as client, ThreadPoolExecutor(THREADS) as threads:
            eventually(partial(idle, client, url), f"{served.name}: no app runs")
            assert {each.status_code for each in threads.map(client.get, [url] * 2 * THREADS)} == {200}


def idle(client: httpx.Client, url: str) -> bool:
    return client.get(url).text == "0"


# Both ways at the same time


GUNICORN_BLOCK = 1024
"""gunicorn gives an app no byte of a body before it has so many, or all; the bus gives it what is there."""


def line(numbers: list[int], served: Served) -> bytes:
    said = json.dumps(numbers).encode()
    padding = 0 if served.name == "bus" else -(len(said) + 1) % GUNICORN_BLOCK
    return said + b" " * padding + b"\n"


def test_a_conversation(pair: Both) -> None:
    """A line is sent only when the answer to the one before it is there."""

    def verdict(served: Served) -> Any:
        with socket.create_connection(("127.0.0.1", urlsplit(served.url).port or 80), timeout=20) as sock:
            return list(talk(sock, [line([number, 1], served) for number in range(15)]))

    assert same(pair, verdict)[-1] == {"sum": 15, "all": 120}


def talk(sock: socket.socket, lines: list[bytes]) -> Iterator[Any]:
    sock.sendall(request("POST /small/sums", "Transfer-Encoding: chunked"))
    answer = http.client.HTTPResponse(sock)
    for number, said in enumerate(lines):
        sock.sendall(b"%x\r\n%s\r\n" % (len(said), said))
        if number == 0:
            answer.begin()  # the head comes with the first line
        yield json.loads(answer.readline())
    sock.sendall(b"0\r\n\r\n")
    assert answer.read() == b""
    answer.close()


def test_aiohttp_talks_and_listens(pair: Both) -> None:
    """Several conversations at a time."""
    import aiohttp

    sizes = [1, 10, 300, 4000, 1, 1]

    async def talk(session: Any, served: Served, seed: int) -> int:
        answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        chosen = random.Random(seed)

        async def said() -> AsyncIterator[bytes]:
            for size in sizes:
                numbers = [chosen.randrange(10) for _ in range(size)]
                yield line(numbers, served)
                assert (await answers.get())["sum"] == sum(numbers)

        async with session.post(f"{served.url}/small/sums", data=said()) as answer:
            assert answer.status == 200
            whole = 0
            while answered := await answer.content.readuntil(b"\n"):
                heard = json.loads(answered)
                answers.put_nowait(heard)
                whole = heard["all"]
        return whole

    async def talks(served: Served) -> list[int]:
        async with aiohttp.ClientSession() as session, asyncio.timeout(60):
            return list(await asyncio.gather(*(talk(session, served, seed) for seed in range(5))))

    assert all(same(pair, lambda served: asyncio.run(talks(served))))


def test_more_than_any_window_both_ways(pair: Both) -> None:
    """24 MiB go in while 24 MiB come out."""
    import aiohttp

    block = random.Random(1).randbytes(64 * 1024).replace(b"\n", b" ")[:-1] + b"\n"
    count = 384

    async def said() -> AsyncIterator[bytes]:
        for _ in range(count):
            yield block

    async def talk(url: str) -> tuple[int, bool]:
        size, right = 0, True
        async with aiohttp.ClientSession() as session, asyncio.timeout(60):
            async with session.post(url, data=said()) as answer:
                async for part in answer.content.iter_any():
                    at = size % len(block)
                    right &= part == (block * (len(part) // len(block) + 2))[at : at + len(part)]
                    size += len(part)
        return size, right

    assert same(pair, lambda served: asyncio.run(talk(f"{served.url}/small/echo"))) == (
        count * len(block),
        True,
    )


def test_httpx_streams_lines(pair: Both) -> None:
    """It listens only when it has said everything, and takes the answer as a stream."""

    def verdict(served: Served) -> Any:
        lines = (b"%d\n" % number for number in range(5000))
        with httpx.stream("POST", f"{served.url}/small/echo", content=lines, timeout=20) as answer:
            return answer.status_code, list(answer.iter_lines())

    assert same(pair, verdict)[1][-1] == "4999"


# Server-sent events


def test_events_go_on_after_the_last_one_that_was_seen(pair: Both) -> None:
    import httpx_sse

    def verdict(served: Served) -> Any:
        found: list[tuple[Any, ...]] = []
        connections = 0
        with httpx.Client() as client:
            while len(found) < EVENTS:
                headers = {"Last-Event-ID": found[-1][0]} if found else {}
                with httpx_sse.connect_sse(
                    client, "GET", f"{served.url}/small/events", headers=headers
                ) as source:
                    found += [(event.id, event.event, event.data, event.retry) for event in source.iter_sse()]
                connections += 1
        return connections, found

    connections, found = same(pair, verdict)
    assert connections == EVENTS // 10
    assert [int(event[0]) for event in found] == list(range(1, EVENTS + 1))


# Socket.IO


@pytest.mark.parametrize(
    "transports",
    [["polling"], ["websocket"], ["polling", "websocket"]],
    ids=["polling", "websocket", "upgrade"],
)
def test_socket_io(pair: Both, transports: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rooms, acknowledgements, binary messages, and many at once."""
    import socketio
    from engineio.payload import Payload

    burst = 200
    # By default a poll that brings more ends the connection.
    monkeypatch.setattr(Payload, "max_decode_packets", 3 * burst)

    def verdict(served: Served) -> Any:
        clients = [socketio.Client(reconnection=False) for _ in range(3)]
        said: list[list[Any]] = [[] for _ in clients]
        numbers: list[list[Any]] = [[] for _ in clients]
        for place, client in enumerate(clients):
            client.on("said", partial(hear, said[place]))
            client.on("number", numbers[place].append)
            name = {"name": f"client {place}"}
            client.connect(served.url, auth=name, transports=transports, socketio_path="chat/socket.io")
        try:
            assert [client.call("join", timeout=10) for client in clients] == ["joined"] * 3
            answers = [clients[0].call("say", ("hi", {"ä": [1, None]}, b"\x00\xff" * 2000), timeout=10)]
            answers.append(clients[1].call("say", "x" * 300_000, timeout=10))
            for client in clients:
                client.emit("burst", burst)
            eventually(lambda: all(len(each) == 2 for each in said), "everybody heard everything")
            eventually(lambda: all(len(each) == burst for each in numbers), "everybody got their numbers")
            # A thread for each message is this client's way: neither order nor attachments are safe with it.
            for each in numbers:
                each.sort(key=itemgetter("number"))
            kinds = [client.transport() for client in clients]
        finally:
            for client in clients:
                client.disconnect()
        return answers, said, numbers, kinds

    answers, _, numbers, kinds = same(pair, verdict)
    assert answers == [3, 1]
    assert [each["number"] for each in numbers[0]] == list(range(burst))
    assert kinds == [transports[-1]] * 3


def hear(heard: list[Any], *said: Any) -> None:
    heard.append(said)


# Slow ones


def test_slow_readers_and_writers(pair: Both, tmp_path: Path) -> None:
    """Each at its own pace, several at a time, beside a fast one."""
    needs("curl")
    (tmp_path / "sent").write_bytes(b"0123456789abcde\n" * 40_000)
    speeds = ["150K", "400K", "1M"]

    def slow(url: str, rate: str) -> str:
        sent = ["-T", "sent", "-X", "POST"]
        return run(
            "curl", "-sS", "--limit-rate", rate, *sent, "-o", rate, "-w", "%{http_code}", url, cwd=tmp_path
        )

    def verdict(served: Served) -> Any:
        url = f"{served.url}/small/echo"
        with ThreadPoolExecutor(len(speeds)) as threads:
            running = [threads.submit(slow, url, rate) for rate in speeds]
            fast = httpx.post(url, content=b"fast\n").text
            codes = [each.result() for each in running]
        return (
            fast,
            codes,
            [(tmp_path / rate).read_bytes() == (tmp_path / "sent").read_bytes() for rate in speeds],
        )

    assert same(pair, verdict) == ("fast\n", ["200"] * 3, [True] * 3)


# Those that vanish

HOST = "Host: bus.example"
BODY = b"".join(b"[%d, 1]\n" % number for number in range(60_000))
CHUNKS = b"".join(
    b"%x\r\n%s\r\n" % (len(part), part)
    for part in (BODY[start : start + 20_000] for start in range(0, len(BODY), 20_000))
)


def request(line: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([f"{line} HTTP/1.1", HOST, *headers, "", ""]).encode() + body


UPGRADE = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
KINDS = {
    "a download": request("GET /small/endless"),
    "a slow download": request("GET /small/endless?pause=0.05"),
    "events": request("GET /small/events"),
    "an upload": request("POST /small/echo", f"Content-Length: {len(BODY)}", body=BODY),
    "an upload that is too short": request("POST /small/sums", f"Content-Length: {len(BODY) + 9}", body=BODY),
    "an upload in chunks": request("POST /small/sums", "Transfer-Encoding: chunked", body=CHUNKS + b"0\r\n\r\n"),
    "an upload in chunks that goes on": request("POST /small/echo", "Transfer-Encoding: chunked", body=CHUNKS),
    "a file": request("PUT /dav/vanishing", f"Content-Length: {len(BODY)}", body=BODY),
    "an object": request("PUT /vanishing/object", f"Content-Length: {len(BODY)}", body=BODY),
    "a pack": request(
        "POST /git/both.git/git-upload-pack", "Content-Type: application/x-git-upload-pack-request",
        "Transfer-Encoding: chunked", body=CHUNKS,
    ),
    "a poll": request("GET /chat/socket.io/?EIO=4&transport=polling"),
    "a WebSocket": request(
        "GET /chat/socket.io/?EIO=4&transport=websocket", *UPGRADE,
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", body=b"\x81\x82\x00\x00\x00\x0040",
    ),
}  # fmt: skip
"""What is sent; the client is gone after some bytes of it, or of the answer."""

POINTS = 6


@pytest.mark.parametrize("kind", KINDS)
def test_clients_that_vanish(pair: Both, kind: str) -> None:
    """At random bytes, with a reset, a FIN, or half a FIN and silence; all at the same time."""
    data = KINDS[kind]
    chosen = random.Random(kind)
    head = data.index(b"\r\n\r\n") + 4
    points = [
        chosen.randrange(1, head),
        head,
        *(chosen.randrange(head, len(data) + 1) for _ in range(POINTS - 2)),
    ]
    ends = ["reset", "close", "half"]
    plans = [(point, 0, end) for point, end in zip(points, itertools.cycle(ends), strict=False)]
    plans += [(len(data), chosen.choice([1, 100, 10_000, 1_000_000]), end) for end in ends]

    for served in pair:
        address = urlsplit(served.url)
        with ThreadPoolExecutor(len(plans)) as threads:
            place = (address.hostname or "", address.port or 80)
            for done in [threads.submit(vanish, place, data, *plan) for plan in plans]:
                done.result()
        pair.at_rest()


def vanish(place: tuple[str, int], data: bytes, sent: int, received: int, end: str) -> None:
    """Send so much, take at most so much of what comes, and be gone."""
    with socket.create_connection(place, timeout=2) as sock:
        sender = threading.Thread(target=send, args=(sock, data[:sent]))
        sender.start()
        with suppress(OSError):  # the server is silent, or gone already
            while received > 0 and (part := sock.recv(min(received, 65536))):
                received -= len(part)
        sender.join(0.2)
        if end == "half":
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
                while received >= 0 and (part := sock.recv(65536)):
                    received -= len(part)
        if end == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CUT)
    sender.join()


def send(sock: socket.socket, data: bytes) -> None:
    with suppress(OSError):  # the server has had enough, or we are gone
        sock.sendall(data)


def test_nothing_was_logged_as_an_error(started: Both) -> None:
    """Last: of clients that went away, an agent makes no tracebacks of its own."""
    log = started.bus.program.log()
    own = re.findall(r'File ".*(?:flaskbus|flaskbus_agent)/(\w+)\.py"', log)
    assert not [module for module in own if module not in ("wsgi", "inbound")], log[-5000:]
