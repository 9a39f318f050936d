"""Large bodies over a plain socket, so that the client costs next to nothing."""

from __future__ import annotations

import json
import select
import socket
import time
import zlib

from benchmarks.apps import CHUNK, PATTERN, checksum
from benchmarks.model import Skip, Wrong
from benchmarks.systems.base import HOST

_TIMEOUT = 60.0
"""Seconds without a byte."""
_PART = 4 * CHUNK


def download(port: int, size: int) -> float:
    """GET ``/download/SIZE``; seconds that it took. Raises Wrong where it is short or its checksum is another."""
    with socket.create_connection((HOST, port), _TIMEOUT) as sock:
        start = time.perf_counter()
        sock.sendall(_head(port, f"GET /download/{size}"))
        status, headers, rest = _answer(sock)
        if status != 200 or headers.get("content-length") != str(size):
            raise Wrong(
                f"download: {status}, Content-Length {headers.get('content-length')}, not 200, {size}"
            )
        left, buffer, total = size - len(rest), memoryview(bytearray(1 << 20)), zlib.crc32(rest)
        while left > 0:
            count = sock.recv_into(buffer)
            if not count:
                raise Wrong(f"download: {left} bytes are missing")
            left -= count
            total = zlib.crc32(buffer[:count], total)
        seconds = time.perf_counter() - start
    if left or total != checksum(size):
        raise Wrong("download: the bytes are not the app's")
    return seconds


def upload(port: int, size: int) -> float:
    """POST to ``/upload``; seconds until the app says what it read. Raises Skip at 413, Wrong for others."""
    expected = {"length": size, "checksum": checksum(size)}
    with socket.create_connection((HOST, port), _TIMEOUT) as sock:
        start = time.perf_counter()
        sock.sendall(_head(port, "POST /upload", f"Content-Length: {size}\r\n"))
        pattern, sent = memoryview(PATTERN), 0
        while sent < size:
            # An answer before the end of the body is a refusal.
            if select.select([sock], [], [], 0)[0]:
                break
            place = sent % len(pattern)
            try:
                sent += sock.send(pattern[place : place + min(_PART, size - sent)])
            except TimeoutError:
                raise
            except OSError:
                break
        status, headers, rest = _answer(sock)
        while len(rest) < int(headers.get("content-length", "0")) and (more := sock.recv(CHUNK)):
            rest += more
        seconds = time.perf_counter() - start
    if status == 413:
        raise Skip("answered 413: a body of this size is refused")
    if sent < size or status != 200 or json.loads(rest) != expected:
        raise Wrong(f"upload: {status} {rest[:200]!r} with {size - sent} bytes unsent")
    return seconds


def _head(port: int, first: str, more: str = "") -> bytes:
    return f"{first} HTTP/1.1\r\nHost: {HOST}:{port}\r\nConnection: close\r\n{more}\r\n".encode()


def _answer(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers, and what came of the body with them."""
    data = b""
    while b"\r\n\r\n" not in data:
        try:
            more = sock.recv(CHUNK)
        except ConnectionResetError:
            more = b""
        if not more:
            raise Wrong("the connection was closed without an answer")
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return int(first.split()[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}, rest
