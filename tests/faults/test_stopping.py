"""Quiet, then stop: what becomes of responses whose gateway or agent is told to end."""

from __future__ import annotations

import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from flaskbus.keys import Keys
from tests.conftest import Broker
from tests.integration.fleet import MOUNT, Fleet, Program, eventually
from tests.integration.probe import Client
from tests.integration.test_gateway_process import make_certificate, trusting

APP = r'''
import os, pathlib, threading, time, wsgiref.validate
import flask

app = flask.Flask(__name__)
app.wsgi_app = wsgiref.validate.validator(app.wsgi_app)
here = pathlib.Path(__file__).parent


def waits(name):
    while not (here / name).exists():
        time.sleep(0.01)


def streamed(media_type, produce):
    """A response whose generator leaves a mark when it is closed."""
    def produced():
        try:
            yield from produce
        finally:
            (here / "closed").touch()
    return flask.Response(produced(), content_type=media_type)


def counted(pattern, pause=0.02):
    number = 0
    while True:
        number += 1
        yield pattern.replace("#", str(number)).encode()
        time.sleep(pause)


@app.get("/hello")
def hello():
    return str(os.getpid())


@app.route("/work", methods=["GET", "POST"])
def work():
    with (here / "runs").open("a") as runs:
        runs.write(f"{flask.request.method}\n")
    waits("go")
    return "done"


@app.get("/events")
def events():
    return streamed("text/event-stream", counted("id: #\r\ndata: #\r\n\r\n"))


@app.get("/quiet")
def quiet():
    def produce():
        yield b"data: 1\n\n"
        waits("go")
        yield b"data: 2\n\n"
    return streamed("text/event-stream", produce())


@app.get("/halves")
def halves():
    """Half an event, and the other half with half of the next."""
    def produce():
        yield b"data: 1\n\ndata: 2"
        waits("go")
        yield b"\n\ndata: 3\ndata"
        time.sleep(0.1)
        yield b": 3"
        waits("never")
    return streamed("text/event-stream", produce())


@app.get("/lines")
def lines():
    return streamed("application/x-ndjson", counted('{"number": #}\n'))


@app.get("/sequence")
def sequence():
    return streamed("application/json-seq", counted('\x1e{"number":\n#}\n'))


@app.get("/ticks")
def ticks():
    return streamed("text/plain", counted("#\n\n"))


@app.get("/finite")
def finite():
    def produce():
        for number in range(10):
            yield b"data: %d\n\n" % number
            time.sleep(0.05)
    return streamed("text/event-stream", produce())


@app.get("/flood")
def flood():
    """More than a client that takes nothing lets us send."""
    return streamed("text/event-stream", counted("data: #" + "x" * 100_000 + "\n\n", 0))
'''

GRACE = 2.0
"""``graceful_timeout`` of both; its second half is for event streams to end in."""

SLACK = 3.0
"""Seconds that a machine with much else to do may add."""

OPTIONS = ("--graceful-timeout", str(GRACE))


