"""Uploads that travel while they are sent, beside the same app under gunicorn's threads."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from wsgiref.validate import validator

import flask
import httpx
import pytest

from flaskbus import embedded
from flaskbus.broker import connect
from flaskbus.signing import make_key
from flaskbus.testing import Bus, running_bus
from flaskbus.wire import MAX_BODY, MAX_CHUNK, MAX_INLINE
from tests.conftest import free_port
from tests.integration.fleet import eventually

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

pytestmark = pytest.mark.xdist_group("uploads")

BODY_TIMEOUT = 1.5
BODY_LIMIT = 8 * MAX_INLINE
WINDOW = 128 * 1024
READ = 256 * 1024
"""Bytes that one read of a connection brings at most."""
BIG = os.urandom(1 << 20)
TEXT = ("Content-Type", "text/plain")
CHUNKED = "Transfer-Encoding: chunked"

seen: list[str] = []
"""What the apps in this process saw."""
release = threading.Event()
"""Lets an app go on that waits."""


def uploads(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Several ways to deal with a body, by path."""
    body = environ["wsgi.input"]
    path = environ["PATH_INFO"]
    if path == "/digest":
        digest, length = hashlib.sha256(), 0
        try:
            while part := body.read(10_000):
                seen.append(f"part {len(part)}")
                digest.update(part)
                length += len(part)
        except OSError as error:
            seen.append(f"OSError after {length}: {error}")
            raise
        start_response("200 OK", [TEXT])
        return [f"{length} {digest.hexdigest()}".encode()]
    if path == "/echo":
        start_response("200 OK", [("Content-Type", "application/octet-stream")])
        return iter(lambda: body.read(2048), b"")
    if path == "/ignore":
        start_response("200 OK", [TEXT, ("Content-Length", "7")])
        return [b"ignored"]
    if path == "/paused":
        first = body.read(1)
        seen.append("paused")
        release.wait(30)
        start_response("200 OK", [TEXT])
        return [str(len(first + body.read())).encode()]
    start_response("200 OK", [TEXT])
    return endless()


def endless() -> Iterator[bytes]:
    try:
        while True:
            yield b"x" * 1000
            time.sleep(0.01)
    finally:
        seen.append("closed")


@pytest.fixture(scope="module")
def bus() -> Iterator[Bus]:
    with (
        embedded.start() as broker,
        running_bus(
            broker.url, body_timeout=BODY_TIMEOUT, body_limit=BODY_LIMIT, window=WINDOW, idle_timeout=4.0
        ) as started,
    ):
        yield started


