"""Uploads by clients and for apps that other people wrote: answers to bodies that nobody reads, HTTP/2, and forms."""

from __future__ import annotations

import hashlib
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ResponseReceived, StreamEnded, StreamReset
from h2.exceptions import ProtocolError

from flaskbus import embedded
from flaskbus.testing import Bus
from tests.integration.conftest import Site
from tests.integration.fleet import Fleet, eventually
from tests.integration.test_gateway_process import make_certificate, trusting
from tests.integration.test_uploads import BIG, digest, release, seen, uploads

LARGE = BIG * 3
BODY_LIMIT = 2 * len(LARGE)
BODY_TIMEOUT = 1.5

pytestmark = pytest.mark.xdist_group("site")


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The URL of the uploads app by TLS, with HTTP/2 for who likes it, and the certificate."""
    folder = tmp_path_factory.mktemp("encrypted")
    cert, key = make_certificate(folder)
    options = ["--http2", f"--certfile={cert}", f"--keyfile={key}"]
    options += [f"--body-limit={BODY_LIMIT}", f"--body-timeout={BODY_TIMEOUT}"]
    with embedded.start() as broker, Fleet(folder, broker.url) as fleet:
        _, url = fleet.gateway(*options)
        with Bus(url.replace("http:", "https:"), broker.url).mount(uploads, "/up") as mounted:
            yield mounted, cert


@pytest.fixture
def mount(encrypted: tuple[str, Path]) -> str:
    seen.clear()
    release.clear()
    return encrypted[0]


@pytest.fixture(params=[False, True], ids=["HTTP/1.1", "HTTP/2"])
def client(encrypted: tuple[str, Path], request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    with httpx.Client(http2=request.param, verify=trusting(encrypted[1]), timeout=60.0) as client:
        yield client


def in_parts(data: bytes) -> Iterator[bytes]:
    return (data[at : at + 100_000] for at in range(0, len(data), 100_000))


# Answers without reading

BODIES: dict[str, Callable[[], Any]] = {"with a length": lambda: LARGE, "chunked": lambda: in_parts(LARGE)}


@pytest.mark.parametrize("body", BODIES)
def test_httpx_sees_an_answer_to_a_body_that_nobody_reads(
    mount: str, client: httpx.Client, body: str
) -> None:
    """And is served again after it; over HTTP/2 on the same connection."""
    for _ in range(2):
        assert client.post(f"{mount}/ignore", content=BODIES[body]()).content == b"ignored"
        assert client.post(f"{mount}/digest", content=BODIES[body]()).content == digest(LARGE)


@pytest.mark.parametrize("body", BODIES)
def test_requests_does(encrypted: tuple[str, Path], mount: str, body: str) -> None:
    with requests.Session() as session:

        def post(path: str) -> bytes:
            url = mount + path
            got = session.post(url, data=BODIES[body](), verify=str(encrypted[1]), timeout=60)
            return bytes(got.content)

        for _ in range(2):
            assert post("/ignore") == b"ignored"
            assert post("/digest") == digest(LARGE)


EXPECT = ("--header", "Expect: 100-continue")
CURLS = {
    "at once": ("--header", "Expect:"),
    "after 100": EXPECT,
    "chunked": ("--header", "Expect:", "--header", "Transfer-Encoding: chunked"),
    "chunked, after 100": (*EXPECT, "--header", "Transfer-Encoding: chunked"),
}


@pytest.mark.parametrize("how", CURLS)
def test_curl_does(encrypted: tuple[str, Path], mount: str, tmp_path: Path, how: str) -> None:
    """It is then told to close, or keeps its connection; what it asks next is answered.

    Only over HTTP/1.1: curl 7.88 hangs after an early answer over HTTP/2, with nginx as well.
    """
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (tmp_path / "body").write_bytes(LARGE)
    common = ["--silent", "--show-error", "--http1.1", "--cacert", str(encrypted[1]), "--max-time", "60"]
    upload = ["--data-binary", f"@{tmp_path / 'body'}", *CURLS[how]]
    command = ["curl", *common, *upload, f"{mount}/ignore", "--next", *common, *upload, f"{mount}/digest"]
    assert subprocess.run(command, check=True, capture_output=True).stdout == b"ignored" + digest(LARGE)


def test_who_waits_for_100_need_not_send_what_nobody_reads(
    encrypted: tuple[str, Path], mount: str, tmp_path: Path
) -> None:
    """A refusal comes instead of the 100, and not a byte is sent."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (tmp_path / "body").write_bytes(bytes(BODY_LIMIT + 1))
    command = ["curl", "--silent", "--http1.1", "--cacert", str(encrypted[1]), *EXPECT]
    command += ["--expect100-timeout", "30", "--data-binary", f"@{tmp_path / 'body'}"]
    command += ["--output", "/dev/null", "--write-out", "%{http_code} %{size_upload}", f"{mount}/digest"]
    assert subprocess.run(command, check=True, capture_output=True).stdout == b"413 0"


