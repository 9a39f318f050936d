"""The gateway's processes: deadlines for clients, signals, TLS, and what an operator is told.

The ASGI app is the one of probe_server.py; what is tested here is everything around it.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from gunicorn.config import Config

from flaskbus.settings import GatewaySettings
from flaskbus_gateway.listening import bind_address, listen, turn_away
from tests.conftest import free_port
from tests.integration.probe import Client, Server, until

PROMPT = 4.0
"""Seconds within which what happens at once has happened, also where many tests share two cores."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as server:
        yield server


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def refuses(server: Server) -> bool:
    try:
        server.connect().sock.close()
    except ConnectionRefusedError:
        return True
    return False


# Starting and ending


@pytest.mark.skipif(sys.platform != "linux", reason="needs a socket filter")
def test_a_listener_turns_away_whom_it_does_not_know_yet() -> None:
    listener = listen(GatewaySettings(host="127.0.0.1", port=0), Config(), None)
    address = listener.getsockname()
    with socket.create_connection(address) as known:
        turn_away(listener)
        known.sendall(b"still heard")
        served, _ = listener.sock.accept()
        with served:
            assert served.recv(100) == b"still heard"
        with pytest.raises(TimeoutError):
            socket.create_connection(address, timeout=0.2)
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=30)


def test_says_where_it_listens(server: Server) -> None:
    line = server.log().splitlines()[0]
    assert re.search(
        r"\[INFO\] flaskbus gateway \S+ listening on http://127\.0\.0\.1:[1-9]\d* \(pid \d+\), broker redis://",
        line,
    )
    assert "gunicorn" not in server.log()
    with server.connect() as client:
        assert client.request("/").json()["pid"] == server.workers()[0]


def test_silent_and_idle_connections_do_not_delay_the_end(server: Server) -> None:
    with server.connect() as silent, server.connect() as idle, server.connect() as socketed:
        assert idle.request("/").status == 200
        accept_websocket(socketed)
        assert server.end() < PROMPT
        assert silent.rest() == idle.rest() == b""
        assert closing_code(socketed) == 1001
    assert "probe lifespan shutdown" in server.log()
    assert "probe websocket closed" in server.log()
    assert "cut off" not in server.log()