class Stage(Fleet):
    """One gateway and one agent with the app above."""

    def __init__(self, directory: Path, url: str) -> None:
        super().__init__(directory, url)
        (directory / "stopping.py").write_text(APP)

    def raise_curtain(self, *agent_options: str, gateway_options: tuple[str, ...] = ()) -> None:
        self.front, self.url_ = self.gateway(*OPTIONS, *gateway_options)
        self.back = self.serve("one", *agent_options)
        self.await_route()

    def serve(self, name: str, *options: str) -> Program:
        agent = self.start(name, "flaskbus_agent", "stopping:app=/fleet", *OPTIONS, *options)
        eventually(lambda: self.ready(agent) or agent.process.poll() is not None, f"agent {name}")
        assert agent.process.poll() is None, agent.log()
        return agent

    def await_route(self) -> None:
        eventually(lambda: httpx.get(f"{self.url_}/fleet/hello").status_code == 200, "the mount is known")

    def of(self, role: str) -> Program:
        return {"gateway": self.front, "agent": self.back}[role]

    @contextmanager
    def open(self, path: str, mount: str = "fleet") -> Iterator[Response]:
        host, _, port = self.url_.removeprefix("http://").partition(":")
        with Client(socket.create_connection((host, int(port)), 30)) as client:
            client.send(f"GET /{mount}{path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
            yield Response(client)

    @contextmanager
    def open_later(
        self, path: str, method: str = "GET", mount: str = "fleet"
    ) -> Iterator[Callable[[], bytes]]:
        """A request whose answer is read when it is called for: the bytes of it until the connection ends."""
        host, _, port = self.url_.removeprefix("http://").partition(":")
        with Client(socket.create_connection((host, int(port)), 30)) as client:
            close = "Connection: close\r\n"
            client.send(f"{method} /{mount}{path} HTTP/1.1\r\nHost: test\r\n{close}\r\n".encode())
            yield client.rest

    def queue_length(self, mount: str = MOUNT.key) -> int:
        client: Any = self.registry.client
        return int(client.xlen(Keys().of(mount).requests))

    def touch(self, name: str) -> None:
        (self.directory / name).touch()

    def marked(self, name: str) -> bool:
        return (self.directory / name).exists()


class Response:
    """A chunked response, read as it comes."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.head = client.read_until(b"\r\n\r\n").decode("latin-1")
        assert self.head.startswith("HTTP/1.1 200 "), self.head
        assert "transfer-encoding: chunked" in self.head.lower()
        self.body = b""
        self.complete = False
        """Whether the last chunk, the empty one, has come."""

    def read(self) -> bool:
        """The next chunk; whether there was one."""
        try:
            size = int(self.client.read_until(b"\r\n"), 16)
            data = self.client.read_exactly(size + 2)
        except (AssertionError, ConnectionError):
            return False
        self.body += data[:-2]
        self.complete = not size
        return bool(size)

    def read_for(self, text: bytes) -> None:
        while text not in self.body:
            assert self.read(), f"it ended after {self.body!r}"

    def read_all(self) -> bytes:
        while self.read():
            pass
        return self.body


@pytest.fixture
def stage(broker: Broker, tmp_path: Path) -> Iterator[Stage]:
    with Stage(tmp_path, broker.url) as stage:
        yield stage


def seen_by(later: Callable[[], bytes]) -> tuple[int, bytes]:
    """Status and body."""
    head, _, body = later().partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def ends(program: Program) -> None:
    assert program.process.wait(GRACE + SLACK + 2) == 0, program.log()


def stops(stage: Stage, role: str) -> float:
    """Tell one of the two to stop; when that was (monotonic seconds)."""
    stage.of(role).signal(signal.SIGTERM)
    return time.monotonic()


ROLES = pytest.mark.parametrize("role", ["gateway", "agent"])


# Endless ones


@ROLES
@pytest.mark.parametrize(
    ("path", "whole"),
    [
        ("/events", rb"(id: \d+\r\ndata: \d+\r\n\r\n)+"),
        pytest.param("/lines", rb'(\{"number": \d+\}\n)+', marks=pytest.mark.slow),
        pytest.param("/sequence", rb'(\x1e\{"number":\n\d+\}\n)+', marks=pytest.mark.slow),
    ],
)
def test_an_endless_stream_ends_at_a_boundary_after_the_grace(
    stage: Stage, role: str, path: str, whole: bytes
) -> None:
    stage.raise_curtain()
    with stage.open(path) as response:
        response.read()
        told = stops(stage, role)
        response.read_all()
        assert time.monotonic() - told > GRACE / 2
    assert response.complete
    assert re.fullmatch(whole, response.body)
    eventually(lambda: stage.marked("closed"), "the generator is closed")
    ends(stage.of(role))
    assert "1 event streams end at their next event boundary" in stage.of(role).log()
    assert "cut off" not in stage.of(role).log()
    stage.at_rest()


@ROLES
def test_a_stream_that_waits_for_its_next_event_ends_without_it(stage: Stage, role: str) -> None:
    """And whoever blocks in the app's code is waited for no longer than the grace."""
    stage.raise_curtain()
    with stage.open("/quiet") as response:
        response.read()
        stops(stage, role)
        assert response.read_all() == b"data: 1\n\n"
    assert response.complete
    ends(stage.of(role))
    assert "cut off" not in stage.of(role).log()
    stage.at_rest()


@ROLES
def test_half_an_event_is_waited_for(stage: Stage, role: str) -> None:
    stage.raise_curtain()
    with stage.open("/halves") as response:
        response.read_for(b"data: 2")
        stops(stage, role)
        eventually(lambda: "next event boundary" in stage.of(role).log(), "it is time to end")
        stage.touch("go")
        assert response.read_all() == b"data: 1\n\ndata: 2\n\n"
    assert response.complete
    ends(stage.of(role))
    eventually(lambda: stage.marked("closed"), "the generator is closed")
    stage.at_rest()


@ROLES
@pytest.mark.parametrize("path", ["/halves", "/ticks"])
def test_what_has_no_boundary_in_time_is_cut_and_does_not_look_complete(
    stage: Stage, role: str, path: str
) -> None:
    stage.raise_curtain()
    with stage.open(path) as response:
        response.read()
        stops(stage, role)
        assert response.read_all()
    assert not response.complete
    ends(stage.of(role))
    assert "cut off" in stage.of(role).log()
    stage.at_rest()


@ROLES
def test_a_finite_stream_is_finished(stage: Stage, role: str) -> None:
    stage.raise_curtain()
    with stage.open("/finite") as response:
        response.read()
        stops(stage, role)
        assert response.read_all() == b"".join(b"data: %d\n\n" % number for number in range(10))
    assert response.complete
    ends(stage.of(role))
    assert "event boundary" not in stage.of(role).log()
    stage.at_rest()


def test_http2_streams_end_with_end_stream(stage: Stage, tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    stage.front, url = stage.gateway(*OPTIONS, "--certfile", str(cert), "--keyfile", str(key), "--http2")
    stage.back = stage.serve("one")
    with httpx.Client(http2=True, verify=trusting(cert), timeout=20) as client:
        url = url.replace("http:", "https:")
        eventually(lambda: client.get(f"{url}/fleet/hello").status_code == 200, "the mount is known")
        with client.stream("GET", f"{url}/fleet/events") as response:
            assert response.http_version == "HTTP/2"
            pieces = response.iter_raw()
            body = next(pieces)
            stops(stage, "gateway")
            # A stream that is reset, or a connection that breaks, is an error here.
            body += b"".join(pieces)
        assert re.fullmatch(rb"(id: \d+\r\ndata: \d+\r\n\r\n)+", body)
    ends(stage.front)
    stage.at_rest()


# Agents


@pytest.mark.slow
@pytest.mark.parametrize("how", ["reload", "max_requests"])
def test_an_open_stream_does_not_hold_up_the_next_worker(stage: Stage, how: str) -> None:
    grace = 3 * GRACE
    limit = ["--max-requests", "20"] if how == "max_requests" else []
    stage.raise_curtain("--graceful-timeout", str(grace), *limit)
    old = stage.ready(stage.back)
    with stage.open("/events") as response:
        response.read()
        if how == "reload":
            stage.back.signal(signal.SIGHUP)
        told = time.monotonic()
        while how == "max_requests" and stage.ready(stage.back) == old:
            assert httpx.get(f"{stage.url_}/fleet/hello").status_code == 200
        eventually(lambda: set(stage.ready(stage.back)) - {*old}, "another worker is ready")
        assert int(httpx.get(f"{stage.url_}/fleet/hello").text) not in old
        assert not stage.marked("closed")
        response.read_all()
        assert time.monotonic() - told > grace / 2
    assert response.complete
    assert response.body.endswith(b"\r\n\r\n")
    eventually(lambda: stage.marked("closed"), "the generator is closed")
    eventually(lambda: not {*old} & {*stage.back.workers()}, "the old worker is gone")
    stage.back.end()
    stage.at_rest()


@pytest.mark.slow
def test_a_stream_may_wait_for_its_next_event_longer_than_kill_after(stage: Stage) -> None:
    stage.raise_curtain("--kill-after", "1", "--threads", "2")
    old = stage.ready(stage.back)
    with stage.open("/quiet") as response:
        response.read()
        read = time.monotonic()
        # Something else is overdue: the worker is replaced, and the stream ends as at any other stop.
        eventually(lambda: time.monotonic() - read > 2, "twice as long")
        assert stage.ready(stage.back) == old
        with stage.open_later("/work"):
            assert response.read_all() == b"data: 1\n\n"
            assert response.complete
            eventually(lambda: {*stage.ready(stage.back)} - {*old}, "another worker is ready")
            eventually(lambda: not {*old} & {*stage.back.workers()}, "the old worker is gone")
            stage.touch("go")
    assert "/work) runs for more than 1 s" in stage.back.log()
    assert "/quiet) runs for more than" not in stage.back.log()
    stage.back.end()
    stage.at_rest()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGQUIT])
