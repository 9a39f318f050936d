"""Everything is restarted, one process after the other, under all kinds of load: no request fails.

Short requests, finite streams whose content is checked, and endless streams of events whose clients come back
with ``Last-Event-ID``. A client turns to the other gateway where its connection is refused, and only then.
"""

from __future__ import annotations

import itertools
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self, TypeVar

import httpx
import pytest

from tests.conftest import Broker
from tests.faults.test_stopping import Response
from tests.integration.fleet import APP, Fleet, Load, Program, Seen, eventually, loads, refused
from tests.integration.probe import Answer, Client
from tests.integration.procs import alive

STREAMS = r'''

@app.get("/finite/<token>")
def finite(token):
    """About two seconds."""
    def produce():
        for number in range(100):
            yield f"{token} {number}\n".encode() * 20
            time.sleep(0.02)
    return flask.Response(produce(), content_type="text/plain")


@app.get("/events")
def events():
    """Goes on after the event that the client had last; an event comes in two pieces."""
    last = int(flask.request.headers["Last-Event-ID"])
    def produce():
        number = last
        while True:
            number += 1
            yield f"id: {number}\ndata: {number}".encode()
            yield f" {number}\n\n".encode()
            time.sleep(0.03)
    return flask.Response(produce(), content_type="text/event-stream")
'''

T = TypeVar("T")

GRACE = 4.0
"""``graceful_timeout`` of gateways and agents: longer than a finite stream, shorter than an endless one."""

OPTIONS = ("--graceful-timeout", str(GRACE))


class Named(Load):
    """A load whose tokens are not those of another."""

    def _request(self, client: httpx.Client, token: str, method: str, first: int) -> Seen:
        return super()._request(client, f"{'kept' if self.keep else 'fresh'}-{token}", method, first)


class Clients:
    """Threads that do one thing again and again, until the ``with`` block ends or it fails."""

    def __init__(self, urls: Sequence[str], count: int) -> None:
        self.urls = urls
        self.failures: list[str] = []
        self.done = 0
        """How often it was done."""
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(count)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads)

    def _run(self, number: int) -> None:
        urls = itertools.islice(itertools.cycle(self.urls), number, None)
        for serial in itertools.count():
            if self._end.is_set():
                return
            try:
                self.act(f"{type(self).__name__}-{number}-{serial}", number, urls)
                self.done += 1
            except (AssertionError, httpx.TransportError, OSError) as error:
                self.failures.append(f"{number}-{serial}: {error!r}")
                return

    def act(self, token: str, number: int, urls: Iterator[str]) -> None:
        raise NotImplementedError

    def more(self, count: int) -> None:
        wanted = self.done + count
        eventually(lambda: self.done >= wanted or self.failures, f"{count} more of {type(self).__name__}")
        assert not self.failures


class Fresh(Clients):
    """Short requests, each over a connection of its own."""

    def act(self, token: str, number: int, urls: Iterator[str]) -> None:
        with ask(urls, connected) as client:
            answered(client, token)


class Kept(Clients):
    """Short requests over connections that are kept until the gateway says that it closes them."""

    def __init__(self, urls: Sequence[str], count: int) -> None:
        super().__init__(urls, count)
        self._kept: dict[int, Client] = {}

    def act(self, token: str, number: int, urls: Iterator[str]) -> None:
        client = self._kept.pop(number, None) or ask(urls, connected)
        if answered(client, token).headers.get("connection") == "close" or self._end.is_set():
            client.sock.close()
        else:
            self._kept[number] = client

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        for client in self._kept.values():
            client.sock.close()


class Finite(Clients):
    """Finite streams: everything of each must come."""

    def act(self, token: str, number: int, urls: Iterator[str]) -> None:
        answer = ask(urls, lambda url: httpx.get(f"{url}/fleet/finite/{token}", timeout=50))
        assert answer.status_code == 200, answer.text
        assert answer.text == "".join(f"{token} {line}\n" * 20 for line in range(100))