# HTTP/2


def test_too_much_is_413(mount: str, client: httpx.Client) -> None:
    """Whether the length was stated or not; and the next request is served."""
    for body, executed in ((bytes(BODY_LIMIT + 1), "no"), (in_parts(bytes(BODY_LIMIT + 1)), "unknown")):
        refused = client.post(f"{mount}/digest", content=body)
        assert (refused.status_code, refused.json()["executed"]) == (413, executed)
        assert client.post(f"{mount}/digest", content=BIG).content == digest(BIG)


class Stream:
    """One HTTP/2 connection of a client that sends what the test says, and when."""

    def __init__(self, url: str, certificate: Path) -> None:
        parts = httpx.URL(url)
        context: ssl.SSLContext = trusting(certificate)
        context.set_alpn_protocols(["h2"])
        plain = socket.create_connection((parts.host, parts.port or 443), 30)
        self.sock = context.wrap_socket(plain, server_hostname="localhost")
        self.h2 = H2Connection(H2Configuration())
        self.h2.initiate_connection()
        self.path = parts.path
        self.answers: dict[int, str] = {}
        """Stream -> status, and whether it was reset or ended."""

    def begin(self, path: str, *more: tuple[str, str]) -> int:
        """Send the header of a POST; the number of its stream."""
        stream = self.h2.get_next_available_stream_id()
        head = {":method": "POST", ":path": self.path + path, ":scheme": "https", ":authority": "localhost"}
        self.h2.send_headers(stream, [*head.items(), *more])
        self._flush()
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        for at in range(0, len(data), 16_384):
            part = data[at : at + 16_384]
            while self.h2.local_flow_control_window(stream) < len(part):
                self._receive()
            self.h2.send_data(stream, part, end_stream=end and at + 16_384 >= len(data))
            self._flush()

    def try_to_send(self, stream: int, data: bytes) -> str:
        """A whole body, and what came of it."""
        try:
            self.send(stream, data, end=True)
            return self.outcome(stream)
        except (ConnectionError, ProtocolError):
            return "closed"

    def reset(self, stream: int) -> None:
        self.h2.reset_stream(stream)
        self._flush()

    def outcome(self, stream: int) -> str:
        while not self.answers.get(stream, "").endswith(("ended", "reset")):
            self._receive()
        return self.answers[stream]

    def _receive(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise ConnectionError("the connection is closed")
        for event in self.h2.receive_data(data):
            if isinstance(event, ResponseReceived):
                self.answers[event.stream_id] = dict(event.headers)[b":status"].decode()
            elif isinstance(event, (StreamEnded, StreamReset)) and event.stream_id:
                so_far = self.answers.get(event.stream_id, "")
                if not so_far.endswith("ended"):
                    how = "ended" if isinstance(event, StreamEnded) else "reset"
                    self.answers[event.stream_id] = f"{so_far} {how}".strip()
        self._flush()

    def _flush(self) -> None:
        self.sock.sendall(self.h2.data_to_send())


@pytest.fixture
def http2(encrypted: tuple[str, Path], mount: str) -> Iterator[Stream]:
    stream = Stream(mount, encrypted[1])
    with stream.sock:
        yield stream


def test_the_app_sees_the_first_part_before_the_last_is_sent(http2: Stream) -> None:
    upload = http2.begin("/digest")
    http2.send(upload, BIG[:20_000])
    eventually(lambda: seen == ["part 10000"] * 2, "the first part is read")
    http2.send(upload, BIG[20_000:], end=True)
    assert http2.outcome(upload) == "200 ended"


@pytest.mark.parametrize("sent", [0, 1000, len(BIG) // 2])
def test_who_stops_sending_gets_408_and_its_other_streams_go_on(http2: Stream, sent: int) -> None:
    stopped = http2.begin("/digest", ("content-length", str(len(BIG))))
    http2.send(stopped, BIG[:sent])
    other = http2.begin("/digest", ("content-length", str(len(BIG))))
    http2.send(other, BIG, end=True)
    assert http2.outcome(other) == "200 ended"
    assert http2.outcome(stopped) == "408 ended"
    again = http2.begin("/digest")
    http2.send(again, BIG, end=True)
    assert http2.outcome(again) == "200 ended"


@pytest.mark.parametrize(("stated", "sent"), [(len(BIG) - 1, len(BIG)), (len(BIG), len(BIG) - 1)])
def test_a_length_that_lies_is_no_whole_body(http2: Stream, stated: int, sent: int) -> None:
    """RFC 9113 section 8.1.1. The connection ends, as for any frame that no client may send."""
    upload = http2.begin("/digest", ("content-length", str(stated)))
    assert http2.try_to_send(upload, BIG[:sent]) == "closed"
    eventually(lambda: seen and seen[-1].startswith("OSError"), "the app's read fails")


@pytest.mark.parametrize("sent", [0, 1000, len(BIG) // 2])
def test_who_resets_a_stream_ends_its_upload_only(http2: Stream, sent: int) -> None:
    upload = http2.begin("/digest")
    http2.send(upload, BIG[:sent])
    if sent > 1000:
        eventually(lambda: seen, "the app has begun")
    http2.reset(upload)
    other = http2.begin("/digest")
    http2.send(other, BIG, end=True)
    assert http2.outcome(other) == "200 ended"
    if sent > 1000:
        eventually(lambda: any(what.startswith("OSError") for what in seen), "the app's read fails")


# Forms

FORM = {"note": "what it is", "size": str(len(LARGE))}
FILES = {
    "first": ("one.bin", LARGE, "application/octet-stream"),
    "second": ("größe.txt", b"small", "text/plain"),
}
SUMS = {"one.bin": hashlib.sha256(LARGE).hexdigest(), "größe.txt": hashlib.sha256(b"small").hexdigest()}


@pytest.mark.parametrize("framework", ["django", "bottle"])
def test_files_in_a_form_are_what_they_are_under_gunicorn(site: Site, framework: str) -> None:
    for url in (site.bus, site.direct):
        got = httpx.post(f"{url}/{framework}/sums", data=FORM, files=FILES, timeout=60)
        assert got.status_code == 200, got.text
        assert got.json() == {"form": FORM, "files": SUMS}, url


@pytest.mark.parametrize("framework", ["django", "bottle"])
def test_a_large_field_is_what_it_is_under_gunicorn(site: Site, framework: str) -> None:
    """Frameworks refuse what is too large for them, with a part of it read, or nothing."""
    field = {"field": "x" * (4 << 20)}
    answers = []
    for url in (site.bus, site.direct):
        got = httpx.post(f"{url}/{framework}/sums", data=field, timeout=60)
        answers.append((got.status_code, got.text.replace(url, "URL")))
    assert answers[0] == answers[1]


def test_flask_refuses_what_is_too_large_for_it_without_reading(site: Site) -> None:
    got = httpx.post(f"{site.bus}/journal/auth/login", data={"name": "x" * (4 << 20)}, timeout=60)
    assert (got.status_code, got.headers["content-type"]) == (413, "text/html; charset=utf-8")


def test_a_part_of_a_form_is_never_taken_for_the_whole(site: Site) -> None:
    """Its client vanishes: under gunicorn some frameworks take what came. Others are served afterwards."""
    request = httpx.Request("POST", f"{site.bus}/bottle/sums", data=FORM, files=FILES)
    body = request.read()
    for cut in (10, 100_000, len(body) - 10):
        lines = [f"{name}: {value}" for name, value in request.headers.items()]
        head = "\r\n".join(["POST /bottle/sums HTTP/1.1", *lines, "", ""]).encode()
        with socket.create_connection((request.url.host, request.url.port or 80), 30) as sock:
            sock.sendall(head + body[:cut])
            sock.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                assert b" 200 " not in sock.recv(100)
    got = httpx.post(f"{site.bus}/bottle/sums", data=FORM, files=FILES, timeout=60)
    assert got.json()["files"] == SUMS
