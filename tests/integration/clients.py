"""Clients that other people wrote, and what they got, in a form that can be compared."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

import httpx

HOST = "bus.example"
"""The Host of every compared request, so that what an app makes of it is the same on either server."""

NOT_COMPARED = {"date", "server", "connection", "keep-alive", "transfer-encoding"}
"""Headers of the server and of the connection, not of the app."""

TIMEOUT = 20.0


@dataclass(frozen=True)
class Sent:
    """A request; ``target`` is sent as it is written here."""

    target: str
    method: str = "GET"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    chunked: bool = False


@dataclass(frozen=True)
class Got:
    """A response: status, headers in their order with names in lower case, and the body as it was sent."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def compared(self, masks: Mapping[str, str]) -> Got:
        """Without the server's headers, and each match of the patterns in ``masks`` replaced."""

        def masked(text: str) -> str:
            for pattern, instead in masks.items():
                text = re.sub(pattern, instead, text)
            return text

        kept = [(name, masked(value)) for name, value in self.headers if name not in NOT_COMPARED]
        return replace(self, headers=kept, body=masked(self.body.decode("latin-1")).encode("latin-1"))

    def without(self, *names: str) -> Got:
        return replace(self, headers=[pair for pair in self.headers if pair[0] not in names])

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]


def by_httpx(url: str, sent: Sent) -> Got:
    content = iter([sent.body or b""]) if sent.chunked else sent.body
    parts = urlsplit(url)
    # Without the certificates of the world, which take longer to read than all the rest.
    with httpx.Client(transport=httpx.HTTPTransport(verify=False), timeout=TIMEOUT) as client:
        request = client.build_request(
            sent.method,
            f"{parts.scheme}://{parts.netloc}/",
            headers={"Host": HOST, **sent.headers},
            content=content,
            # httpx would quote the target anew.
            extensions={"target": (parts.path + sent.target).encode("ascii")},
        )
        del request.headers["Connection"]  # hop-by-hop: the app behind the bus does not see it
        response = client.send(request, stream=True)
        try:
            body = b"".join(response.iter_raw())
        finally:
            response.close()
    headers = [(name.decode().lower(), value.decode("latin-1")) for name, value in response.headers.raw]
    return Got(response.status_code, headers, body)


def by_curl(url: str, sent: Sent, *options: str) -> Got:
    headers = {"Host": HOST, **sent.headers}
    if sent.chunked:
        headers["Transfer-Encoding"] = "chunked"
    command = ["curl", "--silent", "--show-error", "--include", "--raw", "--path-as-is", "--globoff"]
    command += ["--max-time", str(TIMEOUT), *options]
    command += ["--head"] if sent.method == "HEAD" else ["--request", sent.method]
    for name, value in headers.items():
        command += ["--header", f"{name}: {value}"]
    if sent.body is not None:
        command += ["--data-binary", "@-"]
        if "Content-Type" not in headers:
            command += ["--header", "Content-Type:"]
    done = subprocess.run([*command, url + sent.target], input=sent.body, capture_output=True, check=True)
    return parse(done.stdout)


def by_bytes(url: str, data: bytes) -> bytes:
    """All that a server answers to these bytes until it closes the connection, or is silent after them."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT) as sock:
        sock.sendall(data)
        received = b""
        while data := sock.recv(65536):
            received += data
    return received


def parse(data: bytes) -> Got:
    """A response with its head, as curl prints it and a server sends it; interim responses are left out."""
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    status = int(lines[0].split()[1])
    if status < 200:
        return parse(body)
    headers = []
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers.append((name.lower(), value.strip()))
    if ("transfer-encoding", "chunked") in headers:
        body = unchunked(body)
    return Got(status, headers, body)


def unchunked(body: bytes) -> bytes:
    whole = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            assert body == b"\r\n"
            return whole
        whole += body[:length]
        assert body[length : length + 2] == b"\r\n"
        body = body[length + 2 :]
