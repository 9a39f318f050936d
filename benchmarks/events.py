"""Listeners to server-sent events over plain sockets: one thread, and next to nothing for each event."""

from __future__ import annotations

import re
import selectors
import socket
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from benchmarks.model import Wrong
from benchmarks.systems.base import HOST

_EVENT = re.compile(rb"data: (\d+)\n\n")
_RECEIVE = 1 << 16


def _get(port: int, path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\n\r\n".encode()


def _receive(sock: socket.socket) -> bytes:
    """What is there; nothing where the connection has ended, in whichever way."""
    try:
        return sock.recv(_RECEIVE)
    except ConnectionResetError:
        return b""


class Listener:
    """A stream of server-sent events whose data are nanoseconds of CLOCK_MONOTONIC."""

    def __init__(self, port: int, path: str) -> None:
        self.sock = socket.create_connection((HOST, port), 10)
        self.began = time.monotonic_ns()
        self.sock.sendall(_get(port, path))
        self.sock.settimeout(10)
        self.events = 0
        """How many have come."""
        self.status = 0
        self.ended = False
        self._rest = b""

    def read(self) -> list[int]:
        """What the next bytes bring: the data of the events that are complete with them."""
        data = _receive(self.sock)
        if not data:
            self.ended = True
            return []
        self._rest += data
        if not self.status:
            head, found, rest = self._rest.partition(b"\r\n\r\n")
            if not found:
                return []
            self.status, self._rest = int(head.split()[1]), rest
            self.ended = self.status != 200
        seen, end = [], 0
        for match in _EVENT.finditer(self._rest):
            seen.append(int(match[1]))
            end = match.end()
        # What lies between two events is the framing of chunks.
        self._rest = self._rest[end:]
        self.events += len(seen)
        return seen

    def close(self) -> None:
        self.sock.close()


class Caller:
    """Another client, who asks for something else meanwhile: latencies in milliseconds."""

    def __init__(self, port: int, path: str, gap: float) -> None:
        self.sock = socket.create_connection((HOST, port), 10)
        self.gap = gap
        """Seconds between two requests; the next is sent when the last one is answered."""
        self.latencies: list[float] = []
        self.errors = 0
        self.due = time.monotonic()
        self._asked = 0.0
        self._request = _get(port, path)
        self._rest = b""

    def wait(self) -> float:
        """Seconds until it has something to send; infinity while it waits for an answer."""
        return float("inf") if self._asked else max(0.0, self.due - time.monotonic())

    def send(self) -> None:
        self.sock.sendall(self._request)
        self._asked = time.monotonic()

    def read(self) -> None:
        """Raises Wrong where the connection ends."""
        data = _receive(self.sock)
        if not data:
            raise Wrong("a connection that was to be kept was closed")
        self._rest += data
        head, found, body = self._rest.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if found and length and len(body) >= int(length[1]):
            now = time.monotonic()
            self.latencies.append((now - self._asked) * 1000)
            self.errors += head.split()[1] != b"200"
            self._rest, self._asked = b"", 0.0
            self.due = max(self.due + self.gap, now)

    def close(self) -> None:
        self.sock.close()


@dataclass
class Audience:
    """Many listeners, and maybe a caller beside them. Latencies in milliseconds."""

    firsts: list[float] = field(default_factory=list)
    """From the request to the first event, of each that had one."""
    later: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Of the other events: when it was due -> how much later each listener had it."""
    listeners: list[Listener] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def join(self, port: int, path: str, count: int) -> None:
        for _ in range(count):
            listener = Listener(port, path)
            self.listeners.append(listener)
            self._selector.register(listener.sock, selectors.EVENT_READ, listener)
            for key, _ in self._selector.select(0):  # the first events of the first ones
                self._read(key.data)

    def listen(self, seconds: float, *, enough: int = 0, caller: Caller | None = None) -> None:
        """For so long, or until ``enough`` have had their first event."""
        end = time.monotonic() + seconds
        if caller is not None:
            caller.due = time.monotonic()
            self._selector.register(caller.sock, selectors.EVENT_READ, caller)
        while (left := end - time.monotonic()) > 0 and not 0 < enough <= len(self.firsts):
            if caller is not None and caller.wait() <= 0:
                caller.send()
            for key, _ in self._selector.select(min(left, caller.wait() if caller else left)):
                if key.data is caller and caller is not None:
                    caller.read()
                else:
                    self._read(key.data)
        if caller is not None:
            self._selector.unregister(caller.sock)

    def _read(self, listener: Listener) -> None:
        new = not listener.events
        seen = listener.read()
        now = time.monotonic_ns()
        if new and seen:
            self.firsts.append((now - listener.began) / 1e6)
            seen = seen[1:]
        for due in seen:
            self.later[due].append((now - due) / 1e6)
        if listener.ended:
            self._selector.unregister(listener.sock)

    @property
    def open(self) -> int:
        """How many have had an event and are not at their end."""
        return sum(each.events > 0 and not each.ended for each in self.listeners)

    def whole(self) -> Sequence[list[float]]:
        """The events that all who are open have had."""
        return [each for each in self.later.values() if len(each) >= self.open > 0]

    def close(self) -> None:
        for listener in self.listeners:
            with suppress(OSError):
                listener.close()
        self._selector.close()