class Events(Clients):
    """Endless ones: each ends between two events, in good order, and the next goes on where it ended."""

    def __init__(self, urls: Sequence[str], count: int) -> None:
        super().__init__(urls, count)
        self._last = dict.fromkeys(range(count), 0)

    def act(self, token: str, number: int, urls: Iterator[str]) -> None:
        last = self._last[number]
        with ask(urls, connected) as client:
            client.send(f"GET /fleet/events HTTP/1.1\r\nHost: test\r\nLast-Event-ID: {last}\r\n\r\n".encode())
            response = Response(client)
            while response.read():
                if self._end.is_set():
                    return
        assert response.complete, f"it was broken off after {response.body[-80:]!r}"
        assert re.fullmatch(rb"(id: (\d+)\ndata: \2 \2\n\n)*", response.body), response.body[-80:]
        for event in re.findall(rb"id: (\d+)", response.body):
            last += 1
            assert int(event) == last
        self._last[number] = last


def answered(client: Client, token: str) -> Answer:
    answer = client.request(f"/fleet/{token}", "POST")
    assert answer.status == 200
    assert answer.body.startswith(token.encode() + b" ")
    return answer


def connected(url: str) -> Client:
    host, _, port = url.removeprefix("http://").partition(":")
    return Client(socket.create_connection((host, int(port)), 30))


def ask(urls: Iterator[str], act: Callable[[str], T]) -> T:
    """Do something with one gateway, or where nothing listens with the next."""
    end = time.monotonic() + 30
    while True:
        try:
            return act(next(urls))
        except (httpx.ConnectError, ConnectionError) as error:
            if not refused(error) or time.monotonic() > end:
                raise
            time.sleep(0.05)


class Rolling(Fleet):
    """Two gateways and two agents."""

    def __init__(self, directory: Path, url: str) -> None:
        super().__init__(directory, url)
        (directory / "ledgered.py").write_text(APP + STREAMS)
        self.gateways = [self.gateway(*OPTIONS) for _ in range(2)]
        self.agents = {name: self.agent(name, *OPTIONS) for name in ("a", "b")}
        self.urls = [url for _, url in self.gateways]

    def restart_gateway(self, place: int) -> None:
        gateway, url = self.gateways[place]
        ended_well(gateway)
        self.gateways[place] = self.gateway(*OPTIONS, port=int(url.rpartition(":")[2]))

    def restart_agent(self, name: str) -> None:
        ended_well(self.agents[name])
        self.agents[name] = self.agent(name, *OPTIONS)

    def reload(self, program: Program) -> None:
        old = program.workers()
        program.signal(signal.SIGHUP)
        eventually(lambda: not alive(old), "the old workers are gone")


def ended_well(program: Program) -> None:
    program.end()
    assert "cut off" not in program.log(), program.log()


def test_a_gateway_is_restarted_again_and_again(broker: Broker, tmp_path: Path) -> None:
    """Whoever connected before the end is answered, and whoever keeps a connection is told of it."""
    with Fleet(tmp_path, broker.url) as fleet:
        gateway, url = fleet.gateway()
        fleet.agent("one", "--threads", "8")
        with Kept([url], 6) as kept, Fresh([url], 6) as fresh:
            for _ in range(4):
                kept.more(50)
                fresh.more(50)
                ended_well(gateway)
                gateway, _ = fleet.gateway(port=int(url.rpartition(":")[2]))
        assert not kept.failures
        assert not fresh.failures
        fleet.at_rest()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_everything_is_restarted_in_turn_and_no_request_fails(broker: Broker, tmp_path: Path) -> None:
    with Rolling(tmp_path, broker.url) as fleet, ExitStack() as clients:
        kept, fresh = clients.enter_context(
            loads(
                Named(fleet.urls, threads=3, methods=("GET", "POST")),
                Named(fleet.urls, threads=3, methods=("GET", "POST"), keep=False),
            )
        )
        finite = clients.enter_context(Finite(fleet.urls, 3))
        events = clients.enter_context(Events(fleet.urls, 4))

        def go_on() -> None:
            kept.more(20)
            fresh.more(20)
            finite.more(2)

        go_on()
        for place in range(2):
            fleet.restart_gateway(place)
            go_on()
        for name in fleet.agents:
            fleet.restart_agent(name)
            go_on()
        for program in [*(gateway for gateway, _ in fleet.gateways), *fleet.agents.values()]:
            fleet.reload(program)
            go_on()
        clients.close()
        assert not finite.failures + events.failures
        assert events.done >= 8
        runs = fleet.runs()
        for load in (kept, fresh):
            assert not load.bad()
            load.judge(runs)
        fleet.at_rest()
