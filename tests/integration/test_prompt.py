"""Plain requests take a short way through the gateway. Nobody may see that, but by the time that it takes."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import pytest

from flaskbus import embedded
from tests.conftest import free_port
from tests.integration.fleet import Fleet, Program, eventually, whole_lines

REPOSITORY = Path(__file__).parents[2]

APP = """
import os, time
from flask import Flask, Response, jsonify, request

app = Flask(__name__)
ledger = os.open("ran", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

@app.route("/<path:rest>", methods=["GET", "POST", "PUT", "OPTIONS"])
def show(rest):
    seen = {name: value for name, value in request.environ.items() if isinstance(value, str)}
    for name in ("REMOTE_PORT", "SERVER_PORT", "HTTP_HOST", "flaskbus.request_id"):
        seen.pop(name, None)
    return jsonify(environ=seen, body=request.get_data(as_text=True))

@app.get("/sleep/<float:seconds>/<token>")
def sleep(seconds, token):
    os.write(ledger, f"{token}\\n".encode())
    time.sleep(seconds)
    return token

@app.get("/large/<int:size>")
def large(size):
    return bytes(size)

@app.get("/parts")
def parts():
    return Response((part for part in ("a", "b", "c")), mimetype="text/plain")

@app.get("/headers")
def headers():
    answer = Response("x", status=418)
    answer.headers["Server"] = "mine"
    answer.headers["Date"] = "Thu, 01 Jan 1970 00:00:00 GMT"
    answer.headers.add("Set-Cookie", "a=1")
    answer.headers.add("Set-Cookie", "b=2")
    return answer

@app.get("/status/<int:status>")
def status(status):
    return Response(status=status)

@app.get("/raises")
def raises():
    raise RuntimeError
"""

SET = "--set=flaskbus_gateway.app:Gateway._accept=0"
"""A gateway that cannot do it the other way."""


def only_prompt(fleet: Fleet) -> tuple[str, int]:
    port = free_port()
    gateway = Program(
        fleet.directory / "only-prompt.log", "tests.faults.points", SET, "flaskbus_gateway", "--port", str(port),
        FLASKBUS_REDIS_URL=fleet.url, PYTHONPATH=f"{os.environ.get('PYTHONPATH', '')}:{REPOSITORY}",
    )  # fmt: skip
    fleet.programs.append(gateway)
    eventually(lambda: "listening on" in gateway.log(), "gateway")
    return "127.0.0.1", port


def logging(fleet: Fleet) -> tuple[str, int]:
    """A gateway that keeps an access log, and therefore goes the other way."""
    _, url = fleet.gateway("--access-log", str(fleet.directory / "access.log"))
    return address(url)


def address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port


def agent(fleet: Fleet) -> Program:
    started = fleet.start("agent", "flaskbus_agent", "shown:app", "--prefix", "/a", "--threads", "4")
    eventually(lambda: "is ready" in started.log(), "agent")
    return started


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    directory = tmp_path_factory.mktemp("prompt")
    (directory / "shown.py").write_text(APP)
    with embedded.start() as broker, Fleet(directory, broker.url) as fleet:
        agent(fleet)
        yield fleet


@pytest.fixture(scope="module")
def places(fleet: Fleet) -> dict[str, tuple[str, int]]:
    _, url = fleet.gateway()
    found = {"both": address(url), "prompt": only_prompt(fleet), "other": logging(fleet)}
    for each in found.values():
        serves(each)
    return found


def serves(to: tuple[str, int]) -> None:
    eventually(lambda: ask(to, get("/a/warm"))[0] == 200, "served")


def get(path: str, *lines: str, method: str = "GET", body: str = "") -> bytes:
    head = [f"{method} {path} HTTP/1.1", "Host: test", *lines]
    head += [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([*head, "", body]).encode()


class Client:
    """One connection, and what came on it."""

    def __init__(self, to: tuple[str, int]) -> None:
        self.sock = socket.create_connection(to, 30)
        self.came = self.sock.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.came.close()
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def answer(self) -> tuple[int, list[bytes], bytes]:
        """Status, header lines, body."""
        status = int(self.came.readline().split()[1])
        lines = []
        while line := self.came.readline().rstrip(b"\r\n"):
            lines.append(line)
        body = b""
        if b"transfer-encoding: chunked" in lines:
            while size := int(self.came.readline(), 16):
                body += self.came.read(size)
                self.came.readline()
            self.came.readline()
        else:
            length = next(
                (int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:")), 0
            )
            body = self.came.read(length)
        return status, lines, body

    def ask(self, data: bytes) -> tuple[int, list[bytes], bytes]:
        self.send(data)
        return self.answer()


def ask(to: tuple[str, int], data: bytes) -> tuple[int, list[bytes], bytes]:
    with Client(to) as client:
        return client.ask(data)


def test_plain_requests_and_no_others_go_this_way(places: dict[str, tuple[str, int]]) -> None:
    with Client(places["prompt"]) as client:
        for number in range(3):
            assert client.ask(get(f"/a/{number}"))[0] == 200
            assert client.ask(get(f"/a/{number}", method="POST", body="hello"))[0] == 200
        assert client.ask(get("/a/large/100"))[2] == bytes(100)
        assert client.ask(get("/a/large/1000000"))[2] == bytes(1_000_000)
        assert client.ask(get("/a/1", "Connection: close"))[0] == 500


SAME = {
    "a path": get("/a/path"),
    "a query": get("/a/path?a=b&c=%20d"),
    "escapes": get("/a/p%C3%A4th%2B"),
    "headers": get(
        "/a/path", "X-A: b", "x-a: c", "Cookie: a=b", "Accept: */*", "Empty:", "Spaces: \t a b \t"
    ),
    "bytes that are not ASCII": get("/a/path", "X-A: b").replace(b"X-A: b", b"X-A: caf\xc3\xa9"),
    "names with an underscore": get("/a/path", "X_A: b"),
    "forwarding headers of a stranger": get(
        "/a/path", "X-Forwarded-For: 10.0.0.1", "Forwarded: for=10.0.0.1"
    ),
    "a trace context": get("/a/path", "Traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    "hop-by-hop headers": get(
        "/a/path", "Connection: keep-alive", "Keep-Alive: 3", "TE: trailers", "Proxy: a"
    ),
    "a body": get("/a/path", "Content-Type: text/plain", method="POST", body="hello"),
    "a body of nothing": get("/a/path", "Content-Length: 0", method="POST"),
    "another method": get("/a/path", method="OPTIONS"),
    "a method that the app does not take": get("/a/path", method="DELETE"),
    "no mount": get("/b/path"),
    "an ambiguous path": get("/a/%2e%2e/path"),
    "no host": b"GET /a/path HTTP/1.1\r\nX-A: b\r\n\r\n",
    "HEAD": get("/a/path", method="HEAD"),
    "a response in parts": get("/a/parts"),
    "headers of the app's own": get("/a/headers"),
    "an error in the app": get("/a/raises"),
    "no content": get("/a/status/204"),
    "not modified": get("/a/status/304"),
    "a status that nobody knows": get("/a/status/299"),
    "too large a header": get("/a/path", "X-A: " + "a" * 9000),
}


@pytest.mark.parametrize("case", SAME)
def test_the_same_comes_of_it(places: dict[str, tuple[str, int]], case: str) -> None:
    """Twice on one connection, and to the byte, but for what says when and which."""

    def seen(to: tuple[str, int]) -> list[object]:
        with Client(to) as client:
            found: list[object] = []
            for _ in range(2):
                if case == "HEAD":
                    client.send(SAME[case] + get("/a/status/200"))
                    lines = [client.came.readline() for _ in range(5)]
                    return [line for line in lines if not line.startswith(b"Date: ")]
                status, lines, body = client.ask(SAME[case])
                kept = sorted(line for line in lines if not line.startswith(b"Date: ") or b"1970" in line)
                found.append((status, kept, re.sub(rb'"request_id": "[^"]*"', b"", body)))
                if b"Connection: close" in lines:
                    break
            return found

    assert seen(places["both"]) == seen(places["other"])


def test_one_that_takes_long(places: dict[str, tuple[str, int]]) -> None:
    with Client(places["both"]) as client:
        for _ in range(2):
            assert client.ask(get("/a/sleep/0.3/long"))[2] == b"long"
            assert client.ask(get("/a/large/10"))[2] == bytes(10)


@pytest.mark.parametrize("pause", [0.0, 0.02])
def test_requests_before_the_answer(places: dict[str, tuple[str, int]], pause: float) -> None:
    """One after the other in one packet, in several, and cut in two."""
    with Client(places["both"]) as client:
        for _ in range(10):
            client.send(get("/a/sleep/0.05/first"))
            time.sleep(pause)
            client.send(get("/a/large/3") + get("/a/sleep/0.0/th")[:20])
            time.sleep(pause)
            client.send(get("/a/sleep/0.0/th")[20:])
            assert [client.answer()[2] for _ in range(3)] == [b"first", bytes(3), b"th"]


@pytest.mark.parametrize("wait", [0.0, 0.01, 0.2])
def test_a_client_that_leaves_before_its_work_starts(
    fleet: Fleet, places: dict[str, tuple[str, int]], wait: float
) -> None:
    """All threads are busy meanwhile, so it waits in the queue."""
    before = ran(fleet).count("busy")
    busy = [Client(places["both"]) for _ in range(4)]
    for client in busy:
        client.send(get("/a/sleep/0.6/busy"))
    eventually(lambda: ran(fleet).count("busy") == before + 4, "all are busy")
    token = f"left-{wait}"
    with Client(places["both"]) as client:
        client.send(get(f"/a/sleep/0.0/{token}"))
        time.sleep(wait)
    for client in busy:
        assert client.answer()[2] == b"busy"
        client.came.close()
        client.sock.close()
    assert ask(places["both"], get("/a/large/1"))[0] == 200
    assert token not in ran(fleet)
    fleet.at_rest()


def ran(fleet: Fleet) -> list[str]:
    return whole_lines(fleet.directory / "ran")


def test_a_gateway_that_stops_answers_and_says_goodbye(fleet: Fleet) -> None:
    gateway, url = fleet.gateway()
    to = address(url)
    eventually(lambda: ask(to, get("/a/warm"))[0] == 200, "served")
    with Client(to) as idle, Client(to) as client:
        idle.ask(get("/a/warm"))
        client.ask(get("/a/warm"))
        client.send(get("/a/sleep/0.09/last"))
        eventually(lambda: "last" in ran(fleet), "begun")
        gateway.signal(signal.SIGTERM)
        status, lines, body = client.answer()
        assert (status, body) == (200, b"last")
        assert b"Connection: close" in lines
        assert client.came.read() == b""
        assert idle.came.read() == b""
    assert gateway.process.wait(20) == 0


def test_an_idle_connection_is_closed(fleet: Fleet) -> None:
    _, url = fleet.gateway("--keepalive", "1")
    to = address(url)
    eventually(lambda: ask(to, get("/a/warm"))[0] == 200, "served")
    with Client(to) as client:
        for _ in range(3):
            assert client.ask(get("/a/warm"))[0] == 200
        began = time.monotonic()
        assert client.came.read() == b""
        assert 0.5 < time.monotonic() - began < 20