def test_a_quick_stop_of_an_agent_leaves_nobody_waiting(stage: Stage, sign: signal.Signals) -> None:
    stage.raise_curtain()
    with stage.open("/events") as response, stage.open_later("/work", "POST") as posted:
        response.read()
        eventually(lambda: stage.marked("runs"), "the app runs")
        told = time.monotonic()
        stage.back.signal(sign)
        assert b" 502 " in posted()
        response.read_all()
        assert not response.complete
        assert time.monotonic() - told < GRACE / 2 + SLACK
    assert stage.back.process.wait(SLACK) == 0
    assert not stage.records()
    stage.at_rest()


# Gateways


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGQUIT])
def test_a_quick_stop_of_a_gateway_withdraws_what_nobody_took(stage: Stage, sign: signal.Signals) -> None:
    stage.raise_curtain("--threads", "1")
    with stage.open_later("/work") as running, stage.open_later("/work", "POST") as queued:
        eventually(lambda: stage.marked("runs"), "the app runs")
        eventually(lambda: stage.queue_length() == 2, "the other waits")
        stage.front.signal(sign)
        assert running() == queued() == b""
    assert stage.front.process.wait(SLACK) == 0
    eventually(lambda: stage.queue_length() == 0, "both are withdrawn")
    stage.touch("go")
    stage.back.end()
    assert (stage.directory / "runs").read_text() == "GET\n"
    stage.at_rest()