@pytest.fixture(scope="module")
def mount(bus: Bus) -> Iterator[str]:
    with bus.mount(uploads, "/up", window=WINDOW) as url:
        yield url


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same app under gunicorn with threads."""
    port = free_port()
    module = f"{__name__}:uploads"
    with (tmp_path_factory.mktemp("direct") / "log").open("wb") as log:
        server = subprocess.Popen(
            [
                sys.executable, "-m", "gunicorn", "--worker-class=gthread", "--threads=8",
                f"--bind=127.0.0.1:{port}", module,
            ],
            cwd=Path(__file__).parents[2], stdout=log, stderr=log,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return httpx.post(f"{url}/ignore").status_code == 200
        except httpx.TransportError:
            return False

    try:
        eventually(answers, "gunicorn answers")
        yield url
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(autouse=True)
def nothing_is_left(bus: Bus) -> Iterator[None]:
    """After each test the broker has no entry and no list of any exchange."""
    seen.clear()
    release.clear()
    yield
    release.set()
    with connect(bus.broker_url) as client:

        def left() -> list[Any]:
            lists = [*client.scan_iter("*:reply:*"), *client.scan_iter("*:inbound:*")]
            return lists + [key for key in client.scan_iter("*:requests") if client.xlen(key)]

        eventually(lambda: not left(), "nothing is left on the broker", 10.0)


@contextmanager
def request(url: str, *lines: str, path: str = "", method: str = "POST") -> Iterator[socket.socket]:
    """A connection on which the header of a request was sent."""
    parts = urlsplit(url + path)
    with socket.create_connection((parts.hostname, parts.port), 20) as sock:
        head = [f"{method} {parts.path} HTTP/1.1", "Host: test", *lines, "", ""]
        sock.sendall("\r\n".join(head).encode())
        yield sock


def answer(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    response = http.client.HTTPResponse(sock, method="POST")
    with closing(response):
        response.begin()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def digest(data: bytes) -> bytes:
    return f"{len(data)} {hashlib.sha256(data).hexdigest()}".encode()


def both(mount: str, direct: str) -> list[str]:
    return [mount, direct]


@pytest.mark.parametrize("framing", [CHUNKED, f"Content-Length: {len(BIG)}"])
def test_the_app_sees_the_first_part_before_the_last_is_sent(mount: str, framing: str) -> None:
    with request(mount, framing, path="/digest") as sock:
        first, rest = BIG[:20_000], BIG[20_000:]
        sock.sendall(chunk(first) if framing == CHUNKED else first)
        eventually(lambda: seen == ["part 10000"] * 2, "the first part is read")
        sock.sendall(chunk(rest) + b"0\r\n\r\n" if framing == CHUNKED else rest)
        assert answer(sock)[::2] == (200, digest(BIG))


def test_both_directions_at_once(mount: str, direct: str) -> None:
    """Each part is sent after the one before it has come back."""
    for url in both(mount, direct):
        with request(url, CHUNKED, path="/echo") as sock:
            file = sock.makefile("rb")
            part = b"y" * 2048
            for number in range(50):
                sock.sendall(chunk(part))
                if number == 0:
                    assert file.readline().split()[1] == b"200"
                    while file.readline() != b"\r\n":
                        pass
                assert (file.readline(), file.read(2050)) == (b"800\r\n", part + b"\r\n"), (url, number)
            sock.sendall(b"0\r\n\r\n")
            assert file.readline() == b"0\r\n"


@pytest.mark.parametrize("size", [0, 1, MAX_INLINE - 1, MAX_INLINE, MAX_INLINE + 1, BODY_LIMIT])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_around_each_limit_are_whole(mount: str, size: int, chunked: bool) -> None:
    data = (BIG * (size // len(BIG) + 1))[:size]
    sent = (data[at : at + 50_000] for at in range(0, size, 50_000)) if chunked else data
    got = httpx.post(f"{mount}/digest", content=sent)
    assert got.content == digest(data)


@pytest.mark.parametrize("framing", ["stated", "chunked"])
def test_more_than_the_limit_is_413_and_nothing_is_queued(mount: str, bus: Bus, framing: str) -> None:
    if framing == "stated":
        with (
            connect(bus.broker_url) as client,
            request(mount, f"Content-Length: {BODY_LIMIT + 1}", path="/digest") as sock,
        ):
            status, headers, body = answer(sock)  # nothing of the body was sent
            assert not client.xlen("flaskbus:{/up}:requests")
        executed = "no"
    else:
        with request(mount, CHUNKED, path="/digest") as sock:
            for _ in range(BODY_LIMIT // len(BIG) + 1):
                sock.sendall(chunk(BIG))
            status, headers, body = answer(sock)
        executed = "unknown"  # the app had begun
        eventually(lambda: seen and seen[-1].startswith("OSError"), "the app's read fails")
    assert (status, headers["connection"]) == (413, "close")
    assert headers["content-type"] == "application/problem+json"
    assert f'"executed": "{executed}"'.encode() in body


def test_what_has_to_be_whole_has_a_limit_of_its_own(bus: Bus) -> None:
    with (
        running_bus(bus.broker_url) as roomy,
        roomy.mount(uploads, "/keyed", idempotency_keys=True) as url,
        request(url, f"Content-Length: {MAX_BODY + 1}", "Idempotency-Key: k", path="/digest") as sock,
    ):
        status, _, body = answer(sock)
        assert status == 413
        assert b"Idempotency-Key" in body
        assert httpx.post(f"{url}/digest", content=BIG, headers={"Idempotency-Key": "j"}).content == digest(
            BIG
        )


@pytest.mark.parametrize("sent", [0, 1000, MAX_INLINE + 100_000])
@pytest.mark.parametrize("framing", [CHUNKED, f"Content-Length: {len(BIG)}"])
def test_who_stops_sending_gets_408(mount: str, sent: int, framing: str) -> None:
    with request(mount, framing, path="/digest") as sock:
        if sent:
            sock.sendall(chunk(BIG[:sent]) if framing == CHUNKED else BIG[:sent])
        status, headers, body = answer(sock)
        assert status == 408
        assert headers["connection"] == "close"
        assert b'"executed": "unknown"' in body
    eventually(lambda: seen and seen[-1].startswith("OSError after"), "the app's read fails")


def test_408_is_for_the_client_whatever_the_app_makes_of_its_broken_read(bus: Bus) -> None:
    """Also an app that catches the error, and answers at once: its request was taken back before it was told."""
    with connect(bus.broker_url) as client:

        def forgive(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            try:
                environ["wsgi.input"].read()
            except OSError:
                waiting = [
                    entry[b"id"].decode() for _, entry in client.xrange("flaskbus:{/forgive}:requests")
                ]
                seen.append("too early" if environ["flaskbus.request_id"] in waiting else "forgiven")
            start_response("200 OK", [TEXT])
            return [b"never mind"]

        with bus.mount(forgive, "/forgive", threads=12) as url, ExitStack() as stack:
            socks = [stack.enter_context(request(url, CHUNKED)) for _ in range(12)]
            for sock in socks:
                sock.sendall(chunk(b"x"))
            assert [answer(sock)[0] for sock in socks] == [408] * len(socks)
            eventually(lambda: len(seen) == len(socks), "each app is told")
    assert set(seen) == {"forgiven"}


def test_who_stops_sending_after_the_head_of_the_answer(mount: str) -> None:
    """An app that reads on is told, and its answer breaks off; one that does not want the rest goes on."""
    with request(mount, CHUNKED, path="/echo") as sock:
        sock.sendall(chunk(b"x" * 2048))
        got = b"".join(iter(lambda: sock.recv(65536), b""))
        assert got.startswith(b"HTTP/1.1 200")
        assert not got.endswith(b"0\r\n\r\n")
    with request(mount, f"Content-Length: {len(BIG)}", path="/endless") as sock:
        end = time.monotonic() + 2 * BODY_TIMEOUT
        while time.monotonic() < end:
            assert sock.recv(65536)
        assert seen == []
    eventually(lambda: seen == ["closed"], "the end of its client is seen all the same", 10.0)


def test_a_small_body_that_does_not_come_never_reaches_the_app(mount: str) -> None:
    with request(mount, "Content-Length: 5000", path="/digest") as sock:
        sock.sendall(b"x" * 4999)
        status, _, body = answer(sock)
        assert status == 408
        assert b'"executed": "no"' in body
    assert seen == []


def test_a_slow_client_is_served_as_long_as_it_goes_on(mount: str) -> None:
    """It takes longer than the time that a silent one has, for each kind of body."""
    for framing, size in ((CHUNKED, 32_000), ("Content-Length: 32000", 32_000)):
        with request(mount, framing, path="/digest") as sock:
            data = BIG[:size]
            for at in range(0, size, 2000):
                part = data[at : at + 2000]
                sock.sendall(chunk(part) if framing == CHUNKED else part)
                time.sleep(BODY_TIMEOUT / 8)  # the pace of the client is what is tested
            if framing == CHUNKED:
                sock.sendall(b"0\r\n\r\n")
            assert answer(sock)[::2] == (200, digest(data)), framing


@pytest.mark.parametrize("size", [100, 40_000, 1 << 20])
def test_an_answer_to_a_body_that_nobody_reads(mount: str, direct: str, size: int) -> None:
    """The answer arrives, and a client that keeps its connection is served again, or told to close."""
    # gunicorn says keep-alive, and then closes the connection where more than 64 KiB were left.
    for url in both(mount, direct) if size < 65536 else [mount]:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=20)
        with closing(connection):
            for _ in range(3):
                connection.request("POST", f"{parts.path}/ignore", body=BIG[:size])
                got = connection.getresponse()
                assert (got.status, got.read()) == (200, b"ignored"), url


def test_a_client_that_goes_on_sending_sees_the_answer(mount: str) -> None:
    """It sends for longer than a lingering close takes, as a proxy does, and reads only then."""
    with request(mount, f"Content-Length: {BODY_LIMIT}", path="/ignore") as sock:
        for at in range(0, BODY_LIMIT, 50_000):
            sock.sendall(bytes(min(50_000, BODY_LIMIT - at)))
            time.sleep(0.1)
        assert answer(sock)[::2] == (200, b"ignored")


def test_a_lying_length_is_no_whole_body(mount: str) -> None:
    """Shorter than stated, and the connection is closed: the app's read fails."""
    with request(mount, f"Content-Length: {len(BIG)}", path="/digest") as sock:
        sock.sendall(BIG[: MAX_INLINE + 50_000])
        eventually(lambda: seen, "the app has begun")
    eventually(lambda: seen[-1].startswith("OSError"), "the app's read fails")


