"""The real gateway between raw bytes, or another ASGI server, and an app."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from wsgiref.validate import validator

import httpx
import pytest

from flaskbus.routing import Mount
from flaskbus.settings import AgentSettings
from flaskbus.testing import running_bus
from flaskbus_agent.inprocess import InProcessAgent
from tests.conftest import Broker, free_port
from tests.integration.probe import Client, until

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment


def shows(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """A few things of the environ, a line each."""
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    lines = [environ["REQUEST_METHOD"], environ["SCRIPT_NAME"], environ["PATH_INFO"], environ["QUERY_STRING"]]
    lines += [environ.get("HTTP_HOST", "-"), str(len(body))]
    text = "\n".join(lines).encode("latin-1")
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(text)))])
    return [text]


app = validator(shows)


@pytest.fixture(scope="module")
def port(broker_server: Broker) -> Iterator[int]:
    with running_bus(broker_server.url) as bus, bus.mount(app, "/"):
        yield int(bus.url.rpartition(":")[2])


@pytest.fixture
def client(port: int) -> Iterator[Client]:
    with Client(socket.create_connection(("127.0.0.1", port), 10)) as client:
        yield client


@pytest.mark.filterwarnings("ignore:Unknown REQUEST_METHOD")
@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"GET /a/b?c=d HTTP/1.1\r\nHost: test\r\n\r\n", "GET||/a/b|c=d|test|0"),
        (b"GET / HTTP/1.0\r\n\r\n", "GET||/||-|0"),
        (b"PROPFIND / HTTP/1.1\r\nHost: test\r\n\r\n", "PROPFIND||/||test|0"),
        (
            b"POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            "POST||/||test|3",
        ),
    ],
    ids=["plain", "HTTP/1.0 without Host", "WebDAV", "chunked"],
)
def test_reaches_the_app(client: Client, data: bytes, lines: str) -> None:
    client.send(data)
    answer = client.answer()
    assert answer.status == 200
    assert answer.body.decode() == lines.replace("|", "\n")


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a/b@c\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: \xff\r\n\r\n",
        b"GET /a#b HTTP/1.1\r\nHost: test\r\n\r\n",
        b"GET /a%00 HTTP/1.1\r\nHost: test\r\n\r\n",
        b"GET ftp://test/ HTTP/1.1\r\nHost: test\r\n\r\n",
        b"GET x:/?://y HTTP/1.1\r\nHost: test\r\n\r\n",
        b"CONNECT test:443 HTTP/1.1\r\nHost: test:443\r\n\r\n",
    ],
)
def test_is_refused(client: Client, data: bytes) -> None:
    """What gunicorn lets through and has no reading that all would agree on."""
    client.send(data)
    answer = client.answer()
    assert answer.status == 400
    assert answer.json()["executed"] == "no"


def test_uvicorn(broker_server: Broker, tmp_path: Path) -> None:
    """The ASGI app is not bound to gunicorn."""
    port = free_port()
    log = tmp_path / "log"
    program = [
        sys.executable,
        "-m",
        "uvicorn",
        "flaskbus_gateway.asgi:app",
        "--no-proxy-headers",
        "--lifespan",
        "on",
    ]
    environ = os.environ | {"FLASKBUS_REDIS_URL": broker_server.url, "FLASKBUS_NAMESPACE": "uvicorn"}
    agent = InProcessAgent(
        AgentSettings(redis=broker_server.url, namespace="uvicorn"),
        {Mount.parse("/app"): app},
        {Mount.parse("/app"): "app"},
    )
    agent.start()
    with log.open("wb") as output:
        process = subprocess.Popen([*program, "--port", str(port)], env=environ, stdout=output, stderr=output)
    try:
        until(lambda: b"Uvicorn running" in log.read_bytes() or process.poll() is not None, "uvicorn listens")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            answer = client.post("/app/x?y", content=b"body" * 100_000)
            assert answer.text.split("\n") == ["POST", "/app", "/x", "y", f"127.0.0.1:{port}", "400000"]
            assert client.get("/elsewhere").json()["executed"] == "no"
    finally:
        process.terminate()
        process.wait(15)
        agent.stop(10.0)
    assert b"Application shutdown complete" in log.read_bytes()


def test_uvicorn_with_a_mistake_in_the_settings(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "uvicorn", "flaskbus_gateway.asgi:app"]
    result = subprocess.run(
        program,
        env=os.environ | {"FLASKBUS_PORT": "http"},
        capture_output=True,
        text=True,
        timeout=30,
        cwd=tmp_path,
    )
    assert result.returncode == 2
    assert result.stderr == "flaskbus gateway: error: FLASKBUS_PORT must be a whole number, not 'http'\n"