def test_connections_without_a_request_do_not_delay_a_gateway(stage: Stage) -> None:
    """Silent ones and idle ones by a second, one with half a header by another, in which it can read its 408."""
    stage.raise_curtain(gateway_options=("--graceful-timeout", "20"))
    address = ("127.0.0.1", int(stage.url_.rpartition(":")[2]))
    with (
        Client(socket.create_connection(address)) as silent,
        Client(socket.create_connection(address)) as idle,
        Client(socket.create_connection(address)) as half,
    ):
        assert idle.request("/fleet/hello").status == 200
        half.send(b"GET /fleet/hello HTTP/1.1\r\nHo")
        told = stops(stage, "gateway")
        assert half.answer().status == 408
        assert silent.rest() == idle.rest() == b""
        assert stage.front.process.wait(30) == 0
        assert time.monotonic() - told < 2 + SLACK
    assert "cut off" not in stage.front.log()


def test_a_client_that_takes_nothing_delays_a_gateway_by_the_grace_at_most(stage: Stage) -> None:
    stage.raise_curtain()
    with stage.open("/flood") as response:
        response.read()
        ends_by = stops(stage, "gateway") + GRACE + SLACK
        assert stage.front.process.wait(30) == 0
        assert time.monotonic() < ends_by + 2
        response.read_all()
        assert not response.complete
    eventually(lambda: stage.marked("closed"), "the generator is closed")
    stage.at_rest()