def test_more_than_the_stated_length_is_no_part_of_the_body(mount: str) -> None:
    with request(mount, f"Content-Length: {len(BIG)}", path="/digest") as sock:
        sock.sendall(BIG + b"GARBAGE\r\n\r\n")
        first, second = b"".join(iter(lambda: sock.recv(65536), b"")).split(b"HTTP/1.1 ")[1:]
        assert first.startswith(b"200 ")
        assert digest(BIG) in first
        assert second.startswith(b"400 ")


@pytest.mark.parametrize("bad", [b"xyz\r\n", b"-5\r\n", b"5\r\nhelloXX", b"\r\n\r\n"])
def test_a_bad_chunk_ends_the_upload(mount: str, bad: bytes) -> None:
    with request(mount, CHUNKED, path="/digest") as sock:
        sock.sendall(chunk(BIG[:100_000]))
        eventually(lambda: len(seen) == 10, "the app has begun")
        sock.sendall(bad)
        assert answer(sock)[0] == 400
    eventually(lambda: seen[-1].startswith("OSError"), "the app's read fails")


def test_chunks_without_a_last_one_are_no_whole_body(mount: str) -> None:
    with request(mount, CHUNKED, path="/digest") as sock:
        sock.sendall(chunk(BIG[:100_000]))
        eventually(lambda: len(seen) == 10, "the app has begun")
    eventually(lambda: seen[-1].startswith("OSError"), "the app's read fails")


