"""WebSockets (RFC 6455) that echo, over plain sockets."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Sequence

from benchmarks.model import Skip, Wrong
from benchmarks.systems.base import HOST

_KEY, _ACCEPT = "dGhlIHNhbXBsZSBub25jZQ==", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
"""RFC 6455, section 1.3."""
_TIMEOUT = 10.0


def upgrade(port: int, path: str) -> socket.socket:
    """A WebSocket. Raises Skip where it is refused, Wrong where the handshake is not that of the RFC."""
    sock = socket.create_connection((HOST, port), _TIMEOUT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(
        f"GET {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nOrigin: http://{HOST}:{port}\r\n"
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: {_KEY}\r\n\r\n".encode()
    )
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        more = sock.recv(1)  # nothing that comes after it
        if not more:
            sock.close()
            raise Wrong("the connection was closed in the handshake")
        head += more
    status = head.split()[1].decode()
    if status != "101":
        sock.close()
        raise Skip(f"the upgrade was answered {status}")
    if f"sec-websocket-accept: {_ACCEPT}\r\n".lower() not in head.decode("latin-1").lower():
        sock.close()
        raise Wrong("the server's Sec-WebSocket-Accept is not that of RFC 6455, section 1.3")
    return sock


def echoes(sockets: Sequence[socket.socket], seconds: float, payload: bytes) -> list[float]:
    """Milliseconds of each round trip of a text message of less than 126 bytes; each socket has one under way.

    What ends after these seconds does not count. Raises Wrong for another echo, or none within 10 s.
    """
    # A mask of zeros leaves the payload as it is.
    frame = bytes([0x81, 0x80 | len(payload)]) + bytes(4) + payload
    expected = bytes([0x81, len(payload)]) + payload
    latencies: list[float] = []
    with selectors.DefaultSelector() as selector:
        for each in sockets:
            selector.register(each, selectors.EVENT_READ, each)
        sent = {sock: _send(sock, frame) for sock in sockets}
        rest = dict.fromkeys(sockets, b"")
        end = time.perf_counter() + seconds
        while sent:
            ready = selector.select(_TIMEOUT)
            if not ready:
                raise Wrong(f"{len(sent)} echoes did not come within {_TIMEOUT:g} s")
            for key, _ in ready:
                sock: socket.socket = key.data
                data = rest[sock] + sock.recv(4096)
                if data == rest[sock] or not expected.startswith(data):
                    raise Wrong("the echo is not what was sent")
                rest[sock] = data
                if data != expected:
                    continue
                now = time.perf_counter()
                began = sent.pop(sock)
                rest[sock] = b""
                if now < end:
                    latencies.append((now - began) * 1000)
                    sent[sock] = _send(sock, frame)
    return latencies


def _send(sock: socket.socket, frame: bytes) -> float:
    sock.sendall(frame)
    return time.perf_counter()
