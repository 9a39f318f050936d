"""Streamed responses whose client, app or agent goes away, in every phase."""

from __future__ import annotations

import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import requests
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, StreamEnded, StreamReset

from tests.integration.apps.contents import CONTENT
from tests.integration.fleet import eventually
from tests.integration.streaming import (
    GUNICORN,
    HTTP1,
    HTTP2,
    PATIENCE,
    WAYS,
    WINDOW,
    Place,
    raw,
    resting,
    serve,
    streaming,
    vanish,
    wait_for,
)

ROUNDS = 3
"""One of them is to be as prompt as it should: the others may have met something else that this machine does."""


@pytest.fixture(scope="module")
def module_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("streams")
    with streaming(folder, "--threads", "4", "--window", str(WINDOW)) as place:
        yield place


@pytest.fixture
def place(module_place: Place) -> Iterator[Place]:
    yield module_place
    while module_place.held:
        module_place.held.pop().close()
    module_place.at_rest()


class Client2:
    """A client that speaks HTTP/2 itself: httpx neither resets a stream nor stops reading one."""

    def __init__(self, place: Place) -> None:
        where = httpx.URL(place.urls[HTTP2])
        place.trusted.set_alpn_protocols(["h2"])
        plain = socket.create_connection((where.host, where.port), PATIENCE)
        self.socket = place.trusted.wrap_socket(plain, server_hostname="localhost")
        place.held.append(self.socket)
        self.prefix = where.path
        self.state = H2Connection(H2Configuration(header_encoding=None))
        self.state.initiate_connection()

    def get(self, path: str) -> int:
        stream = self.state.get_next_available_stream_id()
        fields = [
            (":method", "GET"),
            (":scheme", "https"),
            (":path", self.prefix + path),
            (":authority", "localhost"),
        ]
        self.state.send_headers(stream, fields, end_stream=True)
        self.send()
        return stream

    def send(self) -> None:
        self.socket.sendall(self.state.data_to_send())

    def read(self, stream: int, count: int) -> bytes:
        """At least so many bytes of one stream, and no more than they need is acknowledged."""
        received = b""
        while len(received) < count:
            data = self.socket.recv(65536)
            assert data, "the connection was closed"
            for event in self.state.receive_data(data):
                assert not isinstance(event, (StreamEnded, StreamReset)), event
                if isinstance(event, DataReceived) and event.stream_id == stream:
                    received += event.data
                    self.state.acknowledge_received_data(event.flow_controlled_length, stream)
            self.send()
        return received

    def reset(self, stream: int) -> None:
        self.state.reset_stream(stream, ErrorCodes.CANCEL)
        self.send()


# Clients that vanish: how, and what they leave. Each takes a path, and a number of bytes to read before


Leave = Callable[[], None]


def closes(place: Place, path: str, count: int) -> Leave:
    sock = place.trickling(path)
    take(sock, count)
    return sock.close


def is_reset(place: Place, path: str, count: int) -> Leave:
    sock = place.trickling(path)
    take(sock, count)
    return lambda: vanish(sock)


def resets_its_stream(place: Place, path: str, count: int) -> Leave:
    """The connection lives on."""
    client = Client2(place)
    stream = client.get(path)
    if count:
        client.read(stream, count)
    return lambda: client.reset(stream)


def closes_http2(place: Place, path: str, count: int) -> Leave:
    client = Client2(place)
    stream = client.get(path)
    if count:
        client.read(stream, count)
    return client.socket.close


def take(sock: socket.socket, count: int) -> None:
    received = b""
    while count and len(received.partition(b"\r\n\r\n")[2]) < count:
        data = sock.recv(16384)
        assert data
        received += data


VANISH = [closes, is_reset, resets_its_stream, closes_http2]
Vanish = Callable[[Place, str, int], Leave]


def withdrawn(place: Place) -> None:
    """The bus knows that nobody waits for what runs."""
    with place.broker.client() as client:
        eventually(lambda: not client.xlen("flaskbus:{/s}:requests"), "it was withdrawn")


@pytest.mark.parametrize("gone", VANISH)
@pytest.mark.parametrize("events", [0, 1, 3])
@pytest.mark.parametrize("media_type", ["text/event-stream", "text/plain"])
def test_between_two_events(place: Place, gone: Vanish, events: int, media_type: str) -> None:
    """Before the first too. The next event is made, since nobody can know that it will be; then all is over."""
    delays = []
    for _ in range(ROUNDS):
        token = uuid.uuid4().hex
        for _ in range(events):
            place.go(token)
        leave = gone(place, f"/events/{token}/99?type={media_type}", 10 * events)
        with place.broker.client() as broker:
            eventually(lambda: broker.xlen("flaskbus:{/s}:requests"), "it runs")
        eventually(lambda: place.made(token) == events, "events")  # noqa: B023
        left = time.monotonic()
        leave()
        withdrawn(place)
        assert time.monotonic() - left < 5
        place.go(token)
        closed = place.at_last(token, "closed")["at"]
        made = [fact["at"] for fact in place.noted(token) if "made" in fact]
        assert len(made) == events + 1
        delays.append(closed - made[-1])
    assert min(delays) < 0.1, delays


@pytest.mark.slow
@pytest.mark.parametrize("gone", VANISH)
@pytest.mark.parametrize("piece", [100, 65536])
@pytest.mark.parametrize("read", [0, 200_000])
def test_while_the_app_waits_for_it(place: Place, gone: Vanish, piece: int, read: int) -> None:
    delays = []
    for _ in range(ROUNDS):
        token = uuid.uuid4().hex
        leave = gone(place, f"/flood/{token}/{piece}", read)
        resting(place, token)
        left = time.monotonic()
        leave()
        delays.append(place.at_last(token, "closed")["at"] - left)
    assert min(delays) < 0.5, delays


