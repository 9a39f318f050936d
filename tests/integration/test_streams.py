"""Streamed responses: what arrives, when it arrives, how it is framed, and what waits where in the meantime."""

from __future__ import annotations

import re
import statistics
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import requests

from flaskbus.resp import LARGE
from flaskbus.settings import AgentSettings
from flaskbus_agent.consumer import SHARED
from tests.integration.apps.contents import CONTENT, LINE
from tests.integration.clients import parse
from tests.integration.fleet import eventually
from tests.integration.streaming import (
    GUNICORN,
    HTTP1,
    PATIENCE,
    WAYS,
    WINDOW,
    Place,
    answers,
    raw,
    resting,
    serve,
    streaming,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with streaming(tmp_path_factory.mktemp("streams"), "--threads", "4", "--window", str(WINDOW)) as place:
        yield place


@pytest.fixture(params=WAYS)
def client(place: Place, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """A real client, over HTTP/1 and HTTP/2."""
    with place.client(request.param) as client:
        yield client


@pytest.fixture
def token() -> str:
    return uuid.uuid4().hex


# What arrives


@pytest.mark.parametrize("piece", [500, 8192, LARGE, 65536, 200_000])
@pytest.mark.parametrize("length", [False, True])
def test_the_content_is_whole_and_in_order(client: httpx.Client, piece: int, length: bool) -> None:
    answer = client.get(f"/content/{piece}", params={"length": ""} if length else {})
    assert answer.content == CONTENT
    assert answer.headers.get("content-length") == (str(len(CONTENT)) if length else None)
    chunked = not length and answer.http_version == "HTTP/1.1"
    assert answer.headers.get("transfer-encoding") == ("chunked" if chunked else None)


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-ndjson"])
def test_many_tiny_yields_do_not_cost_a_round_trip_each(place: Place, media_type: str) -> None:
    count = 100_000
    with place.broker.client() as client:
        client.config_resetstat()
        answer = httpx.get(f"{place.url}/lines/{count}?type={media_type}", timeout=PATIENCE)
        commands = client.info("stats")["total_commands_processed"]
    assert answer.content == b"".join(LINE % number for number in range(count))
    assert commands < count / 10


def by_curl(url: str) -> bytes:
    command = ["curl", "--silent", "--show-error", "--fail", "--no-buffer", "--max-time", "20"]
    return subprocess.run([*command, url], capture_output=True, check=True).stdout


def by_requests(url: str) -> bytes:
    with requests.get(url, stream=True, timeout=PATIENCE) as answer:
        return b"".join(line + b"\n" for line in answer.iter_lines())


def by_httpx(url: str) -> bytes:
    with httpx.stream("GET", url, timeout=PATIENCE) as answer:
        return b"".join(line.encode() + b"\n" for line in answer.iter_lines())


CLIENTS = [by_curl, by_requests, by_httpx]


@pytest.mark.parametrize("fetch", CLIENTS)
@pytest.mark.parametrize("media_type", ["text/plain", "application/x-ndjson", "text/event-stream"])
def test_lines_by_real_clients(place: Place, fetch: Callable[[str], bytes], media_type: str) -> None:
    whole = b"".join(LINE % number for number in range(5000))
    assert fetch(f"{place.url}/lines/5000?type={media_type}") == whole


# When it arrives


def test_a_generator_that_rests_after_a_burst_has_kept_nothing_back(place: Place, token: str) -> None:
    for media_type in ("text/plain", "text/event-stream"):
        for count, size in ((1, 9), (2, 9), (5, 9), (40, 9), (3000, 90), (9, 65536)):
            url = f"{place.url}/burst/{token}/{count}/{size}?type={media_type}"
            with httpx.stream("GET", url, timeout=PATIENCE) as answer:
                received, parts = b"", answer.iter_raw()
                while len(received) < count * size:
                    received += next(parts)  # while the app waits
                assert received == b"".join((b"%d\n" % number).rjust(size) for number in range(count))
                place.go(token)
                assert b"".join(parts) == b"end"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("media_type", ["text/event-stream", "application/x-ndjson", "text/plain"])
def test_an_event_arrives_before_the_next_is_made(
    place: Place, token: str, way: str, media_type: str
) -> None:
    delays: list[float] = []
    place.go(token)
    url = f"/events/{token}/20"
    with place.client(way) as client, client.stream("GET", url, params={"type": media_type}) as answer:
        for number, line in enumerate(line for line in answer.iter_lines() if line):
            delays.append((time.monotonic_ns() - int(line.removeprefix("data: "))) / 1e6)
            assert place.made(token) == number + 1
            if number < 19:
                place.go(token)
    # Nothing that looks each so often, and nothing that waits for more, would be as fast.
    assert statistics.median(delays) < 50, f"milliseconds: {delays}"


def test_events_reach_curl_and_requests_one_by_one(place: Place, token: str) -> None:
    url = f"{place.url}/events/{token}/3"
    place.go(token)
    curl = subprocess.Popen(["curl", "--silent", "--no-buffer", url], stdout=subprocess.PIPE)
    with curl:
        assert curl.stdout is not None
        for number in range(3):
            assert curl.stdout.readline().startswith(b"data: ")
            assert curl.stdout.readline() == b"\n"
            assert place.made(token) == number + 1
            place.go(token)
    assert curl.returncode == 0  # one more step is left, for the first event of the next
    with requests.get(url, stream=True, timeout=PATIENCE) as answer:
        for number, line in enumerate(line for line in answer.iter_lines(chunk_size=1) if line):
            assert line.startswith(b"data: ")
            assert place.made(token) == number + 4
            place.go(token)


# Files


def test_send_file_with_its_ranges_and_conditions(client: httpx.Client) -> None:
    whole = client.get("/file")
    size = len(CONTENT)
    assert (whole.status_code, whole.content) == (200, CONTENT)
    assert whole.headers["content-length"] == str(size)
    ranges = (
        ("0-0", 0, 0),
        ("100000-2000000", 100_000, 2_000_000),
        ("-70000", size - 70_000, size - 1),
    )
    for wanted, first, last in ranges:
        part = client.get("/file", headers={"Range": f"bytes={wanted}"})
        assert part.status_code == 206
        assert part.headers["content-range"] == f"bytes {first}-{last}/{size}"
        assert part.content == CONTENT[first : last + 1]
        assert part.headers["content-length"] == str(last + 1 - first)
    assert client.get("/file", headers={"Range": f"bytes={size}-"}).status_code == 416
    same = client.get("/file", headers={"If-None-Match": whole.headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")
    late = client.get("/file", headers={"If-Modified-Since": whole.headers["last-modified"]})
    assert (late.status_code, late.content) == (304, b"")
    other = client.get("/file", headers={"If-Range": '"other"', "Range": "bytes=0-0"})
    assert (other.status_code, len(other.content)) == (200, size)
    head = client.head("/file")
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(size), b"")


def test_curl_goes_on_where_a_download_broke_off(place: Place, tmp_path: Any) -> None:
    part = tmp_path / "part"
    part.write_bytes(CONTENT[:1_000_001])
    command = ["curl", "--silent", "--fail", "--continue-at", "-", "--output", str(part)]
    subprocess.run([*command, f"{place.url}/file"], check=True, timeout=PATIENCE)
    assert part.read_bytes() == CONTENT


def test_a_file_wrapper_around_what_has_no_fileno(place: Place, client: httpx.Client, token: str) -> None:
    assert client.get(f"/wrapped/{token}").content == CONTENT
    place.at_last(token, "closed")
    assert len(place.noted(token)) == 1


# Framing


CASES = [
    ("GET", "/content/65536", {}),
    ("GET", "/content/65536?length", {}),
    ("GET", "/content/5000000", {}),
    ("GET", "/lines/1", {}),
    ("GET", "/file", {}),
    ("GET", "/file", {"Range": "bytes=1000-300000"}),
    ("GET", "/file", {"Range": "bytes=99999999-"}),
    ("GET", "/wrapped/x", {}),
    ("GET", "/status/304", {}),
    ("HEAD", "/content/65536", {}),
    ("HEAD", "/content/65536?length", {}),
    ("HEAD", "/file", {}),
    ("HEAD", "/file", {"Range": "bytes=1000-300000"}),
]


@pytest.mark.parametrize(("method", "path", "headers"), CASES)
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_the_response_is_that_of_gunicorn(
    place: Place, method: str, path: str, headers: dict[str, str], version: str
) -> None:
    """But for headers that speak of the connection, and those of the server."""
    bus, direct = (raw(place.urls[way], path, method, version, **headers) for way in (HTTP1, GUNICORN))
    mine, theirs = parse(bus), parse(direct)
    assert mine.status == theirs.status
    assert mine.body == theirs.body
    assert shown(mine.headers) == shown(theirs.headers)
    if version == "1.0":
        assert "transfer-encoding" not in dict(mine.headers)
    if method == "HEAD" or mine.status == 304:
        assert bus.endswith(b"\r\n\r\n")


def shown(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(pair for pair in headers if pair[0] not in ("date", "server", "connection"))


def test_a_204_has_neither_body_nor_length(place: Place) -> None:
    head, _, body = raw(place.url, "/status/204").partition(b"\r\n\r\n")
    assert b" 204 " in head
    assert b"x-here" in head.lower()
    assert body == b""
    assert not re.search(rb"(?i)transfer-encoding|content-length", head)


def test_http_1_0_is_ended_by_the_close(place: Place) -> None:
    head, _, body = raw(place.url, "/content/65536", version="1.0").partition(b"\r\n\r\n")
    assert body == CONTENT
    assert not re.search(rb"(?i)transfer-encoding|content-length", head)


@pytest.mark.parametrize("before", [10, 100_000, 3_000_000])
def test_more_than_the_stated_length_is_cut_off(client: httpx.Client, before: int) -> None:
    answer = client.get(f"/broken/long/{before}")
    assert answer.content == CONTENT[: before - 1]
    assert client.get("/plain").status_code == 200  # the connection is in step


# Slow readers


@pytest.mark.parametrize("piece", [100, 8192, 65536])
def test_a_window_bounds_what_lies_on_the_broker(place: Place, token: str, piece: int) -> None:
    with place.trickling(f"/flood/{token}/{piece}"):
        made = resting(place, token)
        assert 0 < place.on_lists() < WINDOW + 2 * 65536 + 1024
        # In the sockets, in the gateway, on the broker, and what was gathered in the agent.
        assert made < 16 * 1024 * 1024
        with place.broker.client() as client:
            memory = sum(client.memory_usage(key) or 0 for key in client.scan_iter("*:reply:*"))
        assert memory < 3 * WINDOW
        assert httpx.get(f"{place.url}/content/65536", timeout=PATIENCE).content == CONTENT
        assert resting(place, token) == made  # only that one waits
    place.at_last(token, "closed")


@pytest.mark.parametrize("window", [64 * 1024, 1024 * 1024, 4 * 1024 * 1024])
def test_the_window_is_a_setting(place: Place, token: str, window: int) -> None:
    agent = serve(place.fleet, "/w", "--window", str(window))
    base = place.url.removesuffix("/s") + "/w"
    with httpx.Client(base_url=base, timeout=PATIENCE) as client:
        eventually(lambda: answers(client), "agent")
    with place.trickling(f"/flood/{token}/16384", base):
        resting(place, token)
        # As much as fits, and hardly more: the last push may pass it.
        assert window - 2 * 65536 < place.on_lists() < window + 2 * 65536
    place.at_last(token, "closed")
    agent.end()


def test_a_reader_that_is_slow_gets_all_of_it(place: Place) -> None:
    with place.trickling("/content/65536?length") as sock:
        received = b""
        while b"\r\n\r\n" not in received:
            received += sock.recv(4096)
        body = received.partition(b"\r\n\r\n")[2]
        while len(body) < len(CONTENT):
            body += sock.recv(150_000)
            time.sleep(0.002)
    assert body == CONTENT


# Many at once


def test_four_streams_do_not_stop_a_four_thread_agent(place: Place, token: str) -> None:
    tokens = [f"{token}-{number}" for number in range(12)]
    with place.client() as client:
        opened = []
        try:
            for each in tokens:
                place.go(each)
                answer = client.send(client.build_request("GET", f"/events/{each}/2"), stream=True)
                lines = answer.iter_lines()
                assert next(lines).startswith("data: ")
                opened.append((answer, lines))
            for _ in range(20):
                assert client.get("/plain", timeout=5.0).status_code == 200
            for each, (_, lines) in zip(tokens, opened, strict=True):
                place.go(each)
                assert len([line for line in lines if line]) == 1
        finally:
            for answer, _ in opened:
                answer.close()


@pytest.mark.slow
def test_the_connections_to_the_broker_do_not_grow_with_streams(place: Place, token: str) -> None:
    count = 500

    def connections() -> int:
        with place.broker.client() as client:
            return len(client.client_list())

    agent = serve(place.fleet, "/many", "--streams", str(count + 1))
    base = place.url.removesuffix("/s") + "/many"
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=base, timeout=60, limits=limits) as client:
        eventually(lambda: answers(client), "agent")
        opened: list[tuple[httpx.Response, Iterator[str]]] = []

        def go_on(number: int) -> None:
            client.post(f"/go/{token}-{number}").raise_for_status()

        def open_one() -> None:
            number = len(opened)
            go_on(number)
            url = f"/events/{token}-{number}/2"
            answer = client.send(client.build_request("GET", url), stream=True)
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            opened.append((answer, lines))

        try:
            open_one()
            before = connections()
            for _ in range(count - 1):
                open_one()
            # Which are opened when they are first needed, and so is that of each request thread.
            assert connections() < before + SHARED + AgentSettings().threads
            assert client.get("/plain").status_code == 200
            for number in range(count):
                go_on(number)
            for answer, lines in opened:
                assert len([line for line in lines if line]) == 1
                answer.close()
        finally:
            for answer, _ in opened:
                answer.close()
    agent.end()
    place.at_rest()