def test_a_response_in_flight_is_finished(server: Server, tmp_path: Path) -> None:
    go = tmp_path / "go"
    with server.connect() as client:
        client.send(f"GET /wait?{go} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        until(go.with_suffix(".begun").exists, "the request is in the app")
        server.send_signal(signal.SIGTERM)
        until(lambda: refuses(server), "nothing is accepted any more")
        go.touch()
        answer = client.answer()
        assert answer.body == b"waited"
        assert answer.headers["connection"] == "close"
        assert client.rest() == b""
    assert server.process.wait(PROMPT) == 0


def test_what_does_not_end_is_cut_off_and_the_app_puts_itself_in_order(tmp_path: Path) -> None:
    with Server(tmp_path, graceful_timeout=0.3) as server, server.connect() as client:
        go = tmp_path / "go"
        client.send(f"GET /wait?{go} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        until(go.with_suffix(".begun").exists, "the request is in the app")
        assert server.end() < 10
    log = server.log()
    assert "cut off 1 connections that did not end in 0.3 s" in log
    assert log.index("probe heard http.disconnect") < log.index("probe lifespan shutdown")


def test_int_does_not_wait(server: Server, tmp_path: Path) -> None:
    with server.connect() as client:
        go = tmp_path / "go"
        client.send(f"GET /wait?{go} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        until(go.with_suffix(".begun").exists, "the request is in the app")
        assert server.end(signal.SIGINT) < 10
    assert "probe heard http.disconnect" in server.log()
    assert "probe lifespan shutdown" in server.log()


def test_workers_are_added_and_removed(server: Server) -> None:
    first = server.workers()[0]
    server.send_signal(signal.SIGTTIN)
    until(lambda: len(server.workers()) == 2, "a second worker is ready")
    server.send_signal(signal.SIGTTOU)
    until(lambda: not alive(first), "the older worker is gone")
    assert alive(server.workers()[1])


def test_hup_reads_the_configuration_again_and_replaces_the_worker(server: Server) -> None:
    old = server.workers()[0]
    with server.connect() as client:
        client.request("/")
        server.write_settings(workers=2, access_log=str(server.directory / "access"))
        server.send_signal(signal.SIGHUP)
        assert client.rest() == b""
    until(lambda: len(server.workers()) == 3 and not alive(old), "two new workers")
    with server.connect() as client:
        assert client.request("/").json()["pid"] in server.workers()[1:]
    until((server.directory / "access").read_text, "the new configuration is used")


def test_a_configuration_that_is_not_valid_changes_nothing(server: Server) -> None:
    server.write_settings(workers=0)
    server.send_signal(signal.SIGHUP)
    server.logged("[ERROR] not reloaded: workers must be at least 1, not 0")
    with server.connect() as client:
        assert client.request("/").json()["pid"] == server.workers()[0]


def test_reload_watches_the_configuration(tmp_path: Path) -> None:
    with Server(tmp_path, reload=True) as server:
        old = server.workers()[0]
        server.write_settings(keepalive=3)
        until(lambda: len(server.workers()) == 2 and not alive(old), "a new worker")


def test_usr1_opens_the_access_log_anew(tmp_path: Path) -> None:
    access = tmp_path / "access"
    with Server(tmp_path, access_log=str(access)) as server, server.connect() as client:
        client.request("/first?a=b")
        line = until(access.read_text, "a line in the access log")
        assert re.fullmatch(
            r'127\.0\.0\.1 - - \[\d\d/\w{3}/\d{4}:.*\] "GET /first\?a=b HTTP/1\.1" 200 \d+ "-" "-"\n', line
        )
        access.rename(tmp_path / "rotated")
        server.send_signal(signal.SIGUSR1)
        until(access.exists, "a new access log")
        until(
            lambda: client.request("/second") and "/second" in access.read_text(), "lines go to the new one"
        )


def test_pid_file(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    with Server(tmp_path, pid=str(pid)) as server:
        assert int(pid.read_text()) == server.process.pid
    assert not pid.exists()


def test_app_that_cannot_start_ends_the_server(tmp_path: Path) -> None:
    server = Server(tmp_path, environ={"PROBE_FAILS": "the broker is unfit"})
    assert server.process.wait(15) == 3
    errors = [line for line in server.log().splitlines() if "[INFO]" not in line]
    assert len(errors) == 1
    assert errors[0].endswith("[ERROR] could not start: the broker is unfit")


# Deadlines


def test_silent_connection_is_closed(tmp_path: Path) -> None:
    with Server(tmp_path, header_timeout=0.3) as server, server.connect() as client:
        assert client.rest() == b""


def test_dripping_header_is_answered_408(tmp_path: Path) -> None:
    with Server(tmp_path, header_timeout=0.3) as server, server.connect() as client:
        client.send(b"GET / HTTP/1.1\r\nHost")
        assert client.answer().status == 408
        assert client.rest() == b""


def test_dripping_header_of_a_later_request_is_answered_408(tmp_path: Path) -> None:
    with Server(tmp_path, header_timeout=0.3) as server, server.connect() as client:
        assert client.request("/").status == 200
        client.send(b"G")
        assert client.answer().status == 408


def test_dripping_header_of_a_pipelined_request_is_answered_408(tmp_path: Path) -> None:
    """It is not an idle connection, although the first request's response has just gone out."""
    with Server(tmp_path, header_timeout=0.6, keepalive=0.2) as server, server.connect() as client:
        client.send(b"GET / HTTP/1.1\r\nHost: test\r\n\r\nGET /")
        assert client.answer().status == 200
        assert client.answer().status == 408


def test_idle_connection_outlives_the_header_deadline(tmp_path: Path) -> None:
    with Server(tmp_path, header_timeout=0.3) as server, server.connect() as kept, server.connect() as silent:
        assert kept.request("/").status == 200
        assert silent.rest() == b""
        assert kept.request("/").status == 200


def test_a_request_may_last_longer_than_its_header(tmp_path: Path) -> None:
    with (
        Server(tmp_path, header_timeout=0.3) as server,
        server.connect() as client,
        server.connect() as silent,
    ):
        client.send(b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\n\r\nbo")
        assert silent.rest() == b""
        client.send(b"dy")
        assert client.answer().json()["body"] == "body"


def test_idle_connection_is_closed_after_keepalive(tmp_path: Path) -> None:
    with Server(tmp_path, keepalive=0.3) as server, server.connect() as client:
        assert client.request("/").status == 200
        assert client.rest() == b""


def test_no_keepalive(tmp_path: Path) -> None:
    with Server(tmp_path, keepalive=0) as server, server.connect() as client:
        assert client.request("/").headers["connection"] == "close"
        assert client.rest() == b""


def test_a_client_that_takes_nothing_is_cut_off(tmp_path: Path) -> None:
    with Server(tmp_path, idle_timeout=0.3) as server, server.connect() as client:
        client.send(b"GET /stream?1000000 HTTP/1.1\r\nHost: test\r\n\r\n")
        server.logged("probe stream over")


def test_the_app_hears_of_a_client_that_goes_away(server: Server, tmp_path: Path) -> None:
    """And is not cancelled, however long it takes to put itself in order."""
    go = tmp_path / "go"
    with server.connect() as client:
        client.send(f"GET /wait?{go} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        until(go.with_suffix(".begun").exists, "the request is in the app")
    server.logged("probe heard http.disconnect")


# WebSocket


def accept_websocket(client: Client) -> None:
    client.send(
        b"GET /ws HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")


def closing_code(client: Client) -> int:
    first, length = client.read_exactly(2)
    assert first == 0x88
    code: int = struct.unpack("!H", client.read_exactly(length)[:2])[0]
    return code


def test_a_websocket_lasts_longer_than_any_deadline_of_http(tmp_path: Path) -> None:
    server = Server(tmp_path, header_timeout=0.3, keepalive=0.3)
    with server, server.connect() as client, server.connect() as silent:
        accept_websocket(client)
        assert silent.rest() == b""
        client.send(b"\x81\x82\0\0\0\0hi")
        assert client.read_exactly(4) == b"\x81\x02hi"


# TLS and other addresses


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate for localhost that signed itself, and its key."""
    cert, key = directory / "cert.pem", directory / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    subprocess.run(
        [*command.split(), "-addext", names, "-keyout", str(key), "-out", str(cert)],
        check=True,
        capture_output=True,
    )
    return cert, key


def trusting(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate))


@pytest.mark.parametrize(("http2", "version"), [(True, "HTTP/2"), (False, "HTTP/1.1")])
def test_tls(tmp_path: Path, certificate: tuple[Path, Path], http2: bool, version: str) -> None:
    cert, key = certificate
    with Server(tmp_path, certfile=str(cert), keyfile=str(key), http2=http2) as server:
        assert server.url.startswith("https://")
        with httpx.Client(http2=True, verify=trusting(cert), base_url=server.url) as client:
            answer = client.post("/path?q", content=b"body" * 50_000, headers={"X-Forwarded-Proto": "http"})
            assert answer.http_version == version
            seen = answer.json()
            assert (seen["scheme"], seen["path"], seen["query"]) == ("https", "/path", "q")
            assert len(seen["body"]) == 200_000
            assert client.get("/stream?10").content == b"x" * 640
            # The client keeps its connection, and so does the server until it ends.
            assert server.end() < PROMPT


def test_http2_carries_bytes_as_http1_does(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    server = Server(tmp_path, certfile=str(cert), keyfile=str(key), http2=True)
    with server, httpx.Client(http2=True, verify=trusting(cert), base_url=server.url) as client:
        text = "é€".encode()
        seen = client.get("/", headers={b"X-Text": text}).json()
        assert dict(seen["headers"])["x-text"].encode("latin-1") == text
        answer = client.get("/", extensions={"target": b"/" + text})
        assert answer.http_version == "HTTP/2"
        assert answer.status_code == 400
        assert answer.json()["executed"] == "no"
        assert client.get("/%C3%A9").json()["raw_path"] == "/%C3%A9"
    assert "Traceback" not in server.log()


def test_an_idle_http2_connection_outlives_the_header_deadline(
    tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    cert, key = certificate
    server = Server(tmp_path, certfile=str(cert), keyfile=str(key), http2=True, header_timeout=0.5)
    with server, httpx.Client(http2=True, verify=trusting(cert), base_url=server.url) as client:
        first = client.get("/").json()["client"]
        for _ in range(2):
            with server.connect() as silent:
                assert silent.rest() == b""
        assert client.get("/").json()["client"] == first


def test_silent_tls_connections_are_closed(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    """Before the handshake, and after it."""
    cert, key = certificate
    with Server(tmp_path, certfile=str(cert), keyfile=str(key), http2=True, header_timeout=0.5) as server:
        with server.connect() as client:
            assert client.rest() == b""
        for protocol in ("h2", "http/1.1"):
            context = trusting(cert)
            context.set_alpn_protocols([protocol])
            with (
                server.connect() as client,
                context.wrap_socket(client.sock, server_hostname="localhost") as tls,
            ):
                assert tls.selected_alpn_protocol() == protocol
                while tls.recv(1000):
                    pass


def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with Server(tmp_path, host=f"unix:{path}") as server:
        assert server.url == f"unix:{path}"
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://test") as client:
            # A peer on a Unix socket has no address; gunicorn would believe its header.
            seen = client.get("/", headers={"X-Forwarded-Proto": "https"}).json()
        assert (seen["scheme"], seen["client"]) == ("http", None)
        second = tmp_path / "second"
        second.mkdir()
        rival = Server(second, host=f"unix:{path}")
        assert rival.process.wait(15) == 3
        assert "another process listens on" in rival.log()
        assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1:5000"),
        ("localhost", "localhost:5000"),
        ("::1", "[::1]:5000"),
        ("[::1]", "[::1]:5000"),
        ("unix:/run/x.sock", "unix:/run/x.sock"),
    ],
)
def test_bind_address(host: str, address: str) -> None:
    assert bind_address(GatewaySettings(host=host)) == address


# What an operator is told


def command(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """``flaskbus-gateway``, that is expected to end by itself."""
    program = Path(sys.executable).with_name("flaskbus-gateway")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30, cwd=directory)


def test_port_in_use_is_one_line_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        begin = time.monotonic()
        result = command("--port", port, directory=tmp_path)
        assert time.monotonic() - begin < PROMPT
    assert result.returncode == 3
    assert result.stderr == (
        f"flaskbus-gateway: error: cannot listen on 127.0.0.1 port {port}: "
        "another process listens there; stop it, or choose another --port\n"
    )
    assert result.stdout == ""


MISTAKES = [
    (["--host", "203.0.113.1"], 3, "this machine has no such address"),
    (["--host", "no-such-host.invalid"], 3, "cannot listen on no-such-host.invalid"),
    (["--host", "unix:nowhere/sock"], 3, "cannot listen on nowhere/sock: No such file or directory"),
    (["--host", "unix:garbage.pem"], 3, "there is a file of that name, not a socket"),
    (["--certfile", "missing.pem"], 3, "cannot read missing.pem: No such file or directory"),
    (["--certfile", "garbage.pem"], 3, "cannot use garbage.pem for TLS: no valid PEM"),
    (["--certfile", "cert.pem", "--keyfile", "other/key.pem"], 3, "they do not belong together"),
    (["--pid", "running.pid"], 3, "Already running on PID"),
    (["--pid", "nowhere/pid"], 3, "nowhere"),
    (["--access-log", "nowhere/access"], 3, "nowhere"),
    (["--http2"], 2, "--http2 needs TLS: give --certfile"),
    (["--keyfile", "key.pem"], 2, "--keyfile needs --certfile"),
    (["--config", "bad.toml"], 2, "prot"),
    (["--port", "http"], 2, "--port"),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the mistakes below are made."""
    directory = tmp_path_factory.mktemp("mistakes")
    make_certificate(directory)
    (directory / "other").mkdir()
    make_certificate(directory / "other")
    (directory / "garbage.pem").write_text("garbage")
    (directory / "bad.toml").write_text("[gateway]\nprot = 1\n")
    (directory / "running.pid").write_text(str(os.getpid()))
    return directory


@pytest.mark.parametrize(("arguments", "code", "text"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes(directory: Path, arguments: list[str], code: int, text: str) -> None:
    result = command("--port", str(free_port()), *arguments, directory=directory)
    assert result.returncode == code
    assert text in result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("flaskbus-gateway: error: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may bind any port")
def test_port_that_is_not_allowed(tmp_path: Path) -> None:
    result = command("--port", "1", directory=tmp_path)
    assert result.returncode == 3
    assert "ports below 1024 need the right to bind them" in result.stderr