@pytest.mark.parametrize("gone", VANISH)
@pytest.mark.parametrize("gap", [0.0, 0.02])
def test_in_the_middle_of_it(place: Place, gone: Vanish, gap: float) -> None:
    for _ in range(ROUNDS):
        token = uuid.uuid4().hex
        leave = gone(place, f"/ticks/{token}/{gap}", 100)
        left = time.monotonic()
        leave()
        assert place.at_last(token, "closed")["at"] - left < 5
        place.at_rest()


def test_a_client_that_has_sent_only_a_part_of_its_request(place: Place) -> None:
    where = httpx.URL(place.url)
    token = uuid.uuid4().hex
    head = f"GET {where.path}/ticks/{token}/0.01 HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    for size in (1, 20, len(head) - 1):
        with socket.create_connection((where.host, where.port)) as sock:
            sock.sendall(head[:size])
    assert httpx.get(f"{place.url}/plain").status_code == 200
    assert place.noted(token) == []


def test_one_that_goes_does_not_disturb_the_others_of_its_connection(place: Place) -> None:
    client = Client2(place)
    tokens = [uuid.uuid4().hex for _ in range(3)]
    for token in tokens:
        place.go(token)
    streams = [client.get(f"/events/{token}/2") for token in tokens]
    eventually(lambda: all(place.made(token) == 1 for token in tokens), "events")
    client.reset(streams[1])
    with place.broker.client() as broker:
        eventually(lambda: broker.xlen("flaskbus:{/s}:requests") == 2, "it was withdrawn")
    for token in tokens:
        place.go(token)
    ended: set[int] = set()
    while len(ended) < 2:
        for event in client.state.receive_data(client.socket.recv(65536)):
            if isinstance(event, StreamEnded):
                ended.add(event.stream_id)
        client.send()
    assert ended == {streams[0], streams[2]}


# Apps that die


def read_on(client: httpx.Client, path: str) -> tuple[bytes, bool]:
    """What came, and whether it looked whole."""
    received = b""
    try:
        with client.stream("GET", path) as answer:
            for part in answer.iter_raw():
                received += part
    except httpx.TransportError:
        return received, False
    return received, True


@pytest.mark.parametrize("how", ["short", "raise", "raise?length"])
@pytest.mark.parametrize("before", [10, 3_000_000])
@pytest.mark.parametrize("way", [HTTP1, HTTP2, GUNICORN])
def test_what_breaks_off_shows_all_that_there_was_and_does_not_look_whole(
    place: Place, way: str, how: str, before: int
) -> None:
    how, _, query = how.partition("?")
    with place.client(way) as client:
        received, whole = read_on(client, f"/broken/{how}/{before}?{query}")
        assert not whole
        assert received == CONTENT[:before]
        assert client.get("/plain").status_code == 200


@pytest.mark.parametrize("before", [10, 3_000_000])
@pytest.mark.parametrize("length", ["", "?length"])
@pytest.mark.parametrize("way", [HTTP1, HTTP2, GUNICORN])
def test_nor_does_it_when_its_process_is_killed(place: Place, way: str, length: str, before: int) -> None:
    with place.client(way) as client:
        received, whole = read_on(client, f"/broken/die/{before}{length}")
    assert not whole
    assert CONTENT.startswith(received)
    wait_for(place, way)


@pytest.mark.parametrize("how", ["raise", "short", "die"])
def test_clients_say_so(place: Place, how: str) -> None:
    url = f"{place.url}/broken/{how}/100000"
    curl = subprocess.run(["curl", "--silent", url], capture_output=True, check=False, timeout=PATIENCE)
    assert curl.returncode in (18, 56), "partial file, or failure in receiving"
    wait_for(place, HTTP1)
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        requests.get(url, timeout=PATIENCE)
    wait_for(place, HTTP1)


@pytest.mark.parametrize("how", ["raise", "die"])
def test_over_http_1_0_the_connection_is_reset(place: Place, how: str) -> None:
    """Its close is all that ends a body there."""
    with pytest.raises(ConnectionResetError):
        raw(place.url, f"/broken/{how}/100000", version="1.0")
    wait_for(place, HTTP1)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_an_agent_that_is_killed_with_all_its_processes(place: Place, way: str) -> None:
    agent = serve(place.fleet, "/killed")
    place.urls["killed"] = place.urls[way].removesuffix("/s") + "/killed"
    wait_for(place, "killed")
    token = uuid.uuid4().hex
    with httpx.Client(
        base_url=place.urls["killed"], verify=place.trusted, http2=way == HTTP2, timeout=30
    ) as client:
        with client.stream("GET", f"/ticks/{token}/0.05") as answer:
            parts: Any = answer.iter_raw()
            next(parts)
            agent.kill()
            with pytest.raises(httpx.RemoteProtocolError):
                for _ in parts:
                    pass
    with place.broker.client() as broker:
        eventually(lambda: not list(broker.scan_iter("*{/killed}:reply:*")), "nothing is left")


@pytest.mark.slow
def test_a_gateway_that_is_killed_ends_its_streams(place: Place) -> None:
    """By another gateway, a lease later."""
    gateway, url = place.fleet.gateway()
    place.urls["other"] = f"{url}/s"
    wait_for(place, "other")
    token = uuid.uuid4().hex
    with (
        httpx.Client(timeout=PATIENCE) as client,
        client.stream("GET", f"{url}/s/ticks/{token}/0.05") as answer,
    ):
        parts: Any = answer.iter_raw()
        next(parts)
        gateway.kill()
        with pytest.raises(httpx.TransportError):
            for _ in parts:
                pass
    place.at_last(token, "closed")
    del place.urls["other"]