def test_who_vanishes_while_the_upload_is_paused_ends_the_stream_of_its_answer(mount: str) -> None:
    with request(mount, f"Content-Length: {BODY_LIMIT}", path="/endless") as sock:
        sock.sendall(bytes(BODY_LIMIT // 2))
        assert sock.recv(12) == b"HTTP/1.1 200"
    eventually(lambda: seen == ["closed"], "the generator is closed", 10.0)


def test_an_app_that_pauses_loses_nothing(mount: str) -> None:
    """For longer than a client may: it is not the client who is slow."""
    with request(mount, f"Content-Length: {len(BIG)}", path="/paused") as sock:
        sock.sendall(BIG)
        eventually(lambda: seen == ["paused"], "the app pauses")
        threading.Timer(2 * BODY_TIMEOUT, release.set).start()
        assert answer(sock)[::2] == (200, str(len(BIG)).encode())


def test_expect_100_continue(mount: str) -> None:
    with request(mount, f"Content-Length: {len(BIG)}", "Expect: 100-continue", path="/digest") as sock:
        line = b""
        while not line.endswith(b"\r\n\r\n"):
            line += sock.recv(1)
        assert line.startswith(b"HTTP/1.1 100 ")
        sock.sendall(BIG)
        assert answer(sock)[::2] == (200, digest(BIG))
    with request(mount, f"Content-Length: {BODY_LIMIT + 1}", "Expect: 100-continue", path="/digest") as sock:
        assert sock.recv(12) == b"HTTP/1.1 413"


def test_what_is_compressed_stays_so(mount: str) -> None:
    """A bomb is not the gateway's to open."""
    bomb = gzip.compress(bytes(300 << 20), 9)
    assert MAX_INLINE < len(bomb) < BODY_LIMIT
    got = httpx.post(f"{mount}/digest", content=bomb, headers={"Content-Encoding": "gzip"})
    assert got.content == digest(bomb)


def test_signed_uploads(bus: Bus) -> None:
    secret = "a secret of at least thirty-two characters"
    with (
        running_bus(bus.broker_url, signing_secret=secret) as signing,
        signing.mount(uploads, "/signed", signing_key=make_key(secret, "flaskbus", "/signed")) as url,
    ):
        assert httpx.post(f"{url}/digest", content=BIG).content == digest(BIG)


# Slow clients

DRIPS = 4


@contextmanager
def drips(url: str) -> Iterator[list[socket.socket]]:
    """As many uploads as a small agent has threads, of which an app has the first part and waits for the next."""
    with ExitStack() as stack:
        socks = [stack.enter_context(request(url, CHUNKED, path="/digest")) for _ in range(DRIPS)]
        for sock in socks:
            sock.sendall(chunk(BIG[:10_000]))
        yield socks


def finish(socks: list[socket.socket]) -> None:
    for sock in socks:
        sock.sendall(chunk(b"y") + b"0\r\n\r\n")
    assert [answer(sock)[::2] for sock in socks] == [(200, digest(BIG[:10_000] + b"y"))] * len(socks)


def test_uploads_that_drip_do_not_stop_an_agent_of_as_many_threads(bus: Bus) -> None:
    with (
        running_bus(bus.broker_url) as patient,
        patient.mount(uploads, "/drip", threads=DRIPS) as url,
        drips(url) as socks,
    ):
        eventually(lambda: seen == ["part 10000"] * DRIPS, "every app has begun")
        for _ in range(20):
            assert httpx.post(f"{url}/ignore").content == b"ignored"
        finish(socks)
        for _ in range(DRIPS + 1):
            assert httpx.post(f"{url}/digest", content=BIG).content == digest(BIG)


def test_without_a_budget_for_streams_they_do(bus: Bus) -> None:
    """It is the budget that lets the others go on: what is beyond it keeps its thread."""
    with (
        running_bus(bus.broker_url) as patient,
        patient.mount(uploads, "/drip", threads=DRIPS, streams=0) as url,
        drips(url) as socks,
    ):
        eventually(lambda: seen == ["part 10000"] * DRIPS, "every app has begun")
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/ignore", timeout=1.0)
        finish(socks)
        assert httpx.post(f"{url}/ignore").content == b"ignored"


def test_a_body_that_is_small_and_drips_is_no_agents_concern(bus: Bus) -> None:
    """Its length is known, and so it is sent when it is whole."""
    with (
        running_bus(bus.broker_url) as patient,
        patient.mount(uploads, "/drip", threads=1, streams=0) as url,
        request(url, "Content-Length: 2", path="/digest") as sock,
    ):
        sock.sendall(b"x")
        assert httpx.post(f"{url}/ignore").content == b"ignored"
        assert seen == []
        sock.sendall(b"y")
        assert answer(sock)[::2] == (200, digest(b"xy"))


def test_many_small_chunks_are_few_frames(mount: str, bus: Bus) -> None:
    with connect(bus.broker_url) as client, request(mount, CHUNKED, path="/digest") as sock:

        def pushed() -> int:
            return int(client.info("commandstats").get("cmdstat_rpush", {}).get("calls", 0))

        before = pushed()
        sock.sendall(b"".join(chunk(BIG[at : at + 100]) for at in range(0, len(BIG), 100)) + b"0\r\n\r\n")
        assert answer(sock)[::2] == (200, digest(BIG))
        assert pushed() - before < len(BIG) // 100 / 10


# Threads of the app's own


def in_threads(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Read in another thread than the one that answers; ``/left`` leaves it behind."""
    body, found = environ["wsgi.input"], []

    def read() -> None:
        digest, length = hashlib.sha256(), 0
        try:
            while part := body.read(1000):
                digest.update(part)
                length += len(part)
        except OSError as error:
            found.append(type(error).__name__.encode())
            seen.append("read fails")
        else:
            found.append(f"{length} {digest.hexdigest()}".encode())

    start_response("200 OK", [TEXT])
    if environ["PATH_INFO"] == "/id":
        return [environ["QUERY_STRING"].encode()]
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    if environ["PATH_INFO"] == "/left":
        return [b"left"]

    def answer() -> Iterator[bytes]:
        while reader.is_alive():
            yield b"." * 500
        yield found[0]

    return answer()


@pytest.mark.parametrize("streams", [100, 0])
def test_an_app_may_read_in_one_thread_and_answer_in_another(bus: Bus, streams: int) -> None:
    with bus.mount(in_threads, "/threads", window=WINDOW, threads=2, streams=streams) as url:
        for _ in range(5):
            got = httpx.post(f"{url}/both", content=2 * BIG)
            assert got.content.lstrip(b".") == digest(2 * BIG)


@pytest.mark.parametrize("streams", [100, 0])
def test_a_thread_that_reads_on_after_the_end_is_told_and_no_other_request_is_hurt(
    bus: Bus, streams: int
) -> None:
    with bus.mount(in_threads, "/threads", window=WINDOW, threads=1, streams=streams) as url:
        for number in range(10):
            # Its last byte is never sent: else the thread might read all of it before the request ends.
            with request(url, f"Content-Length: {len(BIG)}", path="/left") as sock:
                sock.sendall(BIG[:-1])
                assert answer(sock)[::2] == (200, b"left")
            for part in range(10):
                name = f"{number}-{part}"
                assert httpx.get(f"{url}/id?{name}", timeout=5.0).text == name
        eventually(lambda: seen == ["read fails"] * 10, "each of the threads is told")


def test_no_more_than_a_window_waits_in_the_broker(mount: str, bus: Bus) -> None:
    with (
        connect(bus.broker_url) as client,
        request(mount, f"Content-Length: {BODY_LIMIT}", path="/paused") as sock,
    ):

        def waits() -> int:
            return sum(
                len(each) for key in client.scan_iter("*:inbound:*") for each in client.lrange(key, 0, -1)
            )

        threading.Thread(target=sock.sendall, args=(bytes(BODY_LIMIT),), daemon=True).start()
        eventually(lambda: waits() >= WINDOW, "the window is full")
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            assert waits() < WINDOW + MAX_CHUNK + 1024
        (entry,) = client.xrange("flaskbus:{/up}:requests")
        assert MAX_INLINE <= sum(map(len, entry[1].values())) < MAX_INLINE + READ + 4096
        release.set()
        assert answer(sock)[::2] == (200, str(BODY_LIMIT).encode())


# Clients that vanish

PHASES = {
    "after a header with a length": ("Content-Length: {size}", 0),
    "after a header that says chunked": (CHUNKED, 0),
    "with the first part of a small body": ("Content-Length: 5000", 4999),
    "with the first part of a large one": ("Content-Length: {size}", 1000),
    "with the first chunk": (CHUNKED, 1000),
    "one byte before the threshold": ("Content-Length: {size}", MAX_INLINE - 1),
    "at the threshold": ("Content-Length: {size}", MAX_INLINE),
    "one byte after it": ("Content-Length: {size}", MAX_INLINE + 1),
    "at the threshold, with chunks": (CHUNKED, MAX_INLINE),
    "in the middle": ("Content-Length: {size}", BODY_LIMIT // 2),
    "in the middle, with chunks": (CHUNKED, BODY_LIMIT // 2),
    "before the last byte": ("Content-Length: {size}", BODY_LIMIT - 1),
    "before the last chunk": (CHUNKED, BODY_LIMIT),
}


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_vanishes(mount: str, direct: str, phase: str, reset: bool) -> None:
    """An app that has begun is told by an error, and never takes a part for the whole; then others are served.

    Under gunicorn's threads only chunks break off with an error: a body with a length is just shorter there.
    """
    framing, size = PHASES[phase]
    for url in both(mount, direct):
        with request(url, framing.format(size=BODY_LIMIT), path="/digest") as sock:
            for at in range(0, size, 50_000):
                part = bytes(min(50_000, size - at))
                sock.sendall(chunk(part) if framing == CHUNKED else part)
            if url == mount and size > MAX_INLINE:
                eventually(lambda: seen, "the app has begun")
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert httpx.post(f"{url}/digest", content=DATA).content == digest(DATA)
    began = [what for what in seen if what.startswith("part")]
    if size > MAX_INLINE:
        assert len(began) > len(DATA) / 10_000
    eventually(
        lambda: size <= MAX_INLINE or sum(what.startswith("OSError") for what in seen) == 1, "it is told"
    )


@pytest.mark.parametrize("path", ["/digest", "/echo", "/endless"])
def test_a_client_that_vanishes_when_all_was_sent(mount: str, direct: str, path: str) -> None:
    for url in both(mount, direct):
        with request(url, f"Content-Length: {len(BIG)}", path=path) as sock:
            threading.Thread(target=send_quietly, args=(sock, BIG), daemon=True).start()
            if path != "/digest":
                assert sock.recv(1)
        assert httpx.post(f"{url}/digest", content=DATA).content == digest(DATA)


def send_quietly(sock: socket.socket, data: bytes) -> None:
    with suppress(OSError):
        sock.sendall(data)


# Lengths that lie

LIES: dict[str, tuple[Any, ...]] = {
    "a length and chunks": (400, f"Content-Length: {len(BIG)}", CHUNKED),
    "chunks and a length": (400, CHUNKED, f"Content-Length: {len(BIG)}"),
    "two lengths": (400, f"Content-Length: {len(BIG)}", f"Content-Length: {len(BIG) - 1}"),
    "a list": (400, f"Content-Length: {len(BIG)}, {len(BIG)}"),
    "negative": (400, f"Content-Length: -{len(BIG)}"),
    "signed": (400, f"Content-Length: +{len(BIG)}"),
    "a fraction": (400, f"Content-Length: {len(BIG)}.0"),
    "no number": (400, "Content-Length: all of it"),
    "empty": (400, "Content-Length: "),
    "chunked twice": (400, "Transfer-Encoding: chunked, chunked"),
    "compressed by the transfer": (501, "Transfer-Encoding: gzip, chunked"),
    "5,000 digits": (400, f"Content-Length: {'9' * 5000}"),
    "more than 64 bits": (413, f"Content-Length: {2**64 + len(BIG)}"),
    "as large as a length can be": (413, f"Content-Length: {2**63 - 1}"),
    "one more than is taken": (413, f"Content-Length: {BODY_LIMIT + 1}"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_length_that_can_be_told_to_lie_is_refused_before_anything_is_queued(
    mount: str, bus: Bus, lie: str
) -> None:
    refusal, *lines = LIES[lie]
    with connect(bus.broker_url) as client:
        before = client.info("commandstats").get("cmdstat_xadd", {}).get("calls", 0)
        with request(mount, *lines, path="/digest") as sock:
            threading.Thread(target=send_quietly, args=(sock, BIG), daemon=True).start()
            status, headers, body = answer(sock)
        assert (status, headers["connection"]) == (refusal, "close")
        assert b'"executed": "no"' in body
        assert client.info("commandstats").get("cmdstat_xadd", {}).get("calls", 0) == before
    assert seen == []


# What PEP 3333 says of wsgi.input

DATA = b"".join(b"line %d %s\n" % (number, b"." * (number % 300)) for number in range(5000)) + b"no newline"
READERS: dict[str, Callable[[Any], bytes]] = {
    "/read": lambda body: body.read(len(DATA) + 5),
    "/pieces": lambda body: b"".join(iter(lambda: body.read(7777), b"")),
    "/readline": lambda body: b"".join(iter(lambda: body.readline(), b"")),
    "/short-lines": lambda body: b"".join(iter(lambda: body.readline(50), b"")),
    "/readlines": lambda body: b"".join(body.readlines()),
    "/iterate": lambda body: b"".join(body),
}


def reads(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    data = READERS[environ["PATH_INFO"]](environ["wsgi.input"])
    terminated = environ["wsgi.input_terminated"], environ.get("CONTENT_LENGTH", "none")
    start_response("200 OK", [TEXT, ("X-Input", f"{terminated}")])
    return [digest(data)]


@pytest.mark.parametrize("chunked", [False, True])
def test_every_way_to_read_the_input(bus: Bus, chunked: bool) -> None:
    assert len(DATA) > 2 * MAX_INLINE
    with bus.mount(validator(reads), "/reads") as url:
        for path in READERS:
            sent = (DATA[at : at + 9999] for at in range(0, len(DATA), 9999)) if chunked else DATA
            got = httpx.post(url + path, content=sent)
            assert got.content == digest(DATA), path
            assert got.headers["x-input"] == str((True, "none" if chunked else str(len(DATA))))


@pytest.mark.parametrize("size", [1 << 20, pytest.param(100 << 20, marks=pytest.mark.slow)])
def test_a_file_in_a_form(bus: Bus, size: int, tmp_path: Path) -> None:
    app = flask.Flask("files")

    @app.post("/file")
    def take() -> str:
        file = flask.request.files["file"]
        summed = hashlib.file_digest(file.stream, "sha256")  # type: ignore[arg-type]
        return f"{file.filename} {flask.request.form['note']} {summed.hexdigest()}"

    data = (BIG * (size // len(BIG)))[:size]
    app.wsgi_app = validator(app.wsgi_app)  # type: ignore[assignment,method-assign]
    with running_bus(bus.broker_url) as roomy, roomy.mount(app, "/files") as url:
        got = httpx.post(f"{url}/file", data={"note": "n"}, files={"file": ("a.bin", data)}, timeout=120)
        assert got.text == f"a.bin n {hashlib.sha256(data).hexdigest()}"
